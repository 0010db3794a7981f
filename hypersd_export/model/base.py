"""The base pipeline: `open_base` finds and checks it without loading, `BaseModel` loads one component at a time."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import ModelError
from hypersd_export.model import hub, parts
from hypersd_export.model.families import EXPORTABLE, SECOND_ENCODER, Family, family_of_pipeline, parts_of
from hypersd_export.model.files import check_weights, exists, read_json, sha256_files, user_path
from hypersd_export.model.folder import folder_parts, read_model_index
from hypersd_export.model.override import override_part
from hypersd_export.model.parts import Part
from hypersd_export.model.single_file import checkpoint_parts
from hypersd_export.model.single_file import scheduler_config as single_file_schedule
from hypersd_export.model.tokenizer import CLIP_SIZE, Tokenizer, clip_tokenizer, read_tokenizer, write_tokenizer

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

BUILTIN = "builtin"
ENCODERS = {"tokenizer": "text_encoder", "tokenizer_2": SECOND_ENCODER}
SDXL_TIME_IDS = 6
"""What SDXL's UNet is told: height and width of the original, top and left of the crop, height and width aimed at."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base pipeline that was found and checked, not loaded.

    `parts` are the components that can be loaded (none for a family that cannot be exported); `scheduler_config` is
    the base's own scheduler_config.json; `tokenizer_files` are what the tokenizer comes from, for the digest.
    """

    name: str
    source: Path
    family: Family
    pipeline_class: str
    parts: Mapping[str, Part]
    scheduler_config: Mapping[str, Any]
    license_note: str
    other_files: Mapping[str, Path] = field(default_factory=dict)  # configs beside the parts, by relative name
    tokenizer_folder: Path | None = None  # None: CLIP ViT-L/14's, from the package
    tokenizer_2_folder: Path | None = None  # SDXL's second text encoder has one of its own, which pads with "!"
    zero_empty: bool = False  # the empty prompt's states are zeros (SDXL's force_zeros_for_empty_prompt)

    def require_exportable(self) -> None:
        """ModelError, in one line, for a pipeline whose plan is known but whose graphs cannot be exported yet."""
        if self.family not in EXPORTABLE:
            raise ModelError(
                f"{self.name}: {self.family.label} ({self.pipeline_class}) cannot be exported yet; "
                "pass a Stable Diffusion 1.x, 2.x or SDXL pipeline"
            )
        if not self.parts:
            raise ModelError(
                f"{self.name}: a {self.family.label} single file that does not say whether it predicts epsilon or v; "
                "pass its diffusers folder or hub id"
            )
        wanted, given = self.latent_channels, int(self.unet_config.get("in_channels", 4))
        if given != wanted and given == int(self.unet_config.get("out_channels", 4)):
            raise ModelError(
                f"{self.name}: its UNet draws latents of {given} channels and its VAE has {wanted}; "
                "give a VAE of its kind with --vae"
            )
        if given != wanted:
            raise ModelError(
                f"{self.name}: its UNet takes {given} channels where text-to-image takes {wanted} "
                "(an inpainting or image-conditioned model), which cannot be exported; pass a text-to-image UNet"
            )
        known = {"addition_embed_type": "text_time"} if self.family is Family.sdxl else {}
        for key in ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type"):
            if self.unet_config.get(key) != known.get(key):
                raise ModelError(
                    f"{self.name}: its UNet needs {key}={self.unet_config.get(key)!r}, where a UNet of "
                    f"{self.family.label} that can be exported has {known.get(key)!r}; pass another UNet"
                )
        if self.family is Family.sdxl and (ids := self._time_ids()) != SDXL_TIME_IDS:
            raise ModelError(
                f"{self.name}: its UNet is told {ids:g} numbers of the picture where SDXL's base is told "
                f"{SDXL_TIME_IDS} (a refiner?); pass an SDXL base UNet"
            )

    def _time_ids(self) -> float:
        """How many numbers SDXL's UNet is told of the picture, from the width of what it embeds."""
        config, pooled = self.unet_config, int(self._part(SECOND_ENCODER).config.get("projection_dim", 512))
        embedded = int(config.get("projection_class_embeddings_input_dim") or 0)
        return (embedded - pooled) / int(config.get("addition_time_embed_dim") or 256)

    def load_text_encoder(self, dtype: "torch.dtype") -> "CLIPTextModel":
        """The text encoder in `dtype`, in eval mode, without gradients; loaded anew at each call."""
        return self._load("text_encoder", dtype)

    def load_unet(self, dtype: "torch.dtype") -> "UNet2DConditionModel":
        """The UNet in `dtype`, in eval mode, without gradients; loaded anew at each call."""
        return self._load("unet", dtype)

    def load_vae(self, dtype: "torch.dtype") -> "AutoencoderKL":
        """The VAE in `dtype`, in eval mode, without gradients; loaded anew at each call."""
        return self._load("vae", dtype)

    def load(self, name: str, dtype: "torch.dtype | None") -> "torch.nn.Module":
        """The component of this name, as the others; None leaves its weights in the file's dtypes."""
        module: torch.nn.Module = self._load(name, dtype)
        return module

    def marks(self, name: str) -> dict[str, Any]:
        """What diffusers' model_index.json says of a component, which a bundle keeps in the component's config."""
        return {"force_zeros_for_empty_prompt": self.zero_empty} if name == SECOND_ENCODER else {}

    def skeleton(self, name: str) -> "torch.nn.Module":
        """A component on the meta device (names and shapes without memory), to check a LoRA before any work."""
        return parts.skeleton(self._part(name))

    def _load(self, name: str, dtype: "torch.dtype | None") -> Any:
        return parts.load(self._part(name), dtype)

    def _part(self, name: str) -> Part:
        if name not in self.parts:
            self.require_exportable()
            raise ModelError(f"{self.name}: has no {name}; its parts are {', '.join(self.parts)}")
        return self.parts[name]

    def component_config(self, name: str) -> dict[str, Any]:
        """A copy of a component's config.json, or of the config inferred for a single file."""
        return copy.deepcopy(dict(self._part(name).config))

    @property
    def unet_config(self) -> Mapping[str, Any]:
        """The UNet's config; fields that the file leaves out have diffusers' defaults."""
        return self._part("unet").config

    @property
    def vae_config(self) -> Mapping[str, Any]:
        """The VAE's config; fields that the file leaves out have diffusers' defaults."""
        return self._part("vae").config

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.vae_config.get("latent_channels", 4))

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side: 2 to the number of the VAE's downsamplers."""
        return int(2 ** (len(self.vae_config.get("block_out_channels", (64,))) - 1))

    @property
    def scaling_factor(self) -> float:
        """What the VAE's latents are multiplied by before the UNet sees them."""
        return float(self.vae_config.get("scaling_factor", 0.18215))

    @property
    def native_size(self) -> int:
        """Side of the pictures that the UNet was trained on, in pixels."""
        sample = self.unet_config.get("sample_size") or 64
        return int(sample if isinstance(sample, int) else sample[0]) * self.vae_scale_factor

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; its length is at most the text encoder's number of positions."""
        positions = int(self._part("text_encoder").config.get("max_position_embeddings", 77))
        if self.tokenizer_folder is None:
            pad = {"pad": "!"} if self.family is Family.sd21 else {}
            return clip_tokenizer(positions, **pad)
        return read_tokenizer(self.tokenizer_folder, positions)

    @cached_property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """The tokenizer of each text encoder, by its folder's name."""
        found, folder = {"tokenizer": self.tokenizer}, self.tokenizer_2_folder
        if SECOND_ENCODER in self.parts:
            positions = int(self.parts[SECOND_ENCODER].config.get("max_position_embeddings", 77))
            found["tokenizer_2"] = (
                clip_tokenizer(positions, pad="!") if folder is None else read_tokenizer(folder, positions)
            )
        return found

    def write_tokenizers(self, out: Path) -> None:
        """Write each tokenizer into the folder of its name under `out`."""
        for name, tokenizer in self.tokenizers.items():
            write_tokenizer(tokenizer, out / name)

    def write_tokenizer(self, out: Path) -> None:
        """Write vocab.json, merges.txt, tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
        write_tokenizer(self.tokenizer, out)

    def model_index(self) -> dict[str, Any]:
        """A model_index.json for what is exported of this base: no safety checker, no feature extractor."""
        index: dict[str, Any] = {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "scheduler": ["diffusers", str(self.scheduler_config.get("_class_name", "DDIMScheduler"))],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", self.vae_config.get("_class_name", "AutoencoderKL")],
        }
        if self.family is not Family.sdxl:
            return index | {"requires_safety_checker": False, "safety_checker": [None, None]}
        return index | {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": self.zero_empty,
            SECOND_ENCODER: ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }

    @cached_property
    def digest(self) -> str:
        """Hex sha256 over the weight and config files that are used, by content and relative name.

        Where the folder lies does not matter, nor do files that are not read (other variants, a safety checker).
        """
        files = dict(self.other_files)
        for name, part in self.parts.items():
            if part.config_file is not None:
                files[f"{name}/config.json"] = part.config_file
            for path in part.files:
                where = name if part.layout is parts.Layout.diffusers else "checkpoint"
                files[f"{where}/{path.name}"] = path
        return sha256_files(files.items())


def open_base(
    base: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    allow_pickle: bool = False,
) -> BaseModel:
    """Find a base pipeline and check all of it that can be checked without loading.

    `base` is `builtin`, a diffusers folder, a single .safetensors checkpoint in the original layout or a hub
    id; `unet` and `vae` replace a component by another folder, file or hub id. Raises ModelError in one line.
    """
    text = str(base)
    path = user_path(text)
    if text == BUILTIN:
        model = _open_builtin(allow_pickle=allow_pickle)
    elif exists(path) and path.is_dir():
        model = _open_folder(path, name=_folder_name(path), variant=variant, allow_pickle=allow_pickle)
    elif exists(path) and path.is_file():
        if variant is not None:
            raise ModelError(f"{path}: a single file has no variant {variant!r}; drop --variant")
        model = _open_file(path, allow_pickle=allow_pickle)
    elif hub.looks_like_hub_id(text):
        model = _open_hub(text, revision, variant=variant, allow_pickle=allow_pickle)
    else:
        shown = text if len(text) < 300 else f"{text[:300]}…"
        raise ModelError(f"{shown}: no such file or folder; pass a folder, a .safetensors, a hub id or builtin")
    if revision is not None and (text == BUILTIN or exists(path)):
        raise ModelError(f"{text}: --revision {revision} is for hub ids, and this is local; drop --revision")
    replaced = dict(model.parts)
    for name, override in (("unet", unet), ("vae", vae)):
        if override is not None:
            model.require_exportable()
            replaced[name] = override_part(
                name, str(override), model.parts[name], variant=variant, allow_pickle=allow_pickle
            )
    return replace(model, parts=replaced)


def _open_builtin(*, allow_pickle: bool) -> BaseModel:
    from hypersd_export import builtin

    folder = builtin.model_dir()
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"builtin: the built-in model is not in this installation ({folder}); install hypersd again")
    model = _open_folder(folder, name=BUILTIN, variant=None, allow_pickle=allow_pickle)
    return replace(model, license_note=str(builtin.card().get("license", model.license_note)))


def _folder_name(path: Path) -> str:
    """The hub id for a folder of the hub's cache (models--owner--name/snapshots/…), else the folder's name."""
    resolved = path.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        return resolved.parent.parent.name.removeprefix("models--").replace("--", "/")
    return resolved.name


def _open_folder(folder: Path, *, name: str, variant: str | None, allow_pickle: bool) -> BaseModel:
    index = read_model_index(folder)
    class_name = str(index["_class_name"])
    unet_config = folder / "unet" / "config.json"
    family = family_of_pipeline(class_name, read_json(unet_config) if unet_config.is_file() else None)
    others = {"model_index.json": folder / "model_index.json"}
    xl = family is Family.sdxl
    configs = ("scheduler", "tokenizer", *(("tokenizer_2",) if xl else ()))
    others |= {f"{p.parent.name}/{p.name}": p for s in configs for p in _files(folder / s)}
    model = BaseModel(
        name=name, source=folder, family=family, pipeline_class=class_name, parts={}, scheduler_config={},
        license_note=_license(folder), other_files=others, tokenizer_folder=folder / "tokenizer",
        tokenizer_2_folder=folder / "tokenizer_2" if xl else None,
        zero_empty=xl and bool(index.get("force_zeros_for_empty_prompt", True)),
    )  # fmt: skip
    if family not in EXPORTABLE:
        return model
    found = folder_parts(folder, index, parts_of(family), variant=variant, allow_pickle=allow_pickle)
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    return _with_tokenizer(replace(model, parts=found, scheduler_config=schedule))


def _open_file(path: Path, *, allow_pickle: bool) -> BaseModel:
    check_weights(path, allow_pickle=allow_pickle)
    family, found = checkpoint_parts(path)
    folder, second = (_beside(path, name) for name in ("tokenizer", "tokenizer_2"))
    model = BaseModel(
        name=path.stem, source=path, family=family, pipeline_class="single file", parts=found,
        scheduler_config=single_file_schedule(path) if found else {}, license_note=_license(path.parent),
        other_files={f"{each.name}/{p.name}": p for each in (folder, second) if each for p in _files(each)},
        tokenizer_folder=folder, tokenizer_2_folder=second, zero_empty=family is Family.sdxl,
    )  # fmt: skip
    if not found:
        return model
    if folder is None and (size := int(found["text_encoder"].config["vocab_size"])) != CLIP_SIZE:
        raise ModelError(
            f"{path}: its text encoder has {size} tokens where CLIP's tokenizer has {CLIP_SIZE}; "
            f"put its own tokenizer into {path.parent / 'tokenizer'}"
        )
    return _with_tokenizer(model)


def _beside(path: Path, name: str) -> Path | None:
    """A tokenizer's folder beside a single file, if there is one."""
    folder = path.parent / name
    return folder if any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")) else None


def _with_tokenizer(model: BaseModel) -> BaseModel:
    """The model, once its tokenizer is readable and fits the text encoder."""
    for name, tokenizer in model.tokenizers.items():
        encoder, folder = ENCODERS[name], getattr(model, f"{name}_folder")
        size = int(model.component_config(encoder).get("vocab_size", CLIP_SIZE))
        highest = max(tokenizer.vocabulary.values(), default=-1)
        if highest >= size:
            raise ModelError(
                f"{folder}: its ids go up to {highest} where the text encoder has {size} tokens; "
                "tokenizer and text encoder are of different models"
            )
    return model


def _open_hub(hub_id: str, revision: str | None, *, variant: str | None, allow_pickle: bool) -> BaseModel:
    folder = hub.fetch_configs(hub_id, revision)
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{hub_id}: has no model_index.json, so it is not a diffusers pipeline; pass another id or a file"
        )
    unet_config = folder / "unet" / "config.json"
    class_name = str(read_model_index(folder)["_class_name"])
    family = family_of_pipeline(class_name, read_json(unet_config) if unet_config.is_file() else None)
    if family in EXPORTABLE:
        for name in parts_of(family):
            folder = hub.fetch_component(hub_id, revision, name, variant=variant, allow_pickle=allow_pickle)
    return _open_folder(folder, name=hub_id, variant=variant, allow_pickle=allow_pickle)


def _files(folder: Path | None) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file()) if folder is not None and folder.is_dir() else []


def _license(folder: Path) -> str:
    """The licence that the model card's front matter states, or what is known instead."""
    card = folder / "README.md"
    if card.is_file():
        lines = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0].splitlines()
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "license" and value.strip():
                return value.strip().strip("'\"")
    return "see its LICENSE file" if any(folder.glob("LICENSE*")) else "not stated by the base"

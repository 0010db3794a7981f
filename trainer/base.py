"""The base model of a distillation: its name and digest, its noise schedule, its networks and its conditioning.

`hypersd_export.model` finds, checks and loads the networks; here is what training adds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from hypersd_export.diffusion import BetaSchedule, NoiseSchedule, PredictionType, Solver
from hypersd_export.diffusion.scheduler_config import CLASS_DEFAULTS, SOLVER_CLASSES
from hypersd_export.errors import ModelError, OptionError, PlanError
from hypersd_export.model.base import BaseModel, open_base
from hypersd_export.model.families import Family
from hypersd_export.model.files import sha256_files
from trainer.batch import Conditioning, cat

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

DISTILLABLE = (Family.sd15, Family.sd21, Family.sdxl)
CAPTIONS_AT_ONCE = 64


class PromptEncoder:
    """Captions to conditioning, as StableDiffusionPipeline and StableDiffusionXLPipeline do (clip_skip None).

    SD 1.x and 2.x: the text encoder's last hidden state. SDXL: hidden_states[-2] of both encoders side by side, the
    pooled embedding of the second, and time ids. Results are on the encoders' device, in their dtype.
    """

    def __init__(self, encoders: Sequence[tuple[Any, Any]], *, native_size: int, zero_empty: bool) -> None:
        self._encoders, self._native_size, self._zero_empty = tuple(encoders), native_size, zero_empty

    def to(self, device: torch.device | str) -> "PromptEncoder":
        """Move the encoders, and return this."""
        for _, encoder in self._encoders:
            encoder.to(device)
        return self

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], *, size: tuple[int, int]) -> Conditioning:
        """One row per caption; `size` is (height, width) in pixels, which SDXL is told (time ids h, w, 0, 0, h, w).

        An empty caption is encoded as text, as diffusers does with a prompt of "" that is passed explicitly. What is
        longer than the tokenizer's length is cut off.
        """
        texts = list(captions)
        parts = [texts[i : i + CAPTIONS_AT_ONCE] for i in range(0, len(texts), CAPTIONS_AT_ONCE)] or [[]]
        return cat([self._encode(part, size) for part in parts])

    def empty(self, *, size: tuple[int, int] | None = None) -> Conditioning:
        """The empty prompt: one row; zeros if an SDXL base says `force_zeros_for_empty_prompt`.

        `size` as above, the base's native size if it is not given.
        """
        row = self([""], size=size or (self._native_size, self._native_size))
        if not self._zero_empty or row.pooled is None:
            return row
        return replace(row, states=torch.zeros_like(row.states), pooled=torch.zeros_like(row.pooled))

    def _encode(self, captions: list[str], size: tuple[int, int]) -> Conditioning:
        if len(self._encoders) == 1:
            return Conditioning(states=_run(*self._encoders[0], captions)[0])
        outputs = [_run(*pair, captions, hidden=True) for pair in self._encoders]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=states.dtype, device=states.device)
        return Conditioning(states=states, pooled=outputs[1].text_embeds, time_ids=ids.repeat(len(captions), 1))


def _run(tokenizer: Any, encoder: Any, captions: list[str], *, hidden: bool = False) -> Any:
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    # only SD 1.x's and 2.x's pipeline asks for the mask, and only if the config says so
    masked = not hidden and getattr(encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(encoder.device) if masked else None
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask, output_hidden_states=hidden)


@dataclass(frozen=True, kw_only=True)
class TrainingBase:
    """A base model that was found and checked, not loaded. Every `load_*` loads anew, in eval mode, without gradients.

    `model` is what `hypersd-export` sees. alphas_cumprod: float64 [T].
    """

    model: BaseModel
    alphas_cumprod: torch.Tensor
    prediction_type: PredictionType

    @property
    def name(self) -> str:
        """`builtin`, the hub id, or the folder's or file's name."""
        return self.model.name

    @property
    def family(self) -> Family:
        """sd15 (the built-in model too), sd21 or sdxl."""
        return self.model.family

    @property
    def digest(self) -> str:
        """Hex sha256, the one by which `hypersd-export` recognises the base that a LoRA was trained on."""
        return self.model.digest

    @property
    def native_size(self) -> int:
        """Side in pixels of the pictures that the UNet was trained on."""
        return self.model.native_size

    @property
    def zero_empty(self) -> bool:
        """Whether the empty prompt is zeros (SDXL's `force_zeros_for_empty_prompt`, diffusers' default True)."""
        return self.model.zero_empty

    @cached_property
    def encoders_digest(self) -> str:
        """Hex sha256 over what latents and text embeddings depend on: VAE, text encoders and tokenizers.

        A cache with this key serves every UNet that is fine-tuned on the same VAE and text encoders.
        """
        if self.model.source.is_file():
            files = {"checkpoint": self.model.source}
        else:
            names = [name for name in self.model.parts if name != "unet"]
            files = {f"{name}/{p.name}": p for name in names for p in self._part_files(name)}
        for place in filter(None, self._tokenizer_folders().values()):
            files |= {f"{place.name}/{p.name}": p for p in sorted(place.iterdir()) if p.is_file()}
        return sha256_files(files.items())

    def latent_shape(self, size_px: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square picture; OptionError if the VAE cannot make whole latents of it."""
        factor = self.model.vae_scale_factor
        if size_px < 1 or size_px % factor:
            raise OptionError(f"data.size_px {size_px}: must be a positive multiple of {factor}, this VAE's factor")
        return self.model.latent_channels, size_px // factor, size_px // factor

    def load_unet(self, dtype: torch.dtype) -> "UNet2DConditionModel":
        """The UNet."""
        return self.model.load_unet(dtype)

    def load_vae(self, dtype: torch.dtype) -> "AutoencoderKL":
        """The VAE, in `dtype` whatever its config says; SDXL's (`force_upcast`) encodes in float32 only."""
        return self.model.load_vae(dtype)

    def prompt_encoder(self, dtype: torch.dtype) -> PromptEncoder:
        """The text encoder(s) with their tokenizers."""
        names = [name for name in self.model.parts if name.startswith("text_encoder")]
        encoders = [self.model.load(name, dtype) for name in names]
        tokenizers = [self._load_tokenizer(*each) for each in self._tokenizer_folders().items()]
        pairs = list(zip(tokenizers, encoders, strict=True))
        return PromptEncoder(pairs, native_size=self.native_size, zero_empty=self.zero_empty)

    def _part_files(self, name: str) -> list[Path]:
        part = self.model.parts[name]
        return [*part.files, *([part.config_file] if part.config_file else [])]

    def _tokenizer_folders(self) -> dict[str, Path | None]:
        """By name; None for the packaged one."""
        return {name: getattr(self.model, f"{name}_folder") for name in self.model.tokenizers}

    def _load_tokenizer(self, name: str, folder: Path | None) -> Any:
        """transformers' CLIPTokenizer, so that special cases (a pad token of "!") are the pipeline's own."""
        from transformers import CLIPTokenizer

        if folder is not None:
            try:
                return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, TypeError) as e:
                raise ModelError(f"{folder}: no tokenizer that can be read ({one_line(e)}); download it again") from e
        with TemporaryDirectory() as place:
            self.model.write_tokenizers(Path(place))
            return CLIPTokenizer.from_pretrained(Path(place, name), local_files_only=True)


def open_training_base(name: str) -> TrainingBase:
    """Find a base: `builtin`, a diffusers folder, a single file (SD 1.x) or a hub id; ModelError if it will not do.

    The schedule is the training one of its scheduler_config.json, whichever sampler that names.
    """
    model = open_base(name)
    if model.family not in DISTILLABLE:
        raise ModelError(
            f"{model.name}: {model.family.label} ({model.pipeline_class}) cannot be distilled; "
            "pass a Stable Diffusion 1.x, 2.x or SDXL pipeline"
        )
    if not model.parts:
        raise ModelError(
            f"{model.name}: a {model.family.label} single file cannot be read here; pass its diffusers folder or hub id"
        )
    _check(model)
    alphas_cumprod, prediction_type = noise_schedule(model.scheduler_config, model.name)
    return TrainingBase(model=model, alphas_cumprod=alphas_cumprod, prediction_type=prediction_type)


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json with the defaults of the class that it names, or DDIMScheduler's, for what it omits."""
    name = str(config.get("_class_name", ""))
    solver = next((solver for solver, known in SOLVER_CLASSES.items() if known == name), Solver.DDIM)
    return {**CLASS_DEFAULTS[solver], **{key: value for key, value in config.items() if value is not None}}


def schedule_of(config: Mapping[str, Any]) -> NoiseSchedule:
    """The training schedule of a scheduler_config.json; ValueError or PlanError for a value that is none."""
    values = _stated(config)
    return NoiseSchedule(
        num_train_timesteps=values["num_train_timesteps"], beta_start=values["beta_start"],
        beta_end=values["beta_end"], beta_schedule=BetaSchedule(values["beta_schedule"]),
        rescale_betas_zero_snr=bool(values["rescale_betas_zero_snr"]),
    )  # fmt: skip


def noise_schedule(config: Mapping[str, Any], name: str) -> tuple[torch.Tensor, PredictionType]:
    """(alphas_cumprod float64 [T], prediction type) that a scheduler_config.json trains with.

    Keys that it leaves out have the defaults of the class that it names, or DDIMScheduler's. ModelError for what is
    not a discrete variance-preserving schedule (flow matching, EDM) and for a table of betas.
    """
    class_name = str(config.get("_class_name", ""))
    if class_name.startswith(("FlowMatch", "EDM")) or config.get("trained_betas") is not None:
        what = "trained_betas" if config.get("trained_betas") is not None else class_name
        raise ModelError(f"{name}: its schedule ({what}) is not a beta schedule of diffusers; pass another base")
    try:
        prediction_type = PredictionType(_stated(config)["prediction_type"])
        schedule = schedule_of(config)
    except (ValueError, PlanError) as e:
        raise ModelError(f"{name}: its scheduler_config.json cannot be used ({one_line(e)}); pass another base") from e
    return torch.tensor(schedule.alphas_cumprod(), dtype=torch.float64), prediction_type


@torch.no_grad()
def encode_pictures(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Latents float32 [B, C, h, w] of pictures [B, 3, H, W] in [-1, 1], as the UNet sees them.

    The mode of the posterior, not a sample: so a cache is a function of its pictures. Ours: other trainers sample once
    and keep that. Autocast is off: SDXL's VAE overflows in float16 (`force_upcast`), and encoding is done once.
    """
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.autocast(vae.device.type, enabled=False):
        mode = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mode()
    latents: torch.Tensor = (mode.float() - shift) * vae.config.scaling_factor
    return latents


def _check(model: BaseModel) -> None:
    """ModelError for a UNet or VAE whose inputs a distillation would have to invent."""
    unet, vae = model.unet_config, model.vae_config
    if (channels := int(unet.get("in_channels", 4))) != model.latent_channels:
        raise ModelError(
            f"{model.name}: its UNet takes {channels} channels where the VAE has {model.latent_channels} "
            "(an inpainting or image-conditioned model); pass a text-to-image base"
        )
    wanted = "text_time" if model.family is Family.sdxl else None
    never = dict.fromkeys(("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type"))
    for key, allowed in {"addition_embed_type": wanted, **never}.items():
        if unet.get(key) != allowed:
            raise ModelError(
                f"{model.name}: its UNet has {key}={unet.get(key)!r}, where a {model.family.label} base has "
                f"{allowed!r}; pass the base that it was made from"
            )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise ModelError(f"{model.name}: its VAE normalises by latents_mean and latents_std; pass another base")


def one_line(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]

"""One component of a pipeline (UNet, VAE, text encoder): where its weights lie, and how they become a module.

The module is built without memory and the tensors of the file are put into it as they are mapped from disk, so a
component costs its size once, or nothing beyond the page cache while its dtype is the file's. Every parameter must
be found with its shape and every tensor must be used: nothing stays at its random start, as it would with a warning in
diffusers' and transformers' `from_pretrained`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import ModelError
from hypersd_export.model.files import is_pickle, read_header, read_tensors
from hypersd_export.model.ldm_names import unet_ldm_names, vae_ldm_names
from hypersd_export.model.open_clip import from_open_clip
from hypersd_export.model.pages import Relief

if TYPE_CHECKING:
    import torch

CLASS_NAMES = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}  # fmt: skip
TINY_VAE = "AutoencoderTiny"
"""TAESD's class, which may stand in the VAE's place: its latents are those of the VAE that it was distilled from."""
# What files carry beside a component's weights: buffers of older releases, the rest of CLIP, the VAE's training loss.
IGNORABLE = re.compile(
    r"(^|\.)(position_ids|logit_scale|(text|visual)_projection\.weight)$|(^|\.)(loss|vision_model)\."
)
OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


class Layout(StrEnum):
    """How the tensors of a file are named."""

    diffusers = "diffusers"
    ldm = "ldm"  # the original layout of single-file checkpoints
    open_clip = "open_clip"  # a text encoder there, of SD 2.x and SDXL


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A component that can be loaded: `config` is its config.json (or the one inferred from the shapes)."""

    name: str
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    config_file: Path | None = None
    layout: Layout = Layout.diffusers
    prefix: str = ""  # of its tensors in an LDM checkpoint

    @property
    def label(self) -> str:
        """Name and place, for error messages."""
        return f"{self.name} of {self.files[0].parent if len(self.files) > 1 else self.files[0]}"


def classes_of(name: str) -> tuple[str, ...]:
    """The classes that a component may be of, the usual one first."""
    return (CLASS_NAMES[name], TINY_VAE) if name == "vae" else (CLASS_NAMES[name],)


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a weight file, from its header alone unless it is a pickle."""
    if is_pickle(path):
        return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    return {name: info.shape for name, info in read_header(path).tensors.items()}


def skeleton(part: Part) -> "torch.nn.Module":
    """The module of a part with its parameters on the meta device: names and shapes, no memory."""
    from accelerate import init_empty_weights

    build = {
        "unet": _build_unet, "vae": _build_vae, "text_encoder": _build_text_encoder, "text_encoder_2": _build_second,
    }[part.name]  # fmt: skip
    try:
        with init_empty_weights(include_buffers=False):
            return build({k: v for k, v in part.config.items() if not k.startswith("_") or k == "_class_name"})
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:160]
        raise ModelError(f"{part.label}: its config cannot be built ({reason}); check its config.json") from e


def _build_unet(config: dict[str, Any]) -> "torch.nn.Module":
    from diffusers import UNet2DConditionModel

    config.pop("_class_name", None)
    return UNet2DConditionModel.from_config(config)


def _build_vae(config: dict[str, Any]) -> "torch.nn.Module":
    from diffusers import AutoencoderKL, AutoencoderTiny

    kind = AutoencoderTiny if config.pop("_class_name", None) == TINY_VAE else AutoencoderKL
    return kind.from_config(config)


def _build_text_encoder(config: dict[str, Any]) -> "torch.nn.Module":
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(config))


def _build_second(config: dict[str, Any]) -> "torch.nn.Module":
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))


def load(part: Part, dtype: "torch.dtype | None") -> "torch.nn.Module":
    """The module with its weights, in `dtype` (None: as the file has them), in eval mode, without gradients.

    Raises ModelError if anything is amiss.
    """
    module = skeleton(part)
    state: dict[str, torch.Tensor] = {}
    for path in part.files:
        state.update(read_tensors(path))
    if part.layout is Layout.open_clip:
        state = from_open_clip(state, part.prefix, part.config)
        part = replace(part, prefix="")
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    sources = match_names(part, module, set(state))
    _check_complete(part, wanted, {name: tuple(state[source].shape) for name, source in sources.items()})
    used = set(sources.values())
    own = [name for name in state if name.startswith(part.prefix) and not IGNORABLE.search(name)]
    surplus = [name for name in own if name not in used]
    if surplus:
        way = (
            "pass the folder with its own config.json" if part.layout is Layout.diffusers else "pass a plain checkpoint"
        )
        raise ModelError(f"{part.label}: {len(surplus)} tensors too many ({_first(surplus)}) for its config; {way}")
    tensors, relief = {}, Relief()
    for name, source in sources.items():
        tensor = state.pop(source).reshape(wanted[name])
        tensors[name] = tensor if dtype is None else _cast(tensor, dtype, relief)
    module.load_state_dict(tensors, assign=True, strict=True)
    return module.eval().requires_grad_(False)


def cast(module: "torch.nn.Module", dtype: "torch.dtype") -> None:
    """Have all weights in `dtype`, one after the other: mapped files leave memory as they are read."""
    relief = Relief()
    for weight in (*module.parameters(), *module.buffers()):
        weight.data = _cast(weight.data, dtype, relief)


def _cast(tensor: "torch.Tensor", dtype: "torch.dtype", relief: Relief) -> "torch.Tensor":
    """The tensor in `dtype`; itself, and not read, where it has that or is not of floating point."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    relief(tensor)
    return tensor.to(dtype)


def match_names(part: Part, module: "torch.nn.Module", present: set[str]) -> dict[str, str]:
    """{parameter of the module: tensor of the file}, as far as there is one."""
    names = list(module.state_dict())
    if part.layout is Layout.ldm:
        candidates = _ldm_candidates(part, module)
    else:
        candidates = {name: _diffusers_candidates(part.name, name) for name in names}
    found = {}
    for name in names:
        source = next((c for c in candidates.get(name, ()) if c in present), None)
        if source is not None:
            found[name] = source
    return found


def _diffusers_candidates(part: str, name: str) -> tuple[str, ...]:
    """The names under which releases of diffusers and transformers have saved this parameter."""
    if part.startswith("text_encoder"):  # transformers 5.6 flattened CLIPTextModel
        bare = name.removeprefix("text_model.")
        return (name, bare, f"text_model.{bare}")
    if part == "vae":
        for new, old in OLD_VAE_ATTENTION.items():
            if f".attentions.0.{new}." in name:  # the deprecated AttentionBlock of diffusers before 0.17
                return (name, name.replace(f".{new}.", f".{old}."))
    return (name,)


def _ldm_candidates(part: Part, module: "torch.nn.Module") -> dict[str, tuple[str, ...]]:
    """The names in an original checkpoint, for each parameter that has one."""
    names = list(module.state_dict())
    result: dict[str, tuple[str, ...]] = {}
    if part.name == "text_encoder":
        bare = [name.removeprefix("text_model.") for name in names]
        for name, inner in zip(names, bare, strict=True):
            result[name] = (f"{part.prefix}text_model.{inner}", f"{part.prefix}{inner}")
        return result
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    if part.name == "unet":
        table = unet_ldm_names(owners, part.config["layers_per_block"])
    else:
        table = vae_ldm_names(owners, len(part.config["block_out_channels"]))
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if owner in table:
            result[name] = (f"{part.prefix}{table[owner]}.{leaf}",)
    return result


def _check_complete(part: Part, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """ModelError unless every parameter is there with its shape (1x1 convolutions and linears are the same)."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ModelError(
            f"{part.label}: {len(missing)} of {len(wanted)} tensors are missing ({_first(missing)}); "
            "not this kind of model, or an incomplete file"
        )
    other = [name for name in wanted if _squeezed(found[name]) != _squeezed(wanted[name])]
    if other:
        name = other[0]
        raise ModelError(
            f"{part.label}: {len(other)} tensors have other shapes than the config says ({name}: "
            f"{list(found[name])} in the file, {list(wanted[name])} in the config); pass weights of this architecture"
        )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[o, i, 1, 1] and [o, i, 1] as [o, i]: the attention of old VAEs is a 1x1 convolution."""
    return shape[:2] if len(shape) > 2 and set(shape[2:]) == {1} else shape


def _first(names: Iterable[str], count: int = 3) -> str:
    """The first few names, for an error message."""
    listed = list(names)
    return ", ".join(listed[:count]) + (", …" if len(listed) > count else "")

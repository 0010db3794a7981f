"""LoRA files: read from every common format, refused by name when they are something else, saved as kohya's.

The rule for a missing alpha is diffusers' and peft's: alpha = rank, so the delta is `up @ down`. In order, alpha is
taken from the file's own `.alpha` tensors; from its metadata `lora_adapter_metadata`, which diffusers'
`save_lora_weights` writes; from an `adapter_config.json` beside an `adapter_model.safetensors`, which peft's
`save_pretrained` writes; else by that rule.
"""

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import LoraError
from hypersd_export.model.families import Family, family_of_lora
from hypersd_export.model.files import (
    check_weights,
    exists,
    is_pickle,
    read_header,
    read_json,
    read_tensors,
    sha256_file,
    user_path,
    write_tensors,
)
from hypersd_export.model.lora_keys import LoraFormat, LoraKey, Role, main_format, other_kind, parse_key

if TYPE_CHECKING:
    import torch

    from hypersd_export.model.base import BaseModel

PLAN_KEY, BASE_KEY = "hypersd.plan", "hypersd.base"
ADAPTER_METADATA = "lora_adapter_metadata"
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
KOHYA_NAMES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


class AlphaSource(StrEnum):
    """Where the alphas of a file come from."""

    tensors = "tensors"
    metadata = "metadata"
    adapter_config = "adapter_config.json"
    rank = "rank"  # none is stated: alpha = rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """The low-rank change of one module: `alpha / rank * up @ down`.

    `down` is [r, in] or [r, in, kh, kw], `up` is [out, r] or [out, r, 1, 1], in the file's dtype; an `alpha` of None
    is the rank. `keys` are the names in the file.
    """

    down: "torch.Tensor"
    up: "torch.Tensor"
    alpha: float | None = None
    keys: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return int(self.down.shape[0])

    @property
    def multiplier(self) -> float:
        """alpha / rank, 1 without an alpha."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """A LoRA that was read and is plain LoRA throughout.

    `components` is {`unet` | `text_encoder` | …: {module path as the file spells it: Delta}}; `digest` is the sha256
    of the file (together with adapter_config.json where that gave the alphas).
    """

    path: Path
    format: LoraFormat
    components: Mapping[str, Mapping[str, Delta]]
    metadata: Mapping[str, str]
    digest: str
    alpha_source: AlphaSource

    @property
    def plan_json(self) -> Any:
        """The plan that the trainer wrote (`hypersd.plan`): an object, a list of objects, or None.

        LoraError if it is damaged.
        """
        text = self.metadata.get(PLAN_KEY)
        if text is None:
            return None
        try:
            plan = json.loads(text)
        except ValueError as e:
            raise LoraError(f"{self.path}: its metadata {PLAN_KEY} is not JSON ({e}); pass --steps yourself") from e
        if not isinstance(plan, dict | list):
            raise LoraError(f"{self.path}: its metadata {PLAN_KEY} is not a plan ({text[:40]}); pass --steps yourself")
        return plan

    @property
    def base_digest(self) -> str | None:
        """The digest of the base that it was trained on (`hypersd.base`), if the file says."""
        return self.metadata.get(BASE_KEY)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({delta.rank for part in self.components.values() for delta in part.values()}))

    @property
    def family(self) -> Family | None:
        """The family that it looks like, by key names and the width of its cross-attention; None if unclear."""
        keys = [key for part in self.components.values() for delta in part.values() for key in delta.keys]
        return family_of_lora(keys, cross_attention_width(self.components.get("unet", {})))


def cross_attention_width(deltas: Mapping[str, Delta]) -> int | None:
    """The input width of a UNet LoRA's `attn2.to_k`, which is that of the text states; None if it has none."""
    for path, delta in deltas.items():
        if path.replace(".", "_").endswith(("attn2_to_k", "attn2_to_v")) and delta.down.ndim >= 2:
            return int(delta.down.shape[1])
    return None


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE[:scale]` as path and scale (1 by default).

    What exists as a file is a file, whatever colons it has; a drive letter (`C:\\x`) is not a scale. LoraError for a
    scale that is zero, not finite or not a number.
    """
    whole = user_path(text)
    head, colon, tail = text.rpartition(":")
    drive = len(head) == 1 and head.isalpha()
    if not text or text.startswith(":"):
        raise LoraError(f"--lora {text!r}: no file; write FILE or FILE:scale")
    if not colon or exists(whole) or (drive and tail.startswith(("\\", "/"))):
        return whole, 1.0
    try:
        scale = float(tail)
    except ValueError:
        if "/" in tail or "\\" in tail or tail.endswith(".safetensors"):
            return whole, 1.0  # the colon is within a folder's or a file's name
        raise LoraError(f"--lora {text}: the scale {tail!r} is not a number; write FILE or FILE:0.8") from None
    return user_path(head), check_scale(scale, f"--lora {text}")


def check_scale(scale: float, what: str) -> float:
    """The scale, if it is finite and not zero; LoraError otherwise."""
    if not math.isfinite(scale):
        raise LoraError(f"{what}: scale {scale} is not finite; use one near 1")
    if scale == 0:
        raise LoraError(f"{what}: scale 0 leaves the model as it is; use --lora none for the base alone")
    return scale


def read_lora(path: str | Path, *, allow_pickle: bool = False) -> LoraFile:
    """Read a LoRA file (or a folder that holds one) in any format of `lora_keys`; LoraError in one line otherwise.

    Refused by name: DoRA, LoHa, LoKr, Tucker cores, norm and full-weight deltas, IA3, OFT, GLoRA, biases; keys that
    belong to no format; halves of a pair; NaN or infinite values. The tensors are mapped from the file.
    """
    file = _lora_file(user_path(path))
    check_weights(file, allow_pickle=allow_pickle, error=LoraError)
    metadata = dict(read_header(file, LoraError).metadata) if not is_pickle(file) else {}
    tensors = read_tensors(file, LoraError)
    kind = other_kind(tensors)
    if kind is not None:
        raise LoraError(f"{file}: {kind[0]}, which cannot be fused here ({first(kind[1])}); use a plain LoRA")
    parsed = {key: parse_key(key) for key in tensors}
    if not any(entry is not None and entry.role is not Role.alpha for entry in parsed.values()):
        raise LoraError(_not_a_lora(file, tensors))
    unknown = [key for key, entry in parsed.items() if entry is None]
    if unknown:
        raise LoraError(f"{file}: {len(unknown)} keys of no known LoRA format ({first(unknown)}); use a plain LoRA")
    known = {key: entry for key, entry in parsed.items() if entry is not None}
    components = _pair(file, known, tensors)
    _check_finite(file, components)
    components, source, extra = _with_alphas(file, components, metadata)
    digest = sha256_file(file)
    if extra is not None:
        digest = hashlib.sha256(f"{digest} {sha256_file(extra)}".encode()).hexdigest()
    return LoraFile(
        path=file, format=main_format(entry.format for entry in known.values() if entry.format is not None),
        components=components, metadata=metadata, digest=digest, alpha_source=source,
    )  # fmt: skip


def _lora_file(path: Path) -> Path:
    """The file itself, or the one LoRA in a folder."""
    if not path.is_dir():
        return path
    found = [path / name for name in LORA_FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        listed = first([p.name for p in found]) or "none"
        raise LoraError(f"{path}: a folder with {len(found)} .safetensors ({listed}); name the LoRA file inside it")
    return found[0]


def _not_a_lora(file: Path, tensors: "Mapping[str, torch.Tensor]") -> str:
    name = file.name
    if any(key.startswith("model.diffusion_model.") for key in tensors):
        return f"{file}: a whole checkpoint, not a LoRA; pass it as --base {name}"
    if any(".resnets." in key and key.startswith("down_blocks.") for key in tensors):
        return f"{file}: a whole UNet, not a LoRA; pass it as --unet {name}"
    return f"{file}: holds no LoRA keys ({first(list(tensors)) or 'it is empty'}); pass a LoRA file"


def _pair(
    file: Path, keys: Mapping[str, LoraKey], tensors: "Mapping[str, torch.Tensor]"
) -> dict[str, dict[str, Delta]]:
    """Bring down, up and alpha of each module together."""
    slots: dict[tuple[str, str], dict[Role, str]] = {}
    for key, entry in keys.items():
        slot = slots.setdefault((entry.component, entry.path), {})
        if entry.role in slot:
            raise LoraError(
                f"{file}: {slot[entry.role]} and {key} are for the same module; save the LoRA in one format"
            )
        slot[entry.role] = key
    halves = [key for slot in slots.values() if not {Role.up, Role.down} <= set(slot) for key in slot.values()]
    if halves:
        raise LoraError(
            f"{file}: {len(halves)} keys without their other half ({first(halves)}); the file is incomplete"
        )
    components: dict[str, dict[str, Delta]] = {}
    for (component, path), slot in slots.items():
        alpha = None
        if Role.alpha in slot:
            value = tensors[slot[Role.alpha]]
            if value.numel() != 1 or not math.isfinite(float(value)):
                raise LoraError(f"{file}: {slot[Role.alpha]} is not one finite number; the file is damaged")
            alpha = float(value)
        delta = Delta(down=tensors[slot[Role.down]], up=tensors[slot[Role.up]], alpha=alpha, keys=tuple(slot.values()))
        components.setdefault(component, {})[path] = delta
    return components


def _check_finite(file: Path, components: Mapping[str, Mapping[str, Delta]]) -> None:
    bad = [
        key
        for part in components.values()
        for delta in part.values()
        if not (_is_finite(delta.up) and _is_finite(delta.down))
        for key in delta.keys[:1]
    ]
    if bad:
        raise LoraError(f"{file}: NaN or infinite values in {len(bad)} modules ({first(bad)}); the file is damaged")


def _is_finite(tensor: "torch.Tensor") -> bool:
    """Whether no value is NaN or infinite: one pass, because a sum of such values is never finite."""
    import torch

    return math.isfinite(float(tensor.sum(dtype=torch.float64)))


def _with_alphas(
    file: Path, components: dict[str, dict[str, Delta]], metadata: Mapping[str, str]
) -> tuple[dict[str, dict[str, Delta]], AlphaSource, Path | None]:
    """The deltas with the alphas that the file or its neighbour states, where those came from, and the neighbour."""
    if any(delta.alpha is not None for part in components.values() for delta in part.values()):
        return components, AlphaSource.tensors, None
    beside = file.with_name("adapter_config.json")
    if metadata.get(ADAPTER_METADATA):
        try:
            stated = json.loads(metadata[ADAPTER_METADATA])
            configs = {name: _component_config(stated, name) for name in components}
        except (ValueError, AttributeError) as e:
            raise LoraError(f"{file}: its metadata {ADAPTER_METADATA} is not readable ({e}); save it again") from e
        source, extra = AlphaSource.metadata, None
    elif file.name == "adapter_model.safetensors" and beside.is_file():
        configs = dict.fromkeys(components, read_json(beside, LoraError))
        source, extra = AlphaSource.adapter_config, beside
    else:
        return components, AlphaSource.rank, None
    if not any(config.get("lora_alpha") is not None for config in configs.values()):
        return components, AlphaSource.rank, None
    result = {}
    for name, part in components.items():
        if configs[name].get("use_dora"):
            raise LoraError(f"{file}: DoRA, which cannot be fused here (use_dora in its config); use a plain LoRA")
        result[name] = {p: replace(d, alpha=_peft_alpha(p, d.rank, configs[name], file)) for p, d in part.items()}
    return result, source, extra


def _component_config(stated: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The peft config of one component in diffusers' flat metadata (`unet.lora_alpha`, …)."""
    start = f"{component}."
    return {key.removeprefix(start): value for key, value in stated.items() if key.startswith(start)}


def _peft_alpha(path: str, rank: int, config: Mapping[str, Any], file: Path) -> float | None:
    """The alpha that peft's LoraConfig gives a module: `alpha_pattern` by its regular expressions, else `lora_alpha`.

    With `use_rslora` peft scales by alpha / sqrt(rank); the alpha returned gives that with alpha / rank.
    """
    value = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    try:
        for pattern, alpha in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                value = alpha
                break
        if value is None:
            return None
        return float(value) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    except (re.error, TypeError, ValueError, AttributeError) as e:
        raise LoraError(f"{file}: its peft config is not readable ({e}); save it again") from e


def base_warning(lora: LoraFile, base: "BaseModel") -> str | None:
    """One line if the LoRA says that it was trained on another base; that is allowed, so never an error."""
    if lora.base_digest is None or lora.base_digest == base.digest:
        return None
    return (
        f"{lora.path.name} was trained on another base ({lora.base_digest[:12]}) than {base.name} "
        f"({base.digest[:12]}); it is fused if the architecture is the same, so judge the pictures"
    )


def check_components(lora: LoraFile, available: Mapping[str, Any] | set[str] | frozenset[str]) -> None:
    """LoraError if the LoRA has a part for a component that the base does not have."""
    for name, part in lora.components.items():
        if name not in available:
            family = lora.family
            kind = f"; it looks like a LoRA for {family.label}" if family else ""
            keys = first([key for delta in part.values() for key in delta.keys[:1]])
            raise LoraError(
                f"{lora.path}: {len(part)} modules for a {name}, which this base does not have ({keys}){kind}; "
                "use a LoRA for this base"
            )


def save_kohya(
    path: Path,
    components: Mapping[str, Mapping[str, Delta]],
    metadata: Mapping[str, str],
    *,
    dtype: "torch.dtype | None" = None,
) -> None:
    """Write a LoRA in kohya's format: `lora_unet_….lora_down.weight`, `.lora_up.weight`, `.alpha` (float32 scalar).

    `components` is {`unet` | `text_encoder`: {dotted module path: Delta}}; `dtype` is float32 by default, or float16.
    Text encoder paths get the `text_model` level that other tools expect. Written beside and renamed into place.
    """
    import torch

    dtype = torch.float32 if dtype is None else dtype
    tensors: dict[str, torch.Tensor] = {}
    ranks: set[int] = set()
    for component, deltas in components.items():
        if component not in KOHYA_NAMES:
            raise LoraError(f"{component}: no component of a kohya file; use one of {', '.join(KOHYA_NAMES)}")
        prefix = (
            "lora_te1" if component == "text_encoder" and "text_encoder_2" in components else KOHYA_NAMES[component]
        )
        for module, delta in deltas.items():
            level = "text_model." if component != "unet" and not module.startswith("text_") else ""
            name = f"{prefix}_{f'{level}{module}'.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = delta.down.detach().to("cpu", dtype, copy=True).contiguous()
            tensors[f"{name}.lora_up.weight"] = delta.up.detach().to("cpu", dtype, copy=True).contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(delta.rank if delta.alpha is None else delta.alpha))
            ranks.add(delta.rank)
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if bad or not tensors:
        raise LoraError(f"{path}: {f'NaN or infinite in {first(bad)}' if bad else 'no modules'}; nothing is written")
    full = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks)), **metadata}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
        staged = Path(beside) / path.name
        write_tensors(staged, tensors, full)
        staged.replace(path)


def first(names: list[str], count: int = 3) -> str:
    """The first few names, for an error message."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")

"""LoRA key names: from every common format to (component, module path, role), by text alone.

| format | a key |
|---|---|
| peft | `unet.down_blocks.0…to_q.lora_A.weight`, `base_model.model.unet.…`, `….lora_A.default.weight` |
| diffusers | `unet.down_blocks.0…to_q.lora.down.weight`, `text_encoder.….q_proj.lora_linear_layer.down.weight` |
| diffusers_old | `unet.….attn1.processor.to_q_lora.down.weight`, `text_encoder.….self_attn.to_q_lora.down.weight` |
| kohya | `lora_unet_down_blocks_0_….lora_down.weight`, `.alpha`; `lora_te_…`, `lora_te1_…`, `lora_te2_…` |
| sgm | kohya's prefix or `diffusion_model.`, with the original names: `lora_unet_input_blocks_4_1_…` |

The path keeps its dots where the file has them; kohya's underscores cannot be undone without the model, so `fuse`
resolves both spellings against the module names that the loaded model really has.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class LoraFormat(StrEnum):
    """How the keys of a LoRA file are written."""

    peft = "peft"
    diffusers = "diffusers"
    diffusers_old = "diffusers_old"
    kohya = "kohya"
    sgm = "sgm"


class Role(StrEnum):
    """What a tensor of a LoRA is: `down` is peft's A [r, in, …], `up` is peft's B [out, r, …]."""

    down = "down"
    up = "up"
    alpha = "alpha"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraKey:
    """One key, understood. `path` is dotted, or underscored for kohya's; `format` is None for an alpha."""

    component: str
    path: str
    role: Role
    format: LoraFormat | None


# Kinds that are not plain LoRA, by the ends of their keys, with the name that people know them by.
OTHER_KINDS = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "DoRA"),
    (re.compile(r"\.hada_(w|t)\d"), "LoHa"),
    (re.compile(r"\.lokr_(w|t)\d"), "LoKr"),
    (re.compile(r"\.lora_mid\."), "a LoRA with a Tucker (CP) core, lora_mid"),
    (
        re.compile(r"\.diff(_b)?$|\.set_weight$|(^|[._])(w|b)_norm$"),
        "norm or full-weight deltas",
    ),
    (re.compile(r"\.on_input$|\.ia3_l"), "IA3"),
    (re.compile(r"\.b?oft_(blocks|diag|r|R)\b"), "OFT"),
    (re.compile(r"\.(a|b)[12]\.weight$"), "GLoRA"),
    (re.compile(r"\.lora_(A|B|up|down)(\.\w+)?\.bias$"), "a LoRA with biases"),
    (re.compile(r"\.lora_embedding_(A|B)"), "a LoRA on an embedding"),
    (re.compile(r"^bundle_emb\.|^emb_params$|string_to_param"), "an embedded textual inversion"),
    (re.compile(r"^lora_controlnet$"), "a Control-LoRA"),
)
KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
}
DOTTED_PREFIXES = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer")
ENDINGS = (
    (re.compile(r"\.lora_(A|B)(?:\.[\w-]+)?\.weight$"), LoraFormat.peft),
    (re.compile(r"\.lora_(down|up)\.weight$"), LoraFormat.kohya),
    (re.compile(r"\.lora(?:_linear_layer)?\.(down|up)\.weight$"), LoraFormat.diffusers),
    (
        re.compile(r"(?<=\.to_[qkv])_lora\.(down|up)\.weight$|(?<=\.to_out)_lora\.(down|up)\.weight$"),
        LoraFormat.diffusers_old,
    ),
)
SGM_PATH = re.compile(r"(input_blocks|middle_block|output_blocks|label_emb)[._]\d|(time_embed|out)[._]\d")
TEXT_PATH = re.compile(r"(text_model\.|encoder\.layers\.|text_projection)")
OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def other_kind(keys: Iterable[str]) -> tuple[str, list[str]] | None:
    """The name of the first kind among `keys` that is not plain LoRA, and its keys; None if there is none."""
    listed = list(keys)
    for pattern, name in OTHER_KINDS:
        found = [key for key in listed if pattern.search(key)]
        if found:
            return name, found
    return None


def parse_key(key: str) -> LoraKey | None:
    """A key as component, path and role; None if it belongs to no format."""
    if key.endswith(".alpha"):
        stem, role, kind = re.sub(r"([._]lora(_linear_layer)?)?\.alpha$", "", key), Role.alpha, None
    else:
        found = _ending(key)
        if found is None:
            return None
        stem, role, kind = found
    for prefix, component in KOHYA_PREFIXES.items():
        if stem.startswith(prefix) and "." not in stem:
            path = stem.removeprefix(prefix)
            if kind is not None and SGM_PATH.match(path):
                kind = LoraFormat.sgm
            return LoraKey(component=component, path=path, role=role, format=kind)
    component, path = _dotted(stem)
    path = path.replace(".processor.", ".")
    if kind is LoraFormat.diffusers_old or role is Role.alpha:
        path = _old_names(path, component)
    if kind is not None and component == "unet" and SGM_PATH.match(path):
        kind = LoraFormat.sgm
    return LoraKey(component=component, path=path, role=role, format=kind)


def _ending(key: str) -> tuple[str, Role, LoraFormat] | None:
    for pattern, kind in ENDINGS:
        match = pattern.search(key)
        if match:
            role = Role.down if next(g for g in match.groups() if g) in {"A", "down"} else Role.up
            return key[: match.start()], role, kind
    return None


def _dotted(stem: str) -> tuple[str, str]:
    """Component and path of a dotted name; without a component's prefix, the path itself tells which it is."""
    stem = stem.removeprefix("base_model.model.")
    head, _, rest = stem.partition(".")
    if head in DOTTED_PREFIXES and rest:
        return head, rest
    for prefix in ("model.diffusion_model.", "diffusion_model."):
        if stem.startswith(prefix):
            return "unet", stem.removeprefix(prefix)
    return ("text_encoder" if TEXT_PATH.match(stem) else "unet"), stem


def _old_names(path: str, component: str) -> str:
    """Attention names of diffusers before 0.17: `to_out` is the UNet's `to_out.0`, and CLIP has the UNet's names."""
    head, _, last = path.rpartition(".")
    last = last.removesuffix("_lora")
    if component.startswith("text_encoder"):
        return f"{head}.{OLD_TEXT_NAMES.get(last, last)}"
    return f"{head}.to_out.0" if last == "to_out" else f"{head}.{last}" if head else last


def main_format(formats: Iterable[LoraFormat]) -> LoraFormat:
    """The format of a file from those of its keys: sgm if any key is, else the most frequent."""
    counted = list(formats)
    if LoraFormat.sgm in counted:
        return LoraFormat.sgm
    return max(set(counted), key=lambda kind: (counted.count(kind), kind.value))

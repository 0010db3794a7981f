"""Which family a pipeline or a LoRA belongs to, read from class names, key names and shapes alone."""

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any


class Family(StrEnum):
    """Families that are told apart; the values are those of the presets."""

    sd15 = "sd15"  # Stable Diffusion 1.x, and everything with its pipeline class (the built-in model too)
    sd21 = "sd21"  # Stable Diffusion 2.x: the same classes, a text encoder of width 1024
    sdxl = "sdxl"
    sd3 = "sd3"
    flux = "flux"
    other = "other"

    @property
    def label(self) -> str:
        """The name that people use."""
        return LABELS[self]


LABELS = {
    Family.sd15: "Stable Diffusion 1.x",
    Family.sd21: "Stable Diffusion 2.x",
    Family.sdxl: "SDXL",
    Family.sd3: "Stable Diffusion 3",
    Family.flux: "FLUX",
    Family.other: "another family",
}
EXPORTABLE = frozenset({Family.sd15, Family.sd21, Family.sdxl})
SECOND_ENCODER = "text_encoder_2"
PARTS = ("unet", "vae", "text_encoder")
"""The components with weights of every pipeline here; SDXL's have a second text encoder beside them."""
# The width of the text states, which the cross-attention's to_k and to_v read: openai/clip-vit-large-patch14,
# OpenCLIP ViT-H, and both SDXL encoders side by side.
CROSS_ATTENTION = {768: Family.sd15, 1024: Family.sd21, 2048: Family.sdxl}


# Key names that only one family has, in the order of asking (FLUX also has SD3's `transformer.transformer_blocks`).
LORA_MARKS = (
    (Family.flux, re.compile(r"double_blocks|single_transformer_blocks|single_blocks")),
    (
        Family.sd3,
        re.compile(r"joint_blocks|^(lora_te3_|text_encoder_3\.|transformer\.transformer_blocks|lora_transformer_)"),
    ),
    (Family.sdxl, re.compile(r"^lora_te2_|^text_encoder_2\.|add_embedding|label_emb")),
)


def parts_of(family: Family) -> tuple[str, ...]:
    """The components with weights of a pipeline of this family."""
    return (*PARTS, SECOND_ENCODER) if family is Family.sdxl else PARTS


def family_of_pipeline(class_name: str, unet_config: Mapping[str, Any] | None) -> Family:
    """The family of a diffusers pipeline, from model_index.json's `_class_name` and the UNet's config."""
    if class_name.startswith("StableDiffusionXL"):
        return Family.sdxl
    if class_name.startswith("StableDiffusion3"):
        return Family.sd3
    if class_name.startswith("Flux"):
        return Family.flux
    if class_name in {"StableDiffusionPipeline", "LatentConsistencyModelPipeline"}:
        width = (unet_config or {}).get("cross_attention_dim")
        return Family.sd21 if width == 1024 else Family.sd15
    return Family.other


def family_of_checkpoint(names: Iterable[str]) -> Family:
    """The family of a single-file checkpoint in its original layout, from its tensor names."""
    found = set(names)
    if any(name.startswith("conditioner.embedders.") for name in found):
        return Family.sdxl
    if any("joint_blocks.0." in name for name in found):
        return Family.sd3
    if any("double_blocks.0." in name for name in found):
        return Family.flux
    if any(name.startswith("cond_stage_model.model.") for name in found):
        return Family.sd21
    if "model.diffusion_model.input_blocks.0.0.weight" in found:
        if any(name.startswith("model.diffusion_model.label_emb.") for name in found):
            return Family.sdxl
        return Family.sd15
    return Family.other


def family_of_lora(keys: Iterable[str], cross_attention: int | None) -> Family | None:
    """The family that a LoRA looks like, from its keys and the input width of its `attn2.to_k`; None if unclear."""
    listed = list(keys)
    for family, pattern in LORA_MARKS:
        if any(pattern.search(key) for key in listed):
            return family
    return CROSS_ATTENTION.get(cross_attention) if cross_attention is not None else None

"""The embedded model: a small text-to-image model in the exact diffusers format, shipped as package data."""

import json
from pathlib import Path
from typing import Any


def model_dir() -> Path:
    """Folder of the embedded StableDiffusionPipeline (model_index.json, unet/, vae/, text_encoder/, tokenizer/)."""
    return Path(__file__).parent / "model"


def card() -> dict[str, Any]:
    """What the model is and how it is sampled by default: name, steps, guidance, licence, LoRA files by steps."""
    result: dict[str, Any] = json.loads((Path(__file__).parent / "card.json").read_text(encoding="utf-8"))
    return result

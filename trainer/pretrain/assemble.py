"""From the trained parts to one StableDiffusionPipeline folder in fp16: what ships as the built-in model."""

import json
from pathlib import Path
from typing import Any

import torch


def text_encoder(clip_folder: Path) -> Any:
    """The text tower of the trained CLIP as a CLIPTextModel, in eval mode."""
    from transformers import CLIPModel, CLIPTextModel

    whole = CLIPModel.from_pretrained(clip_folder)
    model = CLIPTextModel(whole.config.text_config)
    weights = {k.removeprefix("text_model."): v for k, v in whole.state_dict().items() if k.startswith("text_model.")}
    model.load_state_dict(_as_named_in(model, weights))
    return model.requires_grad_(False).eval()


def _as_named_in(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIPTextModel nests its layers under `text_model.` before transformers 5.6, and not since."""
    nested = any(k.startswith("text_model.") for k in model.state_dict())
    return {("text_model." + k if nested else k): v for k, v in weights.items()}


def assemble(out: Path) -> Path:
    """Write `out`/model, a StableDiffusionPipeline whose scheduler is DDIM trailing with every option explicit."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon", thresholding=False,
        timestep_spacing="trailing", rescale_betas_zero_snr=False,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae"),
        text_encoder=text_encoder(out / "clip"),
        tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(out / "unet"),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(out / "model", safe_serialization=True)
    for path in (out / "model").glob("*/config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # where it was trained is nobody's business
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return out / "model"

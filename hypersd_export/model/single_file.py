"""Single-file checkpoints in the original layout of Stable Diffusion 1.x, 2.x and SDXL: configs from the shapes.

diffusers' `from_single_file` fetches the configs of a known repository; here they follow from the tensors alone, so
no network is needed and any width and depth works. What shapes cannot tell is as published: 32 groups, GELU and SiLU;
1.x: 8 attention heads, a latent scale of 0.18215 (CompVis/stable-diffusion `v1-inference.yaml`); 2.x and SDXL: heads of
64 channels; SDXL: a latent scale of 0.13025 (Stability-AI/generative-models `sd_xl_base.yaml`).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypersd_export.errors import ModelError
from hypersd_export.model.families import Family, family_of_checkpoint
from hypersd_export.model.files import is_pickle, read_header
from hypersd_export.model.open_clip import BLOCKS, SD2_PREFIX, SDXL_PREFIX, open_clip_config
from hypersd_export.model.parts import Layout, Part, shapes_of

Shapes = Mapping[str, tuple[int, ...]]
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
SDXL_TEXT_PREFIX = "conditioner.embedders.0.transformer."
LATENT_SCALE = 0.18215
SDXL_VAE = {"scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024}


def checkpoint_parts(path: Path) -> tuple[Family, dict[str, Part]]:
    """The family of a checkpoint and its parts; none for another family, or for a 2.x that does not say what it
    predicts, as the same shapes predict epsilon at 512 px and v at 768."""
    shapes = shapes_of(path)
    family = family_of_checkpoint(shapes)
    if family is Family.other:
        raise ModelError(_what_it_is(path, shapes))
    if family not in TEXT or (family is Family.sd21 and stated_prediction(path) is None):
        return family, {}
    parts = {"unet": ldm_unet(path, shapes, UNET_PREFIX)}
    for name, prefix in {"vae": VAE_PREFIX, **TEXT[family]}.items():
        if not any(key.startswith(prefix) for key in shapes):
            raise ModelError(f"{path}: no {prefix}* tensors, so it has no {name}; pass the full checkpoint")
        parts[name] = BUILD[prefix](path, shapes, prefix)
    if family is Family.sdxl:
        parts["vae"] = replace(parts["vae"], config={**parts["vae"].config, **SDXL_VAE})
        parts["text_encoder_2"] = replace(parts["text_encoder_2"], name="text_encoder_2")
    return family, parts


def _what_it_is(path: Path, shapes: Shapes) -> str:
    """Why a file is not a base checkpoint, and where it belongs instead."""
    if any("lora" in key for key in shapes):
        return f"{path}: a LoRA, not a base model; pass it as --lora {path.name} beside a --base"
    if any(key.startswith("down_blocks.") for key in shapes):
        return f"{path}: a UNet alone in diffusers' layout; pass it as --unet {path.name} beside a --base"
    if any(key.startswith(("decoder.", "encoder.")) for key in shapes):
        return f"{path}: a VAE or an encoder alone; a VAE goes to --vae {path.name} beside a --base"
    return f"{path}: not a Stable Diffusion checkpoint (first tensor {next(iter(shapes), 'none')}); pass another file"


def stated_prediction(path: Path) -> str | None:
    """The prediction type that a file states: metadata `modelspec.prediction_type`, or the marker tensor `v_pred`."""
    header = None if is_pickle(path) else read_header(path)
    if header is None:
        return None
    stated = header.metadata.get("modelspec.prediction_type", "").lower()
    if stated.startswith("v") or "v_pred" in header.tensors:
        return "v_prediction"
    return "epsilon" if stated.startswith("eps") else None


def scheduler_config(path: Path) -> dict[str, Any]:
    """The training schedule of Stable Diffusion as a DDIMScheduler config (v1-inference.yaml; all families have it).

    `prediction_type` and zero terminal SNR (the marker tensor `ztsnr`) come from the file where it states them.
    """
    header = None if is_pickle(path) else read_header(path)
    zero_snr = header is not None and "ztsnr" in header.tensors
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": stated_prediction(path) or "epsilon",
        "rescale_betas_zero_snr": zero_snr,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "thresholding": False,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }


def _strip(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _need(shapes: Shapes, key: str, path: Path, dims: int) -> tuple[int, ...]:
    shape = shapes.get(key)
    if shape is None or len(shape) != dims:
        raise ModelError(
            f"{path}: {key} is {'missing' if shape is None else list(shape)}; not a Stable Diffusion 1.x file"
        )
    return shape


def _indices(shapes: Shapes, start: str) -> list[int]:
    """The sorted numbers that follow `start` in the names."""
    rests = (key.removeprefix(start).split(".")[0] for key in shapes if key.startswith(start))
    return sorted({int(rest) for rest in rests if rest.isdigit()})


def ldm_unet(path: Path, shapes: Shapes, prefix: str) -> Part:
    """The UNet part of an original checkpoint; the config is diffusers' UNet2DConditionModel's."""
    own = _strip(shapes, prefix)
    width, in_channels, *_ = _need(own, "input_blocks.0.0.weight", path, 4)
    blocks = len(_indices(own, "input_blocks."))
    ops = [i for i in range(blocks) if f"input_blocks.{i}.0.op.weight" in own]
    layers = ops[0] - 1 if ops else blocks - 1
    levels = len(ops) + 1
    if layers < 1 or blocks != levels * (layers + 1):
        raise ModelError(f"{path}: {blocks} input blocks with {len(ops)} downsamplers are not a Stable Diffusion UNet")
    starts = [1 + level * (layers + 1) for level in range(levels)]
    channels = [_need(own, f"input_blocks.{i}.0.out_layers.3.weight", path, 4)[0] for i in starts]
    down = [f"input_blocks.{i}.1.proj_in.weight" in own for i in starts]
    up = [f"output_blocks.{level * (layers + 1)}.1.proj_in.weight" in own for level in range(levels)]
    to_k = next((key for key in sorted(own) if key.endswith("attn2.to_k.weight")), "attn2.to_k.weight")
    linear = any(len(shape) == 2 for key, shape in own.items() if key.endswith(".proj_in.weight"))
    depths = [max(len(_indices(own, f"input_blocks.{i}.1.transformer_blocks.")), 1) for i in starts]
    labels = own.get("label_emb.0.0.weight")
    config = {
        "act_fn": "silu",
        "attention_head_dim": [max(c // 64, 1) for c in channels]
        if linear
        else 8,  # the number of heads, despite its name
        "block_out_channels": channels,
        "cross_attention_dim": _need(own, to_k, path, 2)[1],
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in down],
        "in_channels": in_channels,
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "out_channels": _need(own, "out.2.weight", path, 4)[0],
        "sample_size": 64 if labels is None else 128,
        "transformer_layers_per_block": depths if len(set(depths)) > 1 else depths[0],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in up],
        "use_linear_projection": linear,
    }
    if labels is not None:
        config |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": labels[1],
        }  # fmt: skip
    if width != channels[0]:
        raise ModelError(
            f"{path}: a UNet that starts with {width} and goes on with {channels[0]} channels is not known"
        )
    return Part(name="unet", config=config, files=(path,), layout=Layout.ldm, prefix=prefix)


def ldm_vae(path: Path, shapes: Shapes, prefix: str) -> Part:
    """The VAE part of an original checkpoint, or of a VAE file of its own (prefix "")."""
    own = _strip(shapes, prefix)
    image_channels = _need(own, "encoder.conv_in.weight", path, 4)[1]
    levels = len(_indices(own, "encoder.down."))
    channels = [_need(own, f"encoder.down.{i}.block.0.conv2.weight", path, 4)[0] for i in range(levels)]
    config = {
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": image_channels,
        "latent_channels": _need(own, "decoder.conv_in.weight", path, 4)[1],
        "layers_per_block": len(_indices(own, "encoder.down.0.block.")),
        "norm_num_groups": 32,
        "out_channels": _need(own, "decoder.conv_out.weight", path, 4)[0],
        "sample_size": 512,
        "scaling_factor": LATENT_SCALE,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": "post_quant_conv.weight" in own,
        "use_quant_conv": "quant_conv.weight" in own,
    }
    return Part(name="vae", config=config, files=(path,), layout=Layout.ldm, prefix=prefix)


def _ldm_text_encoder(path: Path, shapes: Shapes, prefix: str) -> Part:
    """The CLIP text encoder of an original checkpoint (some merges drop the `text_model.` level)."""
    own = {key.removeprefix("text_model."): shape for key, shape in _strip(shapes, prefix).items()}
    vocabulary, width = _need(own, "embeddings.token_embedding.weight", path, 2)
    config = {
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as in Stable Diffusion 1.x's own config: the pooled state is the highest id's
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "intermediate_size": _need(own, "encoder.layers.0.mlp.fc1.weight", path, 2)[0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": _need(own, "embeddings.position_embedding.weight", path, 2)[0],
        "model_type": "clip_text_model",
        "num_attention_heads": max(width // 64, 1),
        "num_hidden_layers": len(_indices(own, "encoder.layers.")),
        "pad_token_id": 1,
        "projection_dim": width,
        "vocab_size": vocabulary,
    }
    return Part(name="text_encoder", config=config, files=(path,), layout=Layout.ldm, prefix=prefix)


def _open_clip(path: Path, shapes: Shapes, prefix: str) -> Part:
    """The OpenCLIP text encoder of an original checkpoint; 2.x uses all layers but the last."""
    own = _strip(shapes, prefix)
    layers = len(_indices(own, BLOCKS)) - (prefix == SD2_PREFIX)
    config = open_clip_config(own, layers=layers, where=str(path))
    return Part(name="text_encoder", config=config, files=(path,), layout=Layout.open_clip, prefix=prefix)


BUILD = {
    VAE_PREFIX: ldm_vae, TEXT_PREFIX: _ldm_text_encoder, SDXL_TEXT_PREFIX: _ldm_text_encoder, SDXL_PREFIX: _open_clip,
    SD2_PREFIX: _open_clip,
}  # fmt: skip
TEXT = {
    Family.sd15: {"text_encoder": TEXT_PREFIX},
    Family.sd21: {"text_encoder": SD2_PREFIX},
    Family.sdxl: {"text_encoder": SDXL_TEXT_PREFIX, "text_encoder_2": SDXL_PREFIX},
}
"""Where the text encoders of each family lie."""

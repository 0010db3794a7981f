"""Single-file checkpoints in the original Stable Diffusion 1.x layout: their configs, inferred from the shapes.

diffusers' `from_single_file` fetches the configs of a known repository; here they follow from the tensors alone, so
no network is needed and any width and depth works. What shapes cannot tell is Stable Diffusion 1.x's: 8 attention
heads, 32 groups, GELU and SiLU, a latent scale of 0.18215 (CompVis/stable-diffusion `v1-inference.yaml`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypersd_export.errors import ModelError
from hypersd_export.model.families import Family, family_of_checkpoint
from hypersd_export.model.files import is_pickle, read_header
from hypersd_export.model.parts import Layout, Part, shapes_of

Shapes = Mapping[str, tuple[int, ...]]
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."
LATENT_SCALE = 0.18215


def checkpoint_parts(path: Path) -> tuple[Family, dict[str, Part]]:
    """The family of a checkpoint and, if it is Stable Diffusion 1.x, its three parts."""
    shapes = shapes_of(path)
    family = family_of_checkpoint(shapes)
    if family is Family.other:
        raise ModelError(_what_it_is(path, shapes))
    if family is not Family.sd15:
        return family, {}
    parts = {"unet": ldm_unet(path, shapes, UNET_PREFIX)}
    for name, prefix, build in (("vae", VAE_PREFIX, ldm_vae), ("text_encoder", TEXT_PREFIX, _ldm_text_encoder)):
        if not any(key.startswith(prefix) for key in shapes):
            raise ModelError(f"{path}: no {prefix}* tensors, so it has no {name}; pass the full checkpoint")
        parts[name] = build(path, shapes, prefix)
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


def scheduler_config(path: Path) -> dict[str, Any]:
    """The training schedule of Stable Diffusion 1.x as a DDIMScheduler config (v1-inference.yaml).

    `prediction_type` and zero terminal SNR come from the file where it states them: metadata
    `modelspec.prediction_type`, or the marker tensors `v_pred` and `ztsnr`.
    """
    header = None if is_pickle(path) else read_header(path)
    stated = header.metadata.get("modelspec.prediction_type", "").lower() if header else ""
    v = stated.startswith("v") or (header is not None and "v_pred" in header.tensors)
    zero_snr = header is not None and "ztsnr" in header.tensors
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if v else "epsilon",
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
    depth = len(_indices(own, "middle_block.1.transformer_blocks."))
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
        "sample_size": 64,
        "transformer_layers_per_block": max(depth, 1),
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in up],
        "use_linear_projection": linear,
    }
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

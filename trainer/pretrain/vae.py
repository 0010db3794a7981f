"""The autoencoder of the built-in model: a small `AutoencoderKL`, f4, trained to reconstruct scenes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trainer.ema import Ema
from trainer.pretrain.loop import Schedule, StepResult, train
from trainer.pretrain.scenes import SceneRenderer, scene_batches

CONFIG: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 64, 128),
    "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 32, "act_fn": "silu",
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
}  # fmt: skip
KL_WEIGHT = 1e-5


def new_vae(**changes: Any) -> Any:
    """A freshly initialised AutoencoderKL of the recipe's size."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**{**CONFIG, **changes})


def reconstruction_loss(pictures: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """L1 + 2·MSE per pixel, in float32 (ours: L1 for edges, MSE because PSNR is what bounds all the rest)."""
    error = decoded.float() - pictures
    return error.abs().mean() + 2 * error.square().mean()


def train_vae(
    vae: Any, renderer: SceneRenderer, allowed: np.ndarray, schedule: Schedule, *, batch: int, seed: int,
    state: Path, ema: Ema,
) -> Iterator[StepResult]:  # fmt: skip
    """Train in place; the EMA has the weights to keep. Pictures are [-1, 1], float32 [B, 3, 32, 32]."""
    scenes = scene_batches(renderer, allowed, batch, seed)
    noise = torch.Generator().manual_seed(seed + 1)

    def losses(step: int) -> dict[str, torch.Tensor]:
        del step
        pictures = next(scenes)[1].contiguous(memory_format=torch.channels_last)
        mean, logvar = vae.quant_conv(vae.encoder(pictures)).float().chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=noise)
        decoded = vae.decoder(vae.post_quant_conv(z))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        fit = reconstruction_loss(pictures, decoded)
        return {"loss": fit + KL_WEIGHT * kl, "kl": kl, "mse": F.mse_loss(decoded.detach().float(), pictures)}

    return train(vae, losses, schedule, state=state, ema=ema)


@torch.no_grad()
def psnr(vae: Any, pictures: torch.Tensor) -> float:
    """Mean PSNR in dB of decode(mode(encode(pictures))) after rounding to 8 bits; pictures [B, 3, H, W] in [-1, 1]."""
    decoded = torch.cat([vae.decode(vae.encode(p).latent_dist.mode()).sample for p in torch.split(pictures, 64)])
    error = to_uint8(decoded).float() - to_uint8(pictures).float()
    mse = error.square().mean((1, 2, 3)).clamp_min(1e-2)
    return float((10 * torch.log10(255**2 / mse)).mean())


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """[-1, 1] → 0…255, rounded as diffusers' VaeImageProcessor does."""
    return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
def set_scaling_factor(vae: Any, pictures: torch.Tensor) -> float:
    """Set the config's `scaling_factor` to 1/std of the latents (Rombach et al. 2022, appendix G) and return it."""
    latents = torch.cat([vae.encode(p).latent_dist.mode() for p in torch.split(pictures, 64)])
    factor = round(1 / float(latents.std()), 5)
    vae.register_to_config(scaling_factor=factor)
    return factor

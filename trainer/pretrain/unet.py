"""The denoiser of the built-in model: a small conditional UNet, epsilon-prediction on SD1.5's noise schedule."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hypersd_export.diffusion import NoiseSchedule
from trainer.ema import Ema
from trainer.pretrain.concepts import BACKGROUNDS, STYLES
from trainer.pretrain.loop import Schedule, StepResult, train
from trainer.pretrain.scenes import SceneRenderer, SceneSpec, draw_specs

CONFIG: dict[str, Any] = {
    "sample_size": 8, "in_channels": 8, "out_channels": 8, "block_out_channels": (96, 192), "layers_per_block": 1,
    "attention_head_dim": 4, "cross_attention_dim": 256, "norm_num_groups": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0


def new_unet(**changes: Any) -> Any:
    """A freshly initialised UNet2DConditionModel of the recipe's size.

    With the plain attention processor: torch's fused attention for CPU took a third of a bfloat16 training step.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    unet = UNet2DConditionModel(**{**CONFIG, **changes})
    unet.set_attn_processor(AttnProcessor())
    return unet


def min_snr_weight(alphas_cumprod: torch.Tensor, gamma: float = MIN_SNR_GAMMA) -> torch.Tensor:
    """min(SNR, γ)/SNR for epsilon-prediction (Hang et al. 2023, eq. 6): [T] → [T], in (0, 1]."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr


class LatentPool:
    """Latents of random scenes, encoded once and drawn from many times; a part is renewed as training goes on."""

    def __init__(
        self, vae: Any, renderer: SceneRenderer, allowed: np.ndarray, *, size: int, seed: int, chunk: int = 256
    ) -> None:
        self._vae, self._renderer, self._allowed, self._chunk = vae, renderer, allowed, chunk
        self._generator = torch.Generator().manual_seed(seed)
        chunks = [self._encode() for _ in range(-(-size // chunk))]
        self._captions = torch.stack([captions for captions, _ in chunks])
        self._latents = torch.stack([latents for _, latents in chunks])

    @torch.no_grad()
    def _encode(self) -> tuple[torch.Tensor, torch.Tensor]:
        spec = draw_specs(self._chunk, self._allowed, self._generator)
        pictures = self._renderer(spec, self._generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = self._vae.encode(pictures).latent_dist.mode().float()
        return caption_index(spec), latents * self._vae.config.scaling_factor

    def renew(self) -> None:
        """Replace one randomly chosen chunk by new scenes."""
        index = int(torch.randint(len(self._captions), (1,), generator=self._generator))
        self._captions[index], self._latents[index] = self._encode()

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents float32 [B, C, h, w], caption indices int64 [B] into `all_captions()`)."""
        part = torch.randint(len(self._captions), (count,), generator=self._generator)
        item = torch.randint(self._chunk, (count,), generator=self._generator)
        return self._latents[part, item], self._captions[part, item]


def caption_index(spec: SceneSpec) -> torch.Tensor:
    """Where each scene's caption stands in `all_captions()`: int64 [B]; "unsaid" is the last of its axis."""
    style = torch.where(spec.named_style < 0, len(STYLES), spec.named_style)
    background = torch.where(spec.named_background < 0, len(BACKGROUNDS), spec.named_background)
    return (spec.concept * (len(STYLES) + 1) + style) * (len(BACKGROUNDS) + 1) + background


def train_unet(
    unet: Any, pool: LatentPool, states: torch.Tensor, empty: torch.Tensor, schedule: Schedule, *, batch: int,
    seed: int, state: Path, ema: Ema, renew_every: int = 8,
) -> Iterator[StepResult]:  # fmt: skip
    """Train in place: states float32 [captions, S, C] by caption index, `empty` [S, C] for the dropped captions."""
    generator = torch.Generator().manual_seed(seed)
    alphas_cumprod = torch.tensor(NoiseSchedule().alphas_cumprod(), dtype=torch.float32)
    weights = min_snr_weight(alphas_cumprod)

    def losses(step: int) -> dict[str, torch.Tensor]:
        if step % renew_every == 0:
            pool.renew()
        latents, index = pool.draw(batch)
        context = states[index]
        context[torch.rand(batch, generator=generator) < CAPTION_DROPOUT] = empty
        t = torch.randint(len(alphas_cumprod), (batch,), generator=generator)
        eps = torch.randn(latents.shape, generator=generator)
        alpha = alphas_cumprod[t][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * eps
        predicted = unet(noisy.contiguous(memory_format=torch.channels_last), t, context, return_dict=False)[0]
        mse = (predicted.float() - eps).square().mean((1, 2, 3))
        return {"loss": (weights[t] * mse).mean(), "eps_mse": mse.mean()}

    return train(unet, losses, schedule, state=state, ema=ema)

"""The torch side: the pipeline as diffusers' own modules compute it, walked by the table. The truth of all comparisons.

Deliberately not through `hypersd_export.graphs`: a wrapper that forgot `post_quant_conv` would agree with itself.
"""

import gc
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hypersd_export.diffusion import Guidance, GuidanceKind, StepTable, initial_noise, run, step_noise
from hypersd_export.graphs.components import guidance_embedding
from hypersd_export.verify.range_scan import encode_prompts
from hypersd_export.verify.source import Source

Float = npt.NDArray[np.float32]


@torch.no_grad()
def text_states(text_encoder: Any, ids: npt.NDArray[np.int64]) -> tuple[Float, Float]:
    """Ids int64 [B, S] to the states [B, S, C] and the pooled state [B, C]."""
    out = text_encoder(torch.from_numpy(ids))
    return out.last_hidden_state.float().numpy(), out.pooler_output.float().numpy()


def prompt_states(source: Source, texts: Iterable[str], tokens: int) -> list[Float]:
    """The states [1, S, C] of each text, S = `tokens`, by the source's own tokenizer and text encoder, which is given
    back; texts that are too long are cut."""
    from hypersd_export.runtime.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        source.base.write_tokenizer(Path(folder))
        ids = encode_prompts(load_tokenizer(Path(folder), length=tokens).encode, texts)
    text_encoder, _ = source.load("text_encoder", torch.float32)
    states = [text_states(text_encoder, row[None])[0] for row in ids]
    del text_encoder
    gc.collect()
    return states


@torch.no_grad()
def unet_output(unet: Any, sample: Float, t: float, states: Float, guidance: Guidance) -> Float:
    """The network's output for rows of latents [U, C, h, w] at timestep t; an embedded guidance is its input."""
    extra: dict[str, torch.Tensor] = {}
    if guidance.kind is GuidanceKind.EMBEDDED:
        condition = guidance_embedding(guidance.scale, int(unet.config.time_cond_proj_dim)).to(unet.dtype)
        extra["timestep_cond"] = condition.expand(len(sample), -1)
    rows, text = torch.from_numpy(sample).to(unet.dtype), torch.from_numpy(states).to(unet.dtype)
    out = unet(rows, torch.tensor(t, dtype=unet.dtype), encoder_hidden_states=text, **extra).sample
    return out.float().numpy()


def network(
    unet: Any, guidance: Guidance, *, cond: Float, uncond: Float | None
) -> Callable[[npt.NDArray[Any], float], Float]:
    """The function (latents [1, C, h, w], timestep) → prediction; text states are [1, S, C].

    With `uncond` the output is u + w (c - u), both branches in one call.
    """

    def net(x: npt.NDArray[Any], t: float) -> Float:
        x = x.astype(np.float32)
        if uncond is None:
            return unet_output(unet, x, t, cond, guidance)
        u, c = np.split(unet_output(unet, np.concatenate([x, x]), t, np.concatenate([uncond, cond]), guidance), 2)
        mixed: Float = u + np.float32(guidance.scale) * (c - u)
        return mixed

    return net


def denoise(
    unet: Any,
    table: StepTable,
    guidance: Guidance,
    *,
    cond: Float,
    uncond: Float | None,
    seed: int,
    shape: tuple[int, int, int],
) -> Float:
    """Latents [1, C, h, w] of image 0 of `seed`, from its noise, by the table; the rest as for `network`."""

    def fresh(stream: int) -> Float:
        return step_noise(seed=seed, index=0, step=stream, shape=shape)[None]

    start = np.float32(table.init_noise_sigma) * initial_noise(seed=seed, index=0, shape=shape)[None]
    latents: Float = run(table, network(unet, guidance, cond=cond, uncond=uncond), start, step_noise=fresh)
    return latents.astype(np.float32)


def unscale(vae: Any, latents: Float) -> Float:
    """What the decoder takes: latents / scaling_factor (+ shift_factor, where the VAE has one)."""
    shift = np.float32(getattr(vae.config, "shift_factor", None) or 0.0)
    unscaled: Float = latents / np.float32(vae.config.scaling_factor) + shift
    return unscaled


@torch.no_grad()
def decode(vae: Any, unscaled: Float) -> Float:
    """Images [B, 3, H, W] around [-1, 1] of unscaled latents."""
    return vae.decode(torch.from_numpy(unscaled).to(vae.dtype)).sample.float().numpy()


@torch.no_grad()
def encode(vae: Any, images: Float) -> Float:
    """Mean and log-variance [B, 2 C, h, w] of images in [-1, 1]."""
    return vae.encode(torch.from_numpy(images).to(vae.dtype)).latent_dist.parameters.float().numpy()


def to_uint8(images: Float) -> npt.NDArray[np.uint8]:
    """Images in [-1, 1] [B, 3, H, W] to bytes [B, H, W, 3], as diffusers' VaeImageProcessor rounds."""
    scaled = np.clip(images / 2 + 0.5, 0.0, 1.0).transpose(0, 2, 3, 1)
    return np.round(scaled * 255).astype(np.uint8)

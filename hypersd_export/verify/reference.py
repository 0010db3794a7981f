"""The torch side: the pipeline as diffusers' own modules compute it, walked by the table. The truth of all comparisons.

Deliberately not through `hypersd_export.graphs`: a wrapper that forgot `post_quant_conv` would agree with itself.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hypersd_export.bundle.texts import encoders_of
from hypersd_export.diffusion import Guidance, GuidanceKind, StepTable, initial_noise, run, step_noise
from hypersd_export.graphs.components import guidance_embedding
from hypersd_export.graphs.spec import Shapes
from hypersd_export.model.pages import release
from hypersd_export.runtime.text import TIME_IDS, SizeHints, Text, rows, text_of, zeros
from hypersd_export.verify.range_scan import encode_prompts
from hypersd_export.verify.source import Source

Float = npt.NDArray[np.float32]


@torch.no_grad()
def text_outputs(text_encoder: Any, ids: npt.NDArray[np.int64]) -> dict[str, Float]:
    """Ids int64 [B, S] to everything that a text encoder gives, by the names of its graph's outputs."""
    out = text_encoder(torch.from_numpy(ids), output_hidden_states=True)
    found = {name: out[name] for name in ("last_hidden_state", "pooler_output", "text_embeds") if name in out}
    found |= {f"hidden_states.{number}": states for number, states in enumerate(out.hidden_states)}
    return {name: value.float().numpy() for name, value in found.items()}


def prompt_ids(source: Source, texts: Sequence[str], tokens: int) -> list[npt.NDArray[np.int64]]:
    """The ids [P, S] of the texts by each text encoder's tokenizer, S = `tokens`; texts that are too long are cut."""
    from hypersd_export.runtime.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        source.base.write_tokenizers(Path(folder))
        return [
            encode_prompts(load_tokenizer(Path(folder, encoder.tokenizer), length=tokens).encode, texts)
            for encoder in encoders_of(source.configs)
        ]


def prompt_states(source: Source, texts: Sequence[str], shapes: Shapes, *, negative: bool = False) -> list[Text]:
    """Each text as the UNet sees it, by the source's own tokenizers and text encoders, which are given back.

    negative: the last one is what is steered away from, where SDXL may have zeros for "".
    """
    outputs = []
    for encoder, ids in zip(encoders_of(source.configs), prompt_ids(source, texts, shapes.tokens), strict=True):
        module, _ = source.load(encoder.component, torch.float32)
        outputs.append([text_outputs(module, row[None]) for row in ids])
        del module
        release()
    found = [seen(source, each, shapes) for each in zip(*outputs, strict=True)]
    if negative and not texts[-1] and source.base.zero_empty:
        found[-1] = nothing(found[-1])
    return found


def seen(source: Source, outputs: Sequence[Mapping[str, Float]], shapes: Shapes) -> Text:
    """One text as the UNet sees it, of what each text encoder gave for it (one row)."""
    text = text_of(encoders_of(source.configs), outputs)
    return {**text, TIME_IDS: SizeHints().time_ids((shapes.width, shapes.height))} if shapes.pooled else text


def nothing(text: Text) -> Text:
    """SDXL's empty prompt: zeros, and the picture's size as it is."""
    return {**zeros(text), TIME_IDS: text[TIME_IDS]}


@torch.no_grad()
def unet_output(unet: Any, sample: Float, t: float, text: Text, guidance: Guidance) -> Float:
    """The network's output for rows of latents [U, C, h, w] at timestep t and as many of `text`; an embedded guidance
    is its input."""
    extra: dict[str, Any] = {}
    if guidance.kind is GuidanceKind.EMBEDDED:
        condition = guidance_embedding(guidance.scale, int(unet.config.time_cond_proj_dim)).to(unet.dtype)
        extra["timestep_cond"] = condition.expand(len(sample), -1)
    given = {name: torch.from_numpy(value).to(unet.dtype) for name, value in text.items()}
    states = given.pop("encoder_hidden_states")
    if given:
        extra["added_cond_kwargs"] = given
    x, time = torch.from_numpy(sample).to(unet.dtype), torch.tensor(t, dtype=unet.dtype)
    out = unet(x, time, encoder_hidden_states=states, **extra).sample
    return out.float().numpy()


Watch = Callable[[Float, float, Float], None]
"""Told of a call of the UNet: the rows that it was given, at which timestep, and its output."""


def network(
    unet: Any, guidance: Guidance, *, cond: Text, uncond: Text | None, watch: Watch = lambda *_: None
) -> Callable[[npt.NDArray[Any], float], Float]:
    """The function (latents [1, C, h, w], timestep) → prediction.

    With `uncond` the output is u + w (c - u), both branches in one call, the unconditional one first.
    """

    def net(x: npt.NDArray[Any], t: float) -> Float:
        x = x.astype(np.float32)
        given, text = (x, cond) if uncond is None else (np.concatenate([x, x]), rows([uncond, cond], 1))
        output = unet_output(unet, given, t, text, guidance)
        watch(given, t, output)
        if uncond is None:
            return output
        u, c = np.split(output, 2)
        mixed: Float = u + np.float32(guidance.scale) * (c - u)
        return mixed

    return net


def denoise(
    unet: Any,
    table: StepTable,
    guidance: Guidance,
    *,
    cond: Text,
    uncond: Text | None,
    seed: int,
    shape: tuple[int, int, int],
    watch: Watch = lambda *_: None,
) -> Float:
    """Latents [1, C, h, w] of image 0 of `seed`, from its noise, by the table; the rest as for `network`."""

    def fresh(stream: int) -> Float:
        return step_noise(seed=seed, index=0, step=stream, shape=shape)[None]

    start = np.float32(table.init_noise_sigma) * initial_noise(seed=seed, index=0, shape=shape)[None]
    latents: Float = run(table, network(unet, guidance, cond=cond, uncond=uncond, watch=watch), start, step_noise=fresh)
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
    out = vae.encode(torch.from_numpy(images).to(vae.dtype))
    if "latents" in out:  # AutoencoderTiny's one point; -30 is where diffusers clamps a log-variance
        return torch.cat([out.latents, torch.full_like(out.latents, -30.0)], dim=1).float().numpy()
    return out.latent_dist.parameters.float().numpy()


def to_uint8(images: Float) -> npt.NDArray[np.uint8]:
    """Images in [-1, 1] [B, 3, H, W] to bytes [B, H, W, 3], as diffusers' VaeImageProcessor rounds."""
    scaled = np.clip(images / 2 + 0.5, 0.0, 1.0).transpose(0, 2, 3, 1)
    return np.round(scaled * 255).astype(np.uint8)

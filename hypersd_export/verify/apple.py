"""How far a plan's picture is from the one that Apple's scheduler makes where it only comes near: both by torch."""

import numpy as np

from hypersd_export.diffusion import GuidanceKind, PlanFile, initial_noise
from hypersd_export.diffusion.apple import play, plays_exactly
from hypersd_export.graphs.spec import Shapes
from hypersd_export.model.pages import release
from hypersd_export.verify.metrics import psnr, reported
from hypersd_export.verify.reference import decode, denoise, network, prompt_states, to_uint8, unscale
from hypersd_export.verify.source import Source


def psnr_as_played(source: Source, plans: PlanFile, shapes: Shapes, *, prompt: str, seed: int) -> dict[int, float]:
    """PSNR in dB of the 8-bit pictures, by step count, for the plans that Apple's scheduler does not play exactly."""
    import torch

    near = [entry for entry in plans.entries if not plays_exactly(entry.plan)]
    cond, uncond = prompt_states(source, (prompt, ""), shapes, negative=True)
    unet, _ = source.load("unet", torch.float32)
    shape = shapes.channels, shapes.latent_height, shapes.latent_width
    noise = initial_noise(seed=seed, index=0, shape=shape)[None]
    latents = {}
    for entry in near:
        guidance = entry.plan.guidance
        other = uncond if guidance.kind is GuidanceKind.CFG else None
        ours = denoise(unet, entry.table, guidance, cond=cond, uncond=other, seed=seed, shape=shape)
        theirs = play(network(unet, guidance, cond=cond, uncond=other), noise, entry.steps)
        latents[entry.steps] = ours, theirs.astype(np.float32)
    del unet
    release()
    vae, _ = source.load("vae", torch.float32)
    pictures = {n: [to_uint8(decode(vae, unscale(vae, z))) for z in pair] for n, pair in latents.items()}
    return {steps: round(reported(psnr(theirs, ours)), 2) for steps, (ours, theirs) in pictures.items()}

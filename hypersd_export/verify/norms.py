"""Which group norms of a pipeline square what half cannot hold, seen where it draws: Core ML squares op by op.

The fused pipeline draws the range scan's prompts by torch, in float32: the UNet at every row of every plan, the
decoder, and the encoder on the decoded pictures, one component in memory at a time. ONNX graphs have group norms as
one op, and the scan of `range_scan`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hypersd_export.diffusion import GuidanceKind, PlanFile
from hypersd_export.graphs.spec import Shapes
from hypersd_export.model.pages import release
from hypersd_export.targets.onnx_fp16 import HALF_MAX
from hypersd_export.verify.gates import finite
from hypersd_export.verify.range_scan import LIMIT, SCAN_SEED, scan_prompts
from hypersd_export.verify.reference import decode, denoise, encode, prompt_states, unscale
from hypersd_export.verify.source import Source

NORM_LIMIT = math.sqrt(LIMIT)
"""How far from its group's mean a value may lie where half computes its square, with the range scan's margin."""
Spreads = dict[str, float]


def norm_report(spreads: Spreads) -> dict[str, Any]:
    """What is said of one component's group norms: how many `norms`, the `largest` spread, and the `scales`.

    `spreads`: by name, the largest distance of a value from its group's mean. The scales are the powers of two by which
    the norms that need it have their input divided. A value that half cannot hold before it is squared is left to
    the gates: no scale of a norm's input helps there.
    """
    scales = {
        name: 2.0 ** math.ceil(math.log2(spread / NORM_LIMIT))
        for name, spread in spreads.items()
        if NORM_LIMIT < spread < HALF_MAX
    }
    return {"norms": len(spreads), "largest": finite(max(spreads.values(), default=0.0)), "scales": scales}


def norm_spreads(
    source: Source, plans: PlanFile, shapes: Shapes, *, prompt: str, progress: Callable[[str], None] = lambda _: None
) -> Mapping[str, Spreads]:
    """By component of the pipeline (unet, vae) and by name of each group norm: the largest distance between a value of
    its input and the mean of that value's group. A value that is no number counts as infinite."""
    texts = scan_prompts(prompt)
    *states, negative = prompt_states(source, (*texts, ""), shapes, negative=True)
    found: dict[str, Spreads] = {}
    shape = shapes.channels, shapes.latent_height, shapes.latent_width
    unet, _ = source.load("unet", torch.float32)
    latents = []
    with watched(unet) as found["unet"]:
        for entry in plans.entries:
            progress(f"group norms: unet in {entry.steps} steps")
            guidance = entry.plan.guidance
            uncond = negative if guidance.kind is GuidanceKind.CFG else None
            latents += [
                denoise(unet, entry.table, guidance, cond=cond, uncond=uncond, seed=SCAN_SEED + n, shape=shape)
                for n, cond in enumerate(states)
            ]
    del unet
    release()
    vae, _ = source.load("vae", torch.float32)
    progress("group norms: vae")
    with watched(vae) as found["vae"]:
        for each in latents:
            encode(vae, np.clip(decode(vae, unscale(vae, each)), -1, 1))
    return found


@contextmanager
def watched(module: torch.nn.Module) -> Iterator[Spreads]:
    """Measure every group norm of a module while the body runs it."""
    spreads: Spreads = {}
    hooks = []

    def watch(name: str, norm: torch.nn.GroupNorm) -> None:
        def seen(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            x = given[0].detach().reshape(len(given[0]), norm.num_groups, -1)
            spread = float((x - x.mean(-1, keepdim=True)).abs().max())
            spreads[name] = max(spreads[name], spread if math.isfinite(spread) else math.inf)

        spreads[name] = 0.0
        hooks.append(norm.register_forward_pre_hook(seen))

    for name, each in module.named_modules():
        if isinstance(each, torch.nn.GroupNorm):
            watch(name, each)
    try:
        yield spreads
    finally:
        for hook in hooks:
            hook.remove()

"""Canvases: one to three drawings over one background, and for each of them what can be seen of it, as a mask.

The masks are the truth, not an annotation: they come from the drawings' own alpha. `segmenter` learns from them.
"""

from dataclasses import dataclass

import numpy as np
import torch

from trainer.pretrain.concepts import BACKGROUNDS, STYLES
from trainer.pretrain.scenes import Placement, SceneRenderer, SceneSpec, over
from trainer.rewards.structure import Instances

PLACEMENTS = (Placement(), Placement(size=(0.45, 0.75)), Placement(size=(0.36, 0.6)))
"""By the number of drawings, from one, which is a scene's own: more of them are smaller."""
LEAST_VISIBLE = 0.25
"""The share of a drawing that must be left for it to be asked for."""


@dataclass(frozen=True, slots=True)
class Canvases:
    """pictures: float32 [N, 3, H, W] in [-1, 1]; truth: of each, its instances, whose classes are concepts."""

    pictures: torch.Tensor
    truth: list[Instances]


def draw_canvases(
    renderer: SceneRenderer, drawings: int, count: int, allowed: np.ndarray, generator: torch.Generator
) -> Canvases:
    """`count` canvases of so many different drawings each, every one of which `allowed` [concept, style, background]
    lets stand on the canvas' background; a later drawing lies over an earlier one."""
    allowed_here = torch.from_numpy(allowed).flatten(0, 1).T.float()
    background = torch.randint(len(BACKGROUNDS), (count,), generator=generator)
    drawn = torch.multinomial(allowed_here[background], drawings, generator=generator)
    concept = drawn // len(STYLES)
    flat = (concept.flatten(), (drawn % len(STYLES)).flatten())
    placed = renderer.place(*flat, generator, PLACEMENTS[drawings - 1])
    layers = placed.view(count, drawings, *placed.shape[1:])
    pictures = renderer.backdrop(background)
    for layer in layers.unbind(1):
        pictures = over(layer, pictures)
    whole, seen = layers[:, :, 3], visible(layers[:, :, 3])
    kept = (seen > 0.5).sum((2, 3)) >= LEAST_VISIBLE * (whole > 0.5).sum((2, 3)).clamp(min=1)
    truth = [
        Instances(masks[rows] > 0.5, classes[rows]) for masks, classes, rows in zip(seen, concept, kept, strict=True)
    ]
    return Canvases(pictures * 2 - 1, truth)


def scene_canvases(renderer: SceneRenderer, spec: SceneSpec, generator: torch.Generator) -> Canvases:
    """The scenes that `renderer(spec, generator)` draws, with the mask of each one's only drawing."""
    layers = renderer.place(spec.concept, spec.style, generator)
    pictures = over(layers, renderer.backdrop(spec.background)) * 2 - 1
    masks = layers[:, 3:] > 0.5
    return Canvases(pictures, [Instances(*known) for known in zip(masks, spec.concept[:, None], strict=True)])


def visible(alpha: torch.Tensor) -> torch.Tensor:
    """What is seen of each of the layers [N, L, H, W], the last of which is on top: its alpha through those above."""
    seen, clear = [], torch.ones_like(alpha[:, 0])
    for layer in reversed(alpha.unbind(1)):
        seen.append(layer * clear)
        clear = clear * (1 - layer)
    return torch.stack(seen[::-1], 1)


def joined(parts: list[Canvases]) -> Canvases:
    """All of them in order."""
    return Canvases(torch.cat([part.pictures for part in parts]), [known for part in parts for known in part.truth])

"""Scenes: a drawing composited on a plain background, with all that the caption does not say drawn at random.

A caption fixes the concept, and half the time the style and half the time the background. Position, size,
rotation and mirror image are never named, so the picture that belongs to a caption is a distribution and not
a point: without that, distillation to few steps would have nothing to do (docs/design.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from trainer.pretrain.concepts import BACKGROUNDS, CONCEPTS, STYLES, caption
from trainer.pretrain.drawings import Drawings

HELD_OUT_SHARE = 0.2
UNSAID = -1
COMBINATIONS = (len(CONCEPTS), len(STYLES), len(BACKGROUNDS))


def held_out_mask(share: float = HELD_OUT_SHARE, seed: int = 20) -> np.ndarray:
    """Bool [concept, style, background]: True where the combination is kept from every training.

    Each (concept, style) loses floor or ceil of share × 8 of its backgrounds, so that no drawing is held out whole.
    """
    rng = np.random.default_rng(seed)
    concepts, styles, backgrounds = COMBINATIONS
    order = rng.random(COMBINATIONS).argsort(axis=2).argsort(axis=2)
    low = int(share * backgrounds)
    extra = rng.random((concepts, styles)) < (share * backgrounds - low)
    return order < (low + extra)[:, :, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Ranges of what no caption names. Sizes are fractions of the canvas' edge, angles degrees."""

    size: tuple[float, float] = (0.62, 0.98)
    rotation: float = 20.0
    overhang: float = 0.02


@dataclass(frozen=True, slots=True)
class SceneSpec:
    """A batch of scenes before it is drawn: int64 [B] each; `named_*` is UNSAID where the caption is silent."""

    concept: torch.Tensor
    style: torch.Tensor
    background: torch.Tensor
    named_style: torch.Tensor
    named_background: torch.Tensor

    def captions(self) -> list[str]:
        """The caption of each scene."""
        styles, backgrounds = [*STYLES, None], [*BACKGROUNDS, None]
        rows = zip(self.concept.tolist(), self.named_style.tolist(), self.named_background.tolist(), strict=True)
        return [caption(CONCEPTS[c], styles[s], backgrounds[b]) for c, s, b in rows]


def draw_specs(count: int, allowed: np.ndarray, generator: torch.Generator) -> SceneSpec:
    """Draw `count` combinations uniformly from where `allowed` [concept, style, background] is True."""
    combinations = torch.from_numpy(np.argwhere(allowed))
    picked = combinations[torch.randint(len(combinations), (count,), generator=generator)]
    concept, style, background = picked.unbind(1)
    silent = torch.rand(2, count, generator=generator) < 0.5
    return SceneSpec(
        concept, style, background,
        torch.where(silent[0], UNSAID, style), torch.where(silent[1], UNSAID, background),
    )  # fmt: skip


class SceneRenderer:
    """Draws SceneSpecs with torch: premultiplied sprites, placed by one affine resampling at twice the size."""

    def __init__(self, drawings: Drawings, size_px: int, placement: Placement | None = None) -> None:
        self.size_px = size_px
        self.placement = placement or Placement()
        rgba = (
            torch.from_numpy(drawings.rgba.reshape(-1, *drawings.rgba.shape[2:])).float().div(255).permute(0, 3, 1, 2)
        )
        premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
        self._sprites = F.adaptive_avg_pool2d(premultiplied, min(2 * size_px, drawings.tile_px))
        self._colours = torch.tensor(list(BACKGROUNDS.values())).float().div(255)

    def __call__(self, spec: SceneSpec, generator: torch.Generator) -> torch.Tensor:
        """Pictures in [-1, 1]: float32 [B, 3, size_px, size_px]."""
        return over(self.place(spec.concept, spec.style, generator), self.backdrop(spec.background)) * 2 - 1

    def place(
        self, concept: torch.Tensor, style: torch.Tensor, generator: torch.Generator, ranges: Placement | None = None
    ) -> torch.Tensor:
        """Each drawing where the generator puts it, within `ranges` (the renderer's own if None): premultiplied RGBA
        in [0, 1], float32 [B, 4, size_px, size_px]."""
        sprites = self._sprites[concept * len(STYLES) + style]
        theta = _affine(len(sprites), ranges or self.placement, generator)
        edge = 2 * self.size_px
        grid = F.affine_grid(theta, [len(sprites), 4, edge, edge], align_corners=False)
        return F.avg_pool2d(F.grid_sample(sprites, grid, align_corners=False), 2)

    def backdrop(self, background: torch.Tensor) -> torch.Tensor:
        """The colours of these backgrounds in [0, 1]: float32 [B, 3, 1, 1]."""
        return self._colours[background][:, :, None, None]


def over(layer: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """A layer of premultiplied RGBA [B, 4, H, W] over pictures [B, 3, H or 1, W or 1], all in [0, 1]."""
    return layer[:, :3] + (1 - layer[:, 3:]) * below


def _affine(count: int, ranges: Placement, generator: torch.Generator) -> torch.Tensor:
    """Maps output to input coordinates, both in [-1, 1]: float32 [B, 2, 3] for F.affine_grid."""
    unit = torch.rand(5, count, generator=generator)
    low, high = ranges.size
    size = low + (high - low) * unit[0]
    angle = torch.deg2rad(ranges.rotation * (2 * unit[1] - 1))
    mirror = torch.where(unit[2] < 0.5, -1.0, 1.0)
    room = 1 - size + ranges.overhang
    x, y = room * (2 * unit[3] - 1), room * (2 * unit[4] - 1)
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    rotate = torch.stack([torch.stack([mirror * cos, mirror * sin], -1), torch.stack([-sin, cos], -1)], 1)
    shift = -torch.einsum("bij,bj->bi", rotate, torch.stack([x, y], -1))
    return torch.cat([rotate, shift[:, :, None]], 2)


def scene_batches(
    renderer: SceneRenderer, allowed: np.ndarray, batch: int, seed: int, *, concepts: int = 0
) -> Iterator[tuple[SceneSpec, torch.Tensor]]:
    """Endless batches of (spec, pictures), a function of the seed alone.

    With `concepts`, each batch is of so many concepts alone, drawn anew for each.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        among = allowed
        if concepts:
            among = np.zeros_like(allowed)
            picked = torch.randperm(len(allowed), generator=generator)[:concepts].numpy()
            among[picked] = allowed[picked]
        spec = draw_specs(batch, among, generator)
        yield spec, renderer(spec, generator)

"""Ways in which a drawing can be worse than it was, for pairs whose better half is known. All ours."""

import torch
import torch.nn.functional as F

from trainer.losses.tscd import level

RADIUS = 4
"""Of the blur's kernel, in pixels."""


def degrade(pictures: torch.Tensor, generator: torch.Generator, kind: int | None = None) -> torch.Tensor:
    """Each picture [B, 3, H, W] in [-1, 1] made worse in one way, drawn for each (or `kind`), by a drawn strength.

    Values stay in [-1, 1]. Ways are the entries of `DEGRADATIONS`, in order.
    """
    count = len(pictures)
    strength = torch.rand(count, generator=generator)
    drawn = torch.randint(len(DEGRADATIONS), (count,), generator=generator)
    kinds = drawn if kind is None else torch.full_like(drawn, kind)
    worse = pictures.clone()
    for number, way in enumerate(DEGRADATIONS.values()):
        rows = torch.nonzero(kinds == number).flatten()
        if len(rows):
            worse[rows] = way(pictures[rows], level(strength[rows]), generator)
    return worse.clamp(-1, 1)


def _blurred(x: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gaussian, of deviation 0.5 to 2 px."""
    del generator
    count, channels, height, width = x.shape
    place = torch.arange(-RADIUS, RADIUS + 1)
    kernel = torch.exp(-0.5 * (place / (0.5 + 1.5 * strength.view(-1, 1))) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(x.reshape(1, count * channels, height, width), (RADIUS,) * 4, mode="replicate")
    for view in ((-1, 1, 2 * RADIUS + 1, 1), (-1, 1, 1, 2 * RADIUS + 1)):
        flat = F.conv2d(flat, kernel.view(view), groups=count * channels)
    return flat.view(x.shape)


def _noisy(x: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return x + (0.05 + 0.35 * strength) * torch.randn(x.shape, generator=generator)


def _coarse(x: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mixed with itself in blocks of 4 px."""
    del generator
    blocks = F.interpolate(F.avg_pool2d(x, 4), x.shape[2:], mode="nearest")
    return x + (0.3 + 0.7 * strength) * (blocks - x)


def _off_colour(x: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Contrast and saturation too low or too high: what rewards are exploited with."""
    centre = x.mean((2, 3), keepdim=True) if torch.rand((), generator=generator) < 0.5 else x.mean(1, keepdim=True)
    high = level((torch.rand(len(x), generator=generator) < 0.5).float())
    gain = high * (1.3 + 0.9 * strength) + (1 - high) * (0.8 - 0.5 * strength)
    return centre + gain * (x - centre)


def _warped(x: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pushed about by a smooth random field of up to a fifth of the picture's half edge."""
    field = F.interpolate(torch.randn(len(x), 2, 5, 5, generator=generator), x.shape[2:], mode="bicubic")
    moved = (0.04 + 0.16 * strength) * field / field.abs().amax((1, 2, 3), keepdim=True)
    still = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, still + moved.permute(0, 2, 3, 1), align_corners=False, padding_mode="border")


def _ghosted(x: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Another picture of the batch, or its own mirror image where there is none, shows through."""
    del generator
    other = x.roll(1, 0) if len(x) > 1 else x.flip(3)
    return x + (0.12 + 0.38 * strength) * (other - x)


def _torn(x: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A band across it is shifted sideways, by a sixteenth to a quarter of its width."""
    height, width = x.shape[2:]
    torn = x.clone()
    for row, share in enumerate(strength.flatten().tolist()):
        band = round(height * (0.15 + 0.25 * share))
        top = int(height * 0.2) + int(torch.randint(max(1, int(height * 0.6) - band), (), generator=generator))
        by = round(width * (1 / 16 + 3 / 16 * share))
        torn[row, :, top : top + band] = x[row, :, top : top + band].roll(by, 2)
    return torn


DEGRADATIONS = {
    "blur": _blurred, "noise": _noisy, "blocks": _coarse, "colour": _off_colour, "warp": _warped, "ghost": _ghosted,
    "tear": _torn,
}  # fmt: skip

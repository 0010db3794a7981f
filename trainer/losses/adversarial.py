"""The adversarial part of d in TSCD's eq. 12 (arXiv 2404.13686): losses on logits, and where the critic looks.

The paper names SDXL-Lightning's loss and no figure. Two forms here, by back end: hinge averaged over heads, as in PCM's
public code (arXiv 2405.18407), and non-saturating, as in SDXL-Lightning (arXiv 2402.13929). Both sides are judged at a
level s that is as noisy as the jump's end or noisier, reached by the forward process (PCM).
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from trainer.distill.config import Backend
from trainer.losses.tscd import Grid, Indices, level


def critic_loss(backend: Backend, real: Sequence[torch.Tensor], fake: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the discriminator minimises, per sample [B]; logits [B, 1, …], one tensor per head, from `Discriminator`.

    Frozen: relu(1 − real) + relu(1 + fake). Trainable: −log p(real) − log(1 − p(fake)) = softplus(−real) +
    softplus(fake). The mean over each head's map, then over the heads: at logit 0 the values are 2 and 2 log 2.
    """
    if backend is Backend.FROZEN:
        return _mean(real, lambda logit: F.relu(1 - logit)) + _mean(fake, lambda logit: F.relu(1 + logit))
    return _mean(real, lambda logit: F.softplus(-logit)) + _mean(fake, F.softplus)


def generator_loss(backend: Backend, fake: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the student minimises, per sample [B]: relu(1 − fake), as PCM's code (it pushes up to a logit of 1; the
    usual −fake never ends), or −log p(fake) = softplus(−fake)."""
    if backend is Backend.FROZEN:
        return _mean(fake, lambda logit: F.relu(1 - logit))
    return _mean(fake, lambda logit: F.softplus(-logit))


def _mean(logits: Sequence[torch.Tensor], loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.stack([loss(logit).flatten(1).mean(1) for logit in logits]).mean(0)


def renoise(x: torch.Tensor, a_from: torch.Tensor, a_to: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Diffuse x [B, …] from level `a_from` to a level `a_to` <= `a_from`; x itself, bit for bit, where they are equal.

    x' = sqrt(r) x + sqrt(1 − r) noise with r = a_to / a_from: the forward process (arXiv 2006.11239 eq. 2, composed),
    so a sample of the marginal at `a_from` becomes one of the marginal at `a_to`. Levels are alphas_cumprod values, [B]
    or of a shape that broadcasts to x; r is computed in their dtype, the result is of x's. `a_to` > `a_from` gives NaN.
    """
    ratio = level(a_to / a_from, x.ndim) if a_to.ndim == 1 else a_to / a_from
    return ratio.sqrt().to(x.dtype) * x + (1 - ratio).sqrt().to(x.dtype) * noise


def draw_critic_timesteps(
    indices: Indices, grid: Grid, generator: torch.Generator, reach: float = 1.0
) -> torch.Tensor:  # fmt: skip
    """The timestep s at which each sample is judged, int64 [B] on the generator's device: uniform in
    [t_end, t_end + reach·T/k), cut off at T − 1.

    The range is PCM's, whose ends are segment edges, so that it is the segment above. A random end may lie higher: the
    range is then shorter (ours; clamping would heap samples on T − 1, where nothing but noise is left to judge).
    """
    total = int(grid.timesteps[-1]) + 1
    end = grid.timesteps[indices.end.to(grid.timesteps.device)].to(generator.device)
    width = (total - end).clamp(max=max(1, round(reach * total / grid.segments)))
    share = torch.rand(len(end), generator=generator, device=generator.device, dtype=torch.float64)
    return end + torch.floor(share * width).long()

"""Score distillation: distribution matching (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867; paper sec. 3.3, eq. 16).

The student's pictures have a density of their own, whose score a second network ("fake") learns from them. The
difference of both scores at a noisy version of a picture says in which direction the data are denser than the pictures;
it is given to the picture as if it were a gradient. Networks are asked for x0 and not for the score: with
x_t = sqrt(a) x0 + sqrt(1 − a) noise the scores differ by sqrt(a) / (1 − a) times the difference of the x0s.
"""

import torch

from hypersd_export.diffusion import PredictionType
from trainer.losses.tscd import level


def matching_direction(x0: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """What is taken for dKL/dx0 (DMD eq. 7 and 8): (x̂0_fake − x̂0_real) / mean |x0 − x̂0_real|, without gradient.

    x0: the student's samples [B, …]; real, fake: both networks' x̂0 at the same noisy version of them. Going against it
    moves x0 towards the real network's opinion and away from the fake one's. The mean is over each sample's elements,
    so that all noise levels count alike; a sample that is real's opinion exactly has the direction 0 and not NaN.
    """
    x0, real, fake = (tensor.detach().float() for tensor in (x0, real, fake))
    size = level((x0 - real).abs().flatten(1).mean(1), x0.ndim)
    return torch.where(size > 0, (fake - real) / size.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


def matching_loss(x0: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Per sample [B]: half the mean square to the pseudo-target x0 − direction, so that its gradient to x0 is
    direction / elements (DMD2's code); the value itself says how far apart the two scores are."""
    target = (x0 - direction).detach()
    return 0.5 * (x0 - target).square().flatten(1).mean(1)


def denoising_loss(
    out: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, a: torch.Tensor, prediction_type: PredictionType
) -> torch.Tensor:
    """What the fake network minimises, per sample [B]: the mean square to what it predicts at
    x_t = sqrt(a) x0 + sqrt(1 − a) noise: noise, x0, or v = sqrt(a) noise − sqrt(1 − a) x0. `a` broadcasts to x0."""
    if prediction_type is PredictionType.EPSILON:
        target = noise
    elif prediction_type is PredictionType.SAMPLE:
        target = x0
    else:
        target = a.sqrt() * noise - (1 - a).sqrt() * x0
    return (out - target).square().flatten(1).mean(1)

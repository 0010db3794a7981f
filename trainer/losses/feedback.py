"""Human feedback: what the student minimises (arXiv 2404.13686, eq. 13 and 15), and what a preference is learned by."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def hinge(scores: Sequence[torch.Tensor], weights: Sequence[float], targets: Sequence[float]) -> torch.Tensor:
    """Σ_d w_d · ReLU(α_d − r_d) per sample [B], of one [B] of scores for each reward.

    A picture that has reached a reward's target gets no gradient from it: the way to stop before the reward is only
    exploited (eq. 13; there w = 1, and α is not disclosed).
    """
    terms = [w * F.relu(alpha - score) for score, w, alpha in zip(scores, weights, targets, strict=True)]
    return torch.stack(terms).sum(0)


def bradley_terry(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """−log p(better is preferred) = softplus(worse − better) per pair [B] of scores (Bradley & Terry 1952, as in
    ImageReward, arXiv 2304.05977, eq. 1): log 2 where both are equal."""
    return F.softplus(worse - better)

"""Rewards: differentiable scores of pictures, for losses and for figures of a running training. Never the judge.

A judge that had been trained against would have no word left on the result, so `benchmarks.judge` is another model, and
`trainer` never imports `benchmarks`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Reward(Protocol):
    """Pictures float32 [B, 3, H, W] in [-1, 1] and their B prompts → a score each, float32 [B]; higher is better.

    The gradient reaches the pictures and nothing else.
    """

    def __call__(self, images: "torch.Tensor", prompts: Sequence[str]) -> "torch.Tensor":
        """The score of each picture with its own prompt."""
        ...

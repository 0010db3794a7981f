"""Group norms whose squares half cannot hold: their input is made smaller first, which a norm does not notice.

Core ML computes a group norm's variance op by op, so that (x - mean)² has to fit into half: from 256 on it is an
infinity, and all that such a group gives is 0. A norm of x / s with ε / s² is the norm of x with ε, and dividing by a
power of two is exact. This file owns its torch import.
"""

from collections.abc import Mapping

import torch
from torch.nn.functional import group_norm

LEAST_HALF = 2.0**-24
"""The smallest positive half: an ε below it would be 0, and a group whose values are all the same 0 / 0."""


class ScaledNorm(torch.nn.Module):
    """A `GroupNorm` of its input over `scale`, a power of two."""

    def __init__(self, norm: torch.nn.GroupNorm, scale: float) -> None:
        super().__init__()
        self.norm, self.scale = norm, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of [N, C, …], with the inner one's weight, bias and ε."""
        norm = self.norm
        eps = max(norm.eps / self.scale**2, LEAST_HALF)
        return group_norm(x * (1.0 / self.scale), norm.num_groups, norm.weight, norm.bias, eps)


def scale_norms(module: torch.nn.Module, scales: Mapping[str, float]) -> None:
    """Put a `ScaledNorm` in the place of each of these group norms, in place."""
    for name, scale in scales.items():
        norm = module.get_submodule(name)
        assert isinstance(norm, torch.nn.GroupNorm), name
        module.set_submodule(name, ScaledNorm(norm, scale))

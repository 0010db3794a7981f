"""Exponential moving average of a module's weights."""

import copy

import torch
from torch import nn


class Ema:
    """`average ← decay·average + (1 − decay)·module`, with the decay warmed up as (1 + n) / (10 + n).

    `module` is a float32 copy without gradients, always in eval mode.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one step towards `module`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average: list[torch.Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(average, [p.detach() for p in module.parameters()], 1 - decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)

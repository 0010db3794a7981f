"""LoRAs beside a module's weights instead of in them: graphs for several LoRAs then have these weights in common.

    y = W x + scale · alpha / rank · up (down x)

This file owns its torch import.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hypersd_export.model.fuse import match
from hypersd_export.model.lora import Delta


class WithLora(torch.nn.Module):
    """A linear layer or convolution `layer`, and the pairs (`down`, `up`) of its LoRAs, scales folded into `up`."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.downs, self.ups = torch.nn.ModuleList(), torch.nn.ModuleList()

    def add(self, delta: Delta, scale: float) -> None:
        """Another LoRA; `match` has held its shapes against the layer's."""
        layer: Any = self.layer
        up = delta.up.float().flatten(1) * (scale * delta.multiplier)
        if isinstance(layer, torch.nn.Conv2d):
            geometry: dict[str, Any] = {
                name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            }
            down: torch.nn.Module = torch.nn.Conv2d(layer.in_channels, delta.rank, bias=False, **geometry)
            upper: torch.nn.Module = torch.nn.Conv2d(delta.rank, layer.out_channels, 1, bias=False)
        else:
            down = torch.nn.Linear(layer.in_features, delta.rank, bias=False)
            upper = torch.nn.Linear(delta.rank, layer.out_features, bias=False)
        for module, weight in ((down, delta.down.float()), (upper, up)):
            own: Any = module.weight
            own.data = weight.reshape(own.shape).to(layer.weight.dtype)
        self.downs.append(down)
        self.ups.append(upper)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer with its LoRAs fused."""
        y: torch.Tensor = self.layer(x)
        for down, up in zip(self.downs, self.ups, strict=True):
            y = y + up(down(x))
        return y


def keep_apart(module: torch.nn.Module, loras: Sequence[tuple[Mapping[str, Delta], float]], *, component: str) -> None:
    """Put LoRAs, each with its scale, beside the weights of the modules that they change, in place.

    Raises `LoraError` as `match` does.
    """
    matched = [(match(module, deltas, component=component), scale) for deltas, scale in loras]
    for deltas, scale in matched:
        for name, delta in deltas.items():
            found = module.get_submodule(name)
            layer = found if isinstance(found, WithLora) else WithLora(found)
            layer.add(delta, scale)
            module.set_submodule(name, layer)

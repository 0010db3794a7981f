"""The free axes of graphs that take a range of shapes, and the shapes at the range's ends. No torch here."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from hypersd_export.graphs.spec import Axis, Component, Shapes

Range = tuple[int, int]


class Ranges(Protocol):
    """What is free, each (least, most): images at once, and sides in pixels, multiples of `unit`. A `bundle.span.Span`
    is one."""

    @property
    def batch(self) -> Range:
        """Images."""

    @property
    def width(self) -> Range:
        """Pixels."""

    @property
    def height(self) -> Range:
        """Pixels."""

    @property
    def unit(self) -> int:
        """Pixels."""


def traced_with(ranges: Ranges, shapes: Shapes) -> Shapes:
    """The shapes that graphs are traced with: torch.export takes an axis of one row for a constant."""
    return resized(shapes, batch=max(2, shapes.batch)) if ranges.batch[1] > ranges.batch[0] else shapes


def corners(ranges: Ranges, shapes: Shapes) -> tuple[Shapes, ...]:
    """The least and the largest shapes, other than `shapes` itself."""
    ends = [
        resized(shapes, batch=ranges.batch[i], width=ranges.width[i], height=ranges.height[i]) for i in range(2)
    ]  # fmt: skip
    return tuple(each for each in dict.fromkeys(ends) if each != shapes)


def free_axes(ranges: Ranges, component: Component, shapes: Shapes) -> dict[str, dict[int, Axis]]:
    """The free axes of a component's inputs, by input and number; a UNet's rows are all branches of the images."""

    def sides(multiple: int) -> dict[int, Axis | None]:
        named = ((2, "height", ranges.height), (3, "width", ranges.width))
        return {i: _axis(name, (low // ranges.unit, high // ranges.unit), multiple) for i, name, (low, high) in named}

    images, cells = _axis("batch", ranges.batch), ranges.unit // shapes.vae_scale
    if component in (Component.TEXT_ENCODER, Component.TEXT_ENCODER_2):
        return _free({"input_ids": {0: images}})
    if component is Component.VAE_ENCODER:
        return _free({"sample": {0: images, **sides(ranges.unit)}})
    if component is Component.VAE_DECODER:
        return _free({"latent_sample": {0: images, **sides(cells)}})
    rows = _axis("batch", ranges.batch, shapes.unet_batch // shapes.batch)
    texts = ("encoder_hidden_states", *(("text_embeds", "time_ids") if shapes.pooled else ()))
    return _free({"sample": {0: rows, **sides(cells)}, **{name: {0: rows} for name in texts}})


def resized(shapes: Shapes, *, batch: int, width: int | None = None, height: int | None = None) -> Shapes:
    """The same shapes for so many images, and of this size."""
    return dataclasses.replace(
        shapes,
        batch=batch,
        unet_batch=batch * (shapes.unet_batch // shapes.batch),
        latent_width=shapes.latent_width if width is None else width // shapes.vae_scale,
        latent_height=shapes.latent_height if height is None else height // shapes.vae_scale,
    )


def _axis(name: str, span: Range, multiple: int = 1) -> Axis | None:
    """The axis of a range; None for one that has a single size."""
    return Axis(name=name, low=span[0], high=span[1], multiple=multiple) if span[0] < span[1] else None


def _free(axes: Mapping[str, Mapping[int, Axis | None]]) -> dict[str, dict[int, Axis]]:
    """Without the axes that are fixed, and without inputs that have none left."""
    kept = {name: {i: axis for i, axis in listed.items() if axis is not None} for name, listed in axes.items()}
    return {name: listed for name, listed in kept.items() if listed}

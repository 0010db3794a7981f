"""Weights as palettes: 2^bits values for each weight tensor (or group of its channels), and an index for each element.

The values are chosen by k-means. In one dimension that is cheap and needs no random start: the data are counted once,
the cells are intervals, and a cell's mean is a difference of two running sums. coremltools' own k-means wants
scikit-learn and takes minutes for a UNet.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.targets.coreml import GENERATIONS, package, vendor

Values = npt.NDArray[np.floating[Any]]

MIN_ELEMENTS = 2048
"""Smaller weights stay as they are: a palette of 8 bits alone is as large as 256 of them."""
GROUP_SIZE = 16
"""Output channels that share a palette, where the deployment target has such palettes."""
GROUPED_GENERATION = 18
ROUNDS = 100
MIXED = "mixed"
"""What stands in place of the bits where weights have different ones."""
_OPS = frozenset({"conv", "linear"})
_EXCEPT = "p_vae_"
"""Weights of the VAE begin so in a package of the whole pipeline: it is small, and the first to show."""


def build(source: Path, path: Path, *, bits: int | Mapping[str, int | None], deployment_target: str) -> dict[str, Any]:
    """Write the package `source` with the weights of its convolutions and linear layers as palettes, as `path`.

    bits: of all, or of each by its name (`weights`), where None leaves one as it is. Embeddings, biases and the VAE
    stay. From iOS 18 on each `GROUP_SIZE` output channels have their own palette, where that divides their number.
    Returns what the manifest says: the package's figures, and how much became palettes.
    """
    shapes = weights(vendor.read_model(source / package.MODEL_FILE))
    widths = dict.fromkeys(shapes, bits) if isinstance(bits, int) else {name: bits[name] for name in shapes}
    chosen = {name: width for name, width in widths.items() if width is not None}
    palettes = {
        name: (functools.partial(palette, bits=width), group_size(shapes[name], deployment_target))
        for name, width in chosen.items()
    }
    with package.loaded(source, path.parent) as model:
        package.save(vendor.palettize(model, palettes), path)
    grouped = GENERATIONS[deployment_target] >= GROUPED_GENERATION
    figures = {
        "bits": bits if isinstance(bits, int) else MIXED, "group_size": GROUP_SIZE if grouped else None,
        "weights": len(chosen),
    }  # fmt: skip
    return {**package.facts(path), "bytes_before": package.facts(source)["bytes"], "palettes": figures}


def group_size(shape: tuple[int, ...], deployment_target: str) -> int | None:
    """How many output channels of a weight of this shape share a palette; None where all do."""
    grouped = GENERATIONS[deployment_target] >= GROUPED_GENERATION
    return GROUP_SIZE if grouped and shape[0] % GROUP_SIZE == 0 else None


def restored(values: Values, *, bits: int, size: int | None) -> Values:
    """A weight as its palettes give it back; `size` is how many output channels share one, None for all."""
    parts = [values] if size is None else np.split(values, len(values) // size)
    found = (palette(part, bits=bits) for part in parts)
    return np.concatenate([levels[index] for levels, index in found]).reshape(values.shape)


def weights(model: Any) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the weights that become palettes, output channels first, of a program's protobuf."""
    readers: dict[str, set[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for op in package.main_block(model).operations:
        for role, argument in op.inputs.items():
            for item in argument.arguments:
                readers.setdefault(item.name, set()).add(op.type if role == "weight" else role)
        if op.type == "const":
            tensor = op.outputs[0].type.tensorType
            shapes[op.outputs[0].name] = tuple(int(axis.constant.size) for axis in tensor.dimensions)
    return {
        name: shape
        for name, shape in shapes.items()
        if math.prod(shape) > MIN_ELEMENTS and readers.get(name, {""}) <= _OPS and not name.startswith(_EXCEPT)
    }


def palette(values: Values, *, bits: int) -> tuple[Values, npt.NDArray[np.uint8]]:
    """(the 2^bits values that stand for `values`, rising, in their type; the index of each element, flat).

    k-means from a start that is near its end: points spread by the cube root of the density, as the best quantiser of
    many levels has them.
    """
    flat = values.reshape(-1)
    points, counts, index = _counted(flat)
    centres = _means(points, counts, _start(points, counts, 1 << bits))
    best = centres.astype(values.dtype)
    nearest = np.searchsorted((best[1:].astype(np.float64) + best[:-1]) / 2, points)
    return best, nearest.astype(np.uint8)[index]


def _counted(flat: Values) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Distinct values, rising, how often each is there, and where each element's value stands among them."""
    if flat.dtype != np.float16:
        points, index, counts = np.unique(flat, return_inverse=True, return_counts=True)
        return points.astype(np.float64), counts, index
    codes = np.ascontiguousarray(flat).view(np.uint16)  # half has few values: counting is cheaper than sorting
    all_counts = np.bincount(codes, minlength=1 << 16)
    there = np.flatnonzero(all_counts)
    values = there.astype(np.uint16).view(np.float16).astype(np.float64)
    order = np.argsort(values, kind="stable")
    place = np.empty(1 << 16, np.int64)
    place[there[order]] = np.arange(len(there))
    return values[order], all_counts[there[order]], place[codes]


def _start(points: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float64]:
    """`size` centres, rising, between the least and the largest point."""
    bins = np.linspace(points[0], points[-1], 1 + 4 * size)
    density, _ = np.histogram(points, bins=bins, weights=counts)
    mass = np.concatenate([[0.0], np.cumsum(np.cbrt(density))])
    targets = (np.arange(size) + 0.5) / size * mass[-1]
    found: npt.NDArray[np.float64] = np.interp(targets, mass, bins)
    return found


def _means(
    points: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], centres: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Lloyd's rounds until nothing moves; a centre without points stays where it is."""
    number = np.concatenate([[0.0], np.cumsum(counts)])
    total = np.concatenate([[0.0], np.cumsum(counts * points)])
    for _ in range(ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(points, (centres[1:] + centres[:-1]) / 2), [len(points)]])
        inside, sums = np.diff(number[edges]), np.diff(total[edges])
        moved = np.where(inside > 0, sums / np.maximum(inside, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres

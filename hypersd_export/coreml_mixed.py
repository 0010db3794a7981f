"""A UNet's package with palettes of mixed widths: measure what each layer's width costs, choose, build, measure again.

What was measured does not depend on the budget, so that it is a stage of its own: another budget costs a choice and a
package.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_export.errors import BuildError
from hypersd_export.targets.coreml import GENERATIONS, PALETTES, package, palettize
from hypersd_export.targets.coreml.mixed import Option, blocks, choose, scaled, smallest, stored_bytes
from hypersd_export.targets.coreml.palettize import group_size, restored
from hypersd_export.verify.mil import open_package
from hypersd_export.verify.sensitivity import Array, Feeds, constants, output_errors, relative_error

EACH_LAYER = 50_000_000
"""Up to so many elements of weights each layer is measured by itself, at each width, on every call."""
MEASURED_BITS = (4, 2)
"""Beyond it each block of the UNet is measured, at these widths and on the first call; other widths follow from the
weights' own errors."""
Progress = Callable[[str], None]


def rate(source: Path, calls: Sequence[Feeds], *, deployment_target: str, progress: Progress) -> dict[str, Any]:
    """What the output of the package `source` loses where a layer (or block) has palettes, at each width.

    calls: by the package's names. Returns plain JSON: `by` ("layer" or "block"), and `layers` by name, each with the
    `weights` in it and its `options`, those of `targets.coreml.mixed`.
    """
    opened = open_package(source)
    shapes = palettize.weights(opened.file.model)
    alone = sum(map(math.prod, shapes.values())) <= EACH_LAYER
    groups = {name: [name] for name in shapes} if alone else blocks(shapes)
    widths = [bits for bits, first in PALETTES.items() if GENERATIONS[deployment_target] >= first]
    measured = widths if alone else [bits for bits in widths if bits in MEASURED_BITS]
    own: dict[str, dict[int, float]] = {name: {} for name in groups}
    itemsize = {}

    def weights() -> Iterator[Mapping[str, Array]]:
        for number, (name, names) in enumerate(groups.items(), start=1):
            progress(f"what {number} of {len(groups)} parts of the UNet lose with palettes")
            whole = constants(opened, names)
            itemsize[name] = next(iter(whole.values())).itemsize
            for bits in widths:
                small = {each: restored(value, bits=bits, size=group_size(value.shape, deployment_target))
                         for each, value in whole.items()}  # fmt: skip
                own[name][bits] = sum(_square(small[each] - value) for each, value in whole.items())
                if bits in measured:
                    yield small

    found = iter(output_errors(opened, calls if alone else calls[:1], weights))
    layers = {}
    for name, names in groups.items():
        errors = scaled({bits: next(found) for bits in measured}, own[name])
        sizes = {
            bits: sum(stored_bytes(shapes[each], bits, itemsize=itemsize[name], deployment_target=deployment_target)
                      for each in names)
            for bits in (None, *widths)
        }  # fmt: skip
        options = [Option(bits=b, bytes=size, error=0.0 if b is None else errors[b]) for b, size in sizes.items()]
        layers[name] = {"weights": names, "options": [asdict(option) for option in options]}
    return {"by": "layer" if alone else "block", "layers": layers}


def build(
    source: Path, path: Path, *, rated: Mapping[str, Any], budget: float, calls: Sequence[Feeds], deployment_target: str
) -> dict[str, Any]:
    """Write the package `source` with palettes as `path`, in at most `budget` times the bytes that it has.

    rated: what `rate` returned. Returns what the manifest says: the package's figures, each layer's bits and the error
    that is expected of it, and the output's error in dB, as the sum of the layers' and as measured.

    Raises `BuildError` for a budget that cannot be met, with the smallest that can.
    """
    layers = {name: [Option(**option) for option in each["options"]] for name, each in rated["layers"].items()}
    whole = package.facts(source)["bytes"]
    rest = whole - sum(option.bytes for options in layers.values() for option in options if option.bits is None)
    if smallest(layers) + rest > budget * whole:
        least = math.ceil((smallest(layers) + rest) / whole * 1000) / 1000
        raise BuildError(
            f"--size-budget {budget:g}: the smallest that palettes make of this UNet is {least:g} of its "
            f"{whole / 1e6:.1f} MB; ask for that or more"
        )
    chosen = choose(layers, math.floor(budget * whole) - rest)
    bits = {name: option.bits for layer, option in chosen.items() for name in rated["layers"][layer]["weights"]}
    built = palettize.build(source, path, bits=bits, deployment_target=deployment_target)
    exact, found = open_package(source), open_package(path)
    errors = [relative_error(found.evaluate(feeds)[name], value)
              for feeds in calls for name, value in exact.evaluate(feeds).items()]  # fmt: skip
    mixed = {
        "budget": budget,
        "by": rated["by"],
        "layers": {
            name: {"bits": option.bits, "error": float(f"{option.error:.3g}")} for name, option in chosen.items()
        },
        "expected_db": _db(sum(option.error for option in chosen.values())),
        "measured_db": _db(sum(errors) / len(errors)),
    }
    return {**built, "palettes": {**built["palettes"], **mixed}}


def _square(values: Array) -> float:
    return float(np.square(values.astype(np.float64)).sum())


def _db(error: float) -> float:
    """A relative squared error in decibels; 200 for none."""
    return round(-10 * math.log10(max(error, 1e-20)), 2)

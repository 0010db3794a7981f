"""Core ML: packages (`.mlpackage`) of ML programs, converted on any machine; running them needs a Mac or an iPhone.

`convert` turns a graph into a package; `palettize`, `quantize` and `chunk` make another one of a package; `vendor` is
the only file that imports coremltools. This module names what can be asked for, and imports nothing heavy.
"""

from collections.abc import Mapping

from hypersd_export.errors import OptionError

GENERATIONS: Mapping[str, int] = {
    "iOS16": 16, "iOS17": 17, "iOS18": 18, "macOS13": 16, "macOS14": 17, "macOS15": 18,
}  # fmt: skip
"""The deployment targets, and the iOS version whose programs each of them runs (macOS 13 those of iOS 16)."""
DEFAULT_TARGET = "iOS17"
ATTENTIONS = ("original", "split-einsum", "split-einsum-v2")
COMPUTE_UNITS = ("all", "cpu-only", "cpu-and-gpu", "cpu-and-ne")
"""What the system may run a package on ("ne": the Neural Engine). Not part of a package: who loads it says it."""
LAYOUTS = ("plain", "apple")
PALETTES: Mapping[int, int] = {8: 16, 6: 16, 4: 16, 3: 18, 2: 16}
"""Bits of an index into a palette of weights, and the first generation that stores such indices."""
QUANTIZED: Mapping[str, int] = {"int8": 16, "int4": 18}
"""Forms of weights as integers and scales, and the first generation that stores them."""
SINGLE_GRAPH_GENERATION = 17


def check_options(
    *, deployment_target: str, attention: str, palettize: int | None, quantize: str | None, size_budget: float | None,
    chunk_unet: bool, compute_units: str, layout: str, single_graph: bool, batch: int,
) -> None:  # fmt: skip
    """Refuse, before anything is loaded, what can be refused without knowing the model. Raises `OptionError`."""
    _check_choice("--deployment-target", deployment_target, tuple(GENERATIONS))
    _check_choice("--attention", attention, ATTENTIONS)
    _check_choice("--compute-units", compute_units, COMPUTE_UNITS)
    _check_choice("--layout", layout, LAYOUTS)
    generation = GENERATIONS[deployment_target]
    _check_compression(deployment_target, palettize, quantize, size_budget)
    if single_graph:
        if generation < SINGLE_GRAPH_GENERATION:
            raise OptionError(
                f"--single-graph with --deployment-target {deployment_target}: it needs iOS17 or macOS14, or later"
            )
        for asked, option in (
            (chunk_unet, "--chunk-unet"), (layout == "apple", "--layout apple"),
            (size_budget is not None, "--size-budget"),
        ):  # fmt: skip
            if asked:
                raise OptionError(f"--single-graph with {option}: that is about a package of the UNet alone; give one")
    if batch != 1 and (single_graph or layout == "apple"):
        which = "--single-graph to Core ML" if single_graph else "--layout apple"
        raise OptionError(f"--batch {batch} with {which}: such packages make one picture in a call; leave it out")


def _check_compression(
    deployment_target: str, palettize: int | None, quantize: str | None, size_budget: float | None
) -> None:
    generation = GENERATIONS[deployment_target]
    said = [
        f"{option} {value}"
        for option, value in (("--palettize", palettize), ("--quantize", quantize), ("--size-budget", size_budget))
        if value is not None
    ]
    if len(said) > 1:
        raise OptionError(f"{said[0]} with {said[1]}: weights are stored in one of these ways; give one")
    if palettize is not None:
        stored = [bits for bits, first in PALETTES.items() if generation >= first]
        if palettize not in stored:
            later = " (iOS18 and macOS15 store 3 too)" if palettize in PALETTES else ""
            listed = ", ".join(map(str, stored))
            raise OptionError(f"--palettize {palettize}: {deployment_target} stores {listed} bits a weight{later}")
    if quantize is not None:
        _check_choice("--quantize", quantize, tuple(QUANTIZED))
        if generation < QUANTIZED[quantize]:
            raise OptionError(f"--quantize {quantize}: {deployment_target} stores int8 (iOS18 and macOS15 int4 too)")
    if size_budget is not None and not 0 < size_budget < 1:
        raise OptionError(
            f"--size-budget {size_budget:g}: a share of the UNet package's size between 0 and 1, such as 0.3"
        )


def _check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{option} {value}: choose {', '.join(known[:-1])} or {known[-1]}")

"""Which layer's weights get how many bits: the least error that fits into a budget of bytes.

Errors are squared and relative, and those of several layers add up, as those of independent roundings do. Who calls
measures them; here is only the choice.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hypersd_export.targets.coreml.palettize import group_size

RECORD = 64
"""Bytes of a weight's record in the weights file, and what its data are aligned to."""
OP_BYTES = 512
"""More than a weight's op with indices and palette takes in the program, beyond the constant in its place."""
_BLOCKS = re.compile(r"(?:down_blocks_\d+|up_blocks_\d+|mid_block)_[a-z]+_\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A layer at so many bits a weight, None for the weights as they are: its bytes, and the error of the output."""

    bits: int | None
    bytes: int
    error: float


def choose(layers: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """An option for each layer, with at most `budget` bytes together.

    Greedy: from the largest options down, each time by the one that adds the least error for a byte that it saves;
    when it fits, what is left of the budget goes where it takes most error away for a byte. On equal terms the first
    layer is taken. Raises `ValueError` where not even the smallest options fit.
    """
    if smallest(layers) > budget:
        raise ValueError(f"{budget} bytes are less than the {smallest(layers)} of the smallest options")
    chosen = {name: max(options, key=lambda option: option.bytes) for name, options in layers.items()}
    total = sum(option.bytes for option in chosen.values())
    while total > budget:
        smaller = [
            ((option.error - chosen[name].error) / (chosen[name].bytes - option.bytes), name, option)
            for name, options in layers.items() for option in options if option.bytes < chosen[name].bytes
        ]  # fmt: skip
        total += _take(min(smaller, key=_first), chosen)
    while True:
        better = [
            ((option.error - chosen[name].error) / max(option.bytes - chosen[name].bytes, 1), name, option)
            for name, options in layers.items() for option in options
            if option.error < chosen[name].error and total + option.bytes - chosen[name].bytes <= budget
        ]  # fmt: skip
        if not better:
            return chosen
        total += _take(min(better, key=_first), chosen)


def smallest(layers: Mapping[str, Sequence[Option]]) -> int:
    """The bytes of all layers at their smallest."""
    return sum(min(option.bytes for option in options) for options in layers.values())


def _first(move: tuple[float, str, Option]) -> float:
    return move[0]


def _take(move: tuple[float, str, Option], chosen: dict[str, Option]) -> int:
    """Make a move; returns the bytes that it adds."""
    _, name, option = move
    added = option.bytes - chosen[name].bytes
    chosen[name] = option
    return added


def stored_bytes(shape: tuple[int, ...], bits: int | None, *, itemsize: int, deployment_target: str) -> int:
    """At most the bytes that a weight of this shape takes in a package: with its palettes, or as it is (None)."""
    elements = math.prod(shape)
    if bits is None:
        return RECORD + _aligned(elements * itemsize)
    size = group_size(shape, deployment_target)
    palettes = 1 if size is None else shape[0] // size
    indices, values = -(-elements * bits // 8), palettes * itemsize << bits
    return 2 * RECORD + _aligned(indices) + _aligned(values) + OP_BYTES


def blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """The weights of a UNet by the part that they belong to, such as down_blocks_0_resnets_1; what is in none, such as
    the time embedding, is one part, "others". In the order of the first weight of each."""
    found: dict[str, list[str]] = {}
    for name in names:
        part = _BLOCKS.search(name)
        found.setdefault("others" if part is None else part[0], []).append(name)
    return found


def scaled(errors: Mapping[int, float], weight_errors: Mapping[int, float]) -> dict[int, float]:
    """An output's errors at all bits of `weight_errors`, measured at some: at the others the next measured one below
    (else above), times the ratio of the weights' own errors there, which it follows where they are small."""
    found = {}
    for bits, own in weight_errors.items():
        near = max((m for m in errors if m <= bits), default=min(errors))
        found[bits] = errors[near] * (own / weight_errors[near] if weight_errors[near] else 1.0)
    return found


def _aligned(size: int) -> int:
    return -(-size // RECORD) * RECORD

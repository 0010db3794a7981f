"""One package as two, one behind the other, for devices that do not load a large one (an iPhone's limit is near 1 GB).

The program is cut where both sides have about half of the weights and little goes across. What goes across is an
output of the first package and an input of the second, in float32, which holds every half exactly: the chain computes
what the whole does. Only the files are read and written, a weight at a time; nothing is converted again.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hypersd_export.errors import BuildError
from hypersd_export.targets.coreml import package, vendor

BALANCE = (0.45, 0.55)
"""The share of the weights that the first package may have, if there is a choice."""
FLOAT16, FLOAT32 = 10, 11
"""Element types in a program's protobuf."""
FEATURE_FLOAT32 = 65568
"""float32 in the description of a model's inputs and outputs."""
_RECORD = struct.Struct("<IIQQ")
"""How a weight's record begins: a mark, its element type, its size in bytes, and where it is."""
_ALIGNED = 64

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Program:
    """A program's ops by their place: what computes, what is constant (weights, compressed or not), who reads whom."""

    operations: Sequence[Any]
    outputs: Sequence[str]
    computing: list[int] = field(default_factory=list)
    constant: dict[str, int] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    """Which of `computing` makes a value, counted from 0."""
    last: dict[str, int] = field(default_factory=dict)
    """Which of `computing` reads a value last; their number for the program's outputs."""
    types: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place, op in enumerate(self.operations):
            if op.type == "const" or op.type.startswith("constexpr_"):
                self.constant.update((output.name, place) for output in op.outputs)
                continue
            number = len(self.computing)
            self.last.update((name, number) for name in reads(op))
            self.made.update((output.name, number) for output in op.outputs)
            self.types.update((output.name, output.type) for output in op.outputs)
            self.computing.append(place)
        self.last.update((name, len(self.computing)) for name in self.outputs)

    def constants_of(self, places: Iterable[int]) -> set[int]:
        """The places of the constants that the ops at these places read, directly or through compressed weights."""
        found: set[int] = set()
        names = [name for place in places for name in reads(self.operations[place])]
        while names:
            place = self.constant.get(names.pop(), -1)
            if place >= 0 and place not in found:
                found.add(place)
                names += reads(self.operations[place])
        return found

    def crossing(self, cut: int) -> list[str]:
        """What the first `cut` computing ops make and others read, in the order in which it is made."""
        return [name for name, number in self.made.items() if number < cut <= self.last.get(name, -1)]

    def cast_to(self, element: int) -> tuple[Any, Any]:
        """A cast to this element type that the program has, and the constant that names the type."""
        for place in self.computing:
            op = self.operations[place]
            if op.type == "cast" and element_of(op.outputs[0].type) == element:
                return op, self.operations[self.constant[op.inputs["dtype"].arguments[0].name]]
        raise BuildError("a program in half without a cast at its ends cannot be cut: leave --chunk-unet away")


def reads(op: Any) -> list[str]:
    """The values that an op reads by name."""
    return [item.name for argument in op.inputs.values() for item in argument.arguments if item.name]


def element_of(kind: Any) -> int:
    """The element type of a value's type."""
    return int(kind.tensorType.dataType)


def shape_of(kind: Any) -> list[int]:
    """The shape of a value's type."""
    return [int(axis.constant.size) for axis in kind.tensorType.dimensions]


def build(source: Path, first: Path, second: Path) -> dict[str, Any]:
    """Write the package `source` as two; what the first gives and the program's own inputs feed the second.

    Returns what the manifest says: each chunk's figures, and the names of what goes across. Raises `BuildError` for a
    program that cannot be cut.
    """
    model = vendor.read_model(source / package.MODEL_FILE)
    weights: Bytes = np.memmap(source / package.WEIGHTS_FILE, dtype=np.uint8, mode="r")
    block = package.main_block(model)
    program = Program(block.operations, block.outputs)
    cut = choose_cut(program, weights)
    across = {name: f"{name}_out" if element_of(program.types[name]) == FLOAT16 else name
              for name in program.crossing(cut)}  # fmt: skip
    for path, places, edit in (
        (first, program.computing[:cut], _give),
        (second, program.computing[cut:], _take),
    ):
        part = type(model)()
        part.CopyFrom(model)
        kept = sorted({*places, *program.constants_of(places)})
        edit(part, program, [program.operations[place] for place in kept], across)
        (path / package.WEIGHTS_FILE).parent.mkdir(parents=True)
        with (path / package.WEIGHTS_FILE).open("wb") as stream:
            _write_weights(package.main_block(part).operations, weights, stream)
        package.write(path, part)
    return {"chunks": [package.facts(path) for path in (first, second)], "across": list(across.values())}


def choose_cut(program: Program, weights: Bytes) -> int:
    """How many computing ops go before the cut: of the places where the halves are near enough, the one where least
    crosses."""
    seen: set[int] = set()
    sizes = [0]
    for place in program.computing:
        new = program.constants_of([place]) - seen
        seen |= new
        sizes.append(sum(_size(blob, weights) for each in new for blob in _blobs(program.operations[each])))
    share = np.cumsum(sizes) / max(1, sum(sizes))
    places = [n for n in range(1, len(program.computing)) if _all_float(program, n)]
    if not places:
        raise BuildError(f"a program of {len(program.computing)} ops cannot be cut in two: leave --chunk-unet away")
    near = [n for n in places if BALANCE[0] <= share[n] <= BALANCE[1]]
    if not near:
        return min(places, key=lambda n: abs(share[n] - 0.5))
    crossing = {n: sum(prod(shape_of(program.types[name])) for name in program.crossing(n)) for n in near}
    return min(near, key=lambda n: (crossing[n], abs(share[n] - 0.5)))


def _all_float(program: Program, cut: int) -> bool:
    """Whether something crosses, and it is floating-point: the ends of a package have no other type that is exact."""
    crossing = program.crossing(cut)
    return bool(crossing) and all(element_of(program.types[name]) in (FLOAT16, FLOAT32) for name in crossing)


def _give(part: Any, program: Program, ops: Sequence[Any], across: Mapping[str, str]) -> None:
    """Make `part` the first package: these ops, and outputs for what goes across."""
    casts = [op for name, port in across.items() if port != name
             for op in _cast(program, name, port, program.types[name], FLOAT32)]  # fmt: skip
    block = package.main_block(part)
    _replace(block.operations, [*ops, *casts])
    block.outputs[:] = list(across.values())
    del part.description.output[:]
    for name, port in across.items():
        _describe(part.description.output, port, program.types[name])
    _drop_inputs(part)


def _take(part: Any, program: Program, ops: Sequence[Any], across: Mapping[str, str]) -> None:
    """Make `part` the second package: inputs for what goes across, and these ops."""
    casts = [op for name, port in across.items() if port != name
             for op in _cast(program, port, name, program.types[name], FLOAT16)]  # fmt: skip
    _replace(package.main_block(part).operations, [*casts, *ops])
    function = part.mlProgram.functions["main"]
    for name, port in across.items():
        given = function.inputs.add(name=port)
        given.type.CopyFrom(program.types[name])
        given.type.tensorType.dataType = FLOAT32
        _describe(part.description.input, port, program.types[name])
    _drop_inputs(part)


def _cast(program: Program, source: str, result: str, kind: Any, element: int) -> list[Any]:
    """The two ops that make `result` of `source` in another element type, after one that the program has."""
    cast, dtype = (type(op)() for op in program.cast_to(element))
    for op, like, name in zip(
        (dtype, cast), reversed(program.cast_to(element)), (f"{result}_dtype", result), strict=True
    ):
        op.CopyFrom(like)
        op.outputs[0].name = name
        op.attributes["name"].immediateValue.tensor.strings.values[:] = [name]
    cast.outputs[0].type.CopyFrom(kind)
    cast.outputs[0].type.tensorType.dataType = element
    cast.inputs["x"].arguments[0].name = source
    cast.inputs["dtype"].arguments[0].name = dtype.outputs[0].name
    return [dtype, cast]


def _replace(repeated: Any, items: Sequence[Any]) -> None:
    copies = [type(item)() for item in items]
    for copy, item in zip(copies, items, strict=True):
        copy.CopyFrom(item)
    del repeated[:]
    repeated.extend(copies)


def _describe(features: Any, name: str, kind: Any) -> None:
    feature = features.add(name=name)
    feature.type.multiArrayType.shape.extend(shape_of(kind))
    feature.type.multiArrayType.dataType = FEATURE_FLOAT32


def _drop_inputs(part: Any) -> None:
    """Leave out the inputs that no op reads."""
    used = {name for op in package.main_block(part).operations for name in reads(op)}
    for inputs in (part.mlProgram.functions["main"].inputs, part.description.input):
        kept = [given for given in inputs if given.name in used]
        _replace(inputs, kept)


def _blobs(op: Any) -> Iterator[Any]:
    """The references of an op into the weights file."""
    given = [item.value for argument in op.inputs.values() for item in argument.arguments]
    for value in (*op.attributes.values(), *given):
        if value.WhichOneof("value") == "blobFileValue":
            yield value.blobFileValue


def _size(blob: Any, weights: Bytes) -> int:
    return int(_RECORD.unpack(weights[blob.offset : blob.offset + _RECORD.size].tobytes())[2])


def _write_weights(operations: Sequence[Any], weights: Bytes, stream: BinaryIO) -> None:
    """Write the weights that these ops refer to as a file of their own, and let them refer to it."""
    blobs = sorted((blob for op in operations for blob in _blobs(op)), key=lambda blob: int(blob.offset))
    header = bytearray(weights[:_ALIGNED].tobytes())
    header[:4] = struct.pack("<I", len({int(blob.offset) for blob in blobs}))
    stream.write(header)
    moved: dict[int, int] = {}
    for blob in blobs:
        old = int(blob.offset)
        if old not in moved:
            moved[old] = stream.tell()
            record = bytearray(weights[old : old + _ALIGNED].tobytes())
            mark, kind, size, start = _RECORD.unpack_from(record)
            _RECORD.pack_into(record, 0, mark, kind, size, stream.tell() + _ALIGNED)
            stream.write(record)
            stream.write(weights[start : start + size].data)
            stream.write(bytes(-stream.tell() % _ALIGNED))
        blob.offset = moved[old]

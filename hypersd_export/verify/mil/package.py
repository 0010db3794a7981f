"""A package as functions that can be evaluated: what goes in, what comes out, and what is refused."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hypersd_export.errors import BundleError, OptionError
from hypersd_export.verify.mil.file import NUMPY, PackageFile, TensorType, read_package, tensor_type
from hypersd_export.verify.mil.ops import KERNELS
from hypersd_export.verify.mil.run import CONTROL, ROUNDINGS, Run, as_tensor, first_use


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """An input of a function: its type, and where axes of it are free, what the package says about them."""

    kind: TensorType
    listed: tuple[tuple[int, ...], ...] = ()
    """The only shapes that it takes (EnumeratedShapes); none if they are not listed."""
    bounds: tuple[tuple[int, int | None], ...] = ()
    """Least and most of each axis (RangeDim), None for no upper bound; empty if there are none."""

    def allows(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape fits."""
        if not self.kind.allows(shape) or (self.listed and shape not in self.listed):
            return False
        return not self.bounds or all(
            low <= size <= (size if high is None else high)
            for size, (low, high) in zip(shape, self.bounds, strict=True)
        )

    def __str__(self) -> str:
        if self.listed:
            return f"{self.kind.element} of one of the shapes {', '.join(str(list(shape)) for shape in self.listed)}"
        if None in self.kind.shape and self.bounds:
            axes = (
                f"{low}" if low == high else f"{low}…{'' if high is None else high}" for low, high in self.bounds
            )  # fmt: skip
            return f"{self.kind.element} [{', '.join(axes)}]"
        return str(self.kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """One function of a program: its inputs by name in their order, its outputs' names, and its ops."""

    name: str
    inputs: Mapping[str, Input]
    outputs: tuple[str, ...]
    block: Any

    def op_types(self) -> dict[str, int]:
        """How often each op occurs, those of nested blocks included."""
        counts: dict[str, int] = {}
        for op in _walk(self.block):
            counts[op.type] = counts.get(op.type, 0) + 1
        return counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package that can be evaluated: its functions by name, "main" where there is one, and which is the default."""

    file: PackageFile
    functions: Mapping[str, Function]
    default: str

    def function(self, name: str | None = None) -> Function:
        """A function by name, or the default one; raises `OptionError` for a name that the package does not have."""
        chosen = self.default if name is None else name
        if chosen not in self.functions:
            raise OptionError(
                f"{self.file.path} has no function {chosen}: choose from {', '.join(sorted(self.functions))}"
            )
        return self.functions[chosen]

    @torch.no_grad()
    def evaluate(
        self, inputs: Mapping[str, npt.ArrayLike], *, rounding: str = "fp16", function: str | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name, of their declared element types (float32 for fp16 with `rounding` "fp32").

        `inputs` has an array for every input. A number is cast to the declared type if that is a float; an integer or
        boolean input takes values of any type that it can hold exactly.

        Raises:
            OptionError: inputs that do not fit by name, shape or values; a function or rounding that there is not.
            BundleError: an op that is unknown, fails, or gives another shape than the package declares; damaged files.
        """
        run, chosen, values = self._started(inputs, rounding, function)
        return _arrays_of(chosen, run.block(chosen.block, values, chosen.outputs))

    @torch.no_grad()
    def evaluate_with(
        self,
        inputs: Mapping[str, npt.ArrayLike],
        weights: Iterable[Mapping[str, npt.NDArray[Any]]],
        *,
        rounding: str = "fp16",
        function: str | None = None,
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """For each of `weights` the outputs of `evaluate` with these arrays in place of the constants of these names.

        What comes ahead of the first use of a name is not computed again: give the weights in the order of their first
        use. Arrays have the constants' own shapes and element types. Raises as `evaluate`.
        """
        run, chosen, start = self._started(inputs, rounding, function)
        values, done = dict(start), 0
        for changed in weights:
            fork = first_use(chosen.block, changed)
            if fork < done:
                values, done = dict(start), 0
            run.ops(chosen.block, values, chosen.outputs, done, fork)
            done = fork
            own = values | {name: as_tensor(array) for name, array in changed.items()}
            yield _arrays_of(chosen, run.block(chosen.block, own, chosen.outputs, start=fork))

    def _started(
        self, inputs: Mapping[str, npt.ArrayLike], rounding: str, name: str | None
    ) -> tuple[Run, Function, dict[str, Any]]:
        """An evaluation of a function with its inputs in scope, none of its ops run; raises as `evaluate`."""
        if rounding not in ROUNDINGS:
            raise OptionError(f"rounding {rounding}: choose from {' and '.join(ROUNDINGS)}")
        chosen = self.function(name)
        unknown = sorted(set(chosen.op_types()) - set(KERNELS) - {"const", *CONTROL})
        if unknown:
            raise BundleError(
                f"{self.file.path}: the interpreter has no op {', '.join(unknown)}: such a package can be evaluated on "
                "a Mac only"
            )
        run = Run(file=self.file, half=rounding == "fp16")
        values = {
            name: run.settle(as_tensor(array), chosen.inputs[name].kind)
            for name, array in _arrays(self.file.path, chosen, inputs).items()
        }
        return run, chosen, values


def open_package(path: str | Path) -> Package:
    """Read a `.mlpackage` folder; weights are read when they are needed.

    Raises `BundleError` for one that is damaged or no ML program, `MissingBackend` without coremltools.
    """
    file = read_package(Path(path))
    protos = file.model.mlProgram.functions
    functions = {name: _function(file, name, proto) for name, proto in protos.items()}
    if not functions:
        raise BundleError(f"{path} has no function: export it again")
    default = file.model.description.defaultFunctionName or ("main" if "main" in functions else next(iter(functions)))
    return Package(file=file, functions=functions, default=default)


def _function(file: PackageFile, name: str, proto: Any) -> Function:
    if proto.opset not in proto.block_specializations:
        raise BundleError(f"{file.path}: function {name} has no ops for its opset {proto.opset!r}: export it again")
    block = proto.block_specializations[proto.opset]
    description = file.model.description
    own = next((each for each in description.functions if each.name == name), description)
    types = {feature.name: feature.type.multiArrayType for feature in own.input}
    inputs = {value.name: _input(tensor_type(value.type), types.get(value.name)) for value in proto.inputs}
    return Function(name=name, inputs=inputs, outputs=tuple(block.outputs), block=block)


def _input(kind: TensorType, described: Any) -> Input:
    """An input of the program with the shapes that the model's description gives for its free axes."""
    if described is None or None not in kind.shape:
        return Input(kind=kind)
    listed = tuple(tuple(int(size) for size in shape.shape) for shape in described.enumeratedShapes.shapes)
    bounds = tuple(
        (int(axis.lowerBound), None if axis.upperBound < 0 else int(axis.upperBound))
        for axis in described.shapeRange.sizeRanges
    )
    return Input(kind=kind, listed=listed, bounds=bounds)


def _arrays_of(function: Function, results: Sequence[torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: value.contiguous().numpy() for name, value in zip(function.outputs, results, strict=True)}


def _arrays(path: Path, function: Function, given: Mapping[str, npt.ArrayLike]) -> dict[str, npt.NDArray[Any]]:
    """The inputs in their declared types, floats in float32; `OptionError` for names, shapes and values that do not
    fit."""
    if set(given) != set(function.inputs):
        raise OptionError(f"{path} takes {', '.join(function.inputs)}, not {', '.join(given) or 'nothing'}")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, wanted in function.inputs.items():
        array = np.asarray(given[name])
        if not wanted.allows(array.shape):
            raise OptionError(f"{path}: input {name} is {wanted}, not {list(array.shape)}")
        if not _holds(wanted.kind.element, array):
            raise OptionError(f"{path}: input {name} is {wanted.kind.element}, which cannot hold this {array.dtype}")
        target = np.dtype(NUMPY[wanted.kind.element])
        arrays[name] = array.astype(np.float32 if target.kind == "f" else target)
    return arrays


def _holds(element: str, array: npt.NDArray[Any]) -> bool:
    """Whether an element type takes these numbers: a float rounds them, all others must hold them exactly."""
    if array.dtype.kind not in "biuf" or element not in NUMPY:
        return False
    target = np.dtype(NUMPY[element])
    if target.kind == "f":
        return True
    with np.errstate(invalid="ignore"):  # NaN has no integer
        return bool(np.array_equal(array.astype(target), array))


def _walk(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _walk(inner)

"""One evaluation of a function: its ops in order, each in float32, each result in its declared type and shape."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hypersd_export.errors import BundleError
from hypersd_export.verify.mil import compress, elementwise, nn, tensor
from hypersd_export.verify.mil.file import PackageFile, TensorType, tensor_type
from hypersd_export.verify.mil.ops import KERNELS, Args

KERNEL_MODULES = (compress, elementwise, nn, tensor)
"""Importing them fills `KERNELS`."""
ROUNDINGS = ("fp16", "fp32")
CONTROL = ("cond", "while_loop")
"""Ops with blocks of their own, which are run here."""
TORCH = {
    "bool": torch.bool, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8, "int16": torch.int16,
    "int32": torch.int32, "int64": torch.int64, "uint8": torch.uint8, "int4": torch.int8,
    **dict.fromkeys(("uint1", "uint2", "uint3", "uint4", "uint6"), torch.uint8),
    **dict.fromkeys(("uint16", "uint32"), torch.int64),
}  # fmt: skip
"""What holds a value of each element type; torch has little arithmetic on wide unsigned integers."""

Values = dict[str, Any]
"""What is in scope by name: tensors, and `Deferred`."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """A result of an op on constants alone that is made each time it is asked for, so that no weight stays."""

    op: Any
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One evaluation; `half` rounds values that are declared as fp16, which else stay float32."""

    file: PackageFile
    half: bool

    def block(self, block: Any, values: Values, outputs: Sequence[str], *, start: int = 0) -> list[torch.Tensor]:
        """Run the ops of a block with `values` in scope (changed in place); returns what it names as outputs."""
        self.ops(block, values, outputs, start, len(block.operations))
        return [self._value(name, values) for name in outputs]

    def ops(self, block: Any, values: Values, outputs: Sequence[str], start: int, stop: int) -> None:
        """Run a block's ops from number `start` to before `stop`, with in scope what those before have left there.

        A constant that is in scope already stays as it is there.
        """
        last = {name: number for number, op in enumerate(block.operations) for name in _names(op)}
        for number, op in enumerate(block.operations):
            if op.type == "const" or op.type.startswith("constexpr_"):
                for index, declared in enumerate(op.outputs):
                    values.setdefault(declared.name, Deferred(op, index))
                continue
            if not start <= number < stop:
                continue
            for declared, result in zip(op.outputs, self._results(op, values), strict=True):
                if declared.name in last or declared.name in outputs:
                    values[declared.name] = result
            for name in _names(op):
                if last[name] == number and name not in outputs and not isinstance(values.get(name), Deferred):
                    values.pop(name, None)

    def settle(self, value: torch.Tensor, kind: TensorType) -> torch.Tensor:
        """A value in its declared element type; raises `BundleError` for a type that is not held."""
        if kind.element not in TORCH:
            raise BundleError(f"{self.file.path}: the interpreter holds no {kind.element}: convert without it")
        wanted = TORCH[kind.element]
        return value.to(torch.float32 if wanted is torch.float16 and not self.half else wanted)

    def _results(self, op: Any, values: Values) -> list[torch.Tensor]:
        """The results of one op in their declared types; whatever goes wrong is a `BundleError` that names the op."""
        kinds = [tensor_type(declared.type) for declared in op.outputs]
        where = f"{self.file.path}: op {op.outputs[0].name if op.outputs else '?'} ({op.type})"
        try:
            raw = self._control(op, values) if op.type in CONTROL else self._kernel(op, values, kinds)
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            raise BundleError(f"{where} fails: {' '.join(str(error).split())[:200]}: export it again") from error
        if len(raw) != len(kinds):
            raise BundleError(f"{where} has {len(raw)} results, the package declares {len(kinds)}: export it again")
        for result, kind in zip(raw, kinds, strict=True):
            if not kind.allows(tuple(result.shape)):
                raise BundleError(
                    f"{where} has the shape {list(result.shape)}, the package declares {kind}: export it again"
                )
        return [self.settle(result, kind) for result, kind in zip(raw, kinds, strict=True)]

    def _kernel(self, op: Any, values: Values, kinds: Sequence[TensorType]) -> Sequence[torch.Tensor]:
        operands = {name: (_wide(self._constant(value)),) for name, value in op.attributes.items() if name != "name"}
        for name, argument in op.inputs.items():
            operands[name] = tuple(_wide(self._bound(item, values)) for item in argument.arguments)
        result = KERNELS[op.type](Args(values=operands, outputs=tuple(kind.element for kind in kinds)))
        return result if isinstance(result, tuple) else (result,)

    def _control(self, op: Any, values: Values) -> list[torch.Tensor]:
        """`cond` runs one of two blocks; `while_loop` its second block as long as its first says true."""
        if op.type == "cond":
            taken = op.blocks[0 if bool(self._bound(op.inputs["pred"].arguments[0], values)) else 1]
            return self.block(taken, dict(values), taken.outputs)
        state = [self._bound(item, values) for item in op.inputs["loop_vars"].arguments]
        test, body = op.blocks
        while bool(self._called(test, state, values)[0]):
            state = self._called(body, state, values)
        return state

    def _called(self, block: Any, state: Sequence[torch.Tensor], values: Values) -> list[torch.Tensor]:
        inner = values | {declared.name: value for declared, value in zip(block.inputs, state, strict=True)}
        return self.block(block, inner, block.outputs)

    def _bound(self, item: Any, values: Values) -> Any:
        """An argument: a value in scope, or a constant that stands in its place."""
        return self._value(item.name, values) if item.WhichOneof("binding") == "name" else self._constant(item.value)

    def _value(self, name: str, values: Values) -> Any:
        """A value in scope by name; a deferred one is made now."""
        if name not in values:
            raise BundleError(f"{self.file.path}: the value {name} is used before any op makes it: export it again")
        found = values[name]
        if not isinstance(found, Deferred):
            return found
        if found.op.type == "const":
            return self._constant(found.op.attributes["val"])
        return self._results(found.op, values)[found.number]

    def _constant(self, proto: Any) -> Any:
        """A constant as a tensor, a string, or a tuple of them."""
        value = self.file.value(proto)
        return as_tensor(value) if isinstance(value, np.ndarray) else value


def as_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """A copy of an array as a tensor of a type that torch can compute with."""
    return torch.from_numpy(array.astype(np.int64) if array.dtype in (np.uint16, np.uint32) else np.array(array))


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype is torch.float16 else value


def first_use(block: Any, names: Collection[str]) -> int:
    """The number of the first op of a block that reads one of these values, in a nested block or not; the number of
    its ops if none does."""
    users = (number for number, op in enumerate(block.operations) if not _names(op).isdisjoint(names))
    return next(users, len(block.operations))


def _names(op: Any) -> set[str]:
    """What an op reads by name, its nested blocks included."""
    names = {
        item.name
        for argument in op.inputs.values()
        for item in argument.arguments
        if item.WhichOneof("binding") == "name"
    }
    for block in op.blocks:
        names |= set(block.outputs)
        for inner in block.operations:
            names |= _names(inner)
    return names

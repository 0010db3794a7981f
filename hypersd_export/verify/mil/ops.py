"""What a kernel of the MIL interpreter is: a function of `Args`, registered under the op's name.

Kernels see float32 where the program has fp16: the interpreter widens every fp16 operand before and rounds every result
after to its declared type. So a kernel is right if it is right in float32, on integers and on booleans.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Result = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    """The operands of one op by name; an operand is a tuple of values (most have one).

    `outputs` are the declared element types of the results. Readers take a default where MIL has one.
    """

    values: Mapping[str, tuple[Any, ...]]
    outputs: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __call__(self, name: str) -> torch.Tensor:
        """A tensor that must be there."""
        if name not in self.values:
            raise ValueError(f"its input {name} is missing")
        value: torch.Tensor = self.values[name][0]
        return value

    def many(self, name: str) -> tuple[torch.Tensor, ...]:
        """The tensors of a list-valued operand."""
        return self.values[name]

    def maybe(self, name: str) -> torch.Tensor | None:
        """A tensor, or None if the op does not have it."""
        return self.values[name][0] if name in self.values else None

    def integers(self, name: str, default: list[int] | None = None) -> list[int]:
        """A vector of integers."""
        if name not in self.values and default is not None:
            return default
        return [int(v) for v in self(name).reshape(-1).tolist()]

    def integer(self, name: str, default: int | None = None) -> int:
        """One integer."""
        return self.integers(name, None if default is None else [default])[0]

    def flags(self, name: str, count: int) -> list[bool]:
        """A vector of flags, all false by default."""
        return [bool(v) for v in self(name).reshape(-1).tolist()] if name in self.values else [False] * count

    def flag(self, name: str, default: bool = False) -> bool:
        """One flag."""
        return bool(self(name)) if name in self.values else default

    def real(self, name: str, default: float | None = None) -> float:
        """One number."""
        return default if name not in self.values and default is not None else float(self(name))

    def text(self, name: str, default: str = "") -> str:
        """A string."""
        return str(self.values[name][0]) if name in self.values else default


Kernel = Callable[[Args], Result]
KERNELS: dict[str, Kernel] = {}
"""Every op that can be evaluated, by its name in the program."""


def kernel(*names: str) -> Callable[[Kernel], Kernel]:
    """Register a kernel under one or several op names."""

    def register(function: Kernel) -> Kernel:
        for name in names:
            assert name not in KERNELS, f"two kernels for {name}"
            KERNELS[name] = function
        return function

    return register


def pairwise_pads(flat: list[int]) -> Iterator[int]:
    """MIL's [begin, end, begin, end …] from the first axis on, as torch wants it: from the last axis on."""
    for axis in reversed(range(len(flat) // 2)):
        yield flat[2 * axis]
        yield flat[2 * axis + 1]


def along(args: Args, name: str, x: torch.Tensor) -> torch.Tensor:
    """A scalar, or a vector along `axis`, as float32 that broadcasts with x; a zero point that is absent is 0."""
    value = args(name) if name != "zero_point" or name in args else torch.tensor(0.0)
    if value.ndim == 0:
        return value.float()
    shape = [1] * x.ndim
    shape[args.integer("axis")] = -1
    return value.float().reshape(shape)


def dequantized(args: Args, levels: torch.Tensor) -> torch.Tensor:
    """scale (levels - zero point), each of them a scalar or a vector along `axis`."""
    x = levels.float()
    return (x - along(args, "zero_point", x)) * along(args, "scale", x)

"""What a runtime is: it opens the graphs of a bundle, and a graph turns arrays into arrays.

`runtime/onnx.py` runs on onnxruntime, `runtime/tensorrt.py` on NVIDIA's engines; the pipeline knows neither.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Run = Callable[..., dict[str, Array]]
"""Inputs by name in, outputs by name out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input or output of a graph; a dimension that is not fixed is None."""

    shape: tuple[int | None, ...]
    dtype: Any


class Notice(UserWarning):
    """Something that the user should know, in one line; `hypersd-generate` prints it as such."""


class Graph(Protocol):
    """A loaded component, or the whole pipeline as one."""

    @property
    def path(self) -> Path:
        """The file that it came from."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The inputs by name."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""

    def run(self, **feeds: npt.ArrayLike) -> dict[str, Array]:
        """Evaluate; inputs are cast to the graph's types, outputs are new arrays.

        Raises:
            BundleError: the graph does not take these inputs, or fails inside.
        """

    def fixed(self, **feeds: npt.ArrayLike) -> Run:
        """`run` with some of its inputs given once and for all: a device then copies them once."""


class Runtime(Protocol):
    """What runs the graphs of one bundle. Opening it does no work that a graph can do when it is first asked for."""

    @property
    def name(self) -> str:
        """The target that it runs: "onnx", "tensorrt" …"""

    @property
    def provider(self) -> str:
        """What it runs on, in a word or two for reports: onnxruntime's provider, or the device."""

    @property
    def is_single_graph(self) -> bool:
        """Whether the bundle's pipeline is one graph here."""

    def graph(self, component: str) -> Graph:
        """A component's graph, loaded at the first call; BundleError if it is not there or cannot be loaded."""

    def single(self) -> Graph:
        """The whole pipeline as one graph, loaded at the first call; BundleError as `graph`."""


def as_input(value: npt.ArrayLike, tensor: Tensor) -> Array:
    """The value as a C-ordered array of the tensor's type; not copied where it is one."""
    return np.asarray(value, dtype=tensor.dtype, order="C")


def filled(tensor: Tensor, value: float) -> Array:
    """An input that has the same value everywhere, of the tensor's shape and type; a free axis gets one element."""
    return np.full([1 if size is None else size for size in tensor.shape], value, dtype=tensor.dtype)


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]

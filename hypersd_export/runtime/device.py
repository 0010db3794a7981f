"""What a GPU with TensorRT can do, and no more than the runtime needs: `runtime/nvidia.py` is the real one.

Memory is a number, its address. Everything that is enqueued runs in order on the device's one stream; nothing waits
but `synchronize`. This is also the seam of the tests, where a device of NumPy memory and ONNX graphs stands in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hypersd_export.runtime.graph import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceInfo:
    """What stands in reports, and what an engine is checked against."""

    name: str
    capability: tuple[int, int]
    """Compute capability, such as (8, 9)."""
    memory_bytes: int
    driver: str
    """The driver's own version where the system tells it, and the CUDA version that it supports."""
    cuda: str
    """Version of the CUDA runtime that is linked."""
    flavour: str
    """"rtx" or "classic"."""
    library: str
    """Version of the TensorRT library."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTensor:
    """An input or output of an engine; a free dimension is -1."""

    name: str
    is_input: bool
    shape: tuple[int, ...]
    dtype: Any
    """The NumPy type."""
    least: tuple[int, ...] = ()
    most: tuple[int, ...] = ()
    """The profile's bounds of an input with free dimensions."""


class Context(Protocol):
    """An engine's state for one set of input shapes."""

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Fix an input's shape."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, once every input's is fixed."""

    def set_address(self, name: str, address: int) -> None:
        """Where a tensor lies on the device."""

    def enqueue(self) -> None:
        """Enqueue one evaluation; BundleError if the library refuses."""

    def can_capture(self) -> bool:
        """Whether the library allows `enqueue` to be captured."""


class Engine(Protocol):
    """A deserialised engine."""

    @property
    def tensors(self) -> Sequence[EngineTensor]:
        """Its inputs and outputs."""

    def context(self) -> Context:
        """A new context, with device memory of its own for what is between input and output."""

    def compiled(self) -> bytes | None:
        """The kernels that were compiled so far, for the next `Device.load`; None where the library compiles none."""


class Device(Protocol):
    """One GPU, one stream. Every failure is a HypersdError in one line."""

    @property
    def info(self) -> DeviceInfo:
        """What it is."""

    def load(self, path: Path, compiled: bytes | None) -> Engine:
        """Deserialise an engine file; kernels of another environment in `compiled` are ignored by the library."""

    def malloc(self, size: int) -> int:
        """Device memory of so many bytes, for as long as the device is."""

    def pinned(self, size: int) -> Array:
        """Host memory uint8 [size] from which copies are asynchronous, for as long as the device is."""

    def copy_in(self, address: int, host: Array) -> None:
        """Enqueue a copy of the whole array to the device."""

    def copy_out(self, host: Array, address: int) -> None:
        """Enqueue a copy that fills the whole array."""

    def synchronize(self) -> None:
        """Wait for all that was enqueued."""

    def capture(self, work: Callable[[], None]) -> Any | None:
        """What `work` enqueues, as a CUDA graph and without running it; None if that cannot be captured."""

    def launch(self, graph: Any) -> None:
        """Enqueue a captured graph."""

    def event(self) -> Any:
        """A new event for `record`."""

    def record(self, event: Any) -> None:
        """Enqueue the event: it notes the time when the stream comes to it."""

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two events that have passed."""

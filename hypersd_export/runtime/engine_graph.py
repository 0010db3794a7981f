"""An engine as a graph: buffers allocated once, copies only at the two ends, enqueued work captured and replayed.

For each set of input shapes there is one `Session`, because a captured CUDA graph holds the context that it was made
of, and a context's shapes must not change under it. A static engine has one session.

Inputs and outputs never share a buffer: a UNet whose output lands in its input overwrites the latents that the step
still needs.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.errors import BundleError
from hypersd_export.runtime.device import Context, Device, Engine, EngineTensor
from hypersd_export.runtime.graph import Array, Notice, Run, Tensor, as_input


class NotCaptured(Notice):
    """An engine's work cannot be a CUDA graph: it is enqueued call by call, with the same results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Milliseconds on the device for one call, by CUDA events: copies in, the engine, copies out."""

    copy_in: float
    compute: float
    copy_out: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """A tensor's memory on the device and, pinned, on the host; `host` is a view of the tensor's shape and type."""

    address: int
    host: Array


class Session:
    """One engine at one set of input shapes.

    The first `compute` enqueues, which compiles what is left to compile; the second captures the same work as a CUDA
    graph, and from then on that is replayed. What the device refuses to capture goes on being enqueued.
    """

    def __init__(self, device: Device, engine: Engine, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.context: Context = engine.context()
        self.captured: bool | None = None
        """None until it was tried."""
        self._device, self._graph, self._warm = device, None, False
        self._resident: dict[str, object] = {}
        """Which fixed call's value lies in an input's buffer."""
        for name, shape in shapes.items():
            self.context.set_shape(name, shape)
        self._inputs = {t.name: self._buffer(t) for t in engine.tensors if t.is_input}
        self._outputs = {t.name: self._buffer(t) for t in engine.tensors if not t.is_input}

    def _buffer(self, tensor: EngineTensor) -> Buffer:
        shape = self.context.shape(tensor.name)
        size = math.prod(shape) * tensor.dtype.itemsize
        buffer = Buffer(
            address=self._device.malloc(size), host=self._device.pinned(size).view(tensor.dtype).reshape(shape)
        )
        self.context.set_address(tensor.name, buffer.address)
        return buffer

    def upload(self, name: str, value: Array, owner: object | None = None) -> None:
        """Enqueue the copy of an input, unless `owner`'s value already lies there."""
        if owner is not None and self._resident.get(name) is owner:
            return
        buffer = self._inputs[name]
        np.copyto(buffer.host, value)
        self._device.copy_in(buffer.address, buffer.host)
        self._resident[name] = owner

    def compute(self) -> None:
        """Enqueue one evaluation."""
        if not self._warm:
            self.context.enqueue()
            self._warm = True
            return
        if self.captured is None:
            self._graph = self._device.capture(self.context.enqueue) if self.context.can_capture() else None
            self.captured = self._graph is not None
        if self.captured:
            self._device.launch(self._graph)
        else:
            self.context.enqueue()

    def download(self) -> None:
        """Enqueue the copies of all outputs."""
        for buffer in self._outputs.values():
            self._device.copy_out(buffer.host, buffer.address)

    def results(self) -> dict[str, Array]:
        """New arrays of what `download` brought, once the device was waited for."""
        return {name: buffer.host.copy() for name, buffer in self._outputs.items()}


class EngineGraph:
    """A loaded engine; a `Graph` of the runtime."""

    def __init__(
        self,
        path: Path,
        device: Device,
        engine: Engine,
        *,
        timed: bool = False,
        on_compiled: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        """`on_compiled` takes the library's compiled kernels after the first call at new shapes."""
        self.path = path
        self._device, self._engine, self._on_compiled = device, engine, on_compiled
        self._tensors = {tensor.name: tensor for tensor in engine.tensors}
        self.inputs = {
            t.name: Tensor(shape=tuple(None if size == -1 else size for size in t.shape), dtype=t.dtype)
            for t in engine.tensors
            if t.is_input
        }
        self.outputs = tuple(t.name for t in engine.tensors if not t.is_input)
        self.timed = timed
        """Whether calls add a `Timing` to `timings`."""
        self.timings: list[Timing] = []
        self._events: list[Any] = []
        self._sessions: dict[tuple[tuple[int, ...], ...], Session] = {}

    @property
    def captured(self) -> bool | None:
        """Whether every session so far replays a CUDA graph; None where none was called twice."""
        tried = [s.captured for s in self._sessions.values() if s.captured is not None]
        return all(tried) if tried else None

    def run(self, **feeds: npt.ArrayLike) -> dict[str, Array]:
        """See `Graph`."""
        return self._call(self._arrays(feeds), {}, None)

    def fixed(self, **feeds: npt.ArrayLike) -> Run:
        """See `Graph`; the fixed inputs are copied once, and again only if another call used their buffers."""
        owner, kept = object(), self._arrays(feeds)

        def call(**rest: npt.ArrayLike) -> dict[str, Array]:
            return self._call(self._arrays(rest), kept, owner)

        return call

    def _arrays(self, feeds: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        unknown = set(feeds) - set(self.inputs)
        if unknown:
            raise BundleError(f"{self.path} has no input {', '.join(sorted(unknown))}: export the bundle again")
        return {name: as_input(value, self.inputs[name]) for name, value in feeds.items()}

    def _call(self, feeds: dict[str, Array], kept: dict[str, Array], owner: object | None) -> dict[str, Array]:
        session, new = self._session({name: array.shape for name, array in (feeds | kept).items()})
        before = session.captured
        if self.timed and not self._events:
            self._events = [self._device.event() for _ in range(4)]
        self._mark(0)
        for name, array in feeds.items():
            session.upload(name, array)
        for name, array in kept.items():
            session.upload(name, array, owner)
        self._mark(1)
        session.compute()
        self._mark(2)
        session.download()
        self._mark(3)
        self._device.synchronize()
        self._note_timing()
        if new:
            compiled = self._engine.compiled()
            if compiled:
                self._on_compiled(compiled)
        if before is None and session.captured is False:
            warnings.warn(
                f"{self.path} cannot be captured as a CUDA graph: it is enqueued at each call",
                NotCaptured,
                stacklevel=4,
            )
        return session.results()

    def _session(self, shapes: dict[str, tuple[int, ...]]) -> tuple[Session, bool]:
        """The session of these shapes, and whether it is new."""
        missing = set(self.inputs) - set(shapes)
        if missing:
            raise BundleError(f"{self.path} also wants {', '.join(sorted(missing))}: export the bundle again")
        key = tuple(shapes[name] for name in self.inputs)
        if key in self._sessions:
            return self._sessions[key], False
        for name, shape in shapes.items():
            _check_shape(self.path, self._tensors[name], shape)
        self._sessions[key] = Session(self._device, self._engine, shapes)
        return self._sessions[key], True

    def _mark(self, number: int) -> None:
        if self.timed:
            self._device.record(self._events[number])

    def _note_timing(self) -> None:
        if self.timed:
            a, b, c, d = self._events
            elapsed = self._device.elapsed_ms
            self.timings.append(Timing(copy_in=elapsed(a, b), compute=elapsed(b, c), copy_out=elapsed(c, d)))


def _check_shape(path: Path, tensor: EngineTensor, shape: tuple[int, ...]) -> None:
    """BundleError unless the engine takes this shape, with what it takes."""
    fits = len(shape) == len(tensor.shape) and all(
        size == fixed or fixed == -1 for size, fixed in zip(shape, tensor.shape, strict=True)
    )
    if fits and tensor.least:
        fits = all(low <= size <= high for low, size, high in zip(tensor.least, shape, tensor.most, strict=True))
    if fits:
        return
    takes = f"{list(tensor.least)} to {list(tensor.most)}" if tensor.least else f"{list(tensor.shape)}"
    raise BundleError(
        f"{path} does not take {tensor.name!r} of shape {list(shape)}, but {takes}: export for that shape"
    )

"""A GPU of NumPy memory: an "engine" names an ONNX graph, which onnxruntime evaluates from and into device memory.

It is as strict as the real one. Nothing that is enqueued happens before `synchronize`, so that a result read too early,
or a host buffer overwritten too soon, gives wrong numbers. Fresh memory is full of NaN. A captured graph repeats what
was enqueued with the addresses of then. A context that was never run cannot be captured.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_export.errors import BundleError, OptionError
from hypersd_export.runtime.device import DeviceInfo, EngineTensor
from hypersd_export.runtime.onnx import OnnxGraph, open_graph

MARK = b"\nFAKE ENGINE OF "
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
          "tensor(uint8)": np.uint8}  # fmt: skip
MOST_ROWS = 4
"""Upper bound of a free dimension in the profile."""


def engine_of(onnx: Path, header: bytes = b"") -> bytes:
    """The bytes of an engine that behaves as this ONNX file."""
    return header + MARK + str(onnx.absolute()).encode()


class FakeDevice:
    """`Device` for tests; `log` is what was enqueued, in order, by name."""

    def __init__(
        self, *, capability: tuple[int, int] = (8, 9), flavour: str = "rtx", library: str = "1.7.1.116",
        capturable: bool = True, memory_bytes: int = 1 << 30,
    ) -> None:  # fmt: skip
        self.info = DeviceInfo(
            name="Fake RTX", capability=capability, memory_bytes=memory_bytes, driver="580.0 (CUDA 13.0)", cuda="13.0",
            flavour=flavour, library=library,
        )  # fmt: skip
        self.capturable = capturable
        self.log: list[str] = []
        self.allocated = 0
        self.loaded: list[tuple[Path, bytes | None]] = []
        self.engines: list[FakeEngine] = []
        self._memory: dict[int, np.ndarray] = {}
        self._next = 0x7F0000000000
        self._queue: list[Callable[[], None]] = []
        self._recording: list[Callable[[], None]] | None = None
        self._clock = 0.0

    def load(self, path: Path, compiled: bytes | None) -> "FakeEngine":
        data = path.read_bytes()
        if MARK not in data:
            raise BundleError(f"{path} does not load on {self.info.name}: not an engine; export it again")
        self.loaded.append((path, compiled))
        self.engines.append(FakeEngine(self, path, open_graph(Path(data.split(MARK)[1].decode()))))
        return self.engines[-1]

    def malloc(self, size: int) -> int:
        self.allocated += size
        if self.allocated > self.info.memory_bytes:
            raise OptionError(f"the memory of {self.info.name} is full: close what else uses it")
        address, self._next = self._next, self._next + (size + 511) // 256 * 256
        self._memory[address] = np.full(size, 0xFF, dtype=np.uint8)
        return address

    def pinned(self, size: int) -> np.ndarray:
        return np.full(size, 0xFF, dtype=np.uint8)

    def copy_in(self, address: int, host: np.ndarray) -> None:
        assert host.flags.c_contiguous
        self.enqueue(f"in {host.dtype} {list(host.shape)}", lambda: self._write(address, host))

    def copy_out(self, host: np.ndarray, address: int) -> None:
        assert host.flags.c_contiguous

        def copy() -> None:
            host[...] = self.read(address, host.shape, host.dtype)

        self.enqueue(f"out {host.dtype} {list(host.shape)}", copy)

    def synchronize(self) -> None:
        assert self._recording is None, "a stream that is captured cannot be waited for"
        self.log.append("wait")
        queue, self._queue = self._queue, []
        for work in queue:
            self._clock += 1.0
            work()

    def capture(self, work: Callable[[], None]) -> Any | None:
        assert self._recording is None
        self.log.append("capture")
        self._recording = []
        try:
            work()
        except BundleError:
            return None
        finally:
            graph, self._recording = self._recording, None
        return graph

    def launch(self, graph: Any) -> None:
        def replay() -> None:
            for work in graph:
                work()

        self.enqueue("launch", replay)

    def event(self) -> Any:
        return [float("nan")]

    def record(self, event: Any) -> None:
        def note() -> None:
            event[0] = self._clock

        self.enqueue("event", note)

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        assert end[0] >= begin[0], "both have to have passed"
        return float(end[0] - begin[0])

    # Below here: what the engine uses.

    def enqueue(self, name: str, work: Callable[[], None]) -> None:
        if self._recording is not None:
            assert name.startswith("run"), f"{name}: only the engine's work is captured"
            self._recording.append(work)
            return
        self.log.append(name)
        self._queue.append(work)

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        memory = self._memory[address]
        assert memory.nbytes == int(np.prod(shape)) * np.dtype(dtype).itemsize, "the buffer is of another size"
        return memory.view(dtype).reshape(shape)

    def _write(self, address: int, value: np.ndarray) -> None:
        self.read(address, value.shape, value.dtype)[...] = value

    write = _write


class FakeEngine:
    """`Engine` over an ONNX graph."""

    def __init__(self, device: FakeDevice, path: Path, graph: OnnxGraph) -> None:
        self.device, self.path, self.graph = device, path, graph
        self.contexts: list[FakeContext] = []
        nodes = [(node, True) for node in graph.session.get_inputs()]
        nodes += [(node, False) for node in graph.session.get_outputs()]
        self.tensors = tuple(_tensor(node, is_input) for node, is_input in nodes)

    def context(self) -> "FakeContext":
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]

    def compiled(self) -> bytes | None:
        ran = sum(context.runs for context in self.contexts)
        return None if self.device.info.flavour == "classic" else f"kernels of {self.path.name} {ran > 0}".encode()


class FakeContext:
    """`Context` over an ONNX graph; `runs` counts evaluations."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.device = engine, engine.device
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs = 0
        self._enqueued = False

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert not self._enqueued, "a context whose work was captured keeps its shapes"
        self.shapes[name] = shape

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = next(t for t in self.engine.tensors if t.name == name)
        if tensor.is_input:
            return self.shapes[name]
        assert set(self.shapes) == {t.name for t in self.engine.tensors if t.is_input}
        rows = next(iter(shape for shape in self.shapes.values() if shape))[0]
        return tuple(rows if size == -1 else size for size in tensor.shape)

    def set_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def can_capture(self) -> bool:
        return self.device.capturable

    def enqueue(self) -> None:
        capturing = self.device._recording is not None
        if capturing and not self._enqueued:
            raise BundleError("a context that was never run cannot be captured")
        assert len(set(self.addresses.values())) == len(self.addresses) == len(self.engine.tensors), "a shared buffer"
        self._enqueued = True
        addresses, engine, device = dict(self.addresses), self.engine, self.device

        def evaluate() -> None:
            self.runs += 1
            inputs = {
                t.name: device.read(addresses[t.name], self.shapes[t.name], t.dtype)
                for t in engine.tensors if t.is_input
            }  # fmt: skip
            for name, value in engine.graph.run(**inputs).items():
                device.write(addresses[name], value)

        device.enqueue(f"run {engine.path.parent.name}", evaluate)


def _tensor(node: Any, is_input: bool) -> EngineTensor:
    shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
    bounds = {}
    if is_input and -1 in shape:
        bounds = {"least": tuple(1 if size == -1 else size for size in shape),
                  "most": tuple(MOST_ROWS if size == -1 else size for size in shape)}  # fmt: skip
    return EngineTensor(name=node.name, is_input=is_input, shape=shape, dtype=np.dtype(_TYPES[node.type]), **bounds)

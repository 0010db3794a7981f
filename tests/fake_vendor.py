# ruff: noqa: N802, N815 (the names are the vendor's)
"""Stand-ins for `cuda.bindings.runtime` and `tensorrt_rtx` themselves, so that every line of runtime/nvidia.py runs.

Device memory is host memory at true addresses; an engine names an ONNX graph (see tests/fake_device.py). What is
enqueued runs at once, or is recorded while the stream is captured. Results are tuples of an error and values, as
cuda-python gives them.
"""

import ctypes
from collections.abc import Callable
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hypersd_export.runtime.onnx import open_graph
from tests.fake_device import MARK, MOST_ROWS

OK = 0


class Stream(int):
    """A stream is its handle."""


class FakeCuda:
    """cuda.bindings.runtime with one GPU."""

    cudaStreamNonBlocking = 1
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, *, capability: tuple[int, int] = (8, 9), memory: int = 1 << 30) -> None:
        self.capability, self.free_bytes = capability, memory
        self.live: dict[int, Any] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.broken_capture = False
        self.fail: dict[str, int] = {}
        """Error numbers by the name of the call that is to fail."""
        self.clock = 0.0

    def __getattribute__(self, name: str) -> Any:
        fail = object.__getattribute__(self, "__dict__").get("fail", {})
        if name in fail:
            return lambda *_: (fail[name], None)
        return object.__getattribute__(self, name)

    def work(self, work: Callable[[], None]) -> None:
        if self.recording is not None:
            self.recording.append(work)
        else:
            self.clock += 1.0
            work()

    def cudaGetDeviceCount(self) -> Any:
        return OK, 1

    def cudaSetDevice(self, device: int) -> Any:
        return (OK,)

    def cudaDriverGetVersion(self) -> Any:
        return OK, 13000

    def cudaRuntimeGetVersion(self) -> Any:
        return OK, 13040

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return OK, SimpleNamespace(name=b"Fake H100\0\0\0", totalGlobalMem=80 << 30)

    def cudaDeviceGetAttribute(self, attr: int, device: int) -> Any:
        return OK, self.capability[attr - 75]

    def cudaGetErrorString(self, error: int) -> Any:
        return OK, b"an illegal memory access was encountered"

    def cudaGetLastError(self) -> Any:
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return OK, self._keep(Stream(7777))

    def cudaStreamDestroy(self, stream: Any) -> Any:
        return self._drop(stream)

    def cudaStreamSynchronize(self, stream: Any) -> Any:
        assert self.recording is None
        return (OK,)

    def cudaMalloc(self, size: int) -> Any:
        if size > self.free_bytes:
            return 2, None
        self.free_bytes -= size
        return OK, self._memory(size)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return OK, self._memory(size)

    def cudaFree(self, devPtr: int) -> Any:
        return self._drop(devPtr)

    def cudaFreeHost(self, ptr: int) -> Any:
        return self._drop(ptr)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: Any) -> Any:
        assert stream == 7777
        device = dst if kind == 1 else src
        assert ctypes.sizeof(self.live[device]) >= count, "past the end of a buffer"
        self.work(lambda: ctypes.memmove(dst, src, count))
        return (OK,)

    def cudaStreamBeginCapture(self, stream: Any, mode: int) -> Any:
        self.recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: Any) -> Any:
        graph, self.recording = self.recording, None
        return (901, None) if self.broken_capture else (OK, graph)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        return OK, self._keep(("exec", tuple(graph)))

    def cudaGraphDestroy(self, graph: Any) -> Any:
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> Any:
        return self._drop(graphExec)

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> Any:
        for step in graphExec[1]:
            self.work(step)
        return (OK,)

    def cudaEventCreate(self) -> Any:
        return OK, self._keep(Event())

    def cudaEventDestroy(self, event: Any) -> Any:
        return self._drop(event)

    def cudaEventRecord(self, event: Any, stream: Any) -> Any:
        event.time = self.clock
        return (OK,)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> Any:
        return OK, end.time - start.time

    def _memory(self, size: int) -> int:
        buffer = (ctypes.c_uint8 * size)()
        ctypes.memset(buffer, 0xFF, size)
        self.live[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def _keep(self, thing: Any) -> Any:
        self.live[id(thing)] = thing
        return thing

    def _drop(self, thing: Any) -> Any:
        del self.live[thing if type(thing) is int else id(thing)]
        return (OK,)


class Event:
    time = float("nan")


class DataType(Enum):
    FLOAT = np.float32
    HALF = np.float16
    INT64 = np.int64
    UINT8 = np.uint8
    BF16 = None


class TensorIOMode(IntEnum):
    INPUT, OUTPUT = 1, 2


class TensorLocation(IntEnum):
    DEVICE, HOST = 0, 1


class ILogger:
    Severity = IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING", start=0)

    def __init__(self) -> None:
        pass


def nptype(kind: DataType) -> Any:
    if kind.value is None:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return kind.value


class FakeTensorRT:
    """tensorrt_rtx, or with `rtx=False` tensorrt, over a FakeCuda."""

    __version__ = "1.7.1.116"
    DataType, TensorIOMode, TensorLocation, ILogger = DataType, TensorIOMode, TensorLocation, ILogger
    nptype = staticmethod(nptype)

    def __init__(self, cuda: FakeCuda, *, rtx: bool = True) -> None:
        self.cuda, self.rtx = cuda, rtx
        self.engines: list[Any] = []
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._deserialize(data, logger))

    def _deserialize(self, data: Any, logger: Any) -> Any:
        content = bytes(data)
        if MARK not in content:
            logger.log(ILogger.Severity.ERROR, "Serialization assertion\nfailed")
            return None
        self.engines.append(VendorEngine(self, Path(content.split(MARK)[1].decode()), logger))
        return self.engines[-1]


class VendorEngine:
    """ICudaEngine over an ONNX file."""

    def __init__(self, trt: FakeTensorRT, onnx: Path, logger: Any) -> None:
        self.trt, self.logger, self.graph = trt, logger, open_graph(onnx)
        session = self.graph.session
        self.nodes = {node.name: node for node in (*session.get_inputs(), *session.get_outputs())}
        self.host_tensors: set[str] = set()
        self.kinds: dict[str, DataType] = {}
        self.contexts: list[VendorContext] = []
        self.no_room = False
        self.num_io_tensors = len(self.nodes)
        if trt.rtx:
            self.create_runtime_config = self._config

    def get_tensor_name(self, index: int) -> str:
        return list(self.nodes)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.graph.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self.host_tensors else TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> DataType:
        kinds = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int64)": DataType.INT64,
                 "tensor(uint8)": DataType.UINT8}  # fmt: skip
        return self.kinds.get(name, kinds[self.nodes[name].type])

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self.nodes[name].shape]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        shape = self.get_tensor_shape(name)
        return [[rows if size == -1 else size for size in shape] for rows in (1, 2, MOST_ROWS)]

    def _config(self) -> Any:
        config = SimpleNamespace(cache=None, create_runtime_cache=RuntimeCache)
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache) or True
        return config

    def create_execution_context(self, config: Any = None) -> "VendorContext | None":
        if self.no_room:
            self.logger.log(ILogger.Severity.ERROR, "out of memory")
            return None
        if self.trt.rtx:
            assert isinstance(config.cache, RuntimeCache)
            assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        else:
            assert config is None
        self.contexts.append(VendorContext(self, config))
        return self.contexts[-1]


class RuntimeCache:
    """IRuntimeCache; its content is bytes."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        self.content = blob if blob.startswith(b"kernels") else b""
        return bool(self.content)

    def serialize(self) -> memoryview:
        return memoryview(self.content or b"kernels")


class VendorContext:
    """IExecutionContext."""

    def __init__(self, engine: VendorEngine, config: Any) -> None:
        self.engine, self.config, self.runs = engine, config, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.refuse: set[str] = set()
        if engine.trt.rtx:
            self.is_stream_capturable = lambda stream: stream == 7777

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self._allowed("set_input_shape")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return self._allowed("set_tensor_address")

    def get_tensor_shape(self, name: str) -> list[int]:
        if name in self.shapes:
            return list(self.shapes[name])
        rows = next(shape for shape in self.shapes.values() if shape)[0]
        return [rows if size == -1 else size for size in self.engine.get_tensor_shape(name)]

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert type(stream_handle) is int
        assert stream_handle == 7777
        if not self._allowed("execute_async_v3"):
            return False
        self.engine.trt.cuda.work(self._evaluate)
        return True

    def _allowed(self, call: str) -> bool:
        if call in self.refuse:
            self.engine.logger.log(ILogger.Severity.ERROR, f"{call} is refused")
        return call not in self.refuse

    def _view(self, name: str) -> np.ndarray:
        shape, kind = tuple(self.get_tensor_shape(name)), nptype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        memory = (ctypes.c_uint8 * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype=kind).reshape(shape)

    def _evaluate(self) -> None:
        self.runs += 1
        graph = self.engine.graph
        for name, value in graph.run(**{name: self._view(name).copy() for name in graph.inputs}).items():
            self._view(name)[...] = value

"""The real device: CUDA through cuda-python, engines through `tensorrt_rtx` or `tensorrt`. No other file calls either.

Two libraries of one vendor share one Python API; where they differ stands `rtx` below. CUDA_NAMES, TENSORRT_NAMES and
RTX_NAMES list all that is used of them; a test compares the lists with this file and with the installed packages.
"""

import ctypes
import mmap
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_export.bundle.engines import CLASSIC, FLAVOURS, RTX
from hypersd_export.errors import BundleError, MissingBackend, OptionError
from hypersd_export.runtime.device import DeviceInfo, EngineTensor
from hypersd_export.runtime.graph import Array

CUDA_NAMES = (
    "cudaDeviceAttr", "cudaDeviceGetAttribute", "cudaDriverGetVersion", "cudaEventCreate", "cudaEventDestroy",
    "cudaEventElapsedTime", "cudaEventRecord", "cudaFree", "cudaFreeHost", "cudaGetDeviceCount",
    "cudaGetDeviceProperties", "cudaGetErrorString", "cudaGetLastError", "cudaGraphDestroy", "cudaGraphExecDestroy",
    "cudaGraphInstantiate", "cudaGraphLaunch", "cudaHostAlloc", "cudaMalloc", "cudaMemcpyAsync", "cudaMemcpyKind",
    "cudaRuntimeGetVersion", "cudaSetDevice", "cudaStreamBeginCapture", "cudaStreamCaptureMode",
    "cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamEndCapture", "cudaStreamNonBlocking",
    "cudaStreamSynchronize",
)  # fmt: skip
"""All that is used of `cuda.bindings.runtime`."""
TENSORRT_NAMES = {
    "": ("ILogger", "Runtime", "TensorIOMode", "TensorLocation", "nptype"),
    "ICudaEngine": (
        "create_execution_context", "get_tensor_dtype", "get_tensor_location", "get_tensor_mode", "get_tensor_name",
        "get_tensor_profile_shape", "get_tensor_shape", "num_io_tensors",
    ),
    "IExecutionContext": ("execute_async_v3", "get_tensor_shape", "set_input_shape", "set_tensor_address"),
    "Runtime": ("deserialize_cuda_engine",),
}  # fmt: skip
"""All that is used of both `tensorrt_rtx` and `tensorrt`, by class."""
RTX_NAMES = {
    "": ("DynamicShapesKernelSpecializationStrategy",),
    "ICudaEngine": ("create_runtime_config",),
    "IExecutionContext": ("is_stream_capturable",),
    "IRuntimeCache": ("deserialize", "serialize"),
    "IRuntimeConfig": ("create_runtime_cache", "dynamic_shapes_kernel_specialization_strategy", "set_runtime_cache"),
}
"""All that is used of `tensorrt_rtx` alone."""

_NO_DEVICE, _OLD_DRIVER = 100, 35
_OUT_OF_MEMORY = 2
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """A flavour's Python module, the package that brings it and our extra that names the package."""

    module: str
    package: str
    extra: str


LIBRARIES = {
    RTX: Library(module=FLAVOURS[RTX], package="tensorrt-rtx", extra="tensorrt"),
    CLASSIC: Library(module=FLAVOURS[CLASSIC], package="tensorrt", extra="tensorrt-classic"),
}


def open_device(flavour: str) -> "NvidiaDevice":
    """The current CUDA device (the first one that CUDA_VISIBLE_DEVICES leaves) with a flavour's TensorRT.

    Raises:
        MissingBackend: cuda-python or the flavour's package is not installed.
        OptionError: there is no driver, no device, or the driver is too old for this CUDA runtime.
    """
    library = LIBRARIES[flavour]
    cuda = _import("cuda.bindings.runtime", "cuda-python", library.extra)
    tensorrt = _import(library.module, library.package, library.extra)
    error, count = cuda.cudaGetDeviceCount()
    if int(error) != 0 or not count:
        raise OptionError(f"runtime 'tensorrt' does not start on this machine: {_no_device(cuda, error)}")
    return NvidiaDevice(cuda, tensorrt, flavour)


def _import(module: str, package: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingBackend(package, extra, "runtime 'tensorrt'") from error
    except (ImportError, OSError, RuntimeError) as error:  # its shared libraries
        raise OptionError(
            f"{package} is installed and cannot be loaded: {_one_line(error)}; install it anew"
        ) from error


def _no_device(cuda: Any, error: Any) -> str:
    """Which of the things that a GPU needs is missing, and the way out; `error` is CUDA's own."""
    supported, linked = int(cuda.cudaDriverGetVersion()[1] or 0), int(cuda.cudaRuntimeGetVersion()[1])
    if int(error) == _OLD_DRIVER and supported == 0:
        return "no NVIDIA driver (libcuda) is found; install one, or start the container with its GPUs (--gpus all)"
    if int(error) == _OLD_DRIVER:
        return (
            f"its driver supports CUDA {_version(supported)} and this runtime is of CUDA {_version(linked)}; update "
            f"the driver, or install cuda-python of CUDA {supported // 1000}"
        )
    if int(error) in (0, _NO_DEVICE):
        return "the driver sees no NVIDIA GPU; check CUDA_VISIBLE_DEVICES, and a container's --gpus all"
    return _error_text(cuda, error)


def _version(number: int) -> str:
    """CUDA's 12090 as 12.9."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _error_text(cuda: Any, error: Any) -> str:
    return f"{cuda.cudaGetErrorString(error)[1].decode()} (cudaError {int(error)})"


def _one_line(error: BaseException | str) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:240]


class NvidiaDevice:
    """`Device` on CUDA's current device; memory is freed when the object goes."""

    def __init__(self, cuda: Any, tensorrt: Any, flavour: str) -> None:
        self._cuda, self._trt, self._rtx = cuda, tensorrt, flavour == RTX
        self._owned: list[tuple[Callable[[Any], Any], Any]] = []
        weakref.finalize(self, _release, self._owned)
        self._check(cuda.cudaSetDevice(0))
        self.info = self._describe(flavour)
        stream = self._check(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        self._stream = self._own(cuda.cudaStreamDestroy, stream)
        self._log = _logger(tensorrt)
        self._runtime = tensorrt.Runtime(self._log)

    def _describe(self, flavour: str) -> DeviceInfo:
        cuda, attribute = self._cuda, self._cuda.cudaDeviceAttr
        properties = self._check(cuda.cudaGetDeviceProperties(0))
        major = self._check(cuda.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, 0))
        minor = self._check(cuda.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, 0))
        supported = f"CUDA {_version(self._check(cuda.cudaDriverGetVersion()))}"
        return DeviceInfo(
            name=bytes(properties.name).split(b"\0")[0].decode(errors="replace"),
            capability=(int(major), int(minor)),
            memory_bytes=int(properties.totalGlobalMem),
            driver=" ".join(part for part in (_driver_version(), f"({supported})") if part),
            cuda=_version(self._check(cuda.cudaRuntimeGetVersion())),
            flavour=flavour,
            library=str(self._trt.__version__),
        )

    def _check(self, result: tuple[Any, ...]) -> Any:
        """The value of a CUDA call."""
        error, *values = result
        if int(error) == _OUT_OF_MEMORY:
            raise OptionError(
                f"the memory of {self._name()} is full: close what else uses it, or export a smaller --batch"
            )
        if int(error) != 0:
            raise OptionError(f"{self._name()} failed: {_error_text(self._cuda, error)}; start again")
        return values[0] if values else None

    def _own(self, free: Callable[[Any], Any], thing: Any) -> Any:
        """The thing, which is freed when the device goes."""
        self._owned.append((free, thing))
        return thing

    def _name(self) -> str:
        return self.info.name if hasattr(self, "info") else "the GPU"

    def load(self, path: Path, compiled: bytes | None) -> "NvidiaEngine":
        """See `Device`; the file is mapped, so that no second copy of its weights is in memory."""
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BundleError(f"{path} does not load on {self.info.name}: {self._log.take()}; export it again")
        return NvidiaEngine(self, path, engine, compiled)

    def malloc(self, size: int) -> int:
        """See `Device`."""
        address: int = self._own(self._cuda.cudaFree, int(self._check(self._cuda.cudaMalloc(max(size, 1)))))
        return address

    def pinned(self, size: int) -> Array:
        """See `Device`."""
        address = self._own(self._cuda.cudaFreeHost, int(self._check(self._cuda.cudaHostAlloc(max(size, 1), 0))))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def copy_in(self, address: int, host: Array) -> None:
        """See `Device`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._check(self._cuda.cudaMemcpyAsync(address, host.ctypes.data, host.nbytes, kind, self._stream))

    def copy_out(self, host: Array, address: int) -> None:
        """See `Device`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._check(self._cuda.cudaMemcpyAsync(host.ctypes.data, address, host.nbytes, kind, self._stream))

    def synchronize(self) -> None:
        """See `Device`."""
        self._check(self._cuda.cudaStreamSynchronize(self._stream))

    def capture(self, work: Callable[[], None]) -> Any | None:
        """See `Device`; a refused capture leaves stream and context as they were."""
        cuda = self._cuda
        self._check(
            cuda.cudaStreamBeginCapture(self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        )
        refused = False
        try:
            work()
        except BundleError:
            refused = True
        error, graph = cuda.cudaStreamEndCapture(self._stream)
        if refused or int(error) != 0:
            cuda.cudaGetLastError()  # CUDA would report it again at the next call
            self._log.take()
            return None
        launchable = self._own(cuda.cudaGraphExecDestroy, self._check(cuda.cudaGraphInstantiate(graph, 0)))
        self._check(cuda.cudaGraphDestroy(graph))
        return launchable

    def launch(self, graph: Any) -> None:
        """See `Device`."""
        self._check(self._cuda.cudaGraphLaunch(graph, self._stream))

    def event(self) -> Any:
        """See `Device`."""
        return self._own(self._cuda.cudaEventDestroy, self._check(self._cuda.cudaEventCreate()))

    def record(self, event: Any) -> None:
        """See `Device`."""
        self._check(self._cuda.cudaEventRecord(event, self._stream))

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """See `Device`."""
        return float(self._check(self._cuda.cudaEventElapsedTime(begin, end)))


class NvidiaEngine:
    """`Engine` of either flavour."""

    def __init__(self, device: NvidiaDevice, path: Path, engine: Any, compiled: bytes | None) -> None:
        self._device, self._path, self._engine = device, path, engine
        self.tensors = tuple(self._tensor(engine.get_tensor_name(i)) for i in range(engine.num_io_tensors))
        self._cache: Any = None
        if device._rtx:
            self._config = engine.create_runtime_config()  # kept, as nobody says that the cache may outlive it
            self._cache = self._config.create_runtime_cache()
            if compiled is not None:
                self._cache.deserialize(compiled)  # False for another environment: then they are compiled anew

    def _tensor(self, name: str) -> EngineTensor:
        trt, engine = self._device._trt, self._engine
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise BundleError(f"{self._path} wants {name!r} in host memory, which this runtime does not feed")
        kind = engine.get_tensor_dtype(name)
        try:
            dtype = np.dtype(trt.nptype(kind))
        except TypeError:
            raise BundleError(f"{self._path} has {name!r} of type {kind}, which this runtime does not feed") from None
        shape = tuple(engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        bounds: dict[str, tuple[int, ...]] = {}
        if is_input and -1 in shape:
            least, _, most = engine.get_tensor_profile_shape(name, 0)
            bounds = {"least": tuple(least), "most": tuple(most)}
        return EngineTensor(name=name, is_input=is_input, shape=shape, dtype=dtype, **bounds)

    def context(self) -> "NvidiaContext":
        """See `Engine`."""
        config = None
        if self._device._rtx:
            config = self._engine.create_runtime_config()
            config.set_runtime_cache(self._cache)
            # The default compiles kernels for a shape behind our back: a captured graph would keep the slow ones.
            eager = self._device._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise OptionError(f"{self._device.info.name} has no room for {self._path}: {self._device._log.take()}")
        return NvidiaContext(self._device, self._path, context, owners=(self, config))

    def compiled(self) -> bytes | None:
        """See `Engine`."""
        content = None if self._cache is None else self._cache.serialize()
        return None if content is None else bytes(content)


class NvidiaContext:
    """`Context` of either flavour."""

    def __init__(self, device: NvidiaDevice, path: Path, context: Any, owners: tuple[Any, ...]) -> None:
        """`owners` live as long as the context does."""
        self._device, self._path, self._context, self._owners = device, path, context, owners

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """See `Context`."""
        if not self._context.set_input_shape(name, shape):
            raise BundleError(f"{self._path} does not take {name!r} of shape {list(shape)}: {self._device._log.take()}")

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Context`."""
        return tuple(self._context.get_tensor_shape(name))

    def set_address(self, name: str, address: int) -> None:
        """See `Context`."""
        if not self._context.set_tensor_address(name, address):
            raise BundleError(f"{self._path} takes no address for {name!r}: {self._device._log.take()}")

    def enqueue(self) -> None:
        """See `Context`."""
        if not self._context.execute_async_v3(int(self._device._stream)):
            raise BundleError(f"{self._path} failed on {self._device.info.name}: {self._device._log.take()}")

    def can_capture(self) -> bool:
        """See `Context`; classic TensorRT has no such question: there the capture itself is the answer."""
        return not self._device._rtx or bool(self._context.is_stream_capturable(int(self._device._stream)))


def _release(owned: list[tuple[Callable[[Any], Any], Any]]) -> None:
    """Free in reverse, the stream last; that CUDA itself may have gone at the program's end is no error."""
    while owned:
        free, thing = owned.pop()
        free(thing)


def _driver_version() -> str:
    """Such as 580.65.06; empty where the system does not tell it in a file."""
    try:
        match = re.search(r"Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER_FILE.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return match[1] if match else ""


def _logger(tensorrt: Any) -> Any:
    """A logger that prints nothing and keeps the first error since it was last asked."""

    class Log(tensorrt.ILogger):
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self._first = ""

        def log(self, severity: Any, message: str) -> None:
            errors = (tensorrt.ILogger.Severity.INTERNAL_ERROR, tensorrt.ILogger.Severity.ERROR)
            if severity in errors and not self._first:
                self._first = message

        def take(self) -> str:
            first, self._first = self._first, ""
            return _one_line(first or "the library does not say why")

    return Log()

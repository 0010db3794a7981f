"""The real device, as far as a machine without a GPU can tell: its names exist, and what is missing is one line.

Its own lines run on stand-ins for the vendor's modules; on hardware they run in `python -m benchmarks.gpu_acceptance`.
"""

import ast
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypersd_export.errors import BundleError, HypersdError, MissingBackend, OptionError
from hypersd_export.runtime import nvidia
from hypersd_export.runtime.engine_graph import EngineGraph, NotCaptured
from hypersd_export.runtime.nvidia import (
    CUDA_NAMES,
    LIBRARIES,
    RTX_NAMES,
    TENSORRT_NAMES,
    NvidiaDevice,
    open_device,
)
from hypersd_export.runtime.onnx import open_graph
from tests.bundles import CHANNELS, HEIGHT, TOKENS, WIDTH, write_unet
from tests.fake_device import engine_of
from tests.fake_vendor import DataType, FakeCuda, FakeTensorRT

SOURCE = Path(nvidia.__file__).read_text(encoding="utf-8")


def _attributes() -> set[str]:
    """All names that stand after a dot in the file."""
    return {node.attr for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Attribute)}


def test_the_lists_name_all_that_the_file_uses() -> None:
    used = {name for name in _attributes() if re.match(r"cuda[A-Z]", name)}
    members = {name for name in used if re.match(r"cuda(DevAttr|Memcpy(Host|Device)|StreamCaptureMode[A-Z])", name)}
    assert used - members == set(CUDA_NAMES)
    listed = {name for names in (TENSORRT_NAMES, RTX_NAMES) for members in names.values() for name in members}
    assert listed <= _attributes()


def test_cuda_python_has_what_is_used() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime")
    assert [name for name in CUDA_NAMES if not hasattr(cuda, name)] == []
    assert int(cuda.cudaMemcpyKind.cudaMemcpyHostToDevice) == 1
    assert int(cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost) == 2
    assert int(cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal) == 1
    for name in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"):
        assert hasattr(cuda.cudaDeviceAttr, name)
    assert {"name", "totalGlobalMem"} <= set(dir(cuda.cudaDeviceProp()))
    assert int(cuda.cudaStream_t()) == 0, "its handle is what TensorRT takes"


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt"])
def test_tensorrt_has_what_is_used(module: str) -> None:
    trt = pytest.importorskip(module)
    wanted = [TENSORRT_NAMES, RTX_NAMES] if module == "tensorrt_rtx" else [TENSORRT_NAMES]
    missing = [
        f"{owner}.{name}"
        for names in wanted
        for owner, members in names.items()
        for name in members
        if not hasattr(getattr(trt, owner) if owner else trt, name)
    ]
    assert missing == []
    assert {"INPUT"} <= set(trt.TensorIOMode.__members__)
    assert {"DEVICE"} <= set(trt.TensorLocation.__members__)
    assert trt.nptype(trt.DataType.UINT8) is not None
    if module == "tensorrt_rtx":
        assert "EAGER" in trt.DynamicShapesKernelSpecializationStrategy.__members__


def test_the_logger_keeps_the_first_error() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    log = nvidia._logger(trt)
    severity = trt.ILogger.Severity
    log.log(severity.WARNING, "a warning")
    log.log(severity.ERROR, "the\n  first")
    log.log(severity.INTERNAL_ERROR, "the second")
    assert log.take() == "the first"
    assert log.take() == "the library does not say why"


def test_a_file_that_is_no_engine_is_refused_by_the_library_in_one_line(tmp_path: Path) -> None:
    """The real library through our own `load`: no driver is needed to see that this is no engine."""
    trt = pytest.importorskip("tensorrt_rtx")
    device = object.__new__(nvidia.NvidiaDevice)
    device._log = nvidia._logger(trt)
    device._runtime = trt.Runtime(device._log)
    device.info = types.SimpleNamespace(name="the GPU")  # type: ignore[assignment]
    (tmp_path / "model.engine").write_bytes(b"not an engine" * 100)
    with pytest.raises(BundleError, match=r"magicTag.*export it again") as caught:
        device.load(tmp_path / "model.engine", None)
    assert "\n" not in str(caught.value)


# What is missing


def _cuda(error: int, count: int = 0, supported: int = 0) -> Any:
    """cuda.bindings.runtime of a machine in this state."""
    real = pytest.importorskip("cuda.bindings.runtime")
    return types.SimpleNamespace(
        cudaGetDeviceCount=lambda: (real.cudaError_t(error), count),
        cudaDriverGetVersion=lambda: (real.cudaError_t(0), supported),
        cudaRuntimeGetVersion=lambda: (real.cudaError_t(0), 13040),
        cudaGetErrorString=real.cudaGetErrorString,
    )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"error": 35}, r"no NVIDIA driver \(libcuda\) is found; install one, or start the container with its GPUs"),
        ({"error": 35, "supported": 12020}, r"driver supports CUDA 12\.2 and this runtime is of CUDA 13\.4; update"),
        ({"error": 100, "supported": 13000}, "the driver sees no NVIDIA GPU; check CUDA_VISIBLE_DEVICES"),
        ({"error": 0, "supported": 13000}, "the driver sees no NVIDIA GPU"),
        ({"error": 999, "supported": 13000}, r"unknown error \(cudaError 999\)"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    state: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {"cuda.bindings.runtime": _cuda(**state), "tensorrt_rtx": types.SimpleNamespace()}
    monkeypatch.setattr(nvidia, "import_module", modules.__getitem__)
    with pytest.raises(OptionError, match=message) as caught:
        open_device("rtx")
    assert str(caught.value).startswith("runtime 'tensorrt' does not start on this machine: ")
    assert "\n" not in str(caught.value)


def test_this_machine_says_what_it_lacks() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime")
    pytest.importorskip("tensorrt_rtx")
    if int(cuda.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("this machine has a GPU")
    with pytest.raises(OptionError, match="does not start on this machine"):
        open_device("rtx")


@pytest.mark.parametrize("flavour", LIBRARIES)
def test_missing_packages_name_their_extra(flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = LIBRARIES[flavour]
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingBackend, match=rf"cuda-python.*hypersd\[{library.extra}\]"):
        open_device(flavour)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", types.ModuleType("cuda.bindings.runtime"))
    monkeypatch.setitem(sys.modules, library.module, None)
    with pytest.raises(MissingBackend, match=rf"needs {library.package}, .*hypersd\[{library.extra}\]"):
        open_device(flavour)


def test_libraries_that_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file:\n No such file")

    monkeypatch.setattr(nvidia, "import_module", broken)
    with pytest.raises(
        HypersdError, match=r"cuda-python is installed and cannot be loaded: libcudart.*install it anew"
    ):
        open_device("rtx")


# Every line of it, on stand-ins for the vendor's modules


def machine(*, rtx: bool = True, **options: Any) -> tuple[FakeCuda, FakeTensorRT, NvidiaDevice]:
    cuda = FakeCuda(**options)
    trt = FakeTensorRT(cuda, rtx=rtx)
    return cuda, trt, NvidiaDevice(cuda, trt, "rtx" if rtx else "classic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    write_unet(folder / "unet", 2)
    write_unet(folder / "free", "rows", half=True)
    for name in ("unet", "free"):
        (folder / name / "model.engine").write_bytes(engine_of(folder / name / "model.onnx"))
    return folder


def feeds(rows: int = 2, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, CHANNELS, HEIGHT, WIDTH)),
        "timestep": np.float64(500.0),
        "encoder_hidden_states": rng.standard_normal((rows, TOKENS, CHANNELS)),
    }


def opened(folder: Path, name: str, device: NvidiaDevice, kernels: bytes | None = None) -> EngineGraph:
    path = folder / name / "model.engine"
    return EngineGraph(path, device, device.load(path, kernels))


@pytest.mark.parametrize("rtx", [True, False], ids=["rtx", "classic"])
@pytest.mark.parametrize(("name", "rows"), [("unet", (2, 2, 2)), ("free", (2, 3, 2, 3))])
def test_it_gives_what_the_onnx_graph_gives(folder: Path, rtx: bool, name: str, rows: tuple[int, ...]) -> None:
    _, trt, device = machine(rtx=rtx)
    graph, reference = opened(folder, name, device), open_graph(folder / name / "model.onnx")
    assert graph.inputs == reference.inputs
    for seed, count in enumerate((*rows, *rows)):
        given = feeds(count, seed)
        np.testing.assert_array_equal(graph.run(**given)["out_sample"], reference.run(**given)["out_sample"])
    assert graph.captured is True
    assert len(trt.engines[0].contexts) == len(set(rows))


def test_what_the_device_says_of_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.3.0\n"
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(nvidia, "_DRIVER_FILE", tmp_path / "version")
    _, _, device = machine(capability=(9, 0), rtx=False)
    info = device.info
    assert (info.name, info.capability, info.memory_bytes) == ("Fake H100", (9, 0), 80 << 30)
    assert (info.driver, info.cuda) == ("580.65.06 (CUDA 13.0)", "13.4")
    assert (info.flavour, info.library) == ("classic", "1.7.1.116")
    monkeypatch.setattr(nvidia, "_DRIVER_FILE", tmp_path / "none")
    assert machine()[2].info.driver == "(CUDA 13.0)"


def test_compiled_kernels(folder: Path) -> None:
    path = folder / "unet" / "model.engine"
    device = machine()[2]
    assert device.load(path, None).compiled() == b"kernels"
    assert device.load(path, b"kernels of before").compiled() == b"kernels of before"
    assert device.load(path, b"of another driver").compiled() == b"kernels"
    assert machine(rtx=False)[2].load(path, None).compiled() is None


def test_timing(folder: Path) -> None:
    graph = opened(folder, "unet", machine()[2])
    graph.timed = True
    graph.run(**feeds())
    assert (graph.timings[0].copy_in, graph.timings[0].compute, graph.timings[0].copy_out) == (3.0, 1.0, 1.0)


def test_everything_is_freed_with_the_device(folder: Path) -> None:
    import gc

    cuda, trt, device = machine()
    graph = opened(folder, "unet", device)
    graph.timed = True
    for _ in range(2):
        graph.run(**feeds())
    assert len(cuda.live) == 4 + 4 + 4 + 1 + 1  # device and host buffers, events, a graph and the stream
    del graph, device
    trt.engines.clear()
    gc.collect()
    assert cuda.live == {}


@pytest.mark.parametrize("how", ["the stream", "the library"])
def test_a_capture_that_fails_leaves_the_rest_working(folder: Path, how: str) -> None:
    cuda, trt, device = machine()
    graph, reference = opened(folder, "unet", device), open_graph(folder / "unet" / "model.onnx")
    graph.run(**feeds())
    cuda.broken_capture = how == "the stream"
    if how == "the library":
        trt.engines[0].contexts[0].is_stream_capturable = lambda stream: False
    with pytest.warns(NotCaptured, match="cannot be captured as a CUDA graph"):
        mine = graph.run(**feeds(seed=1))
    np.testing.assert_array_equal(mine["out_sample"], reference.run(**feeds(seed=1))["out_sample"])


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_what_the_library_refuses_is_one_line_with_its_reason(folder: Path, call: str) -> None:
    _, trt, device = machine()
    engine = device.load(folder / "unet" / "model.engine", None)
    context = engine.context()
    trt.engines[0].contexts[0].refuse = {call}
    refused = {
        "set_input_shape": lambda: context.set_shape("sample", (2, 4)),
        "set_tensor_address": lambda: context.set_address("sample", 1),
        "execute_async_v3": context.enqueue,
    }[call]
    with pytest.raises(BundleError, match=f"{call} is refused"):
        refused()


def test_engines_that_cannot_be_fed(folder: Path) -> None:
    _, trt, device = machine()
    path = folder / "unet" / "model.engine"
    engine = device.load(path, None)
    vendor = trt.engines[0]
    vendor.host_tensors = {"timestep"}
    with pytest.raises(BundleError, match="wants 'timestep' in host memory"):
        engine._tensor("timestep")
    vendor.kinds = {"sample": DataType.BF16}
    with pytest.raises(BundleError, match=r"has 'sample' of type DataType\.BF16"):
        engine._tensor("sample")
    vendor.no_room = True
    with pytest.raises(OptionError, match=r"Fake H100 has no room for .*: out of memory"):
        engine.context()


def test_cuda_errors_are_one_line(folder: Path) -> None:
    cuda, _, device = machine()
    graph = opened(folder, "unet", device)
    cuda.fail = {"cudaStreamSynchronize": 700}
    with pytest.raises(OptionError, match=r"Fake H100 failed: an illegal memory .* \(cudaError 700\); start again"):
        graph.run(**feeds())
    with pytest.raises(OptionError, match="the memory of Fake H100 is full"):
        opened(folder, "unet", machine(memory=100)[2]).run(**feeds())


def test_cuda_python_takes_our_arguments() -> None:
    """The real functions with arguments of our types: without a driver each answers with an error, and none objects."""
    cuda = pytest.importorskip("cuda.bindings.runtime")
    if int(cuda.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("this machine has a GPU; the acceptance script makes these calls")
    host = np.zeros(4, dtype=np.float32)
    stream = cuda.cudaStream_t()
    calls = {
        "cudaSetDevice": (0,),
        "cudaGetDeviceProperties": (0,),
        "cudaDeviceGetAttribute": (cuda.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor, 0),
        "cudaStreamCreateWithFlags": (cuda.cudaStreamNonBlocking,),
        "cudaMalloc": (16,),
        "cudaHostAlloc": (16, 0),
        "cudaMemcpyAsync": (4096, host.ctypes.data, host.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream),
        "cudaStreamSynchronize": (stream,),
        "cudaStreamBeginCapture": (stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal),
        "cudaEventCreate": (),
        "cudaFree": (4096,),
        "cudaFreeHost": (4096,),
    }
    for name, arguments in calls.items():
        result = getattr(cuda, name)(*arguments)
        assert isinstance(result, tuple), name
        assert int(result[0]) in (3, 35, 100), (name, result)


def test_the_stand_in_takes_as_many_arguments_as_cuda_python() -> None:
    import inspect

    cuda = pytest.importorskip("cuda.bindings.runtime")
    for name in CUDA_NAMES:
        if inspect.ismethod(getattr(FakeCuda(), name)):
            signature = str(getattr(cuda, name).__doc__).split(")")[0].split("(", 1)[1]
            theirs = [part for part in signature.split(",") if part.strip()]
            assert len(inspect.signature(getattr(FakeCuda(), name)).parameters) == len(theirs), name

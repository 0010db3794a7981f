"""The real device, as far as a machine without a GPU can tell: its names exist, and what is missing is one line.

What runs on the GPU is covered by the tests of `runtime/engine_graph.py` on a device that stands in, and on hardware by
`python -m benchmarks.gpu_acceptance`.
"""

import ast
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from hypersd_export.errors import BundleError, HypersdError, MissingBackend, OptionError
from hypersd_export.runtime import nvidia
from hypersd_export.runtime.nvidia import CUDA_NAMES, LIBRARIES, RTX_NAMES, TENSORRT_NAMES, open_device

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

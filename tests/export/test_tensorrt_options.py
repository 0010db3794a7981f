"""Which library, which GPUs, which weights: decided on this machine, or refused in one line. No library is needed."""

import pytest

from hypersd_export.bundle.engines import engine_digest
from hypersd_export.errors import MissingBackend, OptionError
from hypersd_export.targets import tensorrt, tensorrt_vendor
from hypersd_export.targets.tensorrt import DEFAULT_CAPABILITIES, EngineOptions, parse_capabilities, resolve

VERSIONS = {"rtx": "1.7.1.116", "classic": "11.4.0.106"}


@pytest.fixture
def machine(monkeypatch):
    """A machine: its GPU's capability or None, and the libraries that are installed."""

    def be(gpu, *libraries):
        def version(flavour):
            if flavour not in libraries:
                raise MissingBackend(tensorrt_vendor.FLAVOURS[flavour], "tensorrt", "--target tensorrt")
            return VERSIONS[flavour]

        monkeypatch.setattr(tensorrt_vendor, "gpu_capability", lambda: gpu)
        monkeypatch.setattr(tensorrt_vendor, "installed", lambda flavour: flavour in libraries)
        monkeypatch.setattr(tensorrt_vendor, "installed_version", version)

    return be


@pytest.mark.parametrize(
    ("gpu", "libraries", "flavour", "why"),
    [
        (None, ("rtx",), "rtx", "no GPU here, and only TensorRT-RTX builds without one"),
        (None, ("rtx", "classic"), "rtx", "no GPU here"),
        ((9, 0), ("rtx", "classic"), "classic", "a GPU of 9.0 is here and tensorrt is installed"),
        ((8, 9), ("rtx",), "rtx", "a GPU of 8.9 is here, and tensorrt is not installed"),
    ],
)
def test_auto_says_which_library_and_why(machine, gpu, libraries, flavour, why):
    machine(gpu, *libraries)
    options, said = resolve()
    assert options.flavour == flavour
    assert options.capabilities == (DEFAULT_CAPABILITIES if flavour == "rtx" else ("9.0",))
    assert why in said
    assert VERSIONS[flavour] in said


def test_what_is_asked_for_is_taken(machine):
    machine((8, 9), "rtx", "classic")
    options, said = resolve(flavour="rtx", capabilities=("8.6", "12.0"), weights="refit", optimization_level=5)
    assert options == EngineOptions(
        flavour="rtx", capabilities=("8.6", "12.0"), weights="refit", optimization_level=5
    )  # fmt: skip
    assert "tensorrt_rtx 1.7.1.116 for compute capability 8.6, 12.0 (--trt-flavour rtx)" in said
    assert resolve(flavour="classic", capabilities=("8.9",), weights="stripped")[0].weights == "stripped"


@pytest.mark.parametrize(
    ("gpu", "asked", "said"),
    [
        (None, {"flavour": "new"}, "--trt-flavour new: choose auto, rtx or classic"),
        (None, {"weights": "none"}, "--weights none: choose full, stripped or refit"),
        (None, {"flavour": "classic"}, "no driver and GPU are found here; use --trt-flavour rtx"),
        (None, {"weights": "refit"}, "TensorRT-RTX writes such engines only with a GPU; use full here"),
        (None, {"weights": "stripped"}, "only with a GPU"),
        (None, {"capabilities": ("9.0",)}, "H100 and H200 are not TensorRT-RTX's; build on that GPU"),
        (None, {"flavour": "rtx", "capabilities": ("8.9", "9.0")}, "H100 and H200 are not TensorRT-RTX's"),
        (None, {"flavour": "rtx", "capabilities": ("7.5",)}, "fails to build fp16 UNets for Turing cards"),
        (None, {"capabilities": ("7.5", "8.6")}, "fails to build fp16 UNets for Turing cards"),
        (None, {"flavour": "rtx", "capabilities": ("8.7",)}, "TensorRT-RTX has 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"),
        ((9, 0), {"capabilities": ("8.9",)}, "tensorrt builds for the GPU in this machine, which is 9.0"),
        (None, {"optimization_level": 6}, "--trt-level 6: from 0 to 5"),
        (None, {"workspace_mb": 0}, "workspace of 0 MB: at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(machine, gpu, asked, said):
    machine(gpu, "rtx", "classic")
    with pytest.raises(OptionError) as error:
        resolve(**asked)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gpu_that_rtx_does_not_build_for(machine):
    """An H100 with TensorRT-RTX alone: engines for it cannot be had, for others they can."""
    machine((9, 0), "rtx")
    with pytest.raises(OptionError, match=r"the GPU here \(9\.0\) is not TensorRT-RTX's; install tensorrt \(hypersd\["):
        resolve()
    assert resolve(capabilities=("8.9",))[0].capabilities == ("8.9",)


def test_a_missing_library(machine):
    machine(None)
    with pytest.raises(MissingBackend, match=r"pip install 'hypersd\[tensorrt\]'"):
        resolve()


def test_capabilities_are_parsed_in_rising_order():
    assert parse_capabilities(None) is None
    assert parse_capabilities("12.0, 8.6,8.9") == ("8.6", "8.9", "12.0")


@pytest.mark.parametrize("text", ["", "8", "8.6,", "sm86", "8.6.1", "8.x", "8.6,8.6", "٨.6"])
def test_capabilities_that_are_none(text):
    with pytest.raises(OptionError, match="--compute-capability"):
        parse_capabilities(text)


def test_a_gpu_is_found_by_its_driver_alone(monkeypatch):
    class Driver:
        def __init__(self, status=0, attributes=0):
            self.status, self.attributes = status, attributes

        def cuInit(self, _):  # noqa: N802
            return self.status

        def cuDeviceGet(self, device, _):  # noqa: N802
            return 0

        def cuDeviceGetAttribute(self, number, attribute, _):  # noqa: N802
            number._obj.value = {75: 8, 76: 9}[attribute]
            return self.attributes

    found = {"driver": Driver()}
    monkeypatch.setattr(tensorrt_vendor.ctypes, "CDLL", lambda _: found["driver"])
    assert tensorrt_vendor.gpu_capability() == (8, 9)
    found["driver"] = Driver(status=100)
    assert tensorrt_vendor.gpu_capability() is None
    found["driver"] = Driver(attributes=1)
    assert tensorrt_vendor.gpu_capability() is None

    def missing(_):
        raise OSError("no such library")

    monkeypatch.setattr(tensorrt_vendor.ctypes, "CDLL", missing)
    assert tensorrt_vendor.gpu_capability() is None


def test_options_are_part_of_the_digest():
    def digest(**more):
        options = EngineOptions(flavour="rtx", capabilities=("8.6",), **more)
        return engine_digest(
            onnx_sha256="0", flavour="rtx", version="1", capabilities=("8.6",), options=options.to_json()
        )

    assert len({digest(), digest(weights="refit"), digest(optimization_level=1), digest(workspace_mb=512)}) == 4
    assert tensorrt.shape_tag({"shape": [], "least": [], "most": []}) == "scalar"

"""Core ML as a runtime, on a Mac of onnxruntime; and the real device's own logic with a stand-in for coremltools."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hypersd_export.bundle.cache import StageCache
from hypersd_export.bundle.packages import package_records
from hypersd_export.errors import BundleError, MissingBackend, OptionError
from hypersd_export.runtime import mac
from hypersd_export.runtime.coreml import UNITS, open_packages
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.targets.coreml import COMPUTE_UNITS
from tests.bundles import make_bundle
from tests.coreml_bundles import COMPONENTS, FakeMac, make_package_bundle, reseal, target_of

pytestmark = pytest.mark.filterwarnings("ignore::hypersd_export.runtime.tokenizer.PromptTruncated")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package_bundle(tmp_path_factory.mktemp("coreml") / "bundle")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeMac:
    device = FakeMac()
    monkeypatch.setattr(mac, "open_device", lambda: device)
    return device


def test_pictures_are_those_of_the_same_graphs_in_onnxruntime(made: Path, device: FakeMac, tmp_path: Path) -> None:
    onnx = make_bundle(tmp_path / "onnx")
    ours, theirs = Pipeline.from_bundle(made), Pipeline.from_bundle(onnx)
    assert (ours.runtime.name, ours.provider) == ("coreml", "Fake M9, macOS 99.0, Core ML on all")
    results = [p("cat dog", negative_prompt="dog", seed=4, num_images=3, steps=2) for p in (ours, theirs)]
    np.testing.assert_allclose(results[0].latents, results[1].latents, atol=1e-6)
    for mine, other in zip(results[0].images, results[1].images, strict=True):
        assert np.abs(np.asarray(mine, np.int16) - np.asarray(other, np.int16)).max() <= 1
    assert ours.golden().passed
    assert [name for name, _, _ in device.loaded] == [
        "text_encoder.mlpackage",
        "unet.mlpackage",
        "vae_decoder.mlpackage",
    ]
    digests = {name: entry["digests"][0] for name, entry in target_of(made)["components"].items()}
    assert device.loaded[1] == ("unet.mlpackage", digests["unet"], "all")


def test_compute_units(made: Path, device: FakeMac) -> None:
    assert UNITS == COMPUTE_UNITS
    pipeline = Pipeline.from_bundle(made, provider="cpu-and-ne", check=False)
    pipeline.runtime.graph("unet")
    assert device.loaded[-1][2] == "cpu-and-ne"
    with pytest.raises(OptionError, match=r"provider 'gpu' of runtime 'coreml': choose one of all, cpu-only"):
        Pipeline.from_bundle(made, provider="gpu", check=False)
    with pytest.raises(OptionError, match="--threads 2: it is onnxruntime's"):
        Pipeline.from_bundle(made, threads=2, check=False)
    assert open_packages(made, target_of(made) | {"compute_units": "cpu-only"}, device=device).provider.endswith(
        "cpu-only"
    )


def test_what_is_wrong_with_a_bundle_is_one_line(made: Path, device: FakeMac, tmp_path: Path) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    shutil.rmtree(copy / "unet" / "unet.mlpackage")
    runtime = open_packages(copy, target_of(copy))
    with pytest.raises(BundleError, match=r"unet\.mlpackage is missing: export the bundle again"):
        runtime.graph("unet")
    with pytest.raises(BundleError, match="no package of pipeline, only of text_encoder, unet"):
        runtime.single()
    graph = runtime.graph("vae_decoder")
    with pytest.raises(BundleError, match=r"takes other inputs \(latent_sample, z\)"):
        graph.run(z=np.zeros(1))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({}, "lists no Core ML packages"),
        ({"components": {"unet": {}}, "ports": {}}, "unusable records of Core ML packages"),
        ({"components": {"unet": {"packages": [], "digests": []}}, "ports": {}}, "names no packages of unet"),
        ({"components": {"unet": {"packages": ["a"], "digests": []}}, "ports": {}}, "names no packages of unet"),
        ({"components": {"unet": {"packages": ["../a"], "digests": ["0"]}}, "ports": {}}, "outside the bundle: do not"),
    ],
)
def test_records_that_cannot_be_read(target: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        package_records(target)


def test_without_a_mac_one_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(OptionError, match=r"runtime 'coreml': Core ML runs on a Mac only .* use --runtime onnx"):
        Pipeline.from_bundle(made, check=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingBackend, match=r"runtime 'coreml' needs coremltools.*hypersd\[coreml\]"):
        mac.open_device()


# The real device, with a stand-in for coremltools


class Tools:
    """coremltools as far as the device needs it."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.loaded: list[tuple[str, Any]] = []
        self.failing = ""
        self.functions: list[str | None] = []
        self.ComputeUnit = SimpleNamespace(ALL=1, CPU_ONLY=2, CPU_AND_GPU=3, CPU_AND_NE=4)
        tools = self

        class CompiledMLModel:
            def __init__(self, path: str, compute_units: Any, function_name: str | None = None) -> None:
                if tools.failing == "load":
                    raise RuntimeError("Error compiling the model\nfor the Neural Engine")
                assert Path(path, "model").is_file()
                tools.loaded.append((path, compute_units))
                tools.functions.append(function_name)

            def predict(self, feeds: dict[str, np.ndarray]) -> dict[str, Any]:
                from PIL import Image

                if tools.failing == "predict":
                    raise RuntimeError("Unable to compute the prediction")
                picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
                return {"image": Image.fromarray(picture).convert("RGBA"), "latents": feeds["noise"] * 2, "more": 0}

        def compile_model(package: str, destination: str) -> str:
            self.compiled.append(package)
            Path(destination).mkdir()
            Path(destination, "model").write_text("compiled")
            return destination

        self.models = SimpleNamespace(
            CompiledMLModel=CompiledMLModel, utils=SimpleNamespace(compile_model=compile_model)
        )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with the description of a single graph, and nothing behind it."""
    pytest.importorskip("coremltools")
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    for name, kind, shape in (("input_ids", 131104, (1, 5)), ("noise", 65568, (1, 2, 2, 2))):
        feature = model.description.input.add(name=name)
        feature.type.multiArrayType.shape.extend(shape)
        feature.type.multiArrayType.dataType = kind
    for name in ("image", "latents"):
        model.description.output.add(name=name)
    path = tmp_path / "pipeline.mlpackage"
    (path / mac.MODEL_FILE).parent.mkdir(parents=True)
    (path / mac.MODEL_FILE).write_bytes(model.SerializeToString())
    return path


def test_a_package_is_compiled_once_and_loaded_on_the_units(package: Path, tmp_path: Path) -> None:
    tools = Tools()
    device = mac.MacDevice(coremltools=tools, cache=StageCache(tmp_path / "cache"))
    model = device.load(package, "digest", "all")
    assert {name: (t.shape, t.dtype) for name, t in model.inputs.items()} == {
        "input_ids": ((1, 5), np.int32), "noise": ((1, 2, 2, 2), np.float32),
    }  # fmt: skip
    found = model.predict({"input_ids": np.zeros((1, 5), np.int32), "noise": np.ones((1, 2, 2, 2), np.float32)})
    assert list(found) == ["image", "latents"]
    assert (found["image"].shape, found["image"].dtype) == ((1, 3, 2, 3), np.uint8)
    assert found["image"][0, :, 1, 2].tolist() == [15, 16, 17]
    assert found["latents"].tolist() == np.full((1, 2, 2, 2), 2.0).tolist()
    for units in ("cpu-only", "cpu-and-gpu", "cpu-and-ne"):
        device.load(package, "digest", units)
    assert [units for _, units in tools.loaded] == [1, 2, 3, 4]
    assert tools.compiled == [str(package.resolve())]
    device.load(package, "another", "all")
    assert len(tools.compiled) == 2
    assert device.name.endswith("macOS ")  # no Mac here


def test_a_function_of_several_is_loaded_by_its_name(package: Path, tmp_path: Path) -> None:
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    for name, side in (("small", 2), ("large", 4)):
        function = model.description.functions.add(name=name)
        feature = function.input.add(name="noise")
        feature.type.multiArrayType.shape.extend((1, side))
        feature.type.multiArrayType.dataType = 65568
        function.output.add(name=f"{name} latents")
    model.description.defaultFunctionName = "large"
    (package / mac.MODEL_FILE).write_bytes(model.SerializeToString())
    tools = Tools()
    device = mac.MacDevice(coremltools=tools, cache=StageCache(tmp_path / "cache"))
    loaded = [device.load(package, "digest", "all", function) for function in (None, "small", "large")]
    assert [each.inputs["noise"].shape for each in loaded] == [(1, 4), (1, 2), (1, 4)]
    assert [each.outputs for each in loaded] == [("large latents",), ("small latents",), ("large latents",)]
    assert tools.functions == [None, "small", "large"]
    assert len(tools.compiled) == 1


def test_only_packages_that_have_the_function_are_asked_for_it(made: Path, device: FakeMac) -> None:
    target = target_of(made)
    target["functions"] = {"four": {}, "eight": {}}
    target["components"]["unet"]["functions"] = ["four", "eight"]
    runtime = open_packages(made, target, function="eight", device=device)
    for component in ("unet", "vae_decoder"):
        runtime.graph(component)
    assert device.functions == ["eight", None]
    with pytest.raises(OptionError, match="function two is not in this bundle: choose four, eight"):
        open_packages(made, target, function="two", device=device)
    with pytest.raises(OptionError, match="function four is not in this bundle: it has none"):
        Pipeline.from_bundle(made, function="four")


def test_what_core_ml_says_is_one_line(package: Path, tmp_path: Path) -> None:
    tools = Tools()
    device = mac.MacDevice(coremltools=tools, cache=StageCache(tmp_path / "cache"))
    model = device.load(package, "digest", "all")
    tools.failing = "predict"
    with pytest.raises(BundleError, match=r"pipeline\.mlpackage failed: Unable to compute the prediction$"):
        model.predict({})
    tools.failing = "load"
    with pytest.raises(BundleError, match=r"does not load on cpu-and-ne: Error compiling the model$"):
        device.load(package, "digest", "cpu-and-ne")
    (package / mac.MODEL_FILE).write_bytes(b"\xff\xff")
    with pytest.raises(BundleError, match=r"pipeline\.mlpackage cannot be read"):
        device.load(package, "digest", "all")


def test_records_of_every_component(made: Path) -> None:
    records = package_records(target_of(made))
    assert set(records) == set(COMPONENTS)
    assert reseal(made) == made

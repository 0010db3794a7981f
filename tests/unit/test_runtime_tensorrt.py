"""Engine bundles on the device of NumPy memory: the very pictures of the ONNX runtime, and refusals in one line."""

import json
import os
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hypersd_export.bundle.engines import EngineRecord
from hypersd_export.cli import app
from hypersd_export.errors import BundleError, MissingBackend, OptionError
from hypersd_export.runtime import Pipeline, nvidia
from hypersd_export.runtime.engine_graph import NotCaptured
from hypersd_export.runtime.tensorrt import KERNELS, KernelsNotKept, TensorRTRuntime, prune_kernels
from tests.bundles import CFG_PLANS, CHANNELS, HEIGHT, PLAIN_PLANS, TOKENS, WIDTH
from tests.engine_bundles import make_engine_bundle, make_single_engine_bundle, reseal
from tests.fake_device import FakeDevice

Records = dict[str, EngineRecord]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hypersd" / KERNELS


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """What `open_device` opens."""
    device = FakeDevice()
    monkeypatch.setattr(nvidia, "open_device", lambda flavour: device)
    return device


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Records]:
    return make_engine_bundle(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def bundle(made: tuple[Path, Records]) -> Path:
    return made[0]


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def onnx_beside(bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(bundle.parent / "onnx", runtime="onnx")


def assert_equal(mine: Any, theirs: Any) -> None:
    np.testing.assert_array_equal(mine.latents, theirs.latents)
    assert len(mine.images) == len(theirs.images)
    for one, other in zip(mine.images, theirs.images, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# Numbers


@pytest.mark.parametrize(
    "settings",
    [
        {"negative_prompt": "dog", "num_images": 3},
        {"steps": 2, "guidance": 5.0},
        {"init_image": Image.new("RGB", (12, 8), "red"), "strength": 0.6, "num_images": 2},
    ],
    ids=["guidance and fresh noise", "another plan and weight", "image to image"],
)
def test_the_pictures_are_the_onnx_runtimes(device: FakeDevice, bundle: Path, settings: dict[str, Any]) -> None:
    mine, theirs = Pipeline.from_bundle(bundle), onnx_beside(bundle)
    assert (mine.runtime.name, theirs.runtime.name) == ("tensorrt", "onnx")
    assert mine.size == theirs.size
    for seed in (3, 4):
        assert_equal(mine("cat hat", seed=seed, **settings), theirs("cat hat", seed=seed, **settings))


@pytest.mark.parametrize("options", [{"batch": 2}, {"dynamic": True}, {"half": True, "timestep_rank": 1}], ids=str)
@pytest.mark.parametrize("plans", [CFG_PLANS, PLAIN_PLANS], ids=["cfg", "plain"])
def test_other_shapes_and_types(device: FakeDevice, tmp_path: Path, plans: Any, options: dict[str, Any]) -> None:
    bundle, _ = make_engine_bundle(tmp_path, plans, **options)
    mine, theirs = Pipeline.from_bundle(bundle), onnx_beside(bundle)
    for count in (1, 3):
        assert_equal(mine("cat", seed=5, num_images=count), theirs("cat", seed=5, num_images=count))


@pytest.mark.parametrize(("plans", "batch"), [(CFG_PLANS, 1), (CFG_PLANS, 2), (PLAIN_PLANS, 1)])
def test_a_single_graph_is_one_launch(device: FakeDevice, tmp_path: Path, plans: Any, batch: int) -> None:
    """The loop of all steps is inside: one copy in per input, one launch, two copies out."""
    bundle, onnx = make_single_engine_bundle(tmp_path, plans, batch=batch)
    mine, theirs = Pipeline.from_bundle(bundle), Pipeline.from_bundle(onnx, runtime="onnx")
    assert mine.is_single_graph
    for seed in range(3):
        device.log.clear()
        assert_equal(mine("cat", seed=seed, num_images=batch), theirs("cat", seed=seed, num_images=batch))
    inputs = 4 if plans is CFG_PLANS else 2
    kinds = [entry.split()[0] for entry in device.log]
    assert kinds == ["in"] * inputs + ["launch", "out", "out", "wait"]
    assert any(entry.startswith("out uint8") for entry in device.log)
    assert mine.golden().passed
    with pytest.raises(OptionError, match="a single graph starts from noise"):
        mine("cat", init_image=Image.new("RGB", (12, 8)))


def test_text_states_are_copied_once_a_call(device: FakeDevice, bundle: Path) -> None:
    pipeline = Pipeline.from_bundle(bundle)
    pipeline("cat")
    states, latents = f"in float32 {[2, TOKENS, CHANNELS]}", f"in float32 {[2, CHANNELS, HEIGHT, WIDTH]}"
    device.log.clear()
    pipeline("cat", num_images=3)
    assert device.log.count(states) == 1
    assert device.log.count(latents) == 4 * 3


def test_golden(device: FakeDevice, bundle: Path) -> None:
    report = Pipeline.from_bundle(bundle).golden()
    assert report.passed
    assert report.latents_max_abs < 1e-5


def test_nothing_is_loaded_before_it_is_needed_and_nothing_twice(device: FakeDevice, bundle: Path) -> None:
    pipeline = Pipeline.from_bundle(bundle)
    assert device.loaded == []
    pipeline("cat")
    pipeline("dog", num_images=2)
    assert [path.parent.name for path, _ in device.loaded] == ["text_encoder", "unet", "vae_decoder"]
    assert "Fake RTX" in pipeline.provider


def test_warm_up_captures_everything(device: FakeDevice, bundle: Path) -> None:
    pipeline = Pipeline.from_bundle(bundle)
    pipeline.warm_up()
    runtime = pipeline.runtime
    assert isinstance(runtime, TensorRTRuntime)
    assert {name: graph.captured for name, graph in runtime.graphs.items()} == {
        "text_encoder": True, "unet": True, "vae_decoder": True,
    }  # fmt: skip
    captures, allocated = device.log.count("capture"), device.allocated
    pipeline("cat", num_images=2)
    assert (device.log.count("capture"), device.allocated) == (captures, allocated)


def test_timed_calls(device: FakeDevice, bundle: Path) -> None:
    pipeline = Pipeline.from_bundle(bundle)
    assert isinstance(pipeline.runtime, TensorRTRuntime)
    pipeline.warm_up()
    for graph in pipeline.runtime.graphs.values():
        graph.timed = True
    pipeline("cat")
    counts = {name: len(graph.timings) for name, graph in pipeline.runtime.graphs.items()}
    assert counts == {"text_encoder": 2, "unet": 4, "vae_decoder": 1}


def test_what_cannot_be_captured_draws_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "open_device", lambda flavour: FakeDevice(capturable=False))
    with pytest.warns(NotCaptured, match="cannot be captured as a CUDA graph") as caught:
        mine = Pipeline.from_bundle(bundle)("cat", seed=1)
    assert_equal(mine, onnx_beside(bundle)("cat", seed=1))
    assert len(caught) == 2  # the text encoder and the UNet, each once; the decoder is called once


# Compiled kernels


def test_kernels_are_kept_for_the_next_process(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [FakeDevice() for _ in range(2)]
    for device in devices:
        monkeypatch.setattr(nvidia, "open_device", lambda flavour, device=device: device)
        Pipeline.from_bundle(bundle)("cat")
    assert {kernels for _, kernels in devices[0].loaded} == {None}
    for path, kernels in devices[1].loaded:
        assert kernels == f"kernels of {path.name} True".encode()
    assert len(list(cache.iterdir())) == 3


def test_kernels_of_another_driver_or_gpu_are_others(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in ({}, {"driver": "590.1 (CUDA 13.1)"}, {"name": "Another GPU"}):
        device = FakeDevice()
        device.info = replace(device.info, **change)
        monkeypatch.setattr(nvidia, "open_device", lambda flavour, device=device: device)
        Pipeline.from_bundle(bundle).runtime.graph("text_encoder").run(input_ids=np.zeros((1, TOKENS)))
        assert device.loaded[0][1] is None
    assert len(list(cache.iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_a_notice(device: FakeDevice, bundle: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    with pytest.warns(KernelsNotKept, match=r"the compiled kernels are not kept in .*rtx-kernels"):
        Pipeline.from_bundle(bundle)("cat")


# Refusals


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"capability": (12, 0)}, r"is for compute capability 8\.6, 8\.9, and this GPU has 12\.0: export it again"),
        ({"capability": (9, 0)}, r"this GPU has 9\.0: export it again with --trt-flavour classic"),
        ({"library": "1.8.0.2"}, r"was built by tensorrt_rtx 1\.7\.1\.116, and here is 1\.8\.0\.2: export it again"),
    ],
)
def test_another_machine(bundle: Path, machine: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(**machine)
    monkeypatch.setattr(nvidia, "open_device", lambda flavour: device)
    with pytest.raises(BundleError, match=message) as caught:
        Pipeline.from_bundle(bundle)
    assert "\n" not in str(caught.value)
    assert device.loaded == []


def _engine(bundle: Path, component: str = "unet") -> Path:
    return next((bundle / component).glob("*.engine"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: e.write_bytes(e.read_bytes()[:-3]), "was cut short or changed"),
        (lambda e: e.unlink(), "is missing"),
        (lambda e: e.write_bytes(b"x" * e.stat().st_size), "is no TensorRT-RTX engine"),
    ],
)
def test_an_engine_that_was_damaged(device: FakeDevice, copy: Path, damage: Any, message: str) -> None:
    """Seen without the digests of --check, and before the driver is asked for."""
    damage(_engine(copy))
    with pytest.raises(BundleError, match=message) as caught:
        Pipeline.from_bundle(copy, check=False)
    assert "\n" not in str(caught.value)


def test_the_check_sees_a_changed_engine(device: FakeDevice, copy: Path) -> None:
    engine = _engine(copy)
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"unet/.*\.engine was changed"):
        Pipeline.from_bundle(copy)


def _changed(copy: Path, records: Records, name: str, **changes: Any) -> Path:
    return reseal(copy, {**records, name: replace(records[name], **changes)})


def test_records_that_do_not_fit(device: FakeDevice, copy: Path, made: tuple[Path, Records]) -> None:
    records = made[1]
    with pytest.raises(BundleError, match="is stale or another's"):
        Pipeline.from_bundle(_changed(copy, records, "unet", onnx_sha256="0" * 64))
    with pytest.raises(BundleError, match=r"holds no weights: refit it"):
        Pipeline.from_bundle(_changed(copy, records, "unet", weights="stripped"))
    with pytest.raises(BundleError, match="has engines for classic, rtx"):
        Pipeline.from_bundle(_changed(copy, records, "unet", flavour="classic"))
    with pytest.raises(BundleError, match="lists no TensorRT engines"):
        Pipeline.from_bundle(reseal(copy, {}))
    inputs = tuple(replace(t, shape=(9, *t.shape[1:])) if t.name == "sample" else t for t in records["unet"].inputs)
    with pytest.raises(BundleError, match="differs from its record in sample: export the bundle again"):
        Pipeline.from_bundle(_changed(copy, records, "unet", inputs=inputs))("cat")
    del (less := dict(records))["vae_decoder"]
    with pytest.raises(BundleError, match="has no engine of vae_decoder"):
        Pipeline.from_bundle(reseal(copy, less))("cat")


def test_classic_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Of these the layout is not known: size and name are compared; nothing is compiled here, so nothing is kept."""
    version = "11.4.0.106"
    bundle, _ = make_engine_bundle(tmp_path, flavour="classic", version=version, capabilities=("9.0",))
    asked: list[str] = []

    def opened(flavour: str) -> FakeDevice:
        asked.append(flavour)
        return FakeDevice(flavour="classic", library=version, capability=(9, 0))

    monkeypatch.setattr(nvidia, "open_device", opened)
    assert_equal(Pipeline.from_bundle(bundle)("cat"), onnx_beside(bundle)("cat"))
    assert asked == ["classic"]
    assert not cache.exists()


def test_an_engine_that_the_library_refuses(device: FakeDevice, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, compiled: bytes | None) -> Any:
        raise BundleError(f"{path} does not load on Fake RTX: Error Code 1; export it again")

    monkeypatch.setattr(device, "load", refuse)
    with pytest.raises(BundleError, match="does not load on Fake RTX"):
        Pipeline.from_bundle(copy)("cat")


# Which runtime


def both(copy: Path, records: Records, onnx: Path) -> Path:
    """A bundle of both targets, TensorRT first."""
    for name in records:
        shutil.copyfile(onnx / name / "model.onnx", copy / name / "model.onnx")
    return reseal(copy, records, {"onnx": {"precision": "fp32", "opset": 18}})


def test_the_first_target_is_the_default(device: FakeDevice, copy: Path, made: tuple[Path, Records]) -> None:
    bundle = both(copy, made[1], made[0].parent / "onnx")
    names = [Pipeline.from_bundle(bundle, runtime=name).runtime.name for name in (None, "onnx", "tensorrt")]
    assert names == ["tensorrt", "onnx", "tensorrt"]
    assert_equal(*(Pipeline.from_bundle(bundle, runtime=name)("cat") for name in ("onnx", "tensorrt")))


def test_what_is_refused(device: FakeDevice, copy: Path, made: tuple[Path, Records]) -> None:
    bundle, onnx = made[0], made[0].parent / "onnx"
    for options, message in (
        ({"runtime": "metal"}, "runtime 'metal' is not known: choose one of onnx, tensorrt, coreml"),
        ({"runtime": "onnx"}, "runtime 'onnx': this bundle was exported to tensorrt; export it with --target onnx"),
        ({"provider": "cpu"}, "--provider cpu: it is onnxruntime's, and runtime 'tensorrt' has no such choice"),
        ({"threads": 1}, "--threads 1: it is onnxruntime's"),
    ):
        with pytest.raises(OptionError, match=message):
            Pipeline.from_bundle(bundle, **options)
    with pytest.raises(OptionError, match="runtime 'tensorrt': this bundle was exported to onnx"):
        Pipeline.from_bundle(onnx, runtime="tensorrt")
    mixed = json.loads((copy / "manifest.json").read_text())
    mixed["targets"]["coreml"] = {}
    (copy / "manifest.json").write_text(json.dumps(mixed))
    with pytest.raises(BundleError, match=r"manifest\.json lists no Core ML packages"):
        Pipeline.from_bundle(copy, runtime="coreml")


def test_without_a_driver_or_a_package(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flavour: str) -> Any:
        raise MissingBackend("tensorrt-rtx", "tensorrt", "runtime 'tensorrt'")

    monkeypatch.setattr(nvidia, "open_device", missing)
    with pytest.raises(MissingBackend, match=r"tensorrt-rtx.*hypersd\[tensorrt\]"):
        Pipeline.from_bundle(bundle)


def test_no_notice_where_all_is_well(device: FakeDevice, bundle: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pipeline.from_bundle(bundle).warm_up(2)


def test_kernels_that_were_not_used_are_pruned(tmp_path: Path) -> None:
    folder = tmp_path / "rtx-kernels"
    folder.mkdir()
    for name, age_days in (("unet-0.bin", 40), ("unet-1.bin", 1), ("notes.txt", 40)):
        (folder / name).write_bytes(b"12345")
        then = time.time() - age_days * 24 * 3600
        os.utime(folder / name, (then, then))
    assert prune_kernels(tmp_path / "none") == (0, 0)
    assert prune_kernels(tmp_path, older_than_days=30) == (1, 5)
    result = CliRunner().invoke(app, ["cache", "prune", "--cache-dir", str(tmp_path)])
    assert "0 stages and 1 files of compiled kernels deleted, 0.0 MB freed" in result.stdout
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]

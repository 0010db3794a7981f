"""`--target tensorrt` through the whole export: engines in the bundle, records, the cache, what is refused."""

import json
import re
from dataclasses import replace

import pytest

from hypersd_export import build_tensorrt
from hypersd_export.build_tensorrt import between_parts, in_pipeline
from hypersd_export.bundle.engines import PIPELINE, engine_records, why_unusable
from hypersd_export.bundle.manifest import verify_files
from hypersd_export.errors import BuildError, MissingBackend, OptionError
from hypersd_export.export import export
from hypersd_export.graphs.spec import Component
from hypersd_export.spec import EngineFlags, ExportSpec, PlanFlags
from hypersd_export.targets import Target, tensorrt_vendor
from tests.tiny import COMPONENTS

rtx = pytest.mark.skipif(not tensorrt_vendor.installed("rtx"), reason="tensorrt_rtx is not installed")
FLAGS = EngineFlags(flavour="rtx", capabilities=("8.6", "8.9"))


@pytest.fixture
def spec(tiny_spec, tmp_path):
    return replace(tiny_spec, targets=(Target.TENSORRT,), engines=FLAGS, out=tmp_path / "bundle", verify=False)


def engines(done):
    return engine_records(done.manifest.targets["tensorrt"], done.path)


@rtx
def test_components_become_engines(spec, tmp_path):
    done = export(spec)
    found = engines(done)
    assert set(found) == set(COMPONENTS)
    for name, record in found.items():
        path = done.path / record.file
        assert path.parent.name == name
        assert (path.parent / "config.json").is_file()
        here = {"flavour": "rtx", "version": record.version, "capability": (8, 9), "contents": True}
        assert why_unusable(record, path, **here) is None
        assert "this GPU has 12.0" in why_unusable(record, path, capability=(12, 0))
    assert {tensor.dtype for r in found.values() for tensor in (*r.inputs, *r.outputs)} == {"float32", "int64"}
    unet = found["unet"]
    assert unet.layers["HALF"] > 10 * unet.layers["FLOAT"]
    assert not list(done.path.rglob("*.onnx"))
    assert not (done.path / "model_index.json").exists()
    target = done.manifest.targets["tensorrt"]
    assert (target["flavour"], target["capabilities"], target["precision"]) == ("rtx", ["8.6", "8.9"], "fp16")
    assert "TensorRT" in (done.path / "README.md").read_text()
    verify_files(done.path)


@rtx
def test_an_engine_is_taken_from_the_cache_for_the_same_gpus_alone(spec, tmp_path, monkeypatch):
    def build(*_, component, **__):
        raise BuildError(f"asked for {component}")

    export(spec)
    monkeypatch.setattr(build_tensorrt.tensorrt, "build", build)
    again = export(replace(spec, out=tmp_path / "again"))
    assert {stage.name: stage.cached for stage in again.stages if stage.name.startswith("tensorrt")} == {
        f"tensorrt-{component}": True for component in COMPONENTS
    }
    for other in (replace(FLAGS, capabilities=("12.0",)), replace(FLAGS, level=1)):
        with pytest.raises(BuildError, match="asked for text_encoder"):
            export(replace(spec, engines=other, out=tmp_path / "other"))
    monkeypatch.setattr(build_tensorrt, "installed_version", lambda _: "1.8")
    with pytest.raises(BuildError, match="asked for text_encoder"):
        export(replace(spec, out=tmp_path / "other"))


@rtx
@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_single_graph_becomes_one_engine(spec, tmp_path, unroll):
    flags = PlanFlags(steps=(2,), scheduler="ddim", guidance=1.0)
    done = export(replace(spec, plan=flags, single_graph=True, unroll=unroll))
    found = engines(done)
    assert set(found) == {PIPELINE}
    record = found[PIPELINE]
    assert (done.path / record.file).parent == done.path
    assert [tensor.name for tensor in record.inputs] == ["input_ids", "noise"]
    assert [(tensor.name, tensor.dtype) for tensor in record.outputs] == [("image", "uint8"), ("latents", "float32")]
    assert record.layers["HALF"] > record.layers["FLOAT"]


@rtx
def test_a_graph_that_the_library_refuses_publishes_nothing(spec, tmp_path, monkeypatch):
    def build(onnx, *_, component, **__):
        raise BuildError(f"TensorRT does not take {component}/{onnx.name}: node n (Op): no")

    monkeypatch.setattr(build_tensorrt.tensorrt, "build", build)
    with pytest.raises(BuildError, match=r"does not take text_encoder/model\.onnx: node n \(Op\): no"):
        export(replace(spec, engines=replace(FLAGS, level=1)))
    assert not spec.out.exists()


def test_the_wheel_is_missed_before_anything_is_opened(spec, monkeypatch):
    def missing(flavour):
        raise MissingBackend("tensorrt_rtx", "tensorrt", "--target tensorrt")

    monkeypatch.setattr(tensorrt_vendor, "installed_version", missing)
    with pytest.raises(MissingBackend, match=re.escape("pip install 'hypersd[tensorrt]'")):
        export(replace(spec, base="/no/such/base"))


@pytest.mark.parametrize(
    ("engines", "said"),
    [
        (EngineFlags(flavour="both"), "--trt-flavour both: choose auto, rtx or classic"),
        (EngineFlags(flavour="rtx", capabilities=("9.0",)), "H100 and H200 are not TensorRT-RTX's"),
        (EngineFlags(weights="half"), "--weights half: choose"),
        (EngineFlags(level=9), "--trt-level 9: from 0 to 5"),
    ],
)
def test_flags_are_refused_at_once(engines, said):
    with pytest.raises(OptionError, match=said):
        ExportSpec(targets=(Target.TENSORRT,), engines=engines)


def test_flags_without_the_target_are_refused():
    with pytest.raises(OptionError, match="are about --target tensorrt"):
        ExportSpec(engines=FLAGS)
    values = json.loads(json.dumps(ExportSpec(targets=(Target.TENSORRT,), engines=FLAGS).to_json()))
    assert values["engines"] == {"flavour": "rtx", "capabilities": ["8.6", "8.9"], "weights": "full", "level": 3}


def test_the_nodes_of_a_single_graph_by_their_part():
    names = [
        "text_encoder.prompt.norm", "text_encoder.negative.norm", "unet.conv", "unet.conv.2", "unet.other",
        "unet.act.2", "vae_decoder.norm.7", "vae_decoder.norm", "Loop", "Mul", "Gather.3",
    ]  # fmt: skip
    blocked = {Component.TEXT_ENCODER: ["norm"], Component.UNET: ["conv"], Component.VAE_DECODER: ["norm.7"]}
    assert list(in_pipeline(names, blocked)) == [
        "text_encoder.prompt.norm", "text_encoder.negative.norm", "unet.conv", "unet.conv.2", "vae_decoder.norm.7",
    ]  # fmt: skip
    assert list(between_parts(names)) == ["Loop", "Mul", "Gather.3"]

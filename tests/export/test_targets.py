"""Several targets in one export: what they start from is built once, and ONNX need not be among what is published."""

import json
from dataclasses import replace

import pytest

from hypersd_export import build
from hypersd_export.build import Built
from hypersd_export.bundle.manifest import verify_files
from hypersd_export.export import VERIFY, export
from hypersd_export.targets import Target
from tests.tiny import COMPONENTS

pytestmark = pytest.mark.usefixtures("quick_build", "quick_verify")


@pytest.fixture
def engines(monkeypatch):
    """A target in the place of TensorRT: each engine is a file that names the graph that it was made from."""

    def engine_target(workshop):
        graphs = workshop.onnx("fp32")
        files = {}
        for component, onnx in graphs.components.items():

            def write(folder, component=component, onnx=onnx):
                (folder / "model.engine").write_text(f"{component} from {onnx.key}")

            stage = workshop.stage(f"tensorrt-{component}", {"onnx": onnx.key}, write)
            files[f"{component}/model.engine"] = stage.path / "model.engine"
        record = {"precision": "fp16", "flavour": "rtx", "version": "1", "capabilities": [], "engines": {}}
        return Built(target=Target.TENSORRT, precision="fp16", files=files, record=record,
                     artifacts=(graphs.artifacts(published=False),))  # fmt: skip

    monkeypatch.setattr(build, "BUILDERS", {**build.BUILDERS, Target.TENSORRT: engine_target})


def names(done):
    return [stage.name for stage in done.stages]


@pytest.mark.usefixtures("engines")
def test_a_target_alone_is_verified_by_the_graphs_that_it_was_made_from(tiny_spec, tmp_path):
    spec = replace(tiny_spec, targets=(Target.TENSORRT,), cache_dir=tmp_path / "cache", out=tmp_path / "b")
    done = export(spec)
    assert {path.name for path in done.path.rglob("model.*")} == {"model.engine"}
    assert not (done.path / "model_index.json").exists()
    assert (done.path / "golden/golden.json").is_file()
    assert list(done.manifest.targets) == ["tensorrt"]
    assert set(done.manifest.parity) > set(COMPONENTS)
    assert "exported to TensorRT by" in (done.path / "README.md").read_text()
    verify_files(done.path)
    assert all(stage.cached for stage in export(replace(spec, out=tmp_path / "c")).stages if "-" in stage.name)


@pytest.mark.usefixtures("engines")
def test_two_targets_share_their_graphs(tiny_spec, tmp_path):
    both = (Target.TENSORRT, Target.ONNX)
    done = export(replace(tiny_spec, targets=both, cache_dir=tmp_path / "cache", out=tmp_path / "b"))
    assert names(done).count("onnx-unet") == names(done).count("tensorrt-unet") == 1
    assert names(done).count(VERIFY) == 1
    assert {path.name for path in (done.path / "unet").iterdir()} == {"model.onnx", "model.engine", "config.json"}
    assert (done.path / "model_index.json").is_file()
    assert list(done.manifest.targets) == ["tensorrt", "onnx"]
    assert json.loads((done.path / "manifest.json").read_text())["options"]["precision"] == {
        "tensorrt": "fp16",
        "onnx": "fp32",
    }

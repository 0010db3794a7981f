"""`hypersd-bench all`: what is exported, what is kept, and that whatever cannot be made has a row that says why."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.bench import everything
from benchmarks.bench.cli import app
from benchmarks.bench.everything import FORMS, Everything, export_all, is_current, run_all
from benchmarks.bench.latency import Options
from benchmarks.bench.parts import write_part
from hypersd_export import export as exporting
from hypersd_export.bundle.manifest import write_manifest
from hypersd_export.errors import BundleError, MissingBackend, OptionError
from hypersd_export.job import open_job, tool_versions
from tests.bench.reports import candidate, entrant, latency, quality


def test_every_form_at_every_step_count(tmp_path):
    specs = Everything(steps=(4, 1)).specs(tmp_path)
    assert list(specs) == [f"{form}-{steps}" for steps in (4, 1) for form in FORMS]
    single = specs["onnx-single-1"]
    assert (single.single_graph, single.plan.steps, single.out) == (True, (1,), tmp_path / "onnx-single-1")
    assert specs["onnx-fp16-4"].precision == "fp16"
    assert [str(target) for target in specs["tensorrt-4"].targets] == ["tensorrt"]
    assert list(Everything(steps=(2,), forms=("coreml",)).specs(tmp_path)) == ["coreml-2"]
    with pytest.raises(OptionError, match="--form int5: choose from onnx-fp32, onnx-fp16, onnx-int8"):
        Everything(steps=(4,), forms=("int5",))


def test_a_bundle_of_the_same_options_weights_and_tools_is_kept(tmp_path):
    spec = Everything(steps=(4,)).specs(tmp_path)["onnx-fp32-4"]
    assert not is_current(spec)
    job = open_job(spec)

    def write(**changes):
        spec.out.mkdir(exist_ok=True)
        (spec.out / "manifest.json").unlink(missing_ok=True)
        base = {"name": "builtin", "family": "sd15", "digest": job.source.base.digest}
        settings = {
            "hypersd": "0", "base": base, "loras": job.lora_records(), "targets": {"onnx": {}},
            "options": job.options(), "versions": tool_versions(), "stages": [], "parity": "not verified",
        }  # fmt: skip
        write_manifest(spec.out, **{**settings, **changes})

    write()
    assert is_current(spec)
    (spec.out / "more").write_text("x")
    assert not is_current(spec)  # not as it was exported
    (spec.out / "more").unlink()
    for changes in (
        {"options": {**job.options(), "opset": 18}}, {"loras": []}, {"versions": {**tool_versions(), "torch": "1"}},
        {"base": {"name": "builtin", "family": "sd15", "digest": "0" * 64}},
    ):  # fmt: skip
        write(**changes)
        assert not is_current(spec), changes


@pytest.fixture
def without_work(monkeypatch):
    """An export that makes a folder, and fails for TensorRT; latency and quality that write invented figures."""
    exported, seen = [], {}

    def export(spec):
        if "tensorrt" in spec.out.name:
            raise MissingBackend("tensorrt_rtx", "tensorrt", "target tensorrt")
        exported.append(spec.out.name)
        spec.out.mkdir(parents=True)

    def run_latency(selection, options, *, prompt, out, command):
        seen["latency"] = selection
        write_part(out, "latency.json", latency(entrant("onnx-fp32-4", 50.0, 1.0)))

    def run_quality(selection, asked, *, out, command):
        seen["quality"], seen["count"] = selection, asked.count
        write_part(out, "quality.json", quality(candidate("onnx-fp32-4", 76.0)))

    monkeypatch.setattr(exporting, "export", export)
    monkeypatch.setattr(everything, "run_latency", run_latency)
    monkeypatch.setattr(everything, "run_quality", run_quality)
    return exported, seen


def test_the_whole_report(without_work, tmp_path):
    exported, seen = without_work
    asked = Everything(steps=(4,), forms=("onnx-fp32", "tensorrt"), count=7, options=Options())
    run_all(asked, tmp_path, command=["hypersd-bench", "all"])
    assert exported == ["onnx-fp32-4"]
    for part in ("latency", "quality"):
        assert [path.name for path in seen[part].bundles] == ["onnx-fp32-4"]
        ((name, why),) = seen[part].absent
        assert name == "tensorrt-4"
        assert "pip install 'hypersd[tensorrt]'" in why
    assert seen["latency"].versus == ("torch", "compile", "teacher", "optimum", "openvino")
    assert seen["quality"].versus == ("torch", "teacher")
    assert seen["count"] == 7
    assert (tmp_path / "report.html").is_file()
    with pytest.raises(BundleError, match=r"nothing could be exported: .* needs tensorrt_rtx"):
        run_all(Everything(steps=(4,), forms=("tensorrt",)), tmp_path, command=[])


def test_what_is_there_is_not_exported_again(without_work, tmp_path, monkeypatch):
    exported, _ = without_work
    monkeypatch.setattr(everything, "is_current", lambda spec: spec.out.name == "onnx-fp32-4")
    made, absent = export_all(Everything(steps=(4,), forms=("onnx-fp32", "onnx-fp16")).specs(tmp_path))
    assert exported == ["onnx-fp16-4"]
    assert [path.name for path in made] == ["onnx-fp32-4", "onnx-fp16-4"]
    assert absent == []


def test_the_command(without_work, tmp_path):
    arguments = ["all", "--out", str(tmp_path / "out"), "--steps", "4", "--form", "onnx-fp32", "--vs", "torch"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1]) == {"report": str(tmp_path / "out" / "report.html")}
    for wrong, message in ((["--steps", "x"], "--steps"), (["--form", "x"], "--form x: choose from")):
        result = CliRunner().invoke(app, ["all", "--out", str(tmp_path / "out"), *wrong])
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1

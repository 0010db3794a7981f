"""helper.py: the second process builds what the first would, and is missed by nobody if it does not."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from hypersd_export import build, helper
from hypersd_export.clock import Clock, Silent
from hypersd_export.component import ComponentTask
from hypersd_export.errors import ModelError, OptionError
from hypersd_export.export import export
from hypersd_export.graphs.spec import Component
from hypersd_export.helper import Helper, help_out, pays
from hypersd_export.job import open_job
from hypersd_export.spec import ExportSpec

GB = 1_000_000_000
TWO = (Component.TEXT_ENCODER, Component.VAE_DECODER)


@pytest.fixture
def bare_spec(tiny_spec: ExportSpec, lora_file: Path, tmp_path: Path) -> ExportSpec:
    """The graphs of the tiny base with its LoRA alone, in a cache of its own."""
    return replace(
        tiny_spec, loras=(f"{lora_file}:0.8",), precision="fp16", verify=False, golden=False, scan=False,
        out=tmp_path / "bundle", cache_dir=tmp_path / "cache",
    )  # fmt: skip


@pytest.fixture
def task(bare_spec: ExportSpec) -> ComponentTask:
    return open_job(bare_spec).component_task("fp16")


def test_a_task_travels(task):
    assert ComponentTask.from_json(json.loads(json.dumps(task.to_json()))) == task


def test_two_processes_build_what_one_builds(bare_spec, tmp_path):
    two = export(replace(bare_spec, jobs=2))
    one = export(replace(bare_spec, jobs=1, out=tmp_path / "one", cache_dir=tmp_path / "other"))
    graphs = [name for name in one.manifest.files if name.endswith((".onnx", "config.json"))]
    assert len(graphs) > 2 * len(Component) - 4
    assert {name: two.manifest.files[name] for name in graphs} == {name: one.manifest.files[name] for name in graphs}
    assert two.manifest.targets == one.manifest.targets
    assert two.manifest.options == one.manifest.options
    began = [record.name for record in two.stages if record.name.startswith("onnx")]
    assert began == [f"onnx-fp16-{name}" for name in ("unet", "vae_encoder", "vae_decoder", "text_encoder")]
    assert [record.name for record in two.stages if record not in one.stages][:2] == ["load", "import"]
    assert not any((tmp_path / "cache" / ".building").iterdir())


def test_the_helper_builds_what_nobody_has_begun(task, tmp_path, monkeypatch):
    built, told = [], []
    monkeypatch.setattr(ComponentTask, "build", lambda _, source, component, folder: built.append((component, folder)))
    (tmp_path / Component.VAE_DECODER).mkdir()
    request = {"task": task.to_json(), "components": [*TWO, Component.VAE_ENCODER], "folder": str(tmp_path)}
    assert help_out(request, told.append) == {}
    assert built == [(component, tmp_path / component) for component in (Component.TEXT_ENCODER, Component.VAE_ENCODER)]
    assert told == ["text_encoder", "vae_encoder"]


def working(folder: Path, lines=(), report=None):
    """A `run_worker` that has made both folders, tells the lines, and ends with a report or a failure."""

    def run_worker(module, request, report_path, *, progress, failure, started):
        started(SimpleNamespace(terminate=lambda: None))
        for line in lines:
            progress(line)
        if report is None:
            raise failure(-9, "")
        return report

    for component in TWO:
        (folder / component).mkdir()
        (folder / component / "model.onnx").write_text(component)
    return run_worker


def test_what_it_built_is_moved_and_what_it_had_begun_is_the_callers(task, tmp_path, monkeypatch):
    to = tmp_path / "to"
    to.mkdir()
    monkeypatch.setattr(helper, "run_worker", working(tmp_path, ["a library's words", "text_encoder"]))
    with Helper(task, TWO, tmp_path) as second:
        assert second.took(Component.TEXT_ENCODER, to)
        assert [path.name for path in to.iterdir()] == ["model.onnx"]
        assert (to / "model.onnx").read_text() == "text_encoder"
        assert not second.took(Component.VAE_DECODER, to)  # it was killed
        assert not second.took(Component.UNET, to)  # it was never asked to
    assert not (tmp_path / Component.UNET).exists()


def test_its_error_is_the_exports(task, tmp_path, monkeypatch):
    report = {"error": {"kind": "ModelError", "message": "vae_decoder: bad weights"}}
    monkeypatch.setattr(helper, "run_worker", working(tmp_path, ["text_encoder"], report))
    with Helper(task, TWO, tmp_path) as second, pytest.raises(ModelError, match="vae_decoder: bad weights"):
        second.took(Component.VAE_DECODER, tmp_path)


def test_what_the_caller_begins_first_is_the_callers(task, tmp_path, monkeypatch):
    monkeypatch.setattr(helper, "run_worker", lambda *_, started, **__: {})
    with Helper(task, TWO, tmp_path) as second:
        assert not second.took(Component.VAE_DECODER, tmp_path)
    assert (tmp_path / Component.VAE_DECODER).is_dir()


def test_it_does_not_outlive_the_export(task, tmp_path):
    began = time.monotonic()
    with Helper(task, TWO, tmp_path) as second:
        second._begun.wait()
        assert second._process is not None
        process = psutil.Process(second._process.pid)
        assert process.is_running()
    assert not process.is_running()
    assert time.monotonic() - began < 60  # it would import torch first


def test_an_export_without_its_helper_is_the_same(bare_spec, tmp_path, monkeypatch):
    def dies(*_, failure, **__):
        raise failure(1, "ImportError: no such thing")

    monkeypatch.setattr(helper, "run_worker", dies)
    alone = export(replace(bare_spec, jobs=2))
    assert {"unet/model.onnx", "text_encoder/model.onnx", "vae_decoder/model.onnx"} <= set(alone.manifest.files)


def test_it_is_for_what_is_missing(bare_spec, tmp_path, monkeypatch):
    """One process builds where the user says so, where the UNet is there, and where nothing else is to be built."""
    asked = []
    monkeypatch.setattr(build, "pays", lambda files: asked.append(list(files)) or True)
    shop = build.Workshop(open_job(replace(bare_spec, jobs=None)), Clock(Silent()), tmp_path)
    everything = tuple(shop.job.components)
    assert shop._shared(everything) == (
        Component.UNET, Component.VAE_ENCODER, Component.VAE_DECODER, Component.TEXT_ENCODER
    )  # fmt: skip
    assert len(asked.pop()) == 3
    assert shop._shared([Component.UNET]) == shop._shared([Component.VAE_DECODER]) == shop._shared([]) == ()
    assert build.Workshop(open_job(replace(bare_spec, jobs=1)), Clock(Silent()), tmp_path)._shared(everything) == ()
    assert not asked
    monkeypatch.setattr(build, "pays", lambda files: False)
    assert shop._shared(everything) == ()


@pytest.mark.parametrize(
    ("cores", "weights", "free", "expected"),
    [(2, 0.5, 4.0, True), (1, 0.5, 4.0, False), (2, 0.05, 4.0, False), (2, 0.5, 3.4, False), (8, 2.0, 8.1, True)],
)
def test_where_it_pays(cores, weights, free, expected, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    with path.open("wb") as stream:
        stream.truncate(int(weights * GB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(free * GB)))
    assert pays([path, path]) is expected


@pytest.mark.parametrize("jobs", [0, 3, -1])
def test_jobs_are_one_or_two(jobs, bare_spec):
    with pytest.raises(OptionError, match=f"--jobs {jobs}: 1 or 2"):
        replace(bare_spec, jobs=jobs)

"""`--target coreml` through the whole export: packages in the bundle, their parity, the cache, what is refused."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from hypersd_export import build_coreml, coreml_mixed, coreml_worker
from hypersd_export.bundle.digest import digest_tree
from hypersd_export.bundle.manifest import NOT_VERIFIED, verify_files
from hypersd_export.diffusion import PlanFile
from hypersd_export.errors import BuildError, MissingBackend, OptionError
from hypersd_export.export import export
from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.proof import open_checked
from hypersd_export.refit import refit_spec
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.spec import CoreMLFlags, ExportSpec
from hypersd_export.targets import Target
from hypersd_export.verify.coreml import InterpretedRuntime
from hypersd_export.verify.metrics import psnr
from tests.tiny import COMPONENTS

pytest.importorskip("coremltools")


@pytest.fixture(scope="module")
def coreml_spec(tiny_spec):
    return replace(tiny_spec, targets=(Target.COREML,))


@pytest.fixture(scope="module")
def done(coreml_spec, tmp_path_factory):
    """The tiny base as packages; all in this process, which has the libraries loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_coreml, "run_apart", lambda asked, folder, *, progress: asked.run(folder, progress))
        return export(replace(coreml_spec, out=tmp_path_factory.mktemp("coreml") / "bundle"), isolate=False)


def packages(done):
    record = done.manifest.targets["coreml"]["components"]
    return {name: done.path / entry["packages"][0] for name, entry in record.items()}


def interpreted(done):
    """The bundle's own pipeline, its packages evaluated by the interpreter."""
    plans = PlanFile.from_json(json.loads((done.path / "plan.json").read_text()))
    return Pipeline(path=done.path, plans=plans, digest="", runtime=InterpretedRuntime(packages=packages(done)))


def test_components_become_packages_that_are_torchs(done):
    found = packages(done)
    assert set(found) == set(COMPONENTS)
    for name, path in found.items():
        assert path == done.path / name / f"{name}.mlpackage"
        assert (path.parent / "config.json").is_file()
    record = done.manifest.targets["coreml"]
    assert {key: record[key] for key in ("precision", "deployment_target", "layout", "attention", "compute_units")} == {
        "precision": "fp16", "deployment_target": "iOS17", "layout": "plain", "attention": "original",
        "compute_units": "all",
    }  # fmt: skip
    unet = record["components"]["unet"]
    assert {"sin", "cos"} < set(unet["float32_ops"])
    assert len(unet["float32_ops"]) < 0.05 * unet["ops"]
    assert not any(record["components"][name]["float32_ops"] for name in found if name != "unet")
    parity = done.manifest.parity
    assert set(parity) == {*COMPONENTS, "image"}
    assert all(55 < parity[name]["psnr_db"] < 100 for name in COMPONENTS)
    assert parity["image"]["psnr_db"] > 45
    assert not list(done.path.rglob("*.onnx"))
    assert not (done.path / "model_index.json").exists()
    assert "exported to Core ML by" in (done.path / "README.md").read_text()
    verify_files(done.path)


def test_the_bundles_own_pipeline_draws_with_them(done, exported):
    """The same seed as the ONNX bundle of the same base: the pictures differ by half precision alone."""
    pair = interpreted(done), Pipeline.from_bundle(exported.path)
    pictures = [np.asarray(p("a cat", seed=3, steps=2).images[0], np.int16) for p in pair]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_the_bundle_is_checked_again_without_a_mac(done, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    pipeline = open_checked(done.path, runtime=None, provider=None)
    assert pipeline.golden().passed
    assert pipeline.provider == "MIL interpreter"
    with pytest.raises(OptionError, match="--provider all: without a Mac the interpreter runs Core ML packages"):
        open_checked(done.path, runtime="coreml", provider="all")
    with pytest.raises(OptionError, match="runtime 'onnx': this bundle was exported to coreml"):
        open_checked(done.path, runtime="onnx", provider=None)


def test_a_second_export_converts_nothing_and_other_options_convert_what_they_change(
    done, coreml_spec, tmp_path, monkeypatch
):
    asked = []

    def run_apart(conversion, folder, *, progress):
        asked.append(conversion)
        raise BuildError(f"asked for {conversion.component}")

    monkeypatch.setattr(build_coreml, "run_apart", run_apart)
    again = export(replace(coreml_spec, out=tmp_path / "again"))
    assert {stage.name for stage in again.stages if stage.cached} == {f"coreml-{c}" for c in COMPONENTS} | {
        "coreml-norms", "verify",
    }  # fmt: skip
    assert {n: digest_tree(p, "*") for n, p in packages(again).items()} == {
        n: digest_tree(p, "*") for n, p in packages(done).items()
    }
    for flags, precision, component in (
        (CoreMLFlags(deployment_target="iOS18"), None, "text_encoder"),
        (CoreMLFlags(attention="split-einsum"), None, "unet"),
        (CoreMLFlags(), "fp32", "text_encoder"),
    ):
        with pytest.raises(BuildError, match=f"asked for {component}$"):
            export(replace(coreml_spec, coreml=flags, precision=precision, out=tmp_path / "other"))
        assert coreml_worker.Conversion.from_json(json.loads(json.dumps(asked[-1].to_json()))) == asked[-1]
    monkeypatch.setattr(build_coreml.vendor, "version", lambda: "10.0")
    with pytest.raises(BuildError, match="asked for text_encoder"):
        export(replace(coreml_spec, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_process_of_its_own_makes_the_same_package(done, tiny_base, tmp_path):
    asked = coreml_worker.Conversion(
        source=coreml_worker.SourceRequest(base=str(tiny_base)), component=Component.TEXT_ENCODER,
        shapes=Shapes(**done.manifest.options["shapes"]), precision="fp16", deployment_target="iOS17",
        attention="original", layout="plain",
    )  # fmt: skip
    said: list[str] = []
    notes = coreml_worker.run_apart(asked, tmp_path, progress=said.append)
    assert said == ["loading text_encoder", "converting text_encoder"]
    assert {path.name for path in tmp_path.iterdir()} == {"text_encoder.mlpackage", "config.json"}
    assert digest_tree(tmp_path / "text_encoder.mlpackage", "*") == digest_tree(packages(done)["text_encoder"], "*")
    assert notes["built"].items() <= done.manifest.targets["coreml"]["components"]["text_encoder"].items()


def test_what_the_workers_process_says_reaches_the_user_in_one_line(done, tiny_base, tmp_path, capfd, monkeypatch):
    asked = coreml_worker.Conversion(
        source=coreml_worker.SourceRequest(base=str(tiny_base / "none")), component=Component.UNET,
        shapes=Shapes(**done.manifest.options["shapes"]),
        precision="fp16", deployment_target="iOS17", attention="original", layout="plain",
    )  # fmt: skip
    with pytest.raises(Exception, match="none") as caught:
        coreml_worker.run_apart(asked, tmp_path, progress=lambda _: None)
    assert type(caught.value).__name__ == "ModelError"
    monkeypatch.setattr(coreml_worker, "MODULE", "hypersd_export.no_such_worker")
    with pytest.raises(BuildError, match=r"^the package of unet: its process ended with exit code 1: .*No module"):
        coreml_worker.run_apart(asked, tmp_path, progress=lambda _: None)
    assert capfd.readouterr() == ("", "")


def test_what_a_library_prints_is_no_progress(tmp_path, monkeypatch, capsys):
    def run(self, folder, progress):
        print("noise")
        progress("news")
        return {"built": {}, "fused": []}

    monkeypatch.setattr(coreml_worker.Conversion, "run", run)
    monkeypatch.setattr(coreml_worker.Conversion, "from_json", classmethod(lambda cls, data: object.__new__(cls)))
    (tmp_path / "request.json").write_text('{"task": "Conversion", "asked": {}}')
    assert coreml_worker.main([str(tmp_path / "request.json")]) == 0
    assert capsys.readouterr() == ("news\n", "noise\n")
    assert json.loads((tmp_path / "report.json").read_text()) == {"built": {}, "fused": []}


def test_not_verified_is_said(coreml_spec, done, tmp_path, in_process):
    again = export(replace(coreml_spec, out=tmp_path / "b", verify=False))
    assert again.manifest.parity == NOT_VERIFIED


def test_refit_keeps_the_options(done, tmp_path):
    spec = refit_spec(done.path, ["other.safetensors"], tmp_path / "out", base="somewhere")
    assert spec.coreml == CoreMLFlags()
    assert spec.targets == (Target.COREML,)


def test_a_missing_coremltools_is_said_before_anything_is_opened(monkeypatch, coreml_spec, tmp_path):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingBackend, match=r"pip install 'hypersd\[coreml\]'"):
        export(replace(coreml_spec, base="/no/such/base", out=tmp_path / "b"))


def test_flags_without_the_target_are_refused():
    with pytest.raises(OptionError, match="are about --target coreml"):
        ExportSpec(coreml=CoreMLFlags(palettize=6))
    with pytest.raises(OptionError, match="--allow-approximate-schedule: it is about --layout apple"):
        ExportSpec(targets=(Target.COREML,), coreml=CoreMLFlags(approximate=True))
    with pytest.raises(OptionError, match="--palettize 7: iOS17 stores"):
        ExportSpec(targets=(Target.COREML,), coreml=CoreMLFlags(palettize=7))


def test_palettes_are_held_against_torch_and_told(coreml_spec, done, tmp_path, monkeypatch):
    """Beside the packages that they were made from, which have to pass; and golden/ asks no more than can be had."""
    monkeypatch.setattr(build_coreml, "run_apart", lambda asked, folder, *, progress: asked.run(folder, progress))
    spec = replace(coreml_spec, coreml=CoreMLFlags(palettize=2), out=tmp_path / "small")
    small = export(spec, isolate=False)
    stages = {stage.name: stage.cached for stage in small.stages}
    assert stages["coreml-unet"]
    assert not stages["coreml-unet-2bit"]
    assert "coreml-vae_decoder-2bit" not in stages
    assert stages["verify-coreml"]  # that of `done`
    before, after = (each.manifest.targets["coreml"]["components"] for each in (done, small))
    assert after["unet"]["palettes"]["bits"] == small.manifest.targets["coreml"]["palettize"] == 2
    assert after["unet"]["bytes_before"] == before["unet"]["bytes"]
    assert after["unet"]["weight_bytes"] < 0.4 * before["unet"]["weight_bytes"]
    assert after["unet"]["float32_ops"] == before["unet"]["float32_ops"]
    assert digest_tree(packages(small)["vae_decoder"], "*") == digest_tree(packages(done)["vae_decoder"], "*")
    parity = small.manifest.parity
    assert (
        10
        < parity["unet"]["psnr_db"]
        < 40
        < parity["unet coreml"]["psnr_db"]
        == done.manifest.parity["unet"]["psnr_db"]
    )
    assert parity["vae_decoder"] == parity["vae_decoder coreml"]  # not compressed, and gated as ever
    bounds = [json.loads((each.path / "golden/golden.json").read_text())["min_psnr_db"] for each in (done, small)]
    assert bounds == [35.0, pytest.approx(parity["image"]["psnr_db"] - 3, abs=0.1)]
    assert interpreted(small).golden().passed


@pytest.mark.slow
def test_mixed_palettes_within_a_budget(coreml_spec, done, tmp_path, monkeypatch):
    tasks = []

    def run_apart(task, folder, *, progress):
        tasks.append(task)
        assert coreml_worker.TASKS[type(task).__name__].from_json(json.loads(json.dumps(task.to_json()))) == task
        return task.run(folder, progress)

    monkeypatch.setattr(build_coreml, "run_apart", run_apart)
    monkeypatch.setattr(coreml_mixed, "EACH_LAYER", 0)
    whole = done.manifest.targets["coreml"]["components"]
    flags = CoreMLFlags(size_budget=0.75)
    mixed = export(replace(coreml_spec, coreml=flags, out=tmp_path / "mixed", verify=False), isolate=False)
    record = mixed.manifest.targets["coreml"]
    unet, text = record["components"]["unet"]["palettes"], record["components"]["text_encoder"]["integers"]
    assert (record["size_budget"], unet["budget"], unet["by"], text["form"]) == (0.75, 0.75, "block", "int8")
    assert record["components"]["unet"]["bytes"] <= 0.75 * whole["unet"]["bytes"]
    assert 10 < unet["measured_db"] < 60
    assert psnr(*(np.asarray(interpreted(each)("a cat", seed=3, steps=2).images[0]) for each in (mixed, done))) > 15
    assert [type(task).__name__ for task in tasks] == ["Compressing", "Rating", "Mixing"]


def test_integers_are_made_by_the_same_task(done, tmp_path):
    source = packages(done)["text_encoder"]
    task = coreml_worker.Compressing(source=source.parent, name=source.name, form="int8", deployment_target="iOS17")
    built = task.run(tmp_path, lambda _: None)
    assert built["integers"]["form"] == "int8"
    assert built["bytes_before"] == done.manifest.targets["coreml"]["components"]["text_encoder"]["bytes"]
    assert CoreMLFlags(quantize="int8").compression == "int8"


def test_a_unet_in_two_packages(coreml_spec, done, tmp_path, monkeypatch):
    monkeypatch.setattr(build_coreml, "run_apart", lambda asked, folder, *, progress: asked.run(folder, progress))
    flags = CoreMLFlags(chunk_unet=True)
    cut = export(replace(coreml_spec, coreml=flags, out=tmp_path / "cut", verify=False), isolate=False)
    record = cut.manifest.targets["coreml"]["components"]["unet"]
    assert record["packages"] == ["unet/unet_chunk1.mlpackage", "unet/unet_chunk2.mlpackage"]
    assert record["bytes"] == done.manifest.targets["coreml"]["components"]["unet"]["bytes"]
    assert {path.name for path in (cut.path / "unet").iterdir()} == {
        "config.json", "unet_chunk1.mlpackage", "unet_chunk2.mlpackage",
    }  # fmt: skip
    pieces = tuple(cut.path / name for name in record["packages"])
    runtime = InterpretedRuntime(packages={**packages(cut), "unet": pieces})
    graphs = runtime.graph("unet"), InterpretedRuntime(packages=packages(done)).graph("unet")
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(t.shape) for name, t in graphs[1].inputs.items()} | {"timestep": [333.0]}
    found, expected = (graph.run(**feeds)["out_sample"] for graph in graphs)
    assert psnr(found, expected) > 75  # half steps of a few values, where the sums are taken in another order

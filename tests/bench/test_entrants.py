"""Who may be measured: bundles that are as they were exported, and what `--vs` makes of the first of them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.bench import peers, weights
from benchmarks.bench.entrants import Versus, bundle_entrant, golden_prompt, open_bundles, speed_entrant
from benchmarks.bench.weights import Places, find_loras, latent_size, plan_of, teacher_plan
from benchmarks.bench.worker import BundlePainter, TorchPainter
from hypersd_export.builtin import card
from hypersd_export.bundle.cache import StageCache
from hypersd_export.bundle.manifest import read_manifest
from hypersd_export.errors import BundleError, MissingBackend, OptionError
from hypersd_export.model.families import Family
from hypersd_export.verify.source import SourceRequest, open_source
from tests.bundles import CFG_PLANS, PLAIN_PLANS, make_bundle


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "cfg", CFG_PLANS)


def test_bundles_with_their_facts(bundle, tmp_path):
    other = make_bundle(tmp_path / "again" / "cfg", PLAIN_PLANS)
    first, second = open_bundles([bundle, other])
    assert (first.name, second.name) == (f"{tmp_path.name}/cfg", "again/cfg")
    facts = first.facts()
    assert (facts["steps"], facts["guidance"], facts["unet_rows"], facts["passes"]) == (4, 3.0, 2, 8)
    assert (facts["target"], facts["precision"], facts["parity"]) == ("onnx", "fp32", "not verified")
    sizes = [path.stat().st_size for path in bundle.rglob("*.onnx")]
    assert facts["size_mb"] == round(sum(sizes) / 1e6, 2) > 0
    assert golden_prompt(first) == "cat hat"
    assert golden_prompt(replace(first, path=tmp_path)) == "a photo of a cat"  # exported with --no-golden
    (two,) = open_bundles([bundle], steps=2)
    assert (two.name, two.plan.num_steps) == ("cfg", 2)
    assert json.loads(bundle_entrant(two, prompt="p", threads=3).command[-1])["steps"] == 2
    assert bundle_entrant(two, prompt="p", threads=3).environment["OMP_NUM_THREADS"] == "3"


def test_what_cannot_be_opened_is_one_line(bundle, tmp_path):
    for paths, settings, message in (
        ([], {}, "no bundle: name at least one"),
        ([bundle, tmp_path / "." / "cfg"], {}, "a bundle is named twice"),
        ([bundle], {"steps": 3}, "cfg: steps 3: this bundle has tables for 4, 2"),
        ([bundle], {"runtime": "tensorrt"}, "this bundle was exported to onnx"),
    ):
        with pytest.raises(OptionError, match=message):
            open_bundles(paths, **settings)
    with (bundle / "unet" / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(BundleError, match=r"unet/model\.onnx was changed"):
        open_bundles([bundle])


def test_a_bundle_draws_as_its_pipeline_does(bundle):
    (opened,) = open_bundles([bundle], steps=2)
    painter = BundlePainter(json.loads(bundle_entrant(opened, prompt="dog", threads=1).command[-1]))
    assert painter.load()["provider"] == "cpu"
    seconds, images = painter.draw(3, 2)
    assert set(seconds) == {"text_encoder", "unet", "vae_decoder"}
    assert [image.size for image in images] == [(12, 8)] * 2


def test_on_a_gpu_torch_is_measured_there_in_the_graphs_precision(bundle, tmp_path, monkeypatch):
    """The same weights on the same device; on the CPU, whose fp16 is emulated, torch stays float32."""
    (opened,) = open_bundles([bundle])
    assert (opened.device, opened.torch_precision) == ("cpu", "fp32")
    targets = {"onnx": {**opened.manifest.targets["onnx"], "precision": "fp16"}}
    half = replace(opened, manifest=replace(opened.manifest, targets=targets))
    assert (half.device, half.torch_precision) == ("cpu", "fp32")
    on_gpu = replace(half, provider="cuda")
    assert (on_gpu.device, on_gpu.torch_precision) == ("cuda", "fp16")
    assert replace(opened, provider="cuda").torch_precision == "fp32"
    captured = bundle_entrant(on_gpu, prompt="p", threads=1, cuda_graph=True)
    assert captured.name == f"{opened.name}, CUDA graph"
    assert json.loads(captured.command[-1])["cuda_graph"] is True
    assert json.loads(bundle_entrant(on_gpu, prompt="p", threads=1).command[-1])["cuda_graph"] is False
    request = json.loads(speed_entrant(1, device=on_gpu.device, precision=on_gpu.torch_precision).command[-1])
    assert (request["device"], request["precision"]) == ("cuda", "fp16")
    made = Versus(first=on_gpu, prompt="p", threads=1, places=Places(), cache=StageCache(tmp_path), tell=print)
    monkeypatch.setattr("benchmarks.bench.entrants.source_of", lambda *_, **__: None)
    monkeypatch.setattr("benchmarks.bench.entrants.weights_mb", lambda source: 1.0)
    entrant = made.entrant("torch")
    request = json.loads(entrant.command[-1])
    assert (request["device"], request["precision"], entrant.facts["precision"]) == ("cuda", "fp16", "fp16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MissingBackend, match="a torch built for CUDA"):
        TorchPainter(request).load()


def test_core_ml_is_not_timed_here(bundle):
    (opened,) = open_bundles([bundle])
    entrant = bundle_entrant(replace(opened, runtime="coreml"), prompt="p", threads=1)
    assert entrant.command == ()
    assert "timed on a Mac" in entrant.missing


def versus(bundle, tmp_path, **places):
    (opened,) = open_bundles([bundle])
    return Versus(
        first=opened, prompt="p", threads=1, places=Places(**places), cache=StageCache(tmp_path / "cache"), tell=print
    )


def test_a_peer_that_is_not_installed_names_its_command(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    for kind in ("optimum", "openvino"):
        entrant = versus(bundle, tmp_path).entrant(kind)
        assert (entrant.command, entrant.missing) == ((), f"not installed: make peer-{kind}")
    with pytest.raises(OptionError, match="--vs sdnext: choose from torch, compile, teacher, optimum, openvino"):
        versus(bundle, tmp_path).entrant("sdnext")


def test_weights_that_are_not_found_are_one_line(bundle, tmp_path):
    """A hand-made bundle's manifest names no base, and a LoRA that nobody has."""
    entrant = versus(bundle, tmp_path).entrant("torch")
    assert entrant.missing == f"{bundle} does not say which base it was made of: export it again"
    assert versus(bundle, tmp_path, base="builtin").entrant("torch").missing == (
        "cfg has the LoRA x.safetensors, sha256 11111111…, which is not found: say where it is with --lora FILE"
    )
    assert "cfg was made of hand-made, sha256 00000000…, and the base here has" in (
        versus(bundle, tmp_path, base="builtin").entrant("teacher").missing
    )
    assert "(cfg was made of it: say where it is with --base)" in (
        versus(bundle, tmp_path, base=str(tmp_path / "gone")).entrant("teacher").missing
    )


def test_sdxl_has_no_other_contestants_yet(tmp_path, monkeypatch):
    source = SimpleNamespace(base=SimpleNamespace(digest="0" * 64, family=Family.sdxl))
    monkeypatch.setattr(weights, "open_source", lambda request: source)
    manifest = SimpleNamespace(base={"digest": "0" * 64, "name": "xl"}, loras=[], options={"base": "xl"})
    monkeypatch.setattr(weights, "read_manifest", lambda bundle: manifest)
    with pytest.raises(OptionError, match="xl-bundle is SDXL's, and --vs draws Stable"):
        weights.source_of(tmp_path / "xl-bundle", weights.Places(base="xl"))


def test_plans_and_sizes(bundle):
    assert plan_of(bundle, None).steps == 4
    with pytest.raises(OptionError, match="cfg: steps 9"):
        plan_of(bundle, 9)
    manifest = read_manifest(bundle)
    assert latent_size(manifest) is None
    shapes = {"latent_height": 4, "latent_width": 6}
    assert latent_size(replace(manifest, options={"shapes": shapes})) == (4, 6)
    assert find_loras(bundle, replace(manifest, loras=[]), Places()) == []


def test_the_teacher_is_the_base_by_its_own_schedule():
    source = open_source(SourceRequest(base="builtin"))
    plan = teacher_plan(source, steps=25, guidance=None)
    assert (str(plan.solver), plan.num_steps, plan.guidance.scale) == ("ddim", 25, card()["guidance"])
    assert plan.net_timesteps()[0] == 999
    assert teacher_plan(source, steps=4, guidance=1.0).guidance.kind == "none"

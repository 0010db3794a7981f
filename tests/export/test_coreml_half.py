"""Group norms whose squares half cannot hold: found by drawing, made smaller, and right again."""

import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from hypersd_export import build_coreml, coreml_worker
from hypersd_export.diffusion import FewStepPlan, Guidance, PlanEntry, PlanFile, Solver
from hypersd_export.errors import BuildError, ParityError
from hypersd_export.export import export
from hypersd_export.graphs.half_safe import LEAST_HALF, ScaledNorm, scale_norms
from hypersd_export.graphs.spec import Graph, Shapes
from hypersd_export.spec import CoreMLFlags
from hypersd_export.targets import Target
from hypersd_export.targets.coreml import convert
from hypersd_export.verify.metrics import max_abs, psnr
from hypersd_export.verify.norms import NORM_LIMIT, norm_report, norm_spreads, watched
from hypersd_export.verify.source import SourceRequest, open_source

SHAPES = Shapes(
    batch=1, unet_batch=1, channels=4, latent_height=4, latent_width=4, vae_scale=4, tokens=16, text_width=32
)


@pytest.fixture(scope="module")
def loud_unet(tiny_base, tmp_path_factory):
    """The folder of the tiny UNet with a louder first convolution, which residuals carry to the last norm."""
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    with torch.no_grad():
        unet.conv_in.weight *= 1000
    folder = tmp_path_factory.mktemp("loud") / "unet"
    unet.save_pretrained(folder)
    return folder


def test_scales_are_powers_of_two_that_bring_the_values_within_the_limit():
    spreads = {"quiet": 127.0, "loud": 130.0, "louder": 1000.0, "lost": math.inf, "none": 0.0, "huge": 3.4e38}
    report = norm_report(spreads)
    assert report["scales"] == {"loud": 2.0, "louder": 8.0}
    assert report["norms"] == 6
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert pytest.approx(65504 / 4) == NORM_LIMIT**2
    assert norm_report({}) == {"norms": 0, "largest": 0.0, "scales": {}}


def test_a_scaled_norm_is_the_norm(tiny_base):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 16, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = 300 * torch.randn(2, 16, 5, 5) + 100
    assert max_abs(ScaledNorm(norm, 8.0)(x).detach(), norm(x).detach()) < 1e-5
    quiet = x / 3e5  # as large as ε is: it is divided too
    assert max_abs(ScaledNorm(norm, 8.0)(quiet).detach(), norm(quiet).detach()) < 1e-5
    assert norm.eps / 64 > LEAST_HALF
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet").eval()
    inputs = torch.randn(1, 4, 4, 4), torch.tensor(500.0), torch.randn(1, 16, 32)
    with torch.no_grad():
        before = unet(*inputs).sample
        scale_norms(unet, {"mid_block.resnets.0.norm2": 4.0, "conv_norm_out": 2.0})
        assert max_abs(unet(*inputs).sample, before) < 1e-5
    assert isinstance(unet.mid_block.resnets[0].norm2, ScaledNorm)


@pytest.mark.parametrize("channels_that_are_silent", [False, True])
def test_a_loud_network_is_right_in_half_only_with_scales(channels_that_are_silent, tmp_path):
    """Values over 4,000 from their mean: their squares are infinities in half. A group that is constant is 0 / ε."""
    pytest.importorskip("coremltools")
    from hypersd_export.verify.mil import open_package

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.GroupNorm(2, 8, eps=1e-6), torch.nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[0].weight *= 3000
        if channels_that_are_silent:
            net[0].weight[:4], net[0].bias[:4] = 0, 1.0
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad(), watched(net) as spreads:
        expected = net(x).numpy()
    assert list(spreads) == ["1"]
    assert 4000 < spreads["1"] < 20_000
    found = []
    for scales in ({}, norm_report(spreads)["scales"]):
        scale_norms(net, scales)
        graph = Graph(name="loud", module=net, inputs={"input": x}, output_names=("y",))
        path = tmp_path / f"{len(scales)}.mlpackage"
        convert.build(graph, path, precision="fp16", deployment_target="iOS17")
        found.append(psnr(open_package(path).evaluate({"input": x.numpy()})["y"], expected))
    assert found[0] < 20
    assert found[1] > 55


def test_the_pipeline_is_drawn_to_find_them(tiny_base, loud_unet, tmp_path):
    """What is louder by a known factor is found louder by it."""
    plans = PlanFile(entries=tuple(
        PlanEntry(plan=plan, table=plan.table(), source="test")
        for plan in (FewStepPlan(solver=Solver.TCD, num_steps=steps, eta=0.3, guidance=Guidance.of(2.0))
                     for steps in (2, 1))
    ))  # fmt: skip
    quiet = norm_spreads(open_source(SourceRequest(base=str(tiny_base))), plans, SHAPES, prompt="a cat")
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    vae = AutoencoderKL.from_pretrained(tiny_base / "vae")
    for part, module in (("unet", unet), ("vae", vae)):
        names = {name for name, each in module.named_modules() if isinstance(each, torch.nn.GroupNorm)}
        assert set(quiet[part]) == names
        assert all(0 < spread < NORM_LIMIT for spread in quiet[part].values())
    with torch.no_grad():
        vae.decoder.conv_in.weight *= 1000
    vae.save_pretrained(tmp_path / "vae")
    request = SourceRequest(base=str(tiny_base), vae=str(tmp_path / "vae"))
    loud = norm_spreads(open_source(request), plans, SHAPES, prompt="a cat")
    assert loud["unet"] == quiet["unet"]
    first = "decoder.mid_block.resnets.0.norm1"
    assert loud["vae"][first] == pytest.approx(1000 * quiet["vae"][first], rel=0.05)
    assert first in norm_report(loud["vae"])["scales"]
    louder = norm_spreads(open_source(replace(request, unet=str(loud_unet))), plans, SHAPES, prompt="a cat")
    assert louder["unet"]["conv_norm_out"] > 5 * NORM_LIMIT


def in_this_process(monkeypatch):
    """What is done in processes of their own; returns the tasks."""
    pytest.importorskip("coremltools")
    asked: list[coreml_worker.Task] = []

    def run_apart(task, folder, *, progress):
        asked.append(task)
        again = type(task).from_json(json.loads(json.dumps(task.to_json())))
        assert again == task
        return again.run(folder, progress)

    monkeypatch.setattr(build_coreml, "run_apart", run_apart)
    return asked


@pytest.mark.slow
def test_a_loud_unet_is_exported_with_scales_and_fails_without(tiny_spec, loud_unet, tmp_path, monkeypatch, in_process):
    asked = in_this_process(monkeypatch)
    spec = replace(
        tiny_spec, unet=str(loud_unet), targets=(Target.COREML,), coreml=CoreMLFlags(chunk_unet=True),
        plan=replace(tiny_spec.plan, steps=(2,)),
    )  # fmt: skip
    done = export(replace(spec, out=tmp_path / "right"))
    scaled = done.manifest.targets["coreml"]["scaled_norms"]
    assert set(scaled) == {"unet"}
    assert scaled["unet"]["conv_norm_out"] >= 8
    assert done.manifest.parity["unet"]["psnr_db"] > 55
    assert done.manifest.parity["image"]["psnr_db"] > 40
    assert [type(task).__name__ for task in asked] == ["Measuring", *["Conversion"] * 4, "Cutting"]
    assert [len(task.scales) for task in asked if isinstance(task, coreml_worker.Conversion)] == [
        0, len(scaled["unet"]), 0, 0,
    ]  # fmt: skip
    asked.clear()
    monkeypatch.setattr(build_coreml, "norm_scales", lambda workshop: {})
    with pytest.raises(ParityError, match="unet"):
        export(replace(spec, out=tmp_path / "wrong"))
    assert [task.what for task in asked] == ["the package of unet", "the pieces of unet.mlpackage"]


@pytest.mark.slow
def test_a_loud_single_graph(tiny_spec, loud_unet, tmp_path, monkeypatch, in_process):
    in_this_process(monkeypatch)
    plan = replace(tiny_spec.plan, steps=(1,))
    spec = replace(tiny_spec, unet=str(loud_unet), targets=(Target.COREML,), single_graph=True, plan=plan)
    done = export(replace(spec, out=tmp_path / "right"))
    assert set(done.manifest.targets["coreml"]["scaled_norms"]) == {"unet"}
    assert done.manifest.parity["image"]["psnr_db"] > 40
    monkeypatch.setattr(build_coreml, "norm_scales", lambda workshop: {})
    with pytest.raises(ParityError, match="image"):
        export(replace(spec, out=tmp_path / "wrong"))


def test_nothing_is_measured_in_float32(tiny_spec, tmp_path, monkeypatch):
    pytest.importorskip("coremltools")

    def run_apart(task, folder, *, progress):
        raise BuildError(f"asked for {task.what}")

    monkeypatch.setattr(build_coreml, "run_apart", run_apart)
    spec = replace(tiny_spec, targets=(Target.COREML,), plan=replace(tiny_spec.plan, steps=(3,)), out=tmp_path / "out")
    spec = replace(spec, cache_dir=tmp_path / "cache")
    for precision, what in (("fp16", "the range of the group norms"), ("fp32", "the package of text_encoder")):
        with pytest.raises(BuildError, match=f"^asked for {what}$"):
            export(replace(spec, precision=precision))

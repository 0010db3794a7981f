"""Core ML packages of SDXL: two text encoders with the states and the pooled one, and a UNet that is told the size."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hypersd_export import build_coreml
from hypersd_export.diffusion import GuidanceKind, StepTable, initial_noise
from hypersd_export.export import export
from hypersd_export.graphs.apple import HIDDEN, as_apple, two_outputs
from hypersd_export.graphs.components import build_graph
from hypersd_export.graphs.pipeline import pipeline_graph
from hypersd_export.graphs.spec import Component, resolve_shapes
from hypersd_export.model.base import open_base
from hypersd_export.plan_choice import BaseClue, choose_plans
from hypersd_export.proof import open_checked
from hypersd_export.spec import CoreMLFlags, PlanFlags
from hypersd_export.targets import Target
from hypersd_export.verify.metrics import max_abs, psnr
from hypersd_export.verify.reference import denoise, nothing, prompt_ids, prompt_states, text_outputs
from hypersd_export.verify.source import SourceRequest, open_source
from tests.train.tiny_sdxl import POOLED, WIDTH, WIDTH_2, tiny_sdxl


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def graphs(base):
    model = open_base(base)
    configs = {name: model.component_config(name) for name in model.parts}
    shapes = resolve_shapes(configs, tokens=16, batch=1, cfg=True, size=None)
    return {c: build_graph(c, model.load(c.source, torch.float32), shapes) for c in Component}, shapes


@pytest.mark.parametrize(
    ("component", "pooled"), [("text_encoder", "pooler_output"), ("text_encoder_2", "text_embeds")]
)
def test_a_text_encoder_gives_what_swift_reads(component, pooled, graphs, base):
    graph = graphs[0][Component(component)]
    narrow = two_outputs(graph)
    apple = as_apple(narrow)
    assert narrow.output_names == apple.output_names == HIDDEN
    ids = np.random.default_rng(0).integers(0, 500, (1, 16))
    expected = text_outputs(open_base(base).load(component, torch.float32), ids)
    layers = {"text_encoder": 3, "text_encoder_2": 4}[component]
    for found, name in zip(
        apple.module(torch.from_numpy(ids).float()), (f"hidden_states.{layers - 1}", pooled), strict=True
    ):
        assert max_abs(found, expected[name]) < 1e-6
    assert {tuple(v.shape) for v in narrow.module(torch.from_numpy(ids))} == {
        (1, 16, WIDTH if component == "text_encoder" else WIDTH_2),
        (1, WIDTH if component == "text_encoder" else POOLED),
    }  # fmt: skip


def test_the_unet_takes_what_swift_feeds(graphs):
    graph = graphs[0][Component.UNET]
    apple = as_apple(graph)
    assert {name: tuple(value.shape) for name, value in apple.inputs.items()} == {
        "sample": (2, 4, 4, 4), "timestep": (2,), "encoder_hidden_states": (2, WIDTH + WIDTH_2, 1, 16),
        "time_ids": (2, 6), "text_embeds": (2, POOLED),
    }  # fmt: skip
    np.testing.assert_array_equal(apple.inputs["time_ids"], [[16, 16, 0, 0, 16, 16]] * 2)
    with torch.no_grad():
        assert max_abs(apple.module(**apple.inputs), graph.module(**graph.inputs)) < 1e-6


@pytest.mark.parametrize("negative", ["", "dog"])
def test_the_module_of_all_parts_is_the_pipeline_of_torch(negative, graphs, base):
    parts, shapes = graphs
    source = open_source(SourceRequest(base=str(base)))
    clue = BaseClue(
        family="sdxl", names=(), scheduler_config=source.base.scheduler_config, embeds_guidance=False, card=None
    )
    entry = choose_plans(PlanFlags(steps=(2,), scheduler="ddim", guidance=5.0), base=clue, loras=[]).default
    table: StepTable = entry.table
    assert entry.plan.guidance.kind is GuidanceKind.CFG
    ids = prompt_ids(source, ("a cat", negative, ""), 16)
    graph = pipeline_graph(
        [parts[Component.TEXT_ENCODER], parts[Component.TEXT_ENCODER_2]], parts[Component.UNET],
        parts[Component.VAE_DECODER], table=table, guidance=entry.plan.guidance, scaling_factor=0.13025,
        shift_factor=0.0, empty=[row[2].tolist() for row in ids],
    )  # fmt: skip
    assert list(graph.inputs) == [
        "negative_input_ids", "negative_input_ids_2", "input_ids", "input_ids_2", "time_ids", "noise",
    ]  # fmt: skip
    cond, uncond = prompt_states(source, ("a cat", negative), shapes, negative=True)
    assert (np.abs(uncond["encoder_hidden_states"]).max() == 0) == (negative == "")
    unet, _ = source.load("unet", torch.float32)
    expected = denoise(
        unet, table, entry.plan.guidance, cond=cond, uncond=uncond, seed=1, shape=(4, 4, 4)
    )  # fmt: skip
    feeds = {
        "negative_input_ids": ids[0][1:2], "negative_input_ids_2": ids[1][1:2], "input_ids": ids[0][:1],
        "input_ids_2": ids[1][:1], "time_ids": cond["time_ids"],
        "noise": initial_noise(seed=1, index=0, shape=(4, 4, 4))[None],
    }  # fmt: skip
    with torch.no_grad():
        _, latents = graph.module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    assert max_abs(latents, expected) < 1e-4 * np.abs(expected).max()
    assert not any(value.any() for name, value in nothing(cond).items() if name != "time_ids")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "precision", "scheduler", "guidance"),
    [("plain", "fp16", "ddim", 5.0), ("apple", "fp32", "apple-dpmpp", 1.0)],
)
def test_an_export_is_torchs(layout, precision, scheduler, guidance, base, tiny_spec, tmp_path, monkeypatch):
    pytest.importorskip("coremltools")
    monkeypatch.setattr(build_coreml, "run_apart", lambda asked, folder, *, progress: asked.run(folder, progress))
    spec = replace(
        tiny_spec, base=str(base), targets=(Target.COREML,), out=tmp_path / "bundle", precision=precision,
        plan=PlanFlags(steps=(2,), scheduler=scheduler, guidance=guidance), coreml=CoreMLFlags(layout=layout),
    )  # fmt: skip
    done = export(spec, isolate=False)
    least = 55 if precision == "fp16" else 110
    assert all(done.manifest.parity[name]["psnr_db"] > least for name in Component)
    assert done.manifest.parity["image"]["psnr_db"] > (35 if precision == "fp16" else 60)
    pipeline = open_checked(done.path, runtime="coreml", provider=None)
    assert pipeline.golden().passed
    if layout == "apple":
        packages = {name: entry["packages"] for name, entry in done.manifest.targets["coreml"]["components"].items()}
        assert packages["text_encoder_2"] == ["text_encoder_2/TextEncoder2.mlpackage"]
    assert psnr(pipeline("a cat", seed=1).latents, pipeline("a cat", seed=1).latents) == float("inf")

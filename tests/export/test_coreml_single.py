"""`--single-graph` to Core ML: ids and noise in, a picture out, in one package whose weights stand there once."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hypersd_export import build_coreml
from hypersd_export.diffusion import FewStepPlan, Guidance, PlanFile, Solver, initial_noise, step_noise
from hypersd_export.export import export
from hypersd_export.graphs.components import build_graph
from hypersd_export.graphs.pipeline import pipeline_graph
from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.spec import CoreMLFlags, PlanFlags
from hypersd_export.targets import Target
from hypersd_export.verify.coreml import InterpretedRuntime
from hypersd_export.verify.metrics import max_abs
from hypersd_export.verify.mil import open_package
from hypersd_export.verify.reference import decode, denoise, text_outputs, to_uint8, unscale
from hypersd_export.verify.source import SourceRequest, open_source

pytest.importorskip("coremltools")

SHAPES = Shapes(
    batch=1, unet_batch=1, channels=4, latent_height=4, latent_width=4, vae_scale=4, tokens=16, text_width=32
)
PARTS = (Component.TEXT_ENCODER, Component.UNET, Component.VAE_DECODER)


@pytest.mark.parametrize(
    "plan",
    [
        FewStepPlan(solver=Solver.DDIM, num_steps=2),
        FewStepPlan(solver=Solver.LCM, num_steps=3),
        FewStepPlan(solver=Solver.EULER, num_steps=2, guidance=Guidance.of(2.0)),
        FewStepPlan(solver=Solver.TCD, num_steps=2, eta=0.3, guidance=Guidance.of(3.0)),
    ],
    ids=lambda plan: str(plan.solver),
)
def test_the_module_is_the_pipeline_of_torch(plan, tiny_base):
    source, table, guided = open_source(SourceRequest(base=str(tiny_base))), plan.table(), plan.guidance.scale > 1
    modules = {part: source.load(part.source, torch.float32)[0] for part in PARTS}
    shapes = replace(SHAPES, unet_batch=2 if guided else 1)
    text, unet, decoder = (build_graph(part, module, shapes) for part, module in modules.items())
    graph = pipeline_graph(
        [text], unet, decoder, table=table, guidance=plan.guidance, scaling_factor=0.5, shift_factor=0.0
    )  # fmt: skip
    ids = {name: np.random.default_rng(n).integers(0, 500, (1, 16)) for n, name in enumerate(("prompt", "negative"))}
    encoder = modules[Component.TEXT_ENCODER]
    texts = {
        name: {"encoder_hidden_states": text_outputs(encoder, row)["last_hidden_state"]} for name, row in ids.items()
    }
    shape = (4, 4, 4)
    latents = denoise(
        modules[Component.UNET], table, plan.guidance, cond=texts["prompt"],
        uncond=texts["negative"] if guided else None, seed=7, shape=shape,
    )  # fmt: skip
    vae = modules[Component.VAE_DECODER]
    feeds = {"negative_input_ids": ids["negative"]} if guided else {}
    feeds |= {"input_ids": ids["prompt"], "noise": initial_noise(seed=7, index=0, shape=shape)[None]}
    if table.noise_streams:
        feeds["step_noise"] = np.stack(
            [step_noise(seed=7, index=0, step=n, shape=shape)[None] for n in table.noise_streams]
        )
    assert {name: list(value.shape) for name, value in feeds.items()} == {
        name: list(value.shape) for name, value in graph.inputs.items()
    }
    with torch.no_grad():
        image, found = graph.module(**{name: torch.from_numpy(feeds[name]) for name in graph.inputs})
    assert max_abs(found, latents) < 1e-4 * np.abs(latents).max()
    picture = to_uint8(decode(vae, unscale(vae, latents)))
    assert max_abs(image.permute(0, 2, 3, 1), picture) <= 1  # where a value is halfway


@pytest.fixture(scope="module")
def done(tiny_spec, tmp_path_factory):
    """With guidance and fresh noise; all in this process."""
    spec = replace(
        tiny_spec, targets=(Target.COREML,), single_graph=True, coreml=CoreMLFlags(deployment_target="macOS14"),
        plan=PlanFlags(steps=(2,), scheduler="tcd", eta=0.3, guidance=3.0),
        out=tmp_path_factory.mktemp("single") / "bundle",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_coreml, "run_apart", lambda asked, folder, *, progress: asked.run(folder, progress))
        return export(spec, isolate=False)


def test_one_package_that_is_torchs_pipeline(done):
    record = done.manifest.targets["coreml"]
    assert record["components"]["pipeline"]["packages"] == ["pipeline.mlpackage"]
    assert set(done.manifest.parity) == {"image"}
    assert done.manifest.parity["image"]["psnr_db"] > 45
    assert {path.parent.name for path in done.path.rglob("config.json")} == {"text_encoder", "unet", "vae_decoder"}
    assert not list(done.path.glob("*/*.mlpackage"))
    function = open_package(done.path / "pipeline.mlpackage").function()
    assert {name: (given.kind.element, given.kind.shape) for name, given in function.inputs.items()} == {
        "negative_input_ids": ("int32", (1, 16)), "input_ids": ("int32", (1, 16)), "noise": ("fp32", (1, 4, 4, 4)),
        "step_noise": ("fp32", (1, 1, 4, 4, 4)),
    }  # fmt: skip


def test_the_picture_is_an_image_and_the_weights_stand_there_once(done, tiny_base):
    package = open_package(done.path / "pipeline.mlpackage")
    outputs = {feature.name: feature.type for feature in package.file.model.description.output}
    assert outputs["image"].WhichOneof("Type") == "imageType"
    assert (outputs["image"].imageType.width, outputs["image"].imageType.colorSpace) == (16, 20)  # RGB
    assert outputs["latents"].multiArrayType.dataType == 65568
    source = open_source(SourceRequest(base=str(tiny_base)))
    parameters = sum(
        p.numel() for part in ("text_encoder", "unet") for p in source.load(part, torch.float32)[0].parameters()
    )
    parameters += sum(p.numel() for p in source.load("vae", torch.float32)[0].decoder.parameters())
    built = done.manifest.targets["coreml"]["components"]["pipeline"]
    assert built["weight_bytes"] == pytest.approx(2 * parameters, rel=0.1)  # the UNet is called twice


def test_what_joins_the_parts_is_in_float32(done):
    kept = done.manifest.targets["coreml"]["components"]["pipeline"]["float32_ops"]
    assert any(name.startswith("mul") for name in kept)
    assert len(kept) < 40
    block = open_package(done.path / "pipeline.mlpackage").function().block
    types = {op.outputs[0].name: op.outputs[0].type.tensorType.dataType for op in block.operations}
    assert {types[name] for name in kept if name in types} == {11, 23}  # float32, and the ids side by side
    assert sum(kind == 10 for kind in types.values()) > 500


def test_the_bundles_own_pipeline_draws_the_golden_picture_with_it(done):
    plans = PlanFile.from_json(json.loads((done.path / "plan.json").read_text()))
    runtime = InterpretedRuntime(
        packages={"pipeline": done.path / "pipeline.mlpackage"}, ports=build_coreml.PIPELINE_PORTS
    )
    pipeline = Pipeline(path=done.path, plans=plans, digest="", runtime=runtime)
    report = pipeline.golden()
    assert report.passed
    assert report.latents_max_abs < 0.005 * np.abs(np.load(done.path / "golden" / "latents.npy")).max()
    images = pipeline("a cat", negative_prompt="a dog", num_images=2, seed=5).images
    assert [image.size for image in images] == [(16, 16)] * 2
    assert images[0].tobytes() != images[1].tobytes()

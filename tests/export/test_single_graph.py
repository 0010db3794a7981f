"""`--single-graph`: one pipeline.onnx, equal to the loop over the parts, and no larger than they are."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import pytest
from PIL import Image

from hypersd_export.bundle import schemas
from hypersd_export.bundle.manifest import read_manifest, verify_files
from hypersd_export.diffusion import FewStepPlan, Guidance, Solver
from hypersd_export.errors import BundleError, OptionError, ParityError
from hypersd_export.export import COMPOSE, export
from hypersd_export.graphs.spec import Component
from hypersd_export.runtime.onnx import open_graph
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.runtime.single import SingleGraph
from hypersd_export.spec import ExportSpec, PlanFlags
from hypersd_export.targets import onnx_pipeline
from hypersd_export.targets.onnx_pipeline import Wiring, compose

PARTS = (Component.TEXT_ENCODER, Component.UNET, Component.VAE_DECODER)
PROMPT = "a cat and a dog"


@pytest.fixture(scope="module")
def spec(tiny_spec, lora_file):
    """As `lora_exported`: TCD in 3 steps with guidance and fresh noise, two oblong pictures at a time."""
    lora = (f"{lora_file}:0.8",)
    return replace(tiny_spec, plan=PlanFlags(), loras=lora, batch=2, size=(24, 16), single_graph=True)


@pytest.fixture(scope="module")
def single(spec, lora_exported, tmp_path_factory):
    return export(replace(spec, out=tmp_path_factory.mktemp("bundles") / "single"), isolate=False)


@pytest.fixture(scope="module")
def unrolled(spec, single, tmp_path_factory):
    return export(replace(spec, unroll=True, out=tmp_path_factory.mktemp("bundles") / "unrolled"), isolate=False)


@pytest.fixture(params=["single", "unrolled"])
def bundle(request):
    return request.getfixturevalue(request.param)


def weights(path):
    return sum(value.const_value.nbytes for value in onnx_ir.load(path).graph.initializers.values())


def test_one_call_gives_the_pictures_of_the_loop(bundle, lora_exported):
    loop, one = Pipeline.from_bundle(lora_exported.path), Pipeline.from_bundle(bundle.path)
    for settings in ({"seed": 3, "num_images": 3}, {"seed": 4, "negative_prompt": "a dog"}):
        theirs, ours = loop(PROMPT, steps=3, **settings), one(PROMPT, **settings)
        assert np.abs(ours.latents - theirs.latents).max() < 3e-6 * np.abs(theirs.latents).max()
        for mine, other in zip(ours.images, theirs.images, strict=True):
            assert np.abs(np.asarray(mine).astype(int) - np.asarray(other)).max() <= 1
    assert set(ours.seconds) == {"pipeline"}


def test_no_weight_is_stored_twice(bundle, lora_exported):
    parts = sum(weights(lora_exported.path / part / "model.onnx") for part in PARTS)
    mine = weights(bundle.path / "pipeline.onnx")
    constants = mine - parts
    assert 0 < constants < 400  # rows and scalars
    record = bundle.manifest.targets["onnx"]["single_graph"]
    assert (record["weight_bytes"], record["parts_weight_bytes"]) == (mine, parts)


def test_the_loop_holds_the_unet_once_and_the_unrolled_graph_every_step(single, unrolled, lora_exported):
    def convolutions(path):
        return sum(node.op_type == "Conv" for node in onnx_ir.load(path).graph.all_nodes())

    unet, decoder = (convolutions(lora_exported.path / part / "model.onnx") for part in ("unet", "vae_decoder"))
    assert convolutions(single.path / "pipeline.onnx") == unet + decoder
    assert convolutions(unrolled.path / "pipeline.onnx") == 3 * unet + decoder
    kinds = {node.op_type for node in onnx_ir.load(unrolled.path / "pipeline.onnx").graph}
    assert "Loop" not in kinds


def test_its_interface(bundle):
    graph = onnx.load(bundle.path / "pipeline.onnx").graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    assert shapes == {
        "input_ids": [2, 16], "negative_input_ids": [2, 16], "noise": [2, 4, 4, 6], "step_noise": [2, 2, 4, 4, 6],
        "image": [2, 16, 24, 3], "latents": [2, 4, 4, 6],
    }  # fmt: skip
    domains = {node.domain for node in onnx_ir.load(bundle.path / "pipeline.onnx").graph.all_nodes()}
    assert domains == {""}  # no vendor's op in a portable graph


def test_the_bundle_is_whole_and_checked(bundle):
    from jsonschema import Draft202012Validator

    verify_files(bundle.path)
    files = {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*.onnx")}
    assert files == {"pipeline.onnx"}
    assert not (bundle.path / "model_index.json").exists()
    manifest = read_manifest(bundle.path)
    Draft202012Validator(schemas.load("manifest")).validate(json.loads((bundle.path / "manifest.json").read_text()))
    assert set(manifest.parity) == {"text_encoder", "unet", "vae_decoder", "image"}
    assert manifest.parity["image"]["psnr_db"] > 50
    golden = Pipeline.from_bundle(bundle.path).golden()
    assert golden.passed
    assert golden.latents_max_abs < 1e-4
    card = (bundle.path / "README.md").read_text()
    assert "| `step_noise` | float32 | [2, 2, 4, 4, 6] |" in card
    assert "ORTStableDiffusionPipeline" not in card
    assert "constant of the graph" in card
    assert len(json.loads((bundle.path / "plan.json").read_text())["entries"]) == 1  # the LoRA's default plan alone


def test_a_plan_without_guidance_and_noise_has_neither_input(tiny_spec, exported, tmp_path):
    done = export(replace(tiny_spec, plan=PlanFlags(steps=(4,), scheduler="ddim", guidance=1.0), single_graph=True,
                          out=tmp_path / "b"), isolate=False)  # fmt: skip
    graph = Pipeline.from_bundle(done.path)
    assert set(done.manifest.targets["onnx"]["single_graph"]["inputs"]) == {"input_ids", "noise"}
    theirs = Pipeline.from_bundle(exported.path)(PROMPT, steps=4, seed=2)
    assert np.array_equal(np.asarray(graph(PROMPT, seed=2).images[0]), np.asarray(theirs.images[0]))
    body = next(n for n in onnx_ir.load(done.path / "pipeline.onnx").graph if n.op_type == "Loop").attributes["body"]
    kinds = [node.op_type for node in body.as_graph()]
    assert "Split" not in kinds or kinds.count("Gather") <= 4  # t, a and b of the row; k is 1 throughout
    rows = {value.name for node in body.as_graph() for value in node.inputs if value and value.name.startswith("rows.")}
    assert rows == {"rows.t", "rows.a", "rows.b"}
    with pytest.raises(OptionError, match="a negative prompt has no effect"):
        graph(PROMPT, negative_prompt="a dog")


@pytest.mark.parametrize("unroll", [False, True])
def test_input_scaling_and_the_scale_of_the_noise_are_in_it(lora_exported, tmp_path, unroll):
    plan = FewStepPlan(solver=Solver.EULER, num_steps=3, guidance=Guidance.of(3.0))
    table = plan.table()
    assert table.init_noise_sigma > 1.1
    assert all(row.k < 1 for row in table.rows)
    parts = {part: lora_exported.path / part / "model.onnx" for part in PARTS}
    shapes = onnx_pipeline.Shapes(**lora_exported.manifest.options["shapes"])
    wiring = Wiring(
        table=table, guidance=plan.guidance, shapes=shapes, scaling_factor=0.5, shift_factor=0.125, unroll=unroll
    )
    noted = compose(parts, wiring, tmp_path, external=True)
    assert noted["external_data"]
    assert (tmp_path / "pipeline.onnx_data").stat().st_size > 0.9 * noted["weight_bytes"]
    assert (tmp_path / "pipeline.onnx").stat().st_size < 0.2 * noted["weight_bytes"] + 1_000_000
    loop = Pipeline.from_bundle(lora_exported.path)
    ids = [loop.texts.ids(text) for text in ("", PROMPT)]
    noise = np.random.default_rng(0).standard_normal((2, *loop.latent_shape)).astype(np.float32)
    entry = replace(loop.plans.default, plan=plan, table=table)
    x = np.float32(table.init_noise_sigma) * noise
    latents = loop.sample(entry, x, loop._guide(ids, 3.0, None), lambda _: noise)
    graph = SingleGraph(open_graph(tmp_path / "pipeline.onnx", threads=1))
    mine, pixels = graph.draw(ids, noise, table, lambda _: noise)
    assert np.abs(mine - latents).max() < 2e-5 * np.abs(latents).max()
    shifted = loop.decode(latents + np.float32(0.125 * 0.5))
    assert np.abs(pixels.astype(int) - shifted).max() <= 1


def test_the_same_export_comes_from_the_cache_and_another_schedule_does_not(spec, single, tmp_path):
    def composed(spec):
        done = export(replace(spec, out=tmp_path / "again", overwrite=True), isolate=False)
        return next(stage for stage in done.stages if stage.name == COMPOSE).cached

    assert composed(spec)
    assert not composed(replace(spec, plan=PlanFlags(guidance=2.0)))
    assert not composed(replace(spec, plan=PlanFlags(eta=0.5)))


def test_what_is_fixed_in_the_graph_cannot_be_asked_otherwise(single):
    pipeline = Pipeline.from_bundle(single.path)
    assert pipeline(PROMPT, guidance=3.0).guidance == 3.0
    with pytest.raises(OptionError, match=r"guidance 2\.0: 3 is a constant of this bundle's single graph"):
        pipeline(PROMPT, guidance=2.0)
    with pytest.raises(OptionError, match="a single graph starts from noise; export without --single-graph"):
        pipeline(PROMPT, init_image=Image.new("RGB", (24, 16)), strength=1.0)
    with pytest.raises(OptionError, match="2"):
        pipeline(PROMPT, steps=2)


def test_a_graph_that_differs_from_torch_is_not_published(spec, tmp_path, monkeypatch):
    """The image gate is the single graph's own: the parts are right, and what joins them is not."""
    right = Wiring.to_json

    def wrong(self, *args, **kwargs):
        kwargs["scaling_factor"] = 2 * kwargs["scaling_factor"]
        usual(self, *args, **kwargs)

    usual = Wiring.__init__
    monkeypatch.setattr(Wiring, "__init__", wrong)
    monkeypatch.setattr(Wiring, "to_json", lambda self: {**right(self), "wrong": True})
    with pytest.raises(ParityError, match="image"):
        export(replace(spec, out=tmp_path / "b"), isolate=False)
    assert not (tmp_path / "b").exists()


def test_graphs_of_two_exports_are_told_apart(single, tmp_path, exported):
    import shutil

    shutil.copytree(single.path, tmp_path / "b")
    shutil.copyfile(exported.path / "plan.json", tmp_path / "b" / "plan.json")
    with pytest.raises(BundleError, match=r"pipeline\.onnx and plan\.json are of two exports"):
        Pipeline.from_bundle(tmp_path / "b", check=False)(PROMPT)
    shutil.copyfile(exported.path / "unet/model.onnx", tmp_path / "b/pipeline.onnx")
    with pytest.raises(BundleError, match=r"does not fit this version .*sample"):
        Pipeline.from_bundle(tmp_path / "b", check=False)(PROMPT)


def test_parts_of_two_opsets_are_refused(lora_exported, tmp_path):
    parts = {part: lora_exported.path / part / "model.onnx" for part in PARTS}
    model = onnx.load(parts[Component.VAE_DECODER])
    model.opset_import[0].version = 18
    onnx.save(model, tmp_path / "old.onnx")
    shapes = onnx_pipeline.Shapes(**lora_exported.manifest.options["shapes"])
    entry = Pipeline.from_bundle(lora_exported.path).plans.default
    wiring = Wiring(table=entry.table, guidance=entry.plan.guidance, shapes=shapes, scaling_factor=0.5)
    with pytest.raises(OptionError, match="different opsets"):
        compose({**parts, Component.VAE_DECODER: tmp_path / "old.onnx"}, wiring, tmp_path / "out")


def test_options_that_contradict():
    with pytest.raises(OptionError, match="--single-graph with --steps 1,2: a graph holds one schedule"):
        ExportSpec(single_graph=True, plan=PlanFlags(steps=(1, 2)))
    with pytest.raises(OptionError, match="--unroll: it is about --single-graph"):
        ExportSpec(unroll=True)

"""Graphs of free shapes: torch's at both ends of their ranges, drawn at any size between, and refused outside."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from PIL import Image

from benchmarks.bench.weights import torch_parts
from hypersd_export import refit
from hypersd_export.bundle.manifest import read_manifest
from hypersd_export.bundle.span import Span
from hypersd_export.errors import OptionError
from hypersd_export.export import export
from hypersd_export.graphs.span import corners, free_axes, traced_with
from hypersd_export.graphs.spec import Axis, Component, Shapes
from hypersd_export.job import open_job
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.spec import DynamicFlags, ExportSpec, PlanFlags, parse_dynamic
from hypersd_export.targets import Target
from hypersd_export.targets import onnx as onnx_target
from hypersd_export.verify.corners import corners_of
from hypersd_export.verify.gates import Gate
from trainer.pretrain.vae import to_uint8

SHAPES = Shapes(
    batch=1, unet_batch=2, channels=4, latent_height=8, latent_width=12, vae_scale=8, tokens=5, text_width=6, pooled=3
)
SPAN = Span(batch=(1, 4), width=(64, 128), height=(64, 64), unit=16)


def test_which_axes_are_free():
    """A side in units, a UNet's rows in branches; what has a single size is fixed."""
    rows, images = Axis(name="batch", low=1, high=4, multiple=2), Axis(name="batch", low=1, high=4)
    width = Axis(name="width", low=4, high=8, multiple=2)
    assert free_axes(SPAN, Component.UNET, SHAPES) == {
        "sample": {0: rows, 3: width}, "encoder_hidden_states": {0: rows}, "text_embeds": {0: rows},
        "time_ids": {0: rows},
    }  # fmt: skip
    assert free_axes(SPAN, Component.TEXT_ENCODER_2, SHAPES) == {"input_ids": {0: images}}
    assert free_axes(SPAN, Component.VAE_DECODER, SHAPES) == {"latent_sample": {0: images, 3: width}}
    assert free_axes(SPAN, Component.VAE_ENCODER, SHAPES) == {"sample": {0: images, 3: replace(width, multiple=16)}}
    assert free_axes(replace(SPAN, batch=(1, 1)), Component.TEXT_ENCODER, SHAPES) == {}
    assert traced_with(SPAN, SHAPES) == replace(SHAPES, batch=2, unet_batch=4)
    assert traced_with(replace(SPAN, batch=(1, 1)), SHAPES) == SHAPES
    assert corners(SPAN, SHAPES) == (
        replace(SHAPES, latent_width=8), replace(SHAPES, batch=4, unet_batch=8, latent_width=16)
    )  # fmt: skip
    assert corners(replace(SPAN, batch=(1, 1), width=(96, 96)), SHAPES) == ()


def test_a_span_says_what_it_takes():
    assert Span.from_json(json.loads(json.dumps(SPAN.to_json()))) == SPAN
    SPAN.check_size(96, 64)
    SPAN.check_batch(4)
    for size in ((48, 64), (100, 64), (144, 64), (64, 80)):
        with pytest.raises(OptionError, match=r"this bundle draws 64x64 to 128x64 pixels, in multiples of 16"):
            SPAN.check_size(*size)
    for batch in (0, 5):
        with pytest.raises(OptionError, match=rf"batch {batch}: this bundle draws 1 to 4 pictures at once"):
            SPAN.check_batch(batch)


def test_options_in_one_line(tiny_spec):
    assert parse_dynamic(None) == DynamicFlags()
    assert parse_dynamic(["size=16x8:32X64", "batch=1:4"]) == DynamicFlags(batch=(1, 4), size=((16, 8), (32, 64)))
    for text in ("batch", "batch=1", "batch=a:b", "size=1:2", "size=8x8", "steps=1:4"):
        with pytest.raises(OptionError, match=r"--dynamic .*: give batch=LEAST:MOST or size=WxH:WxH"):
            parse_dynamic([text])
    with pytest.raises(OptionError, match="batch is there twice"):
        parse_dynamic(["batch=1:2", "batch=1:3"])
    for flags, message in (
        (DynamicFlags(batch=(0, 2)), "--dynamic batch=0:2: the least first, from 1 to 64"),
        (DynamicFlags(batch=(3, 2)), "--dynamic batch=3:2"),
        (DynamicFlags(size=((16, 16), (8, 16))), "--dynamic size=16x16:8x16: the least first"),
    ):
        with pytest.raises(OptionError, match=message):
            replace(tiny_spec, dynamic=flags)
    dynamic = DynamicFlags(batch=(1, 2))
    with pytest.raises(OptionError, match="the graph of a loop is of one shape"):
        ExportSpec(dynamic=dynamic, single_graph=True, plan=PlanFlags(steps=(2,)))
    with pytest.raises(OptionError, match="engines and Core ML packages are of one shape"):
        ExportSpec(dynamic=dynamic, targets=(Target.ONNX, Target.TENSORRT))
    unit = 2 * open_job(tiny_spec).shapes.vae_scale
    for flags, message in (
        (DynamicFlags(batch=(2, 3)), "batch from 2 to 3 does not hold the export's own 1: give --batch inside it"),
        (DynamicFlags(size=((unit, unit), (unit + 1, unit))), f"is not a multiple of {unit} pixels on both sides"),
        (DynamicFlags(size=((512, 512), (1024, 1024))), "width from 512 to 1024 does not hold the export's own"),
    ):
        with pytest.raises(OptionError, match=message):
            open_job(replace(tiny_spec, dynamic=flags))


@pytest.fixture(scope="module")
def dynamic(tiny_spec, tmp_path_factory):
    """With guidance, so that a UNet's rows are twice the images; fp32, proven at both ends of the ranges."""
    shapes = open_job(tiny_spec).shapes
    flags = DynamicFlags(batch=(1, 3), size=((shapes.width // 2, shapes.height), (2 * shapes.width, 2 * shapes.height)))
    plan = PlanFlags(steps=(2,), scheduler="ddim", guidance=3.0)
    out = tmp_path_factory.mktemp("bundles") / "dynamic"
    return export(replace(tiny_spec, plan=plan, dynamic=flags, out=out), isolate=False)


def test_any_shape_of_the_range_is_torchs(dynamic, tiny_spec):
    """Pictures of the bundle against the pipeline in torch, at sizes and counts that were neither traced nor gated."""
    source, manifest = open_job(tiny_spec).source, read_manifest(dynamic.path)
    parts, pipeline = torch_parts(dynamic.path, source), Pipeline.from_bundle(dynamic.path, batch=2)
    (own_width, own_height), scale = pipeline.size, manifest.options["shapes"]["vae_scale"]
    for width, height, count in (
        (own_width, own_height, 1), (own_width // 2, 2 * own_height, 2), (2 * own_width, own_height, 3)
    ):  # fmt: skip
        drawn = pipeline("cat hat", seed=5, num_images=count, size=(width, height))
        sized = replace(parts, latents=(height // scale, width // scale))
        theirs = to_uint8(sized.draw(["cat hat"], drawn.plan.plan, first_seed=5))[0].permute(1, 2, 0).numpy()
        assert theirs.shape == (height, width, 3)
        assert np.abs(np.asarray(drawn.images[0], float) - theirs).max() <= 1
        alone = pipeline("cat hat", seed=5, size=(width, height)).images[0]
        assert np.abs(np.asarray(drawn.images[0], float) - np.asarray(alone, float)).max() <= 1


def test_other_shapes_are_refused(dynamic, exported):
    pipeline = Pipeline.from_bundle(dynamic.path)
    width, height = pipeline.size
    assert (pipeline.batch, pipeline.span.width) == (1, (width // 2, 2 * width))
    with pytest.raises(OptionError, match=f"size {4 * width}x{height}: this bundle draws {width // 2}x{height} to"):
        pipeline("cat", size=(4 * width, height))
    with pytest.raises(OptionError, match="batch 4: this bundle draws 1 to 3 pictures at once"):
        Pipeline.from_bundle(dynamic.path, batch=4)
    static = Pipeline.from_bundle(exported.path)
    assert static.span is None
    assert static("cat", size=static.size, steps=2).images[0].size == static.size
    with pytest.raises(OptionError, match=r"this bundle draws .*; export with --dynamic size="):
        static("cat", size=(2 * static.size[0], static.size[1]))


def test_image_to_image_at_another_size(dynamic):
    pipeline = Pipeline.from_bundle(dynamic.path)
    width, height = pipeline.size
    picture = Image.new("RGB", (64, 64), (200, 30, 90))
    drawn = pipeline("cat", init_image=picture, strength=0.5, size=(2 * width, 2 * height)).images[0]
    assert drawn.size == (2 * width, 2 * height)


def test_what_a_bundle_says_of_its_range(dynamic):
    """The graphs by name, the card, and refit, which exports the same ranges again."""
    model = onnx.load(dynamic.path / "unet" / "model.onnx", load_external_data=False)
    axes = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["2*batch", 4, "2*height", "2*width"]
    assert "| Range | 8x16 to 32x32 px, 1 to 3 at a time |" in (dynamic.path / "README.md").read_text(encoding="utf-8")
    spec = ExportSpec(**refit._options(read_manifest(dynamic.path)))
    assert spec.dynamic == DynamicFlags(batch=(1, 3), size=((8, 16), (32, 32)))


def test_the_gates_hold_the_ends_of_the_ranges(tiny_spec):
    """A graph that is right at its own shapes and wrong at another one fails, by a line that says where."""
    job = open_job(tiny_spec)
    module = job.source.load("vae", torch.float32)[0]
    wide = replace(job.shapes, latent_width=2 * job.shapes.latent_width, batch=2)
    (corner,) = corners_of(Component.VAE_DECODER, module, [wide], job.shapes, None)
    assert corner.inputs["latent_sample"].shape == (2, 4, job.shapes.latent_height, wide.latent_width)

    class Graph:
        """The decoder itself, and from a factor on another one."""

        def __init__(self, factor):
            self.factor = factor

        def run(self, latent_sample):
            with torch.no_grad():
                image = module.decode(torch.from_numpy(latent_sample), return_dict=False)[0]
            return {"sample": self.factor * image.numpy()}

    for factor, failures in ((1.0, 0), (1.2, 1)):
        gate = Gate(name="vae_decoder", least_db=90.0)
        corner.compare(gate, Graph(factor))
        assert len(gate.failures) == failures
    assert f"in sample at {wide.width}x{wide.height}, 2 at once" in gate.failures[0]
    texts = job.source.load("text_encoder", torch.float32)[0]
    several = [wide, replace(wide, batch=1), replace(wide, batch=2, latent_height=2)]
    assert [
        c.inputs["input_ids"].shape[0] for c in corners_of(Component.TEXT_ENCODER, texts, several, job.shapes, None)
    ] == [2]


def test_a_scalar_and_a_row_of_one_are_not_the_same_initialiser(tmp_path):
    """Sharing them gave Concat inputs of two ranks, as the shapes of dynamic graphs are made of such rows."""
    values = [onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.array(value), name=name)) for name, value in (
        ("scalar", 1), ("row", [1]), ("again", [1]))]  # fmt: skip
    node = onnx_ir.node("Concat", [values[1], values[2]], {"axis": 0})
    other = onnx_ir.node("Identity", [values[0]])
    graph = onnx_ir.Graph([], [*node.outputs, *other.outputs], nodes=[node, other], initializers=values)
    onnx_target._share_initializers(onnx_ir.Model(graph, ir_version=10))
    assert set(graph.initializers) == {"scalar", "row"}

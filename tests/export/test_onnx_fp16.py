"""targets/onnx_fp16.py: fp16 weights between float32 ends, single ops back in float32, and half arithmetic on a CPU."""

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel

from hypersd_export.errors import ModelError
from hypersd_export.graphs.components import build_graph
from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.targets import onnx, onnx_fp16
from hypersd_export.verify.metrics import psnr

SHAPES = Shapes(
    batch=1, unet_batch=1, channels=4, latent_height=4, latent_width=4, vae_scale=4, tokens=16, text_width=32
)
HALF, FLOAT = onnx_ir.DataType.FLOAT16, onnx_ir.DataType.FLOAT


def evaluate(path, feeds):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.fixture(scope="module")
def unet(tiny_base, tmp_path_factory):
    """The folder of the tiny UNet in fp16, its float32 feeds, and torch's float32 answer at t = 999."""
    folder = tmp_path_factory.mktemp("unet")
    module = UNet2DConditionModel.from_pretrained(tiny_base / "unet").eval().requires_grad_(False)
    graph = build_graph(Component.UNET, module, SHAPES)
    expected = graph.module(*graph.inputs.values()).numpy()
    onnx_fp16.build(build_graph(Component.UNET, module.half(), SHAPES), folder)
    return folder, {name: value.float().numpy() for name, value in graph.inputs.items()}, expected


def test_weights_are_half_and_the_ends_float32(unet):
    folder, feeds, expected = unet
    graph = onnx_fp16.read(folder / "model.onnx").graph
    assert {value.dtype for value in (*graph.inputs, *graph.outputs)} == {FLOAT}
    assert [value.name for value in (*graph.inputs, *graph.outputs)] == [
        "sample", "timestep", "encoder_hidden_states", "out_sample",
    ]  # fmt: skip
    large = [value for value in graph.initializers.values() if value.const_value.size > 64]
    assert {value.const_value.dtype for value in large} == {HALF}
    angles = {node.op_type: node.inputs[0].dtype for node in graph if node.op_type in ("Sin", "Cos")}
    assert angles == {"Sin": FLOAT, "Cos": FLOAT}
    assert psnr(evaluate(folder / "model.onnx", feeds), expected) > 50


def test_ops_that_are_kept_have_casts_at_the_rim_alone(unet, tmp_path):
    folder, feeds, expected = unet
    model = onnx_fp16.read(folder / "model.onnx")
    nodes = list(model.graph)
    first = next(n for n, node in enumerate(nodes) if node.op_type == "Conv")
    region = {node.name for node in nodes[first : first + 3]}  # a convolution, a reshape and a normalisation
    before = sum(node.op_type == "Cast" for node in nodes)
    onnx_fp16.keep_float32(model, region)
    kept = [node for node in model.graph if node.name in region]
    assert all(value.dtype == FLOAT for node in kept for value in node.outputs)
    assert kept[0].inputs[0].name == "sample"  # not to half and back
    assert kept[0].inputs[1].const_value.dtype == FLOAT
    onnx.write(model, tmp_path, precision="fp16")
    after = sum(node.op_type == "Cast" for node in onnx_ir.load(tmp_path / "model.onnx").graph)
    assert before - 1 <= after <= before + 2
    assert psnr(evaluate(tmp_path / "model.onnx", feeds), expected) > 50


def test_half_arithmetic_can_be_seen_on_a_cpu(unet, tmp_path):
    folder, feeds, expected = unet
    found = {}
    for name, change in (("wide", onnx_fp16.widen), ("rounded", onnx_fp16.round_to_half)):
        model = onnx_fp16.read(folder / "model.onnx")
        change(model)
        found[name] = psnr(
            evaluate(onnx_fp16.save_beside(model, folder / "model.onnx", tmp_path / name), feeds), expected
        )
    assert found["wide"] > found["rounded"] > 45
    assert np.isfinite(found["wide"])


def test_a_weight_that_is_no_half_is_refused():
    module = torch.nn.Linear(2, 2)
    module.register_buffer("nothing", torch.zeros(0).half())
    onnx_fp16.check_weights(module.half(), "unet")
    module.bias.data[1] = torch.nan
    with pytest.raises(ModelError, match="unet: bias is beyond fp16's 65504"):
        onnx_fp16.check_weights(module, "unet")
    module.float().weight.data[0, 0] = 1e6
    with pytest.raises(ModelError, match="unet: weight is beyond fp16's 65504"):
        onnx_fp16.check_weights(module.half(), "unet")

"""Small ONNX files with all that the TensorRT checks look at; made by hand, as an export takes seconds."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
NODES = ("angle", "sine", "cosine", "join", "down", "embed", "spread", "conv", "grow", "add", "act")


def weight(name, shape, dtype=np.float16, scale=0.1):
    """A seeded weight."""
    values = np.random.default_rng(len(name)).standard_normal(shape) * scale
    return numpy_helper.from_array(values.astype(dtype), name)


def small_net(
    path: Path, *, island: bool = False, float_weight: bool = False, batch: int | str = 1, external: bool = False
) -> Path:
    """conv(sample) + embedding(sines of the timestep), a ReLU behind it: fp16, but for the angles.

    `island` computes the convolution in float32 between Casts; `float_weight` stores its kernel in float32 and casts
    it; `external` puts the weights into `<name>_data`.
    """
    nodes = [
        helper.make_node("Mul", ["timestep", "freq"], ["angles"], "angle"),
        helper.make_node("Sin", ["angles"], ["sines"], "sine"),
        helper.make_node("Cos", ["angles"], ["cosines"], "cosine"),
        helper.make_node("Concat", ["sines", "cosines"], ["both"], "join", axis=-1),
        helper.make_node("Cast", ["both"], ["time"], "down", to=HALF),
        helper.make_node("MatMul", ["time", "w_embed"], ["embedded"], "embed"),
        helper.make_node("Reshape", ["embedded", "shape"], ["bias"], "spread"),
    ]
    weights = [
        weight("freq", (1, 4), np.float32, 1.0),
        weight("w_embed", (8, 4)),
        numpy_helper.from_array(np.array([1, 4, 1, 1]), "shape"),
        weight("w_conv", (4, 4, 3, 3), np.float32 if island or float_weight else np.float16),
    ]
    x, kernel = "sample", "w_conv"
    if float_weight:
        nodes.append(helper.make_node("Cast", ["w_conv"], ["w_half"], "shrink", to=HALF))
        kernel = "w_half"
    if island:
        nodes.append(helper.make_node("Cast", ["sample"], ["wide"], "widen", to=FLOAT))
        x = "wide"
    nodes.append(helper.make_node("Conv", [x, kernel], ["convolved"], "conv", pads=[1, 1, 1, 1]))
    y = "convolved"
    if island:
        nodes.append(helper.make_node("Cast", ["convolved"], ["narrow"], "grow", to=HALF))
        y = "narrow"
    nodes += [
        helper.make_node("Add", [y, "bias"], ["sum"], "add"),
        helper.make_node("Relu", ["sum"], ["out_sample"], "act"),
    ]
    image = [batch, 4, 8, 8]
    inputs = [
        helper.make_tensor_value_info("sample", HALF, image),
        helper.make_tensor_value_info("timestep", FLOAT, [1, 1]),
    ]
    outputs = [helper.make_tensor_value_info("out_sample", HALF, image)]
    return save(path, nodes, inputs, outputs, weights, external=external)


def two_inputs(path: Path, first: list[int | str], second: list[int | str]) -> Path:
    """`a` + `b`, of these shapes."""
    inputs = [helper.make_tensor_value_info(name, HALF, shape) for name, shape in (("a", first), ("b", second))]
    nodes = [helper.make_node("Add", ["a", "b"], ["c"], "add")]
    return save(path, nodes, inputs, [helper.make_tensor_value_info("c", HALF, first)], [])


def refused(path: Path) -> Path:
    """Two things that the parser does not take: an op that it does not know, and an addition of two types."""
    nodes = [
        helper.make_node("Relu", ["a"], ["b"], "fine"),
        helper.make_node("Frobnicate", ["b"], ["c"], "odd", domain="my.ops"),
    ]
    inputs, outputs = ([helper.make_tensor_value_info(name, HALF, [1, 4])] for name in ("a", "c"))
    return save(path, nodes, inputs, outputs, [])


def mixed(path: Path) -> Path:
    """An addition of two types."""
    nodes = [helper.make_node("Add", ["a", "w"], ["b"], "odd_sum")]
    inputs, outputs = ([helper.make_tensor_value_info(name, FLOAT, [1, 4])] for name in ("a", "b"))
    return save(path, nodes, inputs, outputs, [weight("w", (1, 4))])


def save(path, nodes, inputs, outputs, weights, *, external=False) -> Path:
    """Write a model."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializer=weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("my.ops", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=16)
    else:
        onnx.save(model, path)
    return path

"""Integer weights: the levels and scales by hand, the graph's arithmetic with them, what is left alone."""

import numpy as np
import onnx_ir
import pytest

from hypersd_export.errors import OptionError
from hypersd_export.runtime.onnx import open_graph
from hypersd_export.spec import CoreMLFlags, ExportSpec
from hypersd_export.targets import Target
from hypersd_export.targets.onnx_quantize import BLOCK, check_options, quantize, to_int4, to_int8

RNG = np.random.default_rng(0)
MATRIX, GEMM = RNG.standard_normal((64, 48)), RNG.standard_normal((40, 48))
KERNEL, SMALL = RNG.standard_normal((32, 4, 3, 3)), RNG.standard_normal((40, 3))


def graph(folder, dtype=np.float32):
    """x [2, 64] → relu(x MATRIX) GEMMᵀ → SMALL; picture [1, 4, 8, 8] through KERNEL."""
    tensors = {"matrix": MATRIX, "gemm": GEMM, "small": SMALL, "kernel": KERNEL}
    x, picture = onnx_ir.Value(name="x"), onnx_ir.Value(name="picture")
    kind = onnx_ir.DataType.FLOAT if dtype is np.float32 else onnx_ir.DataType.FLOAT16
    for value, shape in ((x, (2, 64)), (picture, (1, 4, 8, 8))):
        value.shape, value.type = onnx_ir.Shape(shape), onnx_ir.TensorType(kind)
    weights = {}
    for name, array in tensors.items():
        tensor = onnx_ir.tensor(array.astype(dtype), name=name)
        weights[name] = onnx_ir.Value(
            name=name, shape=onnx_ir.Shape(tensor.shape), type=onnx_ir.TensorType(kind), const_value=tensor
        )

    def op(kind_, *inputs, **attributes):
        node = onnx_ir.node(kind_, inputs, attributes, name=f"{kind_}{len(nodes)}")
        node.outputs[0].name = f"{node.name}_out"
        nodes.append(node)
        return node.outputs[0]

    nodes = []
    hidden = op("Relu", op("MatMul", x, weights["matrix"]))
    out = op("MatMul", op("Gemm", hidden, weights["gemm"], transB=1), weights["small"])
    image = op("Conv", picture, weights["kernel"], pads=[1, 1, 1, 1])
    for value, shape in ((out, (2, 3)), (image, (1, 32, 8, 8))):
        value.shape, value.type = onnx_ir.Shape(shape), onnx_ir.TensorType(kind)
    made = onnx_ir.Graph(
        [x, picture], [out, image], nodes=nodes, initializers=list(weights.values()), opset_imports={"": 21}, name="g"
    )
    return onnx_ir.Model(made, ir_version=10)


def evaluated(model, path):
    onnx_ir.save(model, path)
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((2, 64)), "picture": rng.standard_normal((1, 4, 8, 8))}
    return list(open_graph(path, threads=1).run(**feeds).values()), feeds


def test_int8_has_a_scale_for_each_output():
    levels, scale = to_int8(MATRIX, 1)
    assert (levels.shape, scale.shape) == (MATRIX.shape, (48,))
    np.testing.assert_allclose(scale, np.abs(MATRIX).max(axis=0) / 127, rtol=1e-6)
    assert np.abs(levels).max(axis=0).min() == 127
    assert np.abs(levels * scale - MATRIX).max() <= scale.max() / 2 + 1e-6
    levels, scale = to_int8(KERNEL, 0)
    np.testing.assert_allclose(scale, np.abs(KERNEL).max(axis=(1, 2, 3)) / 127, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_int4_has_a_scale_for_each_block_of_inputs(axis):
    weight = MATRIX if axis == 0 else MATRIX.T
    levels, scale = to_int4(weight, axis)
    assert scale.shape == ((2, 48) if axis == 0 else (48, 2))
    assert set(np.unique(levels)) <= set(range(-7, 8))
    again = levels * np.repeat(scale, BLOCK, axis=axis)
    assert np.all(np.abs(again - weight) <= np.repeat(scale, BLOCK, axis=axis) / 2 + 1e-6)


def test_zeros_stay_zeros():
    levels, scale = to_int8(np.zeros((4, 4)), 1)
    assert not levels.any()
    np.testing.assert_array_equal(scale, 1.0)


@pytest.mark.parametrize(
    ("kind", "dtype", "decibels"), [("int8", np.float32, 38), ("int8", np.float16, 38), ("int4", np.float32, 14)]
)
def test_the_graph_computes_with_the_weights_that_it_stores(kind, dtype, decibels, tmp_path):
    plain, feeds = evaluated(graph(tmp_path, dtype), tmp_path / "plain.onnx")
    model = graph(tmp_path, dtype)
    noted = quantize(model, kind)
    assert (noted["kind"], noted["weights"]) == (kind, 3)  # not the one that is small
    found, _ = evaluated(model, tmp_path / "model.onnx")
    for mine, exact in zip(found, plain, strict=True):
        error = np.square(mine.astype(float) - exact).mean() / np.square(exact.astype(float)).mean()
        assert -10 * np.log10(error) > decibels
        assert mine.dtype == exact.dtype == dtype
    # the same by hand
    if dtype is np.float32:
        levels, scale = to_int8(MATRIX, 1) if kind == "int8" else to_int4(MATRIX, 0)
        matrix = levels * (scale if kind == "int8" else np.repeat(scale, BLOCK, axis=0))
        levels, scale = to_int8(GEMM, 0)  # 48 inputs are no whole blocks of 32
        hidden = np.maximum(feeds["x"] @ matrix, 0) @ (levels * scale[:, None]).T
        np.testing.assert_allclose(found[0], hidden @ SMALL, rtol=2e-3, atol=2e-2)


def test_the_file_is_smaller(tmp_path):
    model = graph(tmp_path)
    noted = quantize(model, "int8")
    stored = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert noted["bytes_before"] == 4 * (MATRIX.size + GEMM.size + KERNEL.size)
    assert noted["bytes"] == sum(t.nbytes for name, t in stored.items() if name != "small")
    assert noted["bytes"] < 0.29 * noted["bytes_before"]
    assert stored["matrix.quantized"].dtype == onnx_ir.DataType.INT8


def test_a_weight_with_two_kinds_of_use_is_left_alone(tmp_path):
    model = graph(tmp_path)
    weight = model.graph.initializers["matrix"]
    other = onnx_ir.node("Transpose", [weight], name="other")
    other.outputs[0].name = "other_out"
    model.graph.append(other)
    assert quantize(model, "int8")["weights"] == 2
    assert "matrix" in model.graph.initializers


def test_options():
    with pytest.raises(OptionError, match="--quantize int5: choose one of int8, int4"):
        check_options("int5", opset=20)
    with pytest.raises(OptionError, match=r"--quantize int4 with --opset 20: .*add --opset 21"):
        ExportSpec(quantize="int4")
    ExportSpec(quantize="int4", opset=21)
    with pytest.raises(OptionError, match="--quantize int8: it is about --target onnx and coreml"):
        ExportSpec(quantize="int8", targets=(Target.TENSORRT,))
    ExportSpec(quantize="int8", targets=(Target.ONNX, Target.COREML), coreml=CoreMLFlags(quantize="int8"))

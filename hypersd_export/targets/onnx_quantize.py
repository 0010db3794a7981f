"""Integer weights in ONNX graphs: `quantize` stores the matrices and kernels as int8, or the matrices as int4.

    w ≈ scale · q,   q a whole number in [-127, 127] or [-7, 7],   scale = largest |w| / 127 or / 7

One scale an output channel for int8, one for each 32 inputs of an output for int4: symmetric, no zero point, by
rounding to nearest. The graph keeps its arithmetic: DequantizeLinear (portable: ONNX's own, int4 from opset 21) gives
the weight back in the type that it had. Biases, norms and embeddings stay as they are. onnx_ir is imported inside.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hypersd_export.errors import OptionError
from hypersd_export.targets import onnx

if TYPE_CHECKING:
    import onnx_ir

KINDS = ("int8", "int4")
BLOCK = 32
"""How many weights of int4 share a scale, as onnxruntime's MatMulNBits and Core ML's blocks have it too."""
INT4_OPSET = 21
SMALLEST = 1024
"""Weights with fewer elements are kept: nothing is gained."""


def check_options(kind: str | None, *, opset: int) -> None:
    """`OptionError` for a kind that there is not, or that the opset cannot store."""
    if kind is None:
        return
    if kind not in KINDS:
        raise OptionError(f"--quantize {kind}: choose one of {', '.join(KINDS)}")
    if kind == "int4" and opset < INT4_OPSET:
        raise OptionError(f"--quantize int4 with --opset {opset}: 4-bit weights need {INT4_OPSET}; add --opset 21")


def quantize(model: "onnx_ir.Model", kind: str) -> dict[str, Any]:
    """Change a model in place; returns how many weights are integers, of how many bytes before and after."""
    import onnx_ir

    graph, counts = model.graph, {"weights": 0, "bytes": 0, "bytes_before": 0}
    place = {node: number for number, node in enumerate(graph)}
    for weight, out_axis in list(_weights(model)):
        array = weight.const_value.numpy()
        in_axis = 1 - out_axis
        block = BLOCK if kind == "int4" and array.ndim == 2 and array.shape[in_axis] % BLOCK == 0 else None
        levels, scale = to_int4(array, in_axis) if block else to_int8(array, out_axis)
        dtype = onnx_ir.DataType.INT4 if block else onnx_ir.DataType.INT8
        stored, scales = (
            onnx.add_initializer(graph, f"{weight.name}.{what}", tensor)
            for what, tensor in (
                ("quantized", onnx_ir.tensor(levels, dtype=dtype)),
                ("scale", onnx_ir.tensor(scale.astype(array.dtype))),
            )
        )
        attributes = {"axis": in_axis, "block_size": block} if block else {"axis": out_axis}
        node = onnx_ir.node(
            "DequantizeLinear", [stored, scales], attributes, name=f"dequantize.{weight.name}"
        )  # fmt: skip
        node.outputs[0].name = f"{weight.name}.dequantized"
        node.outputs[0].dtype, node.outputs[0].shape = weight.dtype, weight.shape
        users = [user for user, _ in weight.uses()]
        graph.insert_before(min(users, key=lambda user: place[user]), node)
        weight.replace_all_uses_with(node.outputs[0])
        del graph.initializers[weight.name]
        counts["weights"] += 1
        counts["bytes_before"] += array.nbytes
        counts["bytes"] += stored.const_value.nbytes + scales.const_value.nbytes
    return {"kind": kind, **counts}


def _weights(model: "onnx_ir.Model") -> "Iterator[tuple[onnx_ir.Value, int]]":
    """The weights that are worth it, and the axis of their outputs."""
    for value in model.graph.initializers.values():
        tensor, uses = value.const_value, list(value.uses())
        if tensor is None or not uses or tensor.size < SMALLEST or not tensor.dtype.is_floating_point():
            continue
        axes = {_out_axis(node, index) for node, index in uses}
        axis = axes.pop()
        if axis is not None and not axes and len(tensor.shape) >= 2:
            yield value, axis


def _out_axis(node: "onnx_ir.Node", index: int) -> int | None:
    """The axis of a weight's outputs where it is the weight of a node that has one, else None."""
    if index != 1:
        return None
    if node.op_type == "Gemm":
        transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
        return 0 if transposed else 1
    return {"Conv": 0, "MatMul": 1}.get(node.op_type)


def to_int8(weight: npt.NDArray[Any], out_axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Whole numbers of the weight's shape, and a scale [outputs]."""
    others = tuple(axis for axis in range(weight.ndim) if axis != out_axis)
    levels, scale = _round(weight, np.abs(weight).max(axis=others, keepdims=True), 127)
    return levels, scale.reshape(-1)


def to_int4(weight: npt.NDArray[Any], in_axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Whole numbers of the matrix's shape (int8 that fit into 4 bits), and a scale for each `BLOCK` along `in_axis`."""
    rows, columns = weight.shape
    shape = (rows // BLOCK, BLOCK, columns) if in_axis == 0 else (rows, columns // BLOCK, BLOCK)
    blocks = weight.reshape(shape)
    levels, scale = _round(blocks, np.abs(blocks).max(axis=1 + in_axis, keepdims=True), 7)
    return levels.reshape(weight.shape), scale.squeeze(1 + in_axis)


def _round(
    weight: npt.NDArray[Any], largest: npt.NDArray[Any], top: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Levels from -top to top, and the scales; all zeros have a scale of 1."""
    scale = (largest.astype(np.float32) / np.float32(top)).astype(weight.dtype).astype(np.float32)  # as it is stored
    scale = np.where(scale > 0, scale, np.float32(1))
    levels = np.clip(np.rint(weight.astype(np.float32) / scale), -top, top)
    return levels.astype(np.int8), scale

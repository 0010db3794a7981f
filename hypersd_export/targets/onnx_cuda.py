"""onnxruntime's own CUDA ops in an ONNX graph, in place of the ops that they stand for; such a graph runs nowhere else.

    GroupNorm            Reshape, InstanceNormalization, Reshape, Mul, Add [, Sigmoid, Mul], between two Transposes
    MultiHeadAttention   what lies between the projections of queries, keys and values and the one of the output

Both are domain com.microsoft, version 1 (onnxruntime's docs/ContribOperators.md). GroupNorm's kernel wants
[N, H, W, C] with gamma and beta in float32; the Transposes meet those that onnxruntime puts around convolutions under
`prefer_nhwc`. A group is then reduced by many blocks at once, where InstanceNormalization's rows have one each. What
does not look exactly as `targets.onnx` writes it (a mask, an op kept in float32, free axes) stays. onnx_ir is imported
inside.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hypersd_export.targets import onnx, onnx_cpu
from hypersd_export.targets.onnx_match import constant, dims, maker, only_user, replace

if TYPE_CHECKING:
    import onnx_ir

DOMAIN = "com.microsoft"
WIDEST_HEAD = 256
"""Beyond it onnxruntime has no flash attention; the VAE's one head of 512 stays as it is."""
_TO_NHWC, _TO_NCHW, _HEADS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2], [0, 2, 1, 3]


def fuse(model: "onnx_ir.Model", kept: Collection[str] = ()) -> dict[str, int]:
    """Change a model with typed values (`onnx_fp16.read`) in place; returns how many of each op it has now.

    `kept`: the nodes that a range scan keeps in float32.
    """
    from onnx_ir.passes import common

    onnx_cpu.undo(model, kept)
    nodes = list(model.graph)
    counts = {
        "GroupNorm": sum(_group_norm(model.graph, node) for node in nodes if node.op_type == "InstanceNormalization"),
        "MultiHeadAttention": sum(_attention(model.graph, node) for node in nodes if node.op_type == "Softmax"),
    }
    if any(counts.values()):
        model.opset_imports[DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
    return counts


def _group_norm(graph: "onnx_ir.Graph", norm: "onnx_ir.Node") -> bool:
    """Replace the group norm around an InstanceNormalization, and the SiLU behind it; False if it is another thing."""
    import onnx_ir

    flat, back = maker(norm.inputs[0], "Reshape"), only_user(norm.outputs[0], "Reshape")
    ones, zeros = (constant(value) for value in norm.inputs[1:])
    if flat is None or back is None or ones is None or zeros is None:
        return False
    x, scaled = flat.inputs[0], only_user(back.outputs[0], "Mul")
    shifted = None if scaled is None else only_user(scaled.outputs[0], "Add")
    shape = dims(x)
    if shifted is None or len(shape) != 4 or dims(back.outputs[0]) != shape or dims(norm.inputs[0])[1] != ones.size:
        return False
    assert scaled is not None
    gamma, beta = (constant(_other(node, before)) for node, before in ((scaled, back), (shifted, scaled)))
    if not (np.all(ones == 1) and np.all(zeros == 0) and _per_channel(gamma, shape) and _per_channel(beta, shape)):
        return False
    silu = _silu(shifted)
    last = silu or shifted
    if last.outputs[0].is_graph_output():
        return False
    affine = [
        onnx.add_initializer(graph, f"{norm.name}.{name}", onnx_ir.tensor(np.asarray(value, np.float32).reshape(-1)))
        for name, value in (("gamma", gamma), ("beta", beta))
    ]
    attributes = {
        "epsilon": norm.attributes["epsilon"].as_float(), "groups": int(ones.size),
        "activation": int(silu is not None), "channels_last": 1,
    }  # fmt: skip
    last_channel = onnx_ir.node("Transpose", [x], {"perm": _TO_NHWC}, name=f"{norm.name}.nhwc")
    fused = onnx_ir.node(
        "GroupNorm", [last_channel.outputs[0], *affine], attributes, domain=DOMAIN, name=f"{norm.name}.fused"
    )
    first_channel = onnx_ir.node("Transpose", [fused.outputs[0]], {"perm": _TO_NCHW}, name=f"{norm.name}.nchw")
    replace(graph, last, [last_channel, fused, first_channel])
    return True


def _silu(node: "onnx_ir.Node") -> "onnx_ir.Node | None":
    """The Mul of x · sigmoid(x), if that is all that takes a node's output x."""
    x = node.outputs[0]
    users = {user.op_type: user for user, _ in x.uses()}
    if len(x.uses()) != 2 or set(users) != {"Sigmoid", "Mul"} or x.is_graph_output():
        return None
    product = users["Mul"]
    return product if only_user(users["Sigmoid"].outputs[0], "Mul") is product else None


def _attention(graph: "onnx_ir.Graph", softmax: "onnx_ir.Node") -> bool:
    """Replace the attention around a Softmax; False if it is another thing."""
    import onnx_ir

    scores, product = maker(softmax.inputs[0], "MatMul"), only_user(softmax.outputs[0], "MatMul")
    if scores is None or product is None or product.inputs[0] is not softmax.outputs[0]:
        return False
    queries, keys = _scaled(scores.inputs[0]), _scaled(scores.inputs[1])
    if queries is None or keys is None:
        return False
    q, k, v = _states(queries[0]), _states(_untransposed(keys[0])), _states(product.inputs[1])
    joined = only_user(product.outputs[0], "Transpose")
    last = None if joined is None or _perm(joined) != _HEADS_FIRST else only_user(joined.outputs[0], "Reshape")
    if q is None or k is None or v is None or last is None or last.outputs[0].is_graph_output():
        return False
    heads, width = dims(queries[0])[1], dims(queries[0])[3]
    if not isinstance(heads, int) or not isinstance(width, int) or width > WIDEST_HEAD:
        return False
    if any(len(dims(states)) != 3 for states in (q, k, v)) or dims(last.outputs[0]) != dims(q):
        return False
    fused = onnx_ir.node(
        "MultiHeadAttention", [q, k, v], {"num_heads": heads, "scale": queries[1] * keys[1]}, domain=DOMAIN,
        name=f"{softmax.name}.fused",
    )  # fmt: skip
    replace(graph, last, [fused])
    return True


def _scaled(value: "onnx_ir.Value | None") -> "tuple[onnx_ir.Value, float] | None":
    """What is multiplied by a constant number, and the number."""
    node = maker(value, "Mul")
    if node is None:
        return None
    for number, other in (node.inputs, node.inputs[::-1]):
        scale = constant(number)
        if scale is not None and scale.size == 1 and other is not None:
            return other, float(scale.reshape(()))
    return None


def _untransposed(value: "onnx_ir.Value | None") -> "onnx_ir.Value | None":
    """Keys [B, h, T, d] of keys [B, h, d, T], which the exporter turns with both leading axes as one."""
    back = maker(value, "Reshape")
    turned = None if back is None else maker(back.inputs[0], "Transpose")
    flat = None if turned is None or _perm(turned) != [0, 2, 1] else maker(turned.inputs[0], "Reshape")
    return None if flat is None else flat.inputs[0]


def _states(value: "onnx_ir.Value | None") -> "onnx_ir.Value | None":
    """States [B, S, h · d] of a value [B, h, S, d] that is one head after the other of them."""
    turned = maker(value, "Transpose")
    apart = None if turned is None or _perm(turned) != _HEADS_FIRST else maker(turned.inputs[0], "Reshape")
    return None if apart is None else apart.inputs[0]


def _other(node: "onnx_ir.Node", before: "onnx_ir.Node") -> "onnx_ir.Value | None":
    """The input of a node of two that another node does not make."""
    return next((value for value in node.inputs if value is not before.outputs[0]), None)


def _per_channel(array: "npt.NDArray[Any] | None", shape: Sequence[Any]) -> bool:
    """Whether an array has an element a channel of [N, C, H, W]."""
    return array is not None and array.ndim >= 3 and array.shape[-3:] == (shape[1], 1, 1) and array.size == shape[1]


def _perm(node: "onnx_ir.Node") -> list[int]:
    return list(node.attributes["perm"].as_ints())

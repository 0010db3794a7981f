"""What onnxruntime's CPU provider computes faster in another layout, in the same portable ops; the values are the same.

Long attention      softmax(Q Kᵀ) V by blocks of queries, as every row of scores is normalised by itself. The scores of
                    SD 1.5's 4096 latents are 537 MB, which go through memory three times where they are one matrix;
                    those of a block stay in the cache.
Gated projections   GEGLU's [a, b] = x W + c by two products where one was split: onnxruntime copies with one thread.
Softmax in float32  It has no kernel for half there: what it runs instead are five ops (`WIDE`, of fp16 graphs).

Providers of devices, and TensorRT, know attention by its whole pattern and fuse it: theirs are not laid out so
(`job.Job.for_cpu`), and `undo` makes it whole again. onnx_ir is imported inside.
"""

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from hypersd_export.targets import onnx
from hypersd_export.targets.onnx_match import constant, dims, maker, only_user, replace

if TYPE_CHECKING:
    import onnx_ir

BLOCK_BYTES = 2**24
"""Of a block's scores in float32, at most; from 4 to 34 MB no difference showed (docs/log.md)."""
MOST_BLOCKS = 64
"""Of one attention: each is three more nodes."""
WIDE = ("Softmax",)
"""Ops that fp16 graphs have in float32."""


def lay_out(model: "onnx_ir.Model") -> dict[str, int]:
    """Change a model whose values have types and shapes in place; returns how many layers of each kind it found."""
    nodes = list(model.graph)
    return {
        "attention in blocks": sum(_block(model.graph, node) for node in nodes if node.op_type == "Softmax"),
        "gates by themselves": sum(_halve(model.graph, node) for node in nodes if node.op_type == "Split"),
    }


def undo(model: "onnx_ir.Model", kept: Collection[str] = ()) -> int:
    """Make attention that was laid out so whole again and half, in place; returns how much was apart.

    `kept`: the nodes that have to stay in float32, as what they handle is beyond half.
    """
    for node in list(model.graph):
        if node.op_type in WIDE and node.name not in kept:
            _narrow(model.graph, node)
    return sum(_join(model.graph, node) for node in list(model.graph) if node.op_type == "Concat")


def blocks_of(scores: list[int]) -> list[int]:
    """How many queries each block has, of scores [..., S, T]; all but the last as many."""
    queries, count = scores[-2], 1
    while count < min(MOST_BLOCKS, queries) and 4 * math.prod(scores) > count * BLOCK_BYTES:
        count *= 2
    size = -(-queries // count)
    return [min(size, queries - start) for start in range(0, queries, size)]


def _block(graph: "onnx_ir.Graph", softmax: "onnx_ir.Node") -> bool:
    """Take the attention around a Softmax apart; False if it is short, or another thing."""
    import onnx_ir

    scores, product = maker(softmax.inputs[0], "MatMul"), only_user(softmax.outputs[0], "MatMul")
    if scores is None or product is None or product.inputs[0] is not softmax.outputs[0]:
        return False
    if product.outputs[0].is_graph_output():
        return False
    shape = dims(scores.outputs[0])
    if len(shape) < 3 or not all(isinstance(axis, int) for axis in shape) or not _is_attention(scores, softmax):
        return False
    sizes, axis = blocks_of(shape), len(shape) - 2
    if len(sizes) == 1:
        return False
    queries, keys = scores.inputs
    name = f"{softmax.name}.blocks"
    lengths = onnx.add_initializer(graph, f"{name}.sizes", onnx_ir.tensor(np.asarray(sizes, np.int64)))
    split = onnx_ir.node("Split", [queries, lengths], {"axis": axis}, num_outputs=len(sizes), name=f"{name}.split")
    nodes, given = [split], []
    for number, (block, size) in enumerate(zip(split.outputs, sizes, strict=True)):
        block.name, block.dtype, block.shape = f"{name}.{number}.queries", softmax.outputs[0].dtype, None
        one = onnx_ir.node("MatMul", [block, keys], name=f"{name}.{number}.scores")
        two = onnx_ir.node("Softmax", one.outputs, {"axis": -1}, name=f"{name}.{number}.weights")
        three = onnx_ir.node("MatMul", [two.outputs[0], product.inputs[1]], name=f"{name}.{number}.values")
        for node in (one, two, three):
            node.outputs[0].dtype = softmax.outputs[0].dtype
        for node in (one, two):
            node.outputs[0].shape = onnx_ir.Shape([*shape[:axis], size, shape[-1]])
        nodes += [one, two, three]
        given.append(three.outputs[0])
    replace(graph, product, [*nodes, onnx_ir.node("Concat", given, {"axis": axis}, name=name)])
    graph.remove([product, softmax, scores], safe=True)
    return True


def _is_attention(scores: "onnx_ir.Node", softmax: "onnx_ir.Node") -> bool:
    """Whether the last axis is normalised, and the scores are nothing else's."""
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    last = axis in (-1, len(dims(scores.outputs[0])) - 1)
    return last and only_user(scores.outputs[0], "Softmax") is softmax


def _narrow(graph: "onnx_ir.Graph", node: "onnx_ir.Node") -> None:
    """Compute a node in half that takes half and gives half by a Cast each."""
    import onnx_ir

    up, down = maker(node.inputs[0], "Cast"), only_user(node.outputs[0], "Cast")
    source = None if up is None else up.inputs[0]
    if source is None or down is None or not source.dtype == down.outputs[0].dtype == onnx_ir.DataType.FLOAT16:
        return
    node.replace_input_with(0, source)
    node.outputs[0].dtype = source.dtype
    down.outputs[0].replace_all_uses_with(node.outputs[0])
    graph.remove(down, safe=True)
    if up is not None and not up.outputs[0].uses():
        graph.remove(up, safe=True)


def _join(graph: "onnx_ir.Graph", concat: "onnx_ir.Node") -> bool:
    """Make the attention whole whose blocks a Concat joins; False if it joins other things."""
    import onnx_ir

    blocks = []
    for value in concat.inputs:
        product = maker(value, "MatMul")
        softmax = None if product is None else maker(product.inputs[0], "Softmax")
        scores = None if softmax is None else maker(softmax.inputs[0], "MatMul")
        split = None if scores is None else maker(scores.inputs[0], "Split")
        if product is None or softmax is None or scores is None or split is None:
            return False
        blocks.append((split, scores, softmax, product))
    split, scores, softmax, product = blocks[0]
    alike = {(one, two.inputs[1], four.inputs[1]) for one, two, _, four in blocks}
    if len(alike) > 1 or [two.inputs[0] for _, two, _, _ in blocks] != list(split.outputs):
        return False
    name = softmax.name
    whole = onnx_ir.node("MatMul", [split.inputs[0], scores.inputs[1]], name=f"{name}.whole.scores")
    weights = onnx_ir.node("Softmax", whole.outputs, {"axis": -1}, name=f"{name}.whole.weights")
    values = onnx_ir.node("MatMul", [weights.outputs[0], product.inputs[1]], name=f"{name}.whole.values")
    for node in (whole, weights):
        node.outputs[0].dtype = softmax.outputs[0].dtype
    replace(graph, concat, [whole, weights, values])
    parts = [node for block in blocks for node in block[1:][::-1]]
    graph.remove([concat, *parts, split], safe=True)
    return True


def _halve(graph: "onnx_ir.Graph", split: "onnx_ir.Node") -> bool:
    """Compute what a Split takes apart by a product each; False if no layer with weights of its own makes it."""
    import onnx_ir

    total = split.inputs[0]
    added = maker(total, "Add")
    if len(split.outputs) != 2 or added is None or total is None or only_user(total, "Split") is None:
        return False
    sides = [(maker(value, "MatMul"), other) for value, other in (added.inputs, added.inputs[::-1])]
    product, bias = next((side for side in sides if side[0] is not None), (None, None))
    if product is None or only_user(product.outputs[0], "Add") is None:
        return False
    w, c = constant(product.inputs[1]), constant(bias)
    if w is None or c is None or w.ndim != 2 or c.shape != (w.shape[1],) or w.shape[1] % 2:
        return False
    axis, width = split.attributes["axis"].as_int(), w.shape[1] // 2
    shapes = [dims(value) for value in split.outputs]
    if axis not in (-1, len(shapes[0]) - 1) or [shape[-1] for shape in shapes if shape] != [width, width]:
        return False
    if any(len(value.uses()) > 1 for value in (product.inputs[1], bias) if value is not None):
        return False
    for number, old in enumerate(split.outputs):
        name, columns = f"{split.name}.{number}", slice(number * width, (number + 1) * width)
        half = onnx.add_initializer(graph, f"{name}.weight", onnx_ir.tensor(w[:, columns]))
        shift = onnx.add_initializer(graph, f"{name}.bias", onnx_ir.tensor(c[columns]))
        times = onnx_ir.node("MatMul", [product.inputs[0], half], name=f"{name}.product")
        plus = onnx_ir.node("Add", [times.outputs[0], shift], name=f"{name}.sum")
        for value, node in ((times.outputs[0], times), (plus.outputs[0], plus)):
            value.name, value.shape, value.type = f"{node.name}.out", old.shape, old.type
        graph.insert_before(split, [times, plus])
        old.replace_all_uses_with(plus.outputs[0])
    weights = [value for value in (product.inputs[1], bias) if value is not None]
    graph.remove([split, added, product], safe=True)
    for value in weights:
        del graph.initializers[str(value.name)]
    return True

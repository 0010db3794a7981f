"""What rewriters of ONNX graphs ask of a node or a value."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    import onnx_ir


def maker(value: "onnx_ir.Value | None", op: str) -> "onnx_ir.Node | None":
    """The node that makes a value, if it is of this op."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op and node.domain == "" else None


def only_user(value: "onnx_ir.Value", op: str) -> "onnx_ir.Node | None":
    """The node that takes a value, if it is of this op and nothing else takes it."""
    users = [user for user, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op and not value.is_graph_output() else None


def constant(value: "onnx_ir.Value | None") -> "npt.NDArray[Any] | None":
    """An initialiser's array."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    array: npt.NDArray[Any] = value.const_value.numpy()
    return array


def dims(value: "onnx_ir.Value | None") -> list[Any]:
    """The axes of a value, each a number or a name; [] where they are not known."""
    shape = None if value is None else value.shape
    return [] if shape is None else [axis if isinstance(axis, int) else str(axis) for axis in shape]


def replace(graph: "onnx_ir.Graph", last: "onnx_ir.Node", nodes: "Sequence[onnx_ir.Node]") -> None:
    """Put nodes where `last` is, the last of them in its place; each one's first output is named after it."""
    old, new = last.outputs[0], nodes[-1].outputs[0]
    for node in nodes:
        node.outputs[0].name = node.outputs[0].name or f"{node.name}.out"
    new.shape, new.type = old.shape, old.type
    graph.insert_after(last, nodes)
    old.replace_all_uses_with(new)

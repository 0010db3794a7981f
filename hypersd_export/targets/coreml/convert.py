"""A graph as a Core ML package: torch.export, then coremltools' converter, then bytes that do not change.

`torch.jit.trace`, the converter's older way in, fails in an `int` op with this torch. Inputs and outputs are float32
(ids int32) at either precision, so that who calls has no half precision to make.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export.graphs.spec import Graph
from hypersd_export.targets.coreml import package, vendor

if TYPE_CHECKING:
    from torch.export import ExportedProgram

TIMESTEP = "timestep"
TIME_IDS = "time_ids"
"""SDXL's numbers of the picture's size, which go through sines and cosines as the timestep does."""
_WEIGHTED = frozenset({"linear", "matmul", "conv"})
"""The ops that end the time embedding's sines and cosines: from the first of them on, half will do."""


def build(
    graph: Graph, path: Path, *, precision: str, deployment_target: str, picture: str | None = None
) -> dict[str, Any]:
    """Write `graph` as the package `path` and return what the manifest says about it.

    graph: its module in float32, its inputs named as the arguments of its `forward`, the timestep of shape [1] or more.
    precision: "fp16" (with the angles of the time embedding in float32) or "fp32". picture: the output that is an RGB
    image [1, 3, H, W] of values from 0 to 255, if the graph is a whole pipeline; what joins its parts is then in
    float32 too, as in every runtime.

    Raises `BuildError` for a graph that the converter refuses, `MissingBackend` without coremltools.
    """
    program = exported(graph)
    kept_ops = Float32(() if picture is None else own_ops(program))
    model = vendor.convert(
        program, outputs=graph.output_names, deployment_target=deployment_target, precision=precision,
        keeps_float32=kept_ops, picture=picture,
    )  # fmt: skip
    package.save(model, path)
    kept = {"float32_ops": kept_ops.kept} if precision == "fp16" else {}
    return {"precision": precision, **kept, **package.facts(path)}


def plain(graph: Graph) -> Graph:
    """The graph with Optimum's names and shapes, but for the timestep: Core ML has no scalars, so that it is [1]."""
    inputs = {name: value.reshape(1) if name == TIMESTEP else value for name, value in graph.inputs.items()}
    return dataclasses.replace(graph, inputs=inputs)


def exported(graph: Graph) -> "ExportedProgram":
    """The graph as torch.export has it, with its ops as they are called and without `alias`, which Core ML lacks."""
    import torch

    with torch.no_grad():
        program = torch.export.export(graph.module.eval(), (), dict(graph.inputs)).run_decompositions({})
    assert program.graph_signature.user_inputs == tuple(graph.inputs), "inputs are named as the module's arguments"
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    return program


def own_ops(program: "ExportedProgram") -> set[str]:
    """The names of the ops that the graph's module calls itself, not in one of its parts."""
    return {
        node.name
        for node in program.graph.nodes
        if node.op == "call_function" and len(node.meta.get("nn_module_stack", ())) == 1
    }


class Float32:
    """Says of each MIL op, asked in the program's order, whether it stays in float32.

    Those do that make the time embedding's sines and cosines, as their angles go up to 999, where half steps by 0.5:
    they are behind the inputs `timestep` and `time_ids` and before the first op with weights. And those of `names`.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self.kept: list[str] = []
        """The names of the ops for which it was true."""
        self._values = {TIMESTEP, TIME_IDS}
        self._names = frozenset(names)

    def __call__(self, op: Any) -> bool:
        """Whether `op` stays in float32."""
        if op.name in self._names:
            self.kept.append(op.name)
            return True
        if op.op_type in _WEIGHTED or self._values.isdisjoint(_names(op.inputs.values())):
            return False
        self._values.update(output.name for output in op.outputs)
        self.kept.append(op.name)
        return True


def _names(inputs: Any) -> "list[str]":
    values = [value for each in inputs for value in (each if isinstance(each, list | tuple) else (each,))]
    return [value.name for value in values]

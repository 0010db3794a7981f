"""A graph of fixed shapes as an `ExportedProgram` for torch.onnx, from one run of its Python.

`torch.export.export` and the `run_decompositions` of torch.onnx run a network's Python several times, as they allow for
symbolic shapes, for changes in place and for gradients: of the 27 s that SD 1.5's UNet took to become an ONNX graph,
they were 15. Our graphs have none of these, and torch.onnx translates their ops as they are called, so that one run of
`make_fx` on fake tensors gives the same graph. What it cannot trace is refused, for torch.export to do.
This file owns its torch import.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx

from hypersd_export.graphs.spec import Graph

_ATEN = torch.ops.aten
_COMPOSITE = (
    *(_ATEN.to.device, _ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.to.other, _ATEN.contiguous.default),
    *(_ATEN.chunk.default, _ATEN.dropout.default, _ATEN.flatten.using_ints, _ATEN.reshape.default),
)
"""Ops that torch.export always takes apart, mostly into nothing; torch.onnx has no translation of `to`."""


class TracedProgram(ExportedProgram):
    """A program of which nothing is left to take apart."""

    def run_decompositions(self, *_: Any, **__: Any) -> "TracedProgram":
        """The program itself: what torch.onnx would take apart has been, or it translates it."""
        return self


def trace_once(graph: Graph) -> TracedProgram:
    """The program of a graph without free axes; weights are its module's own, by their names there.

    Raises `RuntimeError` for what a single run on fake tensors does not show: a tensor that is changed in place, made
    of numbers in the Python code, or asked for its values.
    """
    module, inputs = graph.module.eval(), tuple(graph.inputs.values())
    weights = dict(module.named_parameters()) | dict(module.named_buffers())

    def call(values: list[torch.Tensor], arguments: list[torch.Tensor]) -> list[torch.Tensor]:
        out = torch.func.functional_call(module, dict(zip(weights, values, strict=True)), tuple(arguments))
        return list(out) if isinstance(out, tuple) else [out]

    table = {op: op.decompose for op in _COMPOSITE}
    with torch.no_grad():
        made = make_fx(call, decomposition_table=table, tracing_mode="fake", pre_dispatch=True)(
            list(weights.values()), list(inputs)
        )
    _check(graph, made.graph)
    return TracedProgram(
        root=made,
        graph=made.graph,
        graph_signature=_signature(made.graph, weights),
        state_dict=weights,
        range_constraints={},
        module_call_graph=[ModuleCallEntry(fqn="")],
        example_inputs=(inputs, {}),
    )


def _check(graph: Graph, traced: torch.fx.Graph) -> None:
    """`RuntimeError` for constants, and for ops that change their arguments."""
    for node in traced.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "get_attr" or (schema is not None and schema.is_mutable):
            raise RuntimeError(f"{graph.name}: {node.format_node()} needs torch.export")


def _signature(traced: torch.fx.Graph, weights: Mapping[str, torch.Tensor]) -> ExportGraphSignature:
    """What each placeholder is, weights first and then inputs, and what comes out."""
    holders = [TensorArgument(name=node.name) for node in traced.nodes if node.op == "placeholder"]
    specs = [
        InputSpec(kind=InputKind.PARAMETER, arg=holder, target=name)
        if isinstance(weight, torch.nn.Parameter)
        else InputSpec(kind=InputKind.BUFFER, arg=holder, target=name, persistent=True)
        for (name, weight), holder in zip(weights.items(), holders[: len(weights)], strict=True)
    ]
    specs += [InputSpec(kind=InputKind.USER_INPUT, arg=holder, target=None) for holder in holders[len(weights) :]]
    (results,) = next(node.args for node in traced.nodes if node.op == "output")
    outputs = [
        OutputSpec(kind=OutputKind.USER_OUTPUT, arg=TensorArgument(name=node.name), target=None) for node in results
    ]
    return ExportGraphSignature(input_specs=specs, output_specs=outputs)

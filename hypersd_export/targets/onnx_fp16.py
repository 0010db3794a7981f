"""fp16 ONNX: half-precision weights and arithmetic between float32 inputs and outputs, and float32 where it must be.

`build` exports a module whose weights are torch.float16, so that no float32 copy of them is ever there. `keep_float32`
moves single ops back to float32, with Casts at the rim of each region and none inside. `widen` makes the same
arithmetic visible on a CPU, where onnxruntime computes many fp16 ops in float32 anyway: every half value becomes a
float32 one, to be measured (`hypersd_export.verify.range_scan`) or rounded to half op by op (`round_to_half`). onnx_ir
is imported inside.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import ModelError
from hypersd_export.graphs.spec import Graph
from hypersd_export.model.pages import Relief
from hypersd_export.targets import onnx

if TYPE_CHECKING:
    import onnx_ir
    import torch

HALF_MAX = 65504.0
"""The largest number of fp16."""


def check_weights(module: "torch.nn.Module", what: str) -> None:
    """`ModelError` for a weight that is no number in fp16, which no choice of ops could mend."""
    import torch

    relief = Relief()
    for name, weight in module.state_dict().items():
        relief(weight)
        if weight.dtype != torch.float16 or not weight.numel():
            continue
        # Either end is NaN if any weight is. Many times as fast as isfinite, which has no vectorised kernel for half.
        if not all(end.isfinite() for end in torch.aminmax(weight)):
            raise ModelError(f"{what}: {name} is beyond fp16's {HALF_MAX:g} (or no number): use --precision fp32")


def build(
    graph: Graph,
    folder: Path,
    *,
    opset: int = onnx.DEFAULT_OPSET,
    external: bool | None = None,
    edit: "Callable[[onnx_ir.Model], object] | None" = None,
    wide: Collection[str] = (),
    also: Sequence[Path] = (),
) -> dict[str, Any]:
    """Export a graph whose module is in torch.float16; as `onnx.build`, with float32 inputs and outputs, and `wide`
    ops in float32.

    The timestep reaches the module in float32, as its sine and cosine are taken of numbers up to 999.
    """
    inputs = {name: value.float() if name == "timestep" else value for name, value in graph.inputs.items()}
    half = dataclasses.replace(graph, inputs=inputs)

    def edited(model: "onnx_ir.Model") -> None:
        if edit is not None:
            edit(model)
        keep_float32(model, {str(node.name) for node in model.graph if node.op_type in wide})

    return onnx.build(half, folder, opset=opset, precision="fp16", external=external, edit=edited, also=also)


def read(path: Path) -> "onnx_ir.Model":
    """A model with the type of every value, its weights mapped."""
    import onnx_ir
    from onnx_ir.passes import common

    model = onnx_ir.load(path)
    common.ShapeInferencePass()(model)
    return model


def keep_float32(model: "onnx_ir.Model", names: Collection[str]) -> None:
    """Compute the nodes of these names in float32, and take and give float32 at the graph's ends, in place.

    A value between two float32 nodes stays float32. Weights of float32 nodes become float32 initialisers, of the values
    that they have in fp16. The model needs the types of its values (`read`, or fresh from the exporter).
    """
    import onnx_ir

    _Widening(model, set(names)).apply()
    unused = [value for value in model.graph.initializers.values() if not value.uses() and not value.is_graph_output()]
    for value in unused:
        del model.graph.initializers[value.name]
    assert all(value.dtype != onnx_ir.DataType.FLOAT16 for value in (*model.graph.inputs, *model.graph.outputs))


def widen(model: "onnx_ir.Model") -> "list[onnx_ir.Value]":
    """Compute all in float32, in place, with weights cast as they are used; returns the values that were half."""
    half = list(half_values(model))
    _Widening(model, {node.name for node in model.graph}, cast_weights=True).apply()
    return half


def half_values(model: "onnx_ir.Model") -> "Iterator[onnx_ir.Value]":
    """The values in fp16 that nodes compute."""
    import onnx_ir

    for node in model.graph:
        yield from (value for value in node.outputs if value.dtype == onnx_ir.DataType.FLOAT16)


def round_to_half(model: "onnx_ir.Model") -> None:
    """Compute in float32 and round every value that was half to half, in place: fp16 with float32 accumulators.

    That is what GPUs and TensorRT compute, an overflow to infinity included; a CPU's onnxruntime keeps float32 from op
    to op wherever it has no fp16 kernel.
    """
    import onnx_ir

    for value in widen(model):
        node = value.producer()
        assert node is not None
        down = _cast(value, onnx_ir.DataType.FLOAT16, f"{value.name}.half")
        up = _cast(down.outputs[0], onnx_ir.DataType.FLOAT, f"{value.name}.rounded")
        for user, index in tuple(value.uses()):
            if user is not down:
                user.replace_input_with(index, up.outputs[0])
        model.graph.insert_after(node, [down, up])


def save_beside(model: "onnx_ir.Model", source: Path, folder: Path) -> Path:
    """Write a variant of `source` (a model.onnx) into `folder`, sharing its data file; returns the path."""
    import onnx_ir

    folder.mkdir(parents=True, exist_ok=True)
    data = source.with_name(onnx.DATA_FILE)
    if data.is_file():
        link = folder / onnx.DATA_FILE
        try:
            os.link(data, link)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(data, link)
    onnx_ir.save(model, folder / onnx.MODEL_FILE)
    return folder / onnx.MODEL_FILE


class _Widening:
    """Moves the nodes of some names to float32; the graph's inputs and outputs count as float32 nodes."""

    def __init__(self, model: "onnx_ir.Model", names: set[str], *, cast_weights: bool = False) -> None:
        import onnx_ir

        self._graph, self._names, self._cast_weights = model.graph, names, cast_weights
        self._half, self._float = onnx_ir.DataType.FLOAT16, onnx_ir.DataType.FLOAT
        self._taken: set[str | None] = set()
        self._place: dict[onnx_ir.Node, int] = {}

    def apply(self) -> None:
        nodes = list(self._graph)
        values = [*self._graph.inputs, *self._graph.initializers.values()]
        values += [value for node in nodes for value in node.outputs]
        self._place = {node: number for number, node in enumerate(nodes)}
        self._taken = {value.name for value in values}
        half = [value for value in values if value.dtype == self._half]
        for node in nodes:
            if node.name in self._names and node.op_type == "Cast" and node.attributes["to"].as_int() == self._half:
                self._cast_to_float(node)
        for value in half:
            producer = value.producer()
            if value.is_graph_input() or (producer is not None and producer.name in self._names):
                value.dtype = self._float
        for value in half:
            self._fit_uses(value)
        for place, value in enumerate(self._graph.outputs):
            if value.dtype == self._half:
                self._widen_output(place, value)

    def _fit_uses(self, value: "onnx_ir.Value") -> None:
        """Give each use of a value the type that it wants; one Cast serves all."""
        other: onnx_ir.Value | None = None
        for node, index in tuple(value.uses()):
            wanted = self._float if node.name in self._names else self._half
            if node.op_type == "Cast" or wanted == value.dtype:  # a Cast takes either
                continue
            other = other or self._other(value, wanted)
            node.replace_input_with(index, other)

    def _other(self, value: "onnx_ir.Value", dtype: "onnx_ir.DataType") -> "onnx_ir.Value":
        """The value in the other type: a Cast right behind it, or of a weight another weight."""
        producer = value.producer()
        if producer is not None and producer.op_type == "Cast" and dtype == self._float:
            source = producer.inputs[0]
            if source is not None and source.dtype == self._float:  # not to half and back
                return source
        name = self._free(f"{value.name}.{'float32' if dtype == self._float else 'float16'}")
        if value.is_initializer() and not self._cast_weights:
            return self._weight(value, name)
        cast = _cast(value, dtype, name)
        if producer is not None:
            self._graph.insert_after(producer, cast)
        else:  # not before it is needed: a weight in float32 takes its room for as long as it waits
            users = {node for node, _ in value.uses()} - {cast}
            self._graph.insert_before(min(users, key=lambda node: self._place.get(node, -1)), cast)
        return cast.outputs[0]

    def _free(self, name: str) -> str:
        """The name, or a longer one where that is taken: a graph may be changed more than once."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def _weight(self, value: "onnx_ir.Value", name: str) -> "onnx_ir.Value":
        import numpy as np
        import onnx_ir

        assert value.const_value is not None
        tensor = onnx_ir.tensor(value.const_value.numpy().astype(np.float32))
        return onnx.add_initializer(self._graph, name, tensor)

    def _widen_output(self, place: int, value: "onnx_ir.Value") -> None:
        """The output keeps its name; what was it gets another."""
        name, producer = value.name, value.producer()
        assert name is not None
        assert producer is not None, f"{name}: an output that is computed"
        value.name = self._free(f"{name}.float16")
        cast = _cast(value, self._float, name)
        cast.outputs[0].shape = value.shape
        self._graph.insert_after(producer, cast)
        self._graph.outputs[place] = cast.outputs[0]

    def _cast_to_float(self, node: "onnx_ir.Node") -> None:
        import onnx_ir

        node.attributes["to"] = onnx_ir.AttrInt64("to", int(self._float))


def _cast(value: "onnx_ir.Value", dtype: "onnx_ir.DataType", name: str) -> "onnx_ir.Node":
    import onnx_ir

    node = onnx_ir.node("Cast", [value], {"to": int(dtype)}, name=f"cast.{name}")
    node.outputs[0].name, node.outputs[0].dtype = name, dtype
    return node

"""What can be checked of an engine's build without a GPU: the ONNX parser's errors, the parsed network, the profile.

A network is read into plain `Layer`s first, so that the rules are about data. TensorRT and RTX build in strongly typed
mode: what a layer's output is in the network is what the engine computes.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_export.bundle.engines import EngineTensor
from hypersd_export.errors import BuildError, OptionError

Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""The least, usual and largest shape of each input with a free dimension."""

MOVING = frozenset({
    "ASSERTION", "CAST", "CONCATENATION", "CONDITION", "CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT", "CONSTANT", "GATHER",
    "IDENTITY", "ITERATOR", "LOOP_OUTPUT", "RECURRENCE", "SELECT", "SHAPE", "SHUFFLE", "SLICE", "SQUEEZE", "TRIP_LIMIT",
    "UNSQUEEZE",
})  # fmt: skip
"""Kinds of layers that move numbers and compute none: these may be float32 wherever they stand."""
TRIGONOMETRIC = ("Sin", "Cos")
NUMPY_NAMES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "INT8": "int8",
    "UINT8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""TensorRT's types by NumPy's names."""
_LISTED = 4
_NOISE = re.compile(r"cudaError|^Invalid Node - |^\[\d+\] Invalid Node")
_USAGE = re.compile(r"Error Code \d+: [\w ]+ \((?:[\w/.]+: )?(.*?)(?: In \w+ at \S+)?\)$")
_ASSERTED = re.compile(r"\w+ && \"(.*)\"")
"""The two forms in which the parser wraps a reason: a call that failed, an assertion with a message."""
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A layer of a parsed network: TensorRT's kind, the ONNX node that it came from ("" for a constant), its tensors by
    name, and of each output the type and the count of its elements (0 where a dimension is free)."""

    name: str
    kind: str
    node: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    size: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxFacts:
    """Of an ONNX file without its weights: inputs, outputs, names of their free dimensions, the ops of its nodes."""

    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    symbols: Mapping[str, tuple[str, ...]]
    """By input, a name for each dimension: "" where it is fixed. What has no name of its own is named by its axis."""
    ops: Mapping[str, str]
    """By node name, those in bodies of loops too."""


def read_onnx(path: Path) -> OnnxFacts:
    """The facts of an ONNX file; `BuildError` if it cannot be read."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own, which is no common class
        raise BuildError(f"{path} is no ONNX file that can be read ({str(error)[:80]}): export again") from error
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    symbols = {
        value.name: tuple(
            "" if dim.HasField("dim_value") else dim.dim_param or f"axis {axis}"
            for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        )
        for value in inputs
    }
    return OnnxFacts(
        inputs=tuple(map(_onnx_tensor, inputs)),
        outputs=tuple(map(_onnx_tensor, graph.output)),
        symbols=symbols,
        ops={node.name: node.op_type for node in _nodes(graph)},
    )


def _onnx_tensor(value: Any) -> EngineTensor:
    import onnx

    kind = value.type.tensor_type
    shape = tuple(int(dim.dim_value) if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    dtype = "bfloat16" if kind.elem_type == onnx.TensorProto.BFLOAT16 else None
    return EngineTensor(
        name=value.name,
        shape=shape,
        dtype=dtype or str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name),
    )


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def check_profile(facts: OnnxFacts, profile: Profile) -> None:
    """`OptionError` unless every input with a free dimension has a range that fits it and the other inputs.

    The library checks none of this: it builds an engine that no input fits.
    """
    free = {tensor.name: tensor for tensor in facts.inputs if -1 in tensor.shape}
    known: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, tensor in free.items():
        if name not in profile:
            raise OptionError(f"input {name} has free dimensions {list(tensor.shape)}: its range has to be given")
        bounds = [tuple(shape) for shape in profile[name]]
        said = f"the range of input {name}, {' : '.join(map(str, map(list, bounds)))},"
        if len(bounds) != 3 or any(len(shape) != len(tensor.shape) for shape in bounds):
            raise OptionError(f"{said} has to be three shapes of {len(tensor.shape)} dimensions")
        for axis, (size, sides) in enumerate(zip(tensor.shape, zip(*bounds, strict=True), strict=True)):
            least, usual, most = sides
            if not 0 < least <= usual <= most:
                raise OptionError(f"{said} does not rise along axis {axis}: least, usual and largest are wanted")
            if size != -1 and {*sides} != {size}:
                raise OptionError(f"{said} changes axis {axis}, which is {size} in the graph")
            symbol = facts.symbols[name][axis]
            first = known.setdefault(symbol, (sides, name)) if symbol else (sides, name)
            if first[0] != sides:
                raise OptionError(f"{said} has {sides} where {first[1]} has {first[0]}: both are {symbol!r}")
    for name in set(profile) - set(free):
        raise OptionError(f"a range is given for {name}, which is no input with free dimensions: leave it out")


def parse_errors(errors: Sequence[tuple[str, str, str]]) -> str:
    """The parser's errors (node's name, operator, text) as one line: which node, and the reason."""
    lines = []
    for name, operator, text in errors:
        said = [line for line in text.splitlines() if line.strip() and not _NOISE.search(line)]
        reason = " ".join((said or text.splitlines() or ["no reason given"])[0].split())
        found = _USAGE.search(reason) or _ASSERTED.fullmatch(reason)
        where = f"node {name or 'without a name'} ({operator})" if operator else "the file"
        lines.append(f"{where}: {(found[1] if found else reason)[:200]}")
    return listed(lines)


def listed(problems: Sequence[str]) -> str:
    """At most four of them, and how many more there are."""
    more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more


def read_layers(network: Any) -> list[Layer]:
    """The layers of a TensorRT network in its order."""
    layers = []
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        found = _NODE.search(layer.metadata)
        sizes = tuple(outputs[0].shape) if layer.type.name == "CONSTANT" else ()
        count = 1
        for size in sizes:
            count *= size
        layers.append(
            Layer(
                name=layer.name,
                kind=layer.type.name,
                node=found[1] if found else "",
                inputs=tuple(tensor.name for tensor in inputs if tensor is not None),
                outputs=tuple(tensor.name for tensor in outputs),
                dtypes=tuple(tensor.dtype.name for tensor in outputs),
                size=count if sizes else 0,
            )
        )
    return layers


def count_types(layers: Sequence[Layer]) -> dict[str, int]:
    """How many layers give each type, constants left aside."""
    return dict(sorted(Counter(one.dtypes[0] for one in layers if one.dtypes and one.kind != "CONSTANT").items()))


def interface(network: Any) -> tuple[tuple[EngineTensor, ...], tuple[EngineTensor, ...]]:
    """The inputs and outputs of a TensorRT network."""

    def tensor(found: Any) -> EngineTensor:
        kind = found.dtype.name
        return EngineTensor(name=found.name, shape=tuple(map(int, found.shape)), dtype=NUMPY_NAMES.get(kind, kind))

    return (
        tuple(tensor(network.get_input(number)) for number in range(network.num_inputs)),
        tuple(tensor(network.get_output(number)) for number in range(network.num_outputs)),
    )


def interface_problems(facts: OnnxFacts, inputs: Sequence[EngineTensor], outputs: Sequence[EngineTensor]) -> list[str]:
    """Where the network's inputs and outputs are not the graph's, in name, order, shape or type."""
    problems = []
    for side, wanted, found in (("input", facts.inputs, inputs), ("output", facts.outputs, outputs)):
        names = [[tensor.name for tensor in tensors] for tensors in (wanted, found)]
        if names[0] != names[1]:
            problems.append(f"the {side}s are {', '.join(names[1])} and not {', '.join(names[0])}")
            continue
        for graph, parsed in zip(wanted, found, strict=True):
            if (graph.shape, graph.dtype) != (parsed.shape, parsed.dtype):
                problems.append(
                    f"{side} {graph.name} is {parsed.dtype} {list(parsed.shape)} "
                    f"and not {graph.dtype} {list(graph.shape)}"
                )
    return problems


def precision_problems(
    layers: Sequence[Layer],
    fp32_nodes: Collection[str],
    ops: Mapping[str, str],
    *,
    glue_nodes: Collection[str] = (),
) -> list[str]:
    """Where an fp16 network is not what was intended.

    Float32 has to be what `fp32_nodes` compute. It may be what `glue_nodes` compute, what leads to a sine or cosine
    (the time's angles reach 999), and what only moves numbers. No weight may be stored in float32 to be cast down
    before it is used.
    """
    wanted, allowed = set(fp32_nodes), {*fp32_nodes, *glue_nodes}
    time_path = _leading_to_sines(layers, ops)
    problems = []
    for layer in layers:
        if layer.kind in MOVING or not layer.dtypes:
            continue
        what = f"node {layer.node or layer.name} ({ops.get(layer.node, layer.kind.lower())})"
        if layer.node in wanted and "HALF" in layer.dtypes:
            problems.append(f"{what} is fp16 and ought to be float32")
        elif "FLOAT" in layer.dtypes and layer.node not in allowed and layer.name not in time_path:
            problems.append(f"{what} is float32 and ought to be fp16")
    known = {layer.node for layer in layers}
    problems += [f"node {name}, which ought to be float32, is not in the network" for name in sorted(wanted - known)]
    return problems + _weight_problems(layers)


def _leading_to_sines(layers: Sequence[Layer], ops: Mapping[str, str]) -> set[str]:
    """Names of the layers that are sines or cosines, or on whose float32 outputs they depend."""
    makers = {output: layer for layer in layers for output in layer.outputs}
    waiting = [layer for layer in layers if layer.kind not in MOVING and ops.get(layer.node) in TRIGONOMETRIC]
    found: set[str] = set()
    while waiting:
        layer = waiting.pop()
        if layer.name not in found:
            found.add(layer.name)
            before = [makers[name] for name in layer.inputs if name in makers]
            waiting += [maker for maker in before if "FLOAT" in maker.dtypes]
    return found


def _weight_problems(layers: Sequence[Layer]) -> list[str]:
    users: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in layer.inputs:
            users.setdefault(name, []).append(layer)
    problems = []
    for constant in layers:
        if constant.kind != "CONSTANT" or "FLOAT" not in constant.dtypes or constant.size <= 1:
            continue
        waiting, seen = list(constant.outputs), set(constant.outputs)
        while waiting:
            for layer in users.get(waiting.pop(), ()):
                if layer.kind == "CAST" and "HALF" in layer.dtypes:
                    problems.append(f"weight {constant.name} is stored in float32 and cast to fp16")
                    waiting.clear()
                    break
                if layer.kind in MOVING and layer.kind != "CAST":
                    new = set(layer.outputs) - seen
                    waiting += new
                    seen |= new
    return problems

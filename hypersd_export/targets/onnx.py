"""ONNX: `build` writes one graph as a checked, cleaned `model.onnx`, with static shapes but for the graph's free axes.

The exporter is torch.onnx's (dynamo). A dynamo graph carries large node metadata and repeats equal initialisers; both
are removed, and names are kept exactly. Weights stay in the file up to `EXTERNAL_DATA_BYTES` and go into
`model.onnx_data` beyond (protobuf ends at 2 GB). torch, onnx and onnxscript are imported inside.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import MissingBackend, OptionError
from hypersd_export.graphs.spec import Graph
from hypersd_export.model.pages import Relief
from hypersd_export.targets import onnx_lean
from hypersd_export.targets.onnx_data import weights_in

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx_ir
    import torch

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
DEFAULT_OPSET = 20
OPSETS = range(18, 24)
"""What torch.onnx (2.13) can write: 18 is its own opset, 23 its latest."""
EXTERNAL_DATA_BYTES = 1_500_000_000
DIGEST = "data_sha256"
SHARED = "shared"
"""In the `meta` of an initialiser (which no file has) that stands for several equal ones."""


def check_options(*, opset: int) -> None:
    """Refuse, before anything is loaded, what `build` would refuse."""
    if opset not in OPSETS:
        raise OptionError(f"--opset {opset}: torch.onnx writes {OPSETS.start} to {OPSETS.stop - 1}")


def build(
    graph: Graph,
    folder: Path,
    *,
    opset: int = DEFAULT_OPSET,
    precision: str = "fp32",
    external: bool | None = None,
    edit: "Callable[[onnx_ir.Model], object] | None" = None,
    also: Sequence[Path] = (),
) -> dict[str, Any]:
    """Export `graph` into `folder/model.onnx` and return what the manifest says about it: opset, nodes, bytes.

    `precision` is what the module's weights are, for the record; `edit` changes the graph before it is cleaned.
    `external` forces the weights into (True) or keeps them out of (False) `model.onnx_data`; None decides by size.
    A data file is written to each of `also` too, and its SHA-256 is the result's `DIGEST`, to be taken out of it.
    One of an earlier build is never left behind. Raises `MissingBackend` without onnx or onnxscript.
    """
    from hypersd_export.targets import onnx_refill

    check_options(opset=opset)
    model, weights, uses = _export(graph, opset)
    if edit is not None:
        edit(model)
    origins = onnx_refill.origins(model, [value for value in weights if uses[str(value.name)] == 1])
    written = write(model, folder, precision=precision, external=external, also=also)
    kept = {name: value for name, value in model.graph.initializers.items() if SHARED not in value.meta}
    onnx_refill.note({name: origins[name] for name in origins if name in kept}, weights, folder)
    let_go((*weights, *model.graph.initializers.values()))
    return written


def let_go(weights: "Iterable[onnx_ir.Value]") -> None:
    """Take the weights out of a model that is done with. It is full of cycles, and onnxscript's rewrite rules, which
    live as long as the process, hold the last graph that they looked at, with it a whole network's weights."""
    for value in weights:
        value.const_value = None


def write(
    model: "onnx_ir.Model", folder: Path, *, precision: str, external: bool | None = None, also: Sequence[Path] = ()
) -> dict[str, Any]:
    """Clean a model, save it as `folder/model.onnx` and check it; arguments and result as in `build`."""
    inputs, outputs = ([str(value.name) for value in side] for side in (model.graph.inputs, model.graph.outputs))
    clean(model)
    folder.mkdir(parents=True, exist_ok=True)
    weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if external is None:
        external = weight_bytes > EXTERNAL_DATA_BYTES
    digest = save(model, folder, external=external, also=also)
    check(folder / MODEL_FILE, inputs, outputs)
    written = {
        "precision": precision,
        "opset": model.opset_imports[""],
        "nodes": len(list(model.graph)),
        "weight_bytes": int(weight_bytes),
        "external_data": external,
    }
    return written if digest is None else {**written, DIGEST: digest}


def digests(written: dict[str, Any]) -> dict[str, str]:
    """Take the SHA-256 of files that are known already, by their names, out of what `build` or `write` returned."""
    return {DATA_FILE: written.pop(DIGEST)} if DIGEST in written else {}


def _export(graph: Graph, opset: int) -> "tuple[onnx_ir.Model, list[onnx_ir.Value], dict[str, int]]":
    """The exporter's optimised model, the values of all weights that it began with, and how often it used each."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        raise MissingBackend(str(error.name), "export", "the ONNX target") from error
    with _quiet(), torch.no_grad():
        program = _translate(graph, opset)
        assert program is not None, "the dynamo exporter returns its program"
        weights = list(program.model.graph.initializers.values())
        uses = {str(value.name): len(tuple(value.uses())) for value in weights}
        optimise(program.model)
    return program.model, weights, uses


def _translate(graph: Graph, opset: int) -> "torch.onnx.ONNXProgram | None":
    """torch.onnx's translation of the graph, traced once where that can be, and by torch.export where not."""
    import torch

    from hypersd_export.graphs.trace import trace_once

    options: dict[str, Any] = {
        "opset_version": opset,
        "input_names": list(graph.inputs),
        "output_names": list(graph.output_names),
        "dynamo": True,
        "verbose": False,
        "optimize": False,
    }
    if not graph.axes:
        try:
            program = trace_once(graph)
            with onnx_lean.lean_translation(program):
                return torch.onnx.export(program, (), **options)
        except (RuntimeError, TypeError, AttributeError):  # the latter two from another version of torch
            pass
    onnx_lean.remember_functions()
    inputs, axes = tuple(graph.inputs.values()), _dynamic_shapes(graph)
    return torch.onnx.export(graph.module.eval(), inputs, dynamic_shapes=axes, **options)


def optimise(model: "onnx_ir.Model") -> None:
    """Inline functions, fold constants, and take out what torch's exporter leaves behind, in place.

    That is `onnxscript.optimizer.optimize_ir`, less what `clean` does anyway, and less the rewrite rules that have
    nothing to do here: one of those takes a time quadratic in the nodes, most of it all for SD 1.5's UNet.
    """
    from onnx_ir import passes
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common as rules

    leftovers = RewritePass(
        (
            *(rules.mul_by_1_rule, rules.add_0_rule, rules.sub_0_rule, rules.div_by_1_rule),
            *(rules.cast_cast_rule, rules.no_op_cast_rule, rules.no_op_expand_rule, rules.reshape_reshape_rule),
            *(rules.no_op_transpose_rule, rules.transpose_transpose_rule, rules.unsqueeze_unsqueeze_rule),
            *(rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule),
        )
    )
    unused = passes.Sequential(common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass())
    common.InlinePass()(model)
    for _ in range(2):  # what a rule leaves can be folded again
        with onnx_lean.lean_inference():
            fold_constants(model, onnx_shape_inference=True)
        leftovers(model)
        unused(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.NameFixPass()(model)


def _dynamic_shapes(graph: Graph) -> tuple[dict[int, Any], ...] | None:
    """The free axes as torch.export wants them, by input; None for a graph that has none."""
    from torch.export import Dim

    if not graph.axes:
        return None
    free = [axis for each in graph.axes.values() for axis in each.values()]
    dims = {axis.name: Dim(axis.name, min=axis.low, max=axis.high) for axis in free}
    return tuple(
        {number: axis.multiple * dims[axis.name] for number, axis in graph.axes.get(name, {}).items()}
        for name in graph.inputs
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's notes on torchvision and pytree, which are not about the user's model."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def clean(model: "onnx_ir.Model") -> None:
    """Share equal initialisers and subexpressions, drop what is unused, and clear metadata, doc strings, value_info."""
    from onnx_ir import passes
    from onnx_ir.passes import common

    _share_initializers(model)
    lay_out_initializers(model)
    passes.Sequential(
        common.ClearMetadataAndDocStringPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    forget_types(model)


def forget_types(model: "onnx_ir.Model") -> None:
    """Have no value_info written: shapes are inferred, and an initialiser carries its own."""
    interface = {*model.graph.inputs, *model.graph.outputs}
    inner = {*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)}
    for value in interface | inner:
        value.metadata_props.clear()
    for value in inner - interface:
        value.shape = None
        value.type = None


def _share_initializers(model: "onnx_ir.Model") -> None:
    """Keep one of all equal initialisers, its `meta` marked `SHARED`. Their bytes are compared only where type, shape
    and a sample are the same.

    onnx_ir's own passes do not serve: one keeps a copy of every weight as a dictionary key, the other refuses arrays
    that are not C-contiguous (transposed weights).
    """
    import numpy as np

    graph = model.graph
    outputs = set(graph.outputs)
    alike: dict[tuple[Any, tuple[int, ...], bytes], list[onnx_ir.Value]] = {}
    for value in tuple(graph.initializers.values()):
        if value in outputs:
            continue
        array = value.const_value.numpy()  # () and (1,) are not the same
        known = alike.setdefault((value.const_value.dtype, array.shape, _sample(array)), [])
        first = next((one for one in known if np.array_equal(_bits(one.const_value.numpy()), _bits(array))), None)
        if first is None:
            known.append(value)
        else:
            value.replace_all_uses_with(first)
            del graph.initializers[value.name]
            first.meta[SHARED] = True


def _sample(array: "npt.NDArray[Any]") -> bytes:
    """Up to 128 elements from all over an array of any strides, which tell most weights apart."""
    return array.flat[:: max(1, array.size // 64)].tobytes()


def _bits(array: "npt.NDArray[Any]") -> "npt.NDArray[Any]":
    """The same bytes as integers, in which NaN equals itself and 0.0 is not -0.0."""
    import numpy as np

    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def lay_out_initializers(model: "onnx_ir.Model") -> None:
    """Have transposed weights copied as they are written, one at a time: numpy would write them element by element."""
    import onnx_ir

    def laid_out(array: "npt.NDArray[Any]") -> onnx_ir.Tensor:
        return onnx_ir.Tensor(contiguous(array))

    for value in model.graph.initializers.values():
        tensor = value.const_value
        array = tensor.numpy()
        if not array.flags.c_contiguous:
            value.const_value = onnx_ir.LazyTensor(
                functools.partial(laid_out, array), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name
            )


def contiguous(array: "npt.NDArray[Any]") -> "npt.NDArray[Any]":
    """A copy in C's order. torch copies a transposed matrix by tiles, in two fifths of numpy's time."""
    import numpy as np
    import torch

    if array.dtype not in (np.float16, np.float32) or not array.flags.writeable:  # torch warns of those
        return np.ascontiguousarray(array)
    return torch.from_numpy(array).contiguous().numpy()


def save(
    model: "onnx_ir.Model",
    folder: Path,
    *,
    external: bool,
    names: tuple[str, str] = (MODEL_FILE, DATA_FILE),
    also: Sequence[Path] = (),
) -> str | None:
    """Write `model.onnx`, and `model.onnx_data` if `external`, which is written to each of `also` too; files of an
    earlier build go first. Returns the data file's SHA-256."""
    import onnx_ir

    for name in names:
        (folder / name).unlink(missing_ok=True)
    file, data = names
    if not external:
        onnx_ir.save(model, folder / file)
        return None
    with weights_in(model, folder / data, also=also, told=Relief()) as digest:
        onnx_ir.save(model, folder / file)
    return digest


def check(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """onnx's own checker by path (beyond 2 GB there is no other way), and what it does not notice: names."""
    import onnx

    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path, load_external_data=False).graph
    names = [node.name for node in _all_nodes(graph)]
    assert len(names) == len(set(names)), "onnxruntime wants unique node names"
    assert [value.name for value in graph.input] == list(inputs), "input names as asked"
    assert [value.name for value in graph.output] == list(outputs), "output names as asked"


def _all_nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a GraphProto and of the bodies of its loops and branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_nodes(attribute.g)


def add_initializer(graph: "onnx_ir.Graph", name: str, tensor: Any) -> "onnx_ir.Value":
    """A tensor as an initialiser of this name, its value with type and shape."""
    import onnx_ir

    tensor.name = name
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(tensor.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value

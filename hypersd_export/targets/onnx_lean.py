"""What torch.onnx and onnxscript do for every export and need not, left away while one of our graphs is made.

A third of the time in which a traced UNet becomes a graph: torch.onnx lists and parses the five hundred functions that
onnxscript has for ops, of which a network needs thirty; reads an ONNX op's signature anew for each node; and runs the
whole program once more to find ops with arguments of several dtypes. onnxscript then infers the shapes of values that
have them. The graph is the same without (tests/export/test_trace.py). All of it is in these packages' internals: where
another version has them elsewhere, nothing is changed.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir
    from torch.export import ExportedProgram

INSERTED = ("aten::_to_copy", "aten::scalar_tensor")
"""The ops that type promotion may put into a program."""


@contextmanager
def lean_translation(program: "ExportedProgram") -> Iterator[None]:
    """While this program is translated."""
    with ExitStack() as ends:
        _swap(ends, _signatures)
        _swap(ends, functools.partial(_functions, program))
        if not mixes_dtypes(program):
            _swap(ends, _no_promotion)
        yield


@contextmanager
def lean_inference() -> Iterator[None]:
    """While constants are folded: shapes are inferred for values that have none."""
    with ExitStack() as ends:
        _swap(ends, _inference)
        yield


def remember_functions() -> None:
    """For what `lean_translation` does not do: keep the list of all functions, which is parsed for each export."""
    with suppress(ImportError, AttributeError):
        module, listed = _lister()
        if not hasattr(module.get_torchlib_ops, "cache_info"):
            module.get_torchlib_ops = functools.cache(listed)


def mixes_dtypes(program: "ExportedProgram") -> bool:
    """Whether a program has an op whose tensors, results included, are of several dtypes, casts apart."""
    import torch

    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is torch.ops.aten._to_copy.default:
            continue
        values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
        if len({value.dtype for value in values if isinstance(value, torch.Tensor)}) > 1:
            return True
    return False


def _swap(ends: ExitStack, find: "Callable[[], tuple[Any, str, Any]]") -> None:
    """Put what `find` gives, (owner, name, value), in the place of what is there, until the end."""
    with suppress(ImportError, AttributeError, TypeError):
        owner, name, value = find()
        ends.callback(setattr, owner, name, vars(owner)[name])
        setattr(owner, name, value)


def _lister() -> tuple[Any, Callable[[], list[Any]]]:
    """The module of onnxscript that torch.onnx asks for its functions, and what lists them all anew."""
    from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]

    listed = onnxscript_apis.get_torchlib_ops
    return onnxscript_apis._module, getattr(listed, "__wrapped__", listed)


def _functions(program: "ExportedProgram") -> tuple[Any, str, Any]:
    from onnxscript.function_libs.torch_lib import ops, registration  # noqa: F401 - the former fills the latter

    module, listed = _lister()
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    needed = {*INSERTED, *(target.name().partition(".")[0] for target in targets if hasattr(target, "name"))}
    everything = registration.default_registry
    some = {
        name: functions
        for name, functions in everything.items()
        if name.partition(".")[0] in needed or not name.startswith("aten::")
    }

    def list_some() -> list[Any]:
        registration.default_registry = some
        try:
            return listed()
        finally:
            registration.default_registry = everything

    return module, "get_torchlib_ops", list_some


def _signatures() -> tuple[Any, str, Any]:
    from onnx_ir import schemas

    original = schemas.OpSignature.from_op_schema.__func__
    known: dict[tuple[str, str, int], Any] = {}

    def from_op_schema(cls: type, schema: Any) -> Any:
        key = (schema.domain, schema.name, schema.since_version)
        if key not in known:
            known[key] = original(cls, schema)
        return known[key]

    return schemas.OpSignature, "from_op_schema", classmethod(from_op_schema)


def _no_promotion() -> tuple[Any, str, Any]:
    from torch.onnx._internal.exporter import _fx_passes

    _fx_passes.insert_type_promotion_nodes  # noqa: B018 - there, or nothing is changed
    return _fx_passes, "insert_type_promotion_nodes", lambda _: None


def _inference() -> tuple[Any, str, Any]:
    from onnxscript.optimizer._constant_folding import FoldConstantsPass

    infer = FoldConstantsPass._do_inference

    def infer_missing(self: Any, node: "onnx_ir.Node") -> None:
        if any(value.type is None or value.shape is None or not value.shape.is_static() for value in node.outputs):
            infer(self, node)

    return FoldConstantsPass, "_do_inference", infer_missing

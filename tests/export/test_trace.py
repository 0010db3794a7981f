"""graphs/trace.py: one run of a network's Python gives the graph that torch.export gives, for every family."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderTiny

from benchmarks.random_pipeline import FAMILIES, tiny_parts_of
from hypersd_export.graphs import trace
from hypersd_export.graphs.components import build_graph
from hypersd_export.graphs.spec import Component, Graph, Shapes, resolve_shapes
from hypersd_export.targets import onnx, onnx_fp16, onnx_lean
from hypersd_export.targets.onnx import MODEL_FILE

CASES = [
    (family, component)
    for family in FAMILIES
    for component in Component
    if family == "sdxl" or component is not Component.TEXT_ENCODER_2
]


def small(family: str, component: Component, *, half: bool = False) -> Graph:
    """A component of the tiny pipeline of a family."""
    parts = tiny_parts_of(family)
    texts = {name: make().config.to_dict() for name, make in parts.items() if name.startswith("text_encoder")}
    configs = texts | {name: dict(parts[name]().config) for name in ("unet", "vae")}
    shapes = resolve_shapes(configs, tokens=77, batch=1, cfg=True, size=None)
    module = parts[component.source]().eval().requires_grad_(False)
    guidance = 7.5 if family == "lcm" and component is Component.UNET else None
    return build_graph(component, module.half() if half else module, shapes, embedded_guidance=guidance)


@pytest.fixture
def by_torch_export(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What makes the target take torch.export from here on."""

    def refuse(graph: Graph) -> trace.TracedProgram:
        raise RuntimeError(graph.name)

    return lambda: monkeypatch.setattr(trace, "trace_once", refuse)


def anonymous(model: Any) -> list[tuple[Any, ...]]:
    """A model's nodes without names: a value is the number of its node, an input's name, or a weight's bytes."""
    names: dict[Any, Any] = {value: value.name for value in model.graph.inputs}
    names |= {value: value.const_value.numpy().tobytes() for value in model.graph.initializers.values()}
    nodes = []
    for number, node in enumerate(model.graph):
        names |= {value: (number, place) for place, value in enumerate(node.outputs)}
        inputs = tuple(None if value is None else names[value] for value in node.inputs)
        nodes.append((node.op_type, {name: str(value) for name, value in node.attributes.items()}, inputs))
    return [*nodes, *((value.name, names[value]) for value in model.graph.outputs)]


def exported(graph: Graph) -> Any:
    """The graph as the ONNX target has it before it is written."""
    model, *_ = onnx._export(graph, 20)
    onnx.clean(model)
    return model


@pytest.mark.parametrize(("family", "component"), [("sdxl", Component.UNET), ("sd15", Component.VAE_DECODER)])
def test_the_graph_is_the_one_of_torch_export(family, component, by_torch_export):
    once = anonymous(exported(small(family, component)))
    by_torch_export()
    assert once == anonymous(exported(small(family, component)))
    assert len(once) > 50


@pytest.mark.parametrize(
    ("family", "component"), [("sd15", Component.TEXT_ENCODER), ("sdxl", Component.TEXT_ENCODER_2)]
)
def test_a_text_encoder_has_the_same_values_in_fewer_nodes(family, component, by_torch_export, tmp_path):
    """torch.export makes transformers write its causal mask out, and torch.onnx guards a written mask against NaN."""
    graph = small(family, component)
    built = {"once": onnx.build(graph, tmp_path / "once")}
    by_torch_export()
    built["export"] = onnx.build(graph, tmp_path / "export")
    assert built["once"]["nodes"] < built["export"]["nodes"]
    assert built["once"]["weight_bytes"] <= built["export"]["weight_bytes"] + 77 * 77 * 4
    feed = {name: value.numpy() for name, value in graph.inputs.items()}
    values = {
        name: onnxruntime.InferenceSession(tmp_path / name / MODEL_FILE, providers=["CPUExecutionProvider"]).run(
            None, feed
        )
        for name in built
    }
    expected = graph.module(*graph.inputs.values())
    for one, other, torchs in zip(values["once"], values["export"], expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
        np.testing.assert_allclose(one, torchs.numpy(), atol=2e-5)


def test_a_tiny_vae_too(by_torch_export):
    shapes = Shapes(
        batch=1, unet_batch=1, channels=4, latent_height=4, latent_width=4, vae_scale=8, tokens=77, text_width=32
    )
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    graph = build_graph(Component.VAE_ENCODER, AutoencoderTiny(**widths).eval().requires_grad_(False), shapes)
    once = anonymous(exported(graph))
    by_torch_export()
    assert once == anonymous(exported(graph))


def test_half_too(by_torch_export, tmp_path):
    for name in ("once", "export"):
        onnx_fp16.build(small("sd15", Component.UNET, half=True), tmp_path / name)
        by_torch_export()
    once, export = (onnx_fp16.read(tmp_path / name / MODEL_FILE) for name in ("once", "export"))
    assert anonymous(once) == anonymous(export)


@pytest.mark.parametrize(("family", "component"), CASES)
def test_every_component_is_traced_once(family, component, monkeypatch):
    """torch.export is for what cannot be: were it needed here, nothing but the time would show it."""
    monkeypatch.setattr(torch.export, "export", None)
    monkeypatch.setattr(onnx_lean, "remember_functions", None)
    graph = small(family, component)
    program = trace.trace_once(graph)
    assert onnx._translate(graph, 20) is not None
    assert program.run_decompositions({}) is program
    assert dict(program.named_parameters()).keys() == dict(graph.module.named_parameters()).keys()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("component", [Component.TEXT_ENCODER, Component.UNET, Component.VAE_ENCODER])
def test_the_lean_translation_is_the_whole_one(component, half, monkeypatch):
    """Less work for torch.onnx and onnxscript, the same nodes."""
    monkeypatch.setattr(onnx_lean, "remember_functions", None)  # which comes before torch.export
    graph = small("sd15", component, half=half)
    lean = anonymous(exported(graph))
    monkeypatch.setattr(onnx_lean, "lean_translation", lambda _: nullcontext())
    monkeypatch.setattr(onnx_lean, "lean_inference", nullcontext)
    assert lean == anonymous(exported(graph))


def test_translating_leaves_torch_onnx_as_it_was():
    from onnx_ir import schemas
    from onnxscript.optimizer._constant_folding import FoldConstantsPass
    from torch.onnx._internal.exporter import _fx_passes

    def internals() -> list[Any]:
        owners = {schemas.OpSignature: "from_op_schema", FoldConstantsPass: "_do_inference"}
        owners |= {_fx_passes: "insert_type_promotion_nodes", onnx_lean._lister()[0]: "get_torchlib_ops"}
        return [vars(owner)[name] for owner, name in owners.items()]

    before = internals()
    graph = small("sd15", Component.VAE_ENCODER)
    program = trace.trace_once(graph)
    with onnx_lean.lean_translation(program), onnx_lean.lean_inference():
        assert all(now is not then for now, then in zip(internals(), before, strict=True))
    assert all(now is then for now, then in zip(internals(), before, strict=True))


def test_another_version_of_torch_onnx_is_left_alone(monkeypatch):
    from torch.onnx._internal.exporter import _fx_passes

    monkeypatch.delattr(_fx_passes, "insert_type_promotion_nodes")
    with onnx_lean.lean_translation(trace.trace_once(small("sd15", Component.VAE_ENCODER))):
        assert not hasattr(_fx_passes, "insert_type_promotion_nodes")


class Mixed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.ones_like(x, dtype=torch.float64)


def test_a_program_of_several_dtypes_is_promoted(tmp_path):
    """torch multiplies float32 and float64 as float64, and ONNX not at all: the cast has to be put in."""
    graph = Graph(name="mixed", module=Mixed(), inputs={"x": torch.ones(2)}, output_names=("y",), axes={})
    assert onnx_lean.mixes_dtypes(trace.trace_once(graph))
    onnx.build(graph, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / MODEL_FILE, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones(2, np.float32)})
    assert y.dtype == np.float64
    assert not onnx_lean.mixes_dtypes(trace.trace_once(small("sd15", Component.UNET)))


class InPlace(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y += 1
        return y


class Constant(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0])


class Asks(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if bool(x.sum() > 0) else x


def graph_of(module: torch.nn.Module) -> Graph:
    return Graph(name="odd", module=module, inputs={"x": torch.ones(2, 3)}, output_names=("y",))


@pytest.mark.parametrize(
    ("module", "said"), [(InPlace(), "add_"), (Constant(), "_tensor_constant0"), (Asks(), "data-dependent")]
)
def test_what_one_run_does_not_show_is_refused(module, said):
    with pytest.raises(RuntimeError, match=said):
        trace.trace_once(graph_of(module))


@pytest.mark.parametrize("module", [InPlace(), Constant()])
def test_and_then_torch_export_does_it(module, tmp_path):
    onnx.build(graph_of(module), tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / MODEL_FILE, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"x": np.full((2, 3), 2.0, dtype=np.float32)})
    np.testing.assert_array_equal(found, module(torch.full((2, 3), 2.0)).numpy())


def test_shared_weights_have_one_name():
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(3, 3)
            self.second = torch.nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.register_buffer("shift", torch.ones(3), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)) + self.shift

    program = trace.trace_once(graph_of(Tied()))
    assert [name for name, _ in program.named_parameters()] == ["first.weight", "first.bias", "second.bias"]
    assert [name for name, _ in program.named_buffers()] == ["shift"]
    assert len(exported(graph_of(Tied())).graph.initializers) == 4

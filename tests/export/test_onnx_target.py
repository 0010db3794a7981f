"""targets/onnx.py on small modules: names, static shapes, a clean file, external data, and what is refused."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from hypersd_export.errors import MissingBackend, OptionError
from hypersd_export.graphs import trace
from hypersd_export.graphs.components import build_graph
from hypersd_export.graphs.spec import Component, Graph, Shapes
from hypersd_export.targets import onnx_fp16
from hypersd_export.targets.onnx import DATA_FILE, MODEL_FILE, build, clean, save
from hypersd_export.targets.onnx_refill import ORIGINS


class Twins(torch.nn.Module):
    """Two layers with the same weights in two tensors, applied to a sum that is written twice."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
        self.first = torch.nn.Parameter(weight.clone())
        self.second = torch.nn.Parameter(weight.clone())

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.tanh((sample + timestep) @ self.first) + torch.sin((sample + timestep) @ self.second)


@pytest.fixture
def graph():
    inputs = {"sample": torch.ones(2, 32), "timestep": torch.tensor(3.0)}
    return Graph(name="twins", module=Twins().eval().requires_grad_(False), inputs=inputs, output_names=("out_sample",))


def evaluate(folder, graph):
    session = onnxruntime.InferenceSession(folder / MODEL_FILE, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in graph.inputs.items()})[0]


def test_names_shapes_and_values(graph, tmp_path):
    info = build(graph, tmp_path, opset=20, precision="fp32")
    model = onnx.load(tmp_path / MODEL_FILE)
    dims = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert dims == {"sample": [2, 32], "timestep": [], "out_sample": [2, 32]}
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}
    assert (info["opset"], info["precision"], info["external_data"]) == (20, "fp32", False)
    assert info["nodes"] == len(model.graph.node)
    assert {path.name for path in tmp_path.iterdir()} == {MODEL_FILE, ORIGINS}
    expected = graph.module(*graph.inputs.values()).numpy()
    np.testing.assert_allclose(evaluate(tmp_path, graph), expected, atol=1e-6)


def test_the_file_is_clean_and_weights_are_shared(graph, tmp_path):
    info = build(graph, tmp_path)
    model = onnx.load(tmp_path / MODEL_FILE)
    assert info["weight_bytes"] == 32 * 32 * 4
    assert len(model.graph.initializer) == 1
    assert [node.op_type for node in model.graph.node].count("Add") == 2  # the sum is there once, and the last one
    assert not model.metadata_props
    assert not model.graph.value_info
    assert not model.graph.doc_string
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_cleaning_shares_weights_that_are_not_contiguous_and_keeps_outputs(tmp_path):
    """A transposed weight twice, one of another type with the same bytes, and one that is an output itself."""
    import onnx_ir

    weight = np.arange(6, dtype=np.float32).reshape(2, 3).T
    arrays = {"w": weight, "same": weight.copy(order="C"), "bits": weight.view(np.int32), "kept": weight.copy()}
    values = {}
    for name, array in arrays.items():
        values[name] = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name))
        values[name].metadata_props["from"] = "here"
    total = onnx_ir.node("Add", [values["w"], values["same"]])
    cast = onnx_ir.node("Cast", [values["bits"]], attributes={"to": onnx_ir.DataType.FLOAT})
    result = onnx_ir.node("Add", [total.outputs[0], cast.outputs[0]])
    result.doc_string = "long"
    outputs = (result.outputs[0], values["kept"])
    for value, name in zip(outputs, ("out", "kept"), strict=True):
        value.name, value.dtype, value.shape = name, onnx_ir.DataType.FLOAT, onnx_ir.Shape([3, 2])
    total.outputs[0].shape = onnx_ir.Shape([3, 2])
    graph = onnx_ir.Graph(
        [], outputs, nodes=[total, cast, result], initializers=list(values.values()), name="g", opset_imports={"": 20}
    )
    model = onnx_ir.Model(graph, ir_version=10)
    model.metadata_props["made"] = "somewhere"
    clean(model)
    assert set(model.graph.initializers) == {"w", "bits", "kept"}
    assert not model.metadata_props
    for external in (False, True):
        save(model, tmp_path, external=external)
        onnx.checker.check_model(tmp_path / MODEL_FILE, full_check=True)
        proto = onnx.load(tmp_path / MODEL_FILE)
        assert {value.name for value in proto.graph.value_info} <= {"kept"}
        session = onnxruntime.InferenceSession(tmp_path / MODEL_FILE, providers=["CPUExecutionProvider"])
        out, kept = session.run(None, {})
        np.testing.assert_array_equal(out, 2 * weight + weight.view(np.int32).astype(np.float32))
        np.testing.assert_array_equal(kept, weight)


def test_alike_weights_are_shared_only_if_every_bit_is_the_same():
    import onnx_ir

    from hypersd_export.targets.onnx import _sample, _share_initializers

    long = np.zeros(1000, np.float32)
    late, minus, nan = long.copy(), -long, np.full(1000, np.nan, np.float32)
    late[-1] = 1.0
    arrays = {"a": long, "late": late, "minus": minus, "nan": nan, "b": long.copy(), "nan again": nan.copy()}
    arrays |= {"row": long[None], "empty": np.zeros(0, np.float32)}
    assert _sample(long) == _sample(late)  # so that it is the comparison that tells them apart
    values = [onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name)) for name, array in arrays.items()]
    graph = onnx_ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 20})
    _share_initializers(onnx_ir.Model(graph, ir_version=10))
    assert list(graph.initializers) == ["a", "late", "minus", "nan", "row", "empty"]


@pytest.mark.parametrize("component", [Component.TEXT_ENCODER, Component.UNET, Component.VAE_ENCODER])
@pytest.mark.parametrize("half", [False, True])
def test_the_optimiser_leaves_what_the_exporters_own_leaves(tiny_base, tmp_path, monkeypatch, component, half):
    """Byte by byte: the rewrite rules that are left away have nothing to do in these networks."""
    from onnxscript.optimizer import optimize_ir

    from hypersd_export.targets import onnx as target

    class_, folder = {
        Component.TEXT_ENCODER: (CLIPTextModel, "text_encoder"),
        Component.UNET: (UNet2DConditionModel, "unet"),
        Component.VAE_ENCODER: (AutoencoderKL, "vae"),
    }[component]
    module = class_.from_pretrained(tiny_base / folder).eval().requires_grad_(False)
    shapes = Shapes(
        batch=1, unet_batch=1, channels=4, latent_height=4, latent_width=4, vae_scale=4, tokens=16, text_width=32
    )
    built = build_graph(component, module.half() if half else module, shapes)
    make = onnx_fp16.build if half else build
    make(built, tmp_path / "ours")
    monkeypatch.setattr(target, "optimise", optimize_ir)
    make(built, tmp_path / "theirs")
    assert (tmp_path / "ours" / MODEL_FILE).read_bytes() == (tmp_path / "theirs" / MODEL_FILE).read_bytes()


def test_behind_torch_export_all_functions_are_listed_once(graph, tmp_path, monkeypatch):
    from onnxscript.function_libs.torch_lib import registration

    def refuse(graph):
        raise RuntimeError(graph.name)

    monkeypatch.setattr(trace, "trace_once", refuse)
    build(graph, tmp_path / "first")
    monkeypatch.setattr(registration, "default_registry", None)  # what the list is made from
    build(graph, tmp_path / "again")
    assert (tmp_path / "first" / MODEL_FILE).read_bytes() == (tmp_path / "again" / MODEL_FILE).read_bytes()


def test_the_same_graph_is_the_same_file(graph, tmp_path):
    for name in ("a", "b"):
        build(graph, tmp_path / name)
    assert (tmp_path / "a" / MODEL_FILE).read_bytes() == (tmp_path / "b" / MODEL_FILE).read_bytes()


def test_external_data_on_request_and_never_a_stale_one(graph, tmp_path):
    info = build(graph, tmp_path, external=True)
    assert info["external_data"]
    assert {path.name for path in tmp_path.iterdir()} == {MODEL_FILE, DATA_FILE, ORIGINS}
    assert (tmp_path / DATA_FILE).stat().st_size == 32 * 32 * 4
    [weight] = onnx.load(tmp_path / MODEL_FILE, load_external_data=False).graph.initializer
    assert {entry.key: entry.value for entry in weight.external_data}["location"] == DATA_FILE
    external = evaluate(tmp_path, graph)
    build(graph, tmp_path, external=True)  # not appended to
    assert (tmp_path / DATA_FILE).stat().st_size == 32 * 32 * 4
    build(graph, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {MODEL_FILE, ORIGINS}
    np.testing.assert_array_equal(evaluate(tmp_path, graph), external)


def test_large_weights_become_external_by_themselves(graph, tmp_path, monkeypatch):
    monkeypatch.setattr("hypersd_export.targets.onnx.EXTERNAL_DATA_BYTES", 1000)
    assert build(graph, tmp_path)["external_data"]
    assert (tmp_path / DATA_FILE).is_file()


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets(graph, tmp_path, opset):
    build(graph, tmp_path, opset=opset)
    assert onnx.load(tmp_path / MODEL_FILE).opset_import[0].version == opset


def test_refusals(graph, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="--opset 12"):
        build(graph, tmp_path, opset=12)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingBackend, match=r"pip install 'hypersd\[export\]'"):
        build(graph, tmp_path)
    assert list(tmp_path.iterdir()) == []

"""targets/onnx_cpu.py: long attention by blocks and gates by themselves, for processors; the values are the same."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hypersd_export.export import export
from hypersd_export.graphs.spec import DRAWING, Component
from hypersd_export.job import Job, open_job
from hypersd_export.targets import Target, onnx_cpu, onnx_cuda, onnx_fp16
from hypersd_export.targets import onnx as target
from hypersd_export.verify.metrics import psnr

HEADS, QUERIES, KEYS, WIDTH = 2, 24, 10, 8
MB = 2**20


def attention(*, queries=QUERIES, axis=-1, free=None, looked_at=False):
    """softmax(q kᵀ) v with heads, as `targets.onnx` writes it; `looked_at`: the weights are an output too."""
    shapes = {"q": (1, HEADS, free or queries, WIDTH), "k": (1, HEADS, WIDTH, KEYS), "v": (1, HEADS, KEYS, WIDTH)}
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"], name="scores"),
        helper.make_node("Softmax", ["scores"], ["weights"], name="softmax", axis=axis),
        helper.make_node("MatMul", ["weights", "v"], ["heads"], name="values"),
        helper.make_node("Transpose", ["heads"], ["y"], name="joined", perm=[0, 2, 1, 3]),
    ]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    if looked_at:
        results.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, None))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    return model_of(nodes, inputs, results, [])


def gate(*, outputs=2, shared=False, width=6):
    """a · b of [a, b] = x W + c; `shared`: the bias is another layer's too."""
    rng = np.random.default_rng(1)
    weights = {"w": rng.standard_normal((5, outputs * width)), "c": rng.standard_normal(outputs * width)}
    parts = [f"part{number}" for number in range(outputs)]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node("Add", ["product", "c"], ["sum"], name="sum"),
        helper.make_node("Split", ["sum"], parts, name="split", axis=-1, num_outputs=outputs),
        helper.make_node("Mul", parts[:2], ["y"], name="gate"),
    ]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    if shared:
        nodes.append(helper.make_node("Identity", ["c"], ["other"], name="other"))
        results.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, None))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 3, 5))]
    return model_of(nodes, inputs, results, [numpy_helper.from_array(np.float32(w), n) for n, w in weights.items()])


def model_of(nodes, inputs, results, initializers):
    graph = helper.make_graph(nodes, "graph", inputs, results, initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def evaluated(model):
    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {x.name: rng.standard_normal([QUERIES if isinstance(n, str) else n for n in x.shape], np.float32)
             for x in session.get_inputs()}  # fmt: skip
    return session.run(None, feeds)[0]


def ops(model):
    return Counter(node.op_type for node in model.graph)


def test_the_blocks_are_as_few_as_the_limit_allows():
    assert onnx_cpu.blocks_of([1, 8, 4096, 4096]) == [128] * 32  # 537 MB, 16.8 MB each
    assert onnx_cpu.blocks_of([1, 8, 1024, 1024]) == [512] * 2
    assert onnx_cpu.blocks_of([1, 8, 256, 256]) == [256]
    assert onnx_cpu.blocks_of([1, 8, 4096, 77]) == [4096]
    assert onnx_cpu.blocks_of([1, 8, 16384, 16384]) == [256] * 64  # and no more nodes
    assert onnx_cpu.blocks_of([1, 1, 3, 100 * MB]) == [1, 1, 1]
    assert onnx_cpu.blocks_of([1, 1, 5, 8 * MB]) == [1, 1, 1, 1, 1]
    assert onnx_cpu.blocks_of([1, 1, 5, 2 * MB]) == [2, 2, 1]


@pytest.mark.parametrize("queries", [QUERIES, 23])
def test_attention_in_blocks_is_the_attention(queries, monkeypatch):
    whole = evaluated(attention(queries=queries))
    monkeypatch.setattr(onnx_cpu, "BLOCK_BYTES", 4 * HEADS * 6 * KEYS)
    model = attention(queries=queries)
    assert onnx_cpu.lay_out(model) == {"attention in blocks": 1, "gates by themselves": 0}
    assert ops(model) == {"Split": 1, "MatMul": 8, "Softmax": 4, "Concat": 1, "Transpose": 1}
    np.testing.assert_allclose(evaluated(model), whole, rtol=0, atol=1e-6)

    assert onnx_cpu.undo(model) == 1
    assert ops(model) == {"MatMul": 2, "Softmax": 1, "Transpose": 1}
    np.testing.assert_array_equal(evaluated(model), whole)


@pytest.mark.parametrize(
    "other", [{"axis": -2}, {"free": "queries"}, {"looked_at": True}], ids=lambda options: next(iter(options))
)
def test_what_is_not_this_attention_stays(other, monkeypatch):
    monkeypatch.setattr(onnx_cpu, "BLOCK_BYTES", 4)
    model = attention(**other)
    assert onnx_cpu.lay_out(model)["attention in blocks"] == 0
    assert ops(model) == {"MatMul": 2, "Softmax": 1, "Transpose": 1}


def test_a_concat_of_other_things_is_not_joined(monkeypatch):
    monkeypatch.setattr(onnx_cpu, "BLOCK_BYTES", 4 * HEADS * 6 * KEYS)
    model = attention()
    onnx_cpu.lay_out(model)
    concat = next(node for node in model.graph if node.op_type == "Concat")
    swapped = concat.inputs[1]
    concat.replace_input_with(1, concat.inputs[0])
    concat.replace_input_with(0, swapped)
    assert onnx_cpu.undo(model) == 0


def test_a_gate_is_two_products():
    model = gate()
    whole = evaluated(model)
    assert onnx_cpu.lay_out(model) == {"attention in blocks": 0, "gates by themselves": 1}
    assert ops(model) == {"MatMul": 2, "Add": 2, "Mul": 1}
    assert {name: tuple(value.shape) for name, value in model.graph.initializers.items()} == {
        "split.0.weight": (5, 6), "split.0.bias": (6,), "split.1.weight": (5, 6), "split.1.bias": (6,),
    }  # fmt: skip
    np.testing.assert_allclose(evaluated(model), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("other", [{"outputs": 3}, {"shared": True}], ids=["three", "shared"])
def test_other_splits_stay(other):
    model = gate(**other)
    assert onnx_cpu.lay_out(model)["gates by themselves"] == 0
    assert ops(model)["Split"] == 1


@pytest.fixture
def all_blocks(monkeypatch):
    """Whatever has more than one query is in blocks."""
    monkeypatch.setattr(onnx_cpu, "BLOCK_BYTES", 64)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_export_for_processors_has_them_and_its_gates_pass(tiny_spec, tmp_path, all_blocks, precision):
    spec = replace(tiny_spec, precision=precision, jobs=1, out=tmp_path / "bundle", cache_dir=tmp_path / "cache")
    manifest = export(spec, isolate=False).manifest
    parity, records = manifest.parity, manifest.targets["onnx"]["components"]
    assert "layout" not in records["text_encoder"]
    assert min(figures["psnr_db"] for figures in parity.values()) > (90 if precision == "fp32" else 45)
    for component in DRAWING:
        blocks = onnx_fp16.read(spec.out / component / target.MODEL_FILE)
        found = sum(node.name.endswith(".blocks") for node in blocks.graph)
        gates = sum(node.name.endswith(".1.sum") for node in blocks.graph)
        assert records[component]["layout"] == {"attention in blocks": found, "gates by themselves": gates}
        assert found > 0
        assert (gates > 0) == (component is Component.UNET)
        whole = onnx_fp16.read(spec.out / component / target.MODEL_FILE)
        assert onnx_cpu.undo(whole) > 0
        assert not any(".blocks" in node.name and node.op_type == "Concat" for node in whole.graph)
        softmaxes = {node.outputs[0].dtype for node in blocks.graph if node.op_type == "Softmax"}
        assert softmaxes == {onnx_ir.DataType.FLOAT}  # onnxruntime's CPU provider has no other kernel
        (half,) = {node.outputs[0].dtype for node in whole.graph if node.op_type == "Softmax"}
        assert half == (onnx_ir.DataType.FLOAT16 if precision == "fp16" else onnx_ir.DataType.FLOAT)
    unet = onnx_fp16.read(spec.out / "unet" / target.MODEL_FILE)
    assert onnx_cuda.fuse(unet)["MultiHeadAttention"] > 0
    assert not any(node.op_type == "Softmax" for node in unet.graph)


def test_what_a_scan_keeps_in_float32_stays_there(tiny_spec, tmp_path, all_blocks):
    spec = replace(tiny_spec, precision="fp16", jobs=1, verify=False, golden=False, scan=False, out=tmp_path / "bundle")
    export(replace(spec, cache_dir=tmp_path / "cache"))
    path = spec.out / "unet" / target.MODEL_FILE
    model = onnx_fp16.read(path)
    first = next(node for node in model.graph if node.op_type == "Softmax")
    assert onnx_cpu.undo(model, kept=[first.name]) > 0
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    wide = [node.name for node in softmaxes if node.outputs[0].dtype == onnx_ir.DataType.FLOAT]
    assert wide == [first.name]
    portable = onnx_fp16.save_beside(model, path, tmp_path / "narrow")
    feeds = {value.name: np.full(value.shape, 0.5, np.float32) for value in model.graph.inputs}
    one, other = (
        onnxruntime.InferenceSession(each, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for each in (path, portable)
    )
    assert psnr(one, other) > 60


def test_other_providers_and_engines_get_attention_whole(tiny_spec):
    def laid_out(**options):
        return open_job(replace(tiny_spec, verify=False, **options)).component_task("fp16").for_cpu

    assert laid_out()
    assert not laid_out(provider="cuda")
    assert not laid_out(provider="coreml")
    both = SimpleNamespace(spec=replace(tiny_spec, targets=(Target.ONNX, Target.TENSORRT)))
    assert not Job.for_cpu.fget(both)


def test_the_cache_tells_them_apart(tiny_spec):
    here, there = (open_job(replace(tiny_spec, verify=False, provider=name)) for name in ("cpu", "cuda"))
    for component in (Component.TEXT_ENCODER, *DRAWING):
        same = here.component_depends(Target.ONNX, component) == there.component_depends(Target.ONNX, component)
        assert same == (component not in DRAWING)
    core = [job.component_depends(Target.COREML, Component.UNET) for job in (here, there)]
    assert core[0] == core[1]

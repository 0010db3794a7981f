"""onnxruntime's CUDA ops in place of portable ones: the same values by their definitions, and a bundle that says so.

No CUDA here: MultiHeadAttention runs on onnxruntime's CPU provider, GroupNorm by its definition in numpy (which onnx's
reference evaluator calls), and onnxruntime itself says that it knows the op and lacks only a kernel for this provider.
"""

import json
import shutil
from collections import Counter

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from diffusers import AutoencoderKL
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from typer.testing import CliRunner

from hypersd_export import ort_cuda
from hypersd_export.bundle.manifest import read_manifest, write_manifest
from hypersd_export.cli import app
from hypersd_export.errors import OptionError
from hypersd_export.graphs.components import build_graph
from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.runtime.onnx import OnnxRuntime
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.targets import onnx_cuda, onnx_fp16
from tests.tiny import COMPONENTS


class GroupNorm(OpRun):
    """com.microsoft.GroupNorm as onnxruntime's ContribOperators.md defines it, in [N, H, W, C]."""

    op_domain = "com.microsoft"

    def _run(self, x, gamma, beta, activation=None, channels_last=None, epsilon=None, groups=None):
        assert channels_last == 1
        assert gamma.dtype == beta.dtype == np.float32
        n, h, w, c = x.shape
        grouped = x.astype(np.float32).reshape(n, h, w, groups, c // groups)
        mean = grouped.mean(axis=(1, 2, 4), keepdims=True)
        variance = grouped.var(axis=(1, 2, 4), keepdims=True)
        y = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
        return ((y / (1 + np.exp(-y)) if activation else y).astype(x.dtype),)


class MultiHeadAttention(OpRun):
    """com.microsoft.MultiHeadAttention without bias and mask, of states [B, S, C]."""

    op_domain = "com.microsoft"

    def _run(self, q, k, v, num_heads=None, scale=None):
        q, k, v = (x.reshape(*x.shape[:2], num_heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
        scores = scale * (q @ k.transpose(0, 1, 3, 2))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True)) @ v
        return (out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1),)


def fused(exported, component, folder):
    """A component's graph with the ops, saved in `folder`; returns its path and their counts."""
    path = exported.path / component / "model.onnx"
    model = onnx_fp16.read(path)
    counts = onnx_cuda.fuse(model)
    return onnx_fp16.save_beside(model, path, folder), counts


def ops(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def feeds(path):
    rng = np.random.default_rng(0)
    found = {}
    for value in onnx.load(path).graph.input:
        shape = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        found[value.name] = np.full(shape, 499, np.float32) if not shape else rng.standard_normal(shape, np.float32)
    return found


def drawn(path, inputs):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.parametrize("component", ["unet", "vae_decoder", "vae_encoder"])
def test_the_values_are_those_of_the_portable_graph(exported, tmp_path, component):
    path, counts = fused(exported, component, tmp_path)
    portable = exported.path / component / "model.onnx"
    before, after = ops(portable), ops(path)
    assert counts["GroupNorm"] > 5
    assert after["GroupNorm"] == counts["GroupNorm"]
    assert before["InstanceNormalization"] - after["InstanceNormalization"] == counts["GroupNorm"]
    assert before["Softmax"] - after["Softmax"] == counts["MultiHeadAttention"]
    if component == "unet":
        assert (after["InstanceNormalization"], after["Softmax"]) == (0, 0)
    inputs = feeds(portable)
    evaluator = ReferenceEvaluator(str(path), new_ops=[GroupNorm, MultiHeadAttention])
    for found, expected in zip(evaluator.run(None, inputs), drawn(portable, inputs), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_silu_goes_into_the_norm_where_one_follows(exported, tmp_path):
    path, _ = fused(exported, "unet", tmp_path)
    graph = onnx.load(path).graph
    norms = [node for node in graph.node if node.op_type == "GroupNorm"]
    activations = Counter(
        onnx.helper.get_attribute_value(attribute)
        for node in norms
        for attribute in node.attribute
        if attribute.name == "activation"
    )
    gone = ops(exported.path / "unet" / "model.onnx")["Sigmoid"] - ops(path)["Sigmoid"]
    assert activations[1] == gone > 0
    assert activations[0] == len(norms) - gone > 0  # those in front of the transformers


def test_onnxruntime_takes_its_attention_as_it_is(exported, tmp_path, monkeypatch):
    """By the CPU provider's kernel, so that heads, their order and the scale are as onnxruntime reads them."""
    monkeypatch.setattr(onnx_cuda, "_group_norm", lambda *_: False)
    path, counts = fused(exported, "unet", tmp_path)
    assert counts["GroupNorm"] == 0
    assert counts["MultiHeadAttention"] == ops(exported.path / "unet" / "model.onnx")["Softmax"] > 0
    inputs = feeds(path)
    found, expected = drawn(path, inputs)[0], drawn(exported.path / "unet" / "model.onnx", inputs)[0]
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_onnxruntime_knows_the_op_and_has_no_kernel_here(exported, tmp_path):
    path, _ = fused(exported, "vae_decoder", tmp_path)
    with pytest.raises(Exception, match=r"Could not find an implementation for GroupNorm\(1\)"):
        drawn(path, {})


def test_what_looks_otherwise_stays(exported, tmp_path):
    model = onnx_fp16.read(exported.path / "text_encoder" / "model.onnx")
    assert onnx_cuda.fuse(model) == {"GroupNorm": 0, "MultiHeadAttention": 0}  # its attention has a mask
    assert "com.microsoft" not in model.opset_imports
    model = onnx_fp16.read(exported.path / "unet" / "model.onnx")
    for value in model.graph.initializers.values():
        array = value.const_value.numpy()
        if array.ndim == 1 and array.size == 4 and (array == 1).all():  # the norms' ones
            value.const_value = onnx_ir.tensor(2 * array, name=value.name)
    assert onnx_cuda.fuse(model)["GroupNorm"] == 0


def test_half_graphs_and_what_stays_float32_in_them(tiny_base, tmp_path):
    """Gamma and beta are float32 whatever the graph is; a norm that is kept in float32 between casts stays."""
    module = AutoencoderKL.from_pretrained(tiny_base / "vae").eval().requires_grad_(False)
    shapes = Shapes(
        batch=1, unet_batch=1, channels=4, latent_height=4, latent_width=4, vae_scale=4, tokens=16, text_width=32
    )
    graph = build_graph(Component.VAE_DECODER, module.half(), shapes)
    onnx_fp16.build(graph, tmp_path)
    path = tmp_path / "model.onnx"
    portable = onnx_fp16.read(path)
    norm = next(node for node in portable.graph if node.op_type == "InstanceNormalization")
    counts = []
    for kept in ([], [norm.name]):
        model = onnx_fp16.read(path)
        onnx_fp16.keep_float32(model, kept)
        counts.append(onnx_cuda.fuse(model)["GroupNorm"])
        norms = [node for node in model.graph if node.op_type == "GroupNorm"]
        assert {value.dtype for node in norms for value in node.inputs[1:]} == {onnx_ir.DataType.FLOAT}
        assert {node.inputs[0].producer().op_type for node in norms} == {"Transpose"}
        onnx_fp16.save_beside(model, path, tmp_path / str(len(kept)))
    assert counts[0] == counts[1] + 1
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*GroupNorm\(1\)"):  # all its types are known
        drawn(tmp_path / "0" / "model.onnx", {})


@pytest.fixture
def command(exported, tmp_path):
    def run(*options, bundle=exported.path):
        out = tmp_path / "place" / "cuda"
        return CliRunner().invoke(app, ["ort-cuda", str(bundle), "--out", str(out), *map(str, options)]), out

    return run


def test_the_command_writes_a_bundle_that_runs_on_cuda_alone(exported, command, tmp_path):
    done, out = command()
    assert done.exit_code == 0, done.output
    assert "golden picture: not drawn, as this machine has no CUDA provider" in done.output.replace("\n", " ")
    manifest = read_manifest(out)
    target = manifest.targets["onnx"]
    assert (target["variant"], target["from"], manifest.parity) == ("ort-cuda", exported.digest, "not verified")
    assert set(target["fused"]) == {"unet", "vae_decoder", "vae_encoder"}
    for component in COMPONENTS:
        assert (ops(out / component / "model.onnx")["GroupNorm"] > 0) == (component in target["fused"])
    same = out / "text_encoder" / "model.onnx"
    assert same.read_bytes() == (exported.path / "text_encoder" / "model.onnx").read_bytes()
    assert "## For onnxruntime's CUDA provider alone" in (out / "README.md").read_text(encoding="utf-8")
    assert set(manifest.files) == set(exported.manifest.files)
    assert "onnx: fp32, opset 20, variant ort-cuda" in CliRunner().invoke(app, ["inspect", str(out)]).output
    for provider, message in (("cpu", "give --provider cuda"), (None, "onnxruntime-gpu")):
        with pytest.raises(Exception, match=message):
            Pipeline.from_bundle(out, provider=provider)
    again = CliRunner().invoke(app, ["ort-cuda", str(out), "--out", str(tmp_path / "again")])
    assert (again.exit_code, "has ort-cuda graphs already" in again.output) == (1, True)
    lora = CliRunner().invoke(app, ["refit", str(out), "--lora", "x", "--out", str(tmp_path / "again")])
    assert (lora.exit_code, "was rewritten by ort-cuda" in lora.output.replace("\n", " ")) == (1, True)


def test_the_golden_picture_is_the_proof_where_there_is_cuda(exported, command, monkeypatch):
    """onnxruntime's CPU provider on the portable graphs stands for CUDA on the rewritten ones."""

    def on_cuda(path, provider):
        assert provider == "cuda"
        return OnnxRuntime(path=exported.path)

    monkeypatch.setattr(ort_cuda, "resolve_provider", lambda name: name)
    monkeypatch.setattr(ort_cuda, "OnnxRuntime", on_cuda)
    done, out = command()
    assert done.exit_code == 0, done.output
    figures = read_manifest(out).parity["image"]
    assert figures["psnr_db"] > figures["least_db"] == 50

    golden = Pipeline.golden

    def other(self):
        self.runtime = OnnxRuntime(path=exported.path)
        decode = self.decode
        self.decode = lambda latents: 255 - decode(latents)
        return golden(self)

    monkeypatch.setattr(Pipeline, "golden", other)
    done, _ = command("--overwrite")
    assert done.exit_code == 1
    assert "not the golden picture on cuda" in done.output.replace("\n", " ")
    assert read_manifest(out).parity["image"] == figures  # the old bundle stands


def changed(exported, folder, **changes):
    """A copy of the bundle whose manifest says something else."""
    shutil.copytree(exported.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    write_manifest(folder, **{key: value for key, value in manifest.items() if key not in ("format", "files")})
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": {"onnx": {}, "tensorrt": {}}},
            "was exported to onnx, tensorrt: export it with --target onnx alone",
        ),
        (
            {"options": {"span": {"batch": [1, 2], "width": [8, 8], "height": [8, 8], "unit": 8}}},
            "has graphs of free shapes: export it without --dynamic",
        ),
    ],
)
def test_other_bundles_are_refused(exported, command, tmp_path, changes, message):
    done, out = command(bundle=changed(exported, tmp_path / "other", **changes))
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")
    assert not out.exists()


def test_one_graph_is_refused(exported, tmp_path):
    (tmp_path / "pipeline.onnx").write_bytes(b"")
    with pytest.raises(OptionError, match="is one graph: export it without --single-graph"):
        ort_cuda.check_bundle(tmp_path, exported.manifest)

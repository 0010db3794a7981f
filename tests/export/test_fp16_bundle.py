"""`--precision fp16` from base to bundle: an overflow inside the VAE comes out right; without its cure, no bundle."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx_ir
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from typer.testing import CliRunner

from hypersd_export import refit
from hypersd_export.cli import app
from hypersd_export.errors import BundleError, OptionError
from hypersd_export.export import export
from hypersd_export.graphs.components import build_graph
from hypersd_export.graphs.spec import Component
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.spec import ExportSpec
from hypersd_export.targets import onnx_fp16
from tests.export.test_onnx_fp16 import SHAPES, evaluate

LOUD = 2e5
"""Group norms undo a factor on what flows into them, so the pictures stay; half does not hold what flows."""


@pytest.fixture(scope="module")
def loud_base(tiny_base, tmp_path_factory):
    """The tiny base with a VAE decoder whose inner values pass 65504."""
    base = tmp_path_factory.mktemp("loud") / "model"
    shutil.copytree(tiny_base, base)
    vae = AutoencoderKL.from_pretrained(base / "vae")
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(LOUD)
        vae.decoder.conv_in.bias.mul_(LOUD)
    vae.save_pretrained(base / "vae")
    return base


@pytest.fixture(scope="module")
def loud_spec(tiny_spec, loud_base):
    return replace(tiny_spec, base=str(loud_base), precision="fp16")


def test_an_overflowing_vae_is_exported_right(loud_spec, loud_base, tmp_path):
    vae = AutoencoderKL.from_pretrained(loud_base / "vae").half()
    with torch.no_grad():
        assert not vae.decode(torch.ones(1, 4, 4, 4).half()).sample.isfinite().all()
    done = export(replace(loud_spec, out=tmp_path / "b"), isolate=False)
    decoder = done.manifest.targets["onnx"]["components"]["vae_decoder"]
    graph = onnx_ir.load(done.path / "vae_decoder/model.onnx").graph
    kept = [node for node in graph if node.name in decoder["fp32_nodes"]]
    assert len(kept) == len(decoder["fp32_nodes"]) > 3
    assert kept[0].op_type == "Conv"  # conv_in
    assert (decoder["precision"], decoder["margin"]) == ("fp16", 4.0)
    assert decoder["largest"] > 65504
    assert done.manifest.parity["vae_decoder"]["psnr_db"] >= 40
    assert done.manifest.parity["image"]["psnr_db"] >= 35
    assert json.loads((done.path / "golden/golden.json").read_text())["min_psnr_db"] == 35
    assert Pipeline.from_bundle(done.path).golden().passed


@pytest.mark.usefixtures("in_process")
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # a picture of NaN, which is the point
def test_without_the_block_list_the_gate_fails_with_an_exit_code(loud_spec, tmp_path):
    command = ["--base", loud_spec.base, "--steps", "2", "--scheduler", "ddim", "--guidance", "1", "--no-scan"]
    command += ["--precision", "fp16", "--cache-dir", str(loud_spec.cache_dir), "--out", str(tmp_path / "b")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "not the same as torch: vae_decoder -200.0 dB" in done.output.replace("\n", " ")
    assert not (tmp_path / "b").exists()


def test_a_bundle_without_scan_and_golden_picture_says_so(loud_spec, tmp_path):
    done = export(replace(loud_spec, scan=False, verify=False, golden=False, out=tmp_path / "b"), isolate=False)
    decoder = done.manifest.targets["onnx"]["components"]["vae_decoder"]
    assert (decoder["scan"], "fp32_nodes" in decoder) == ("not run", False)
    assert "| Range scan | not run (--no-scan)" in (done.path / "README.md").read_text(encoding="utf-8")
    again = ExportSpec(**refit._options(done.manifest))
    assert (again.scan, again.golden, again.verify) == (False, False, False)
    assert not (done.path / "golden").exists()
    with pytest.raises(BundleError, match="golden is not there: the bundle was exported with --no-golden"):
        Pipeline.from_bundle(done.path).golden()
    with pytest.raises(OptionError, match="--no-golden: the comparison with torch draws that picture"):
        replace(loud_spec, golden=False)
    with pytest.raises(OptionError, match="--no-scan: it is about the fp16 graphs"):
        replace(loud_spec, precision="fp32", scan=False)


def test_the_time_embedding_of_the_last_timestep_survives_half(tiny_base, tmp_path):
    module = UNet2DConditionModel.from_pretrained(tiny_base / "unet").eval().requires_grad_(False)
    expected = module.time_embedding(module.time_proj(torch.tensor([999.0])))[0].numpy()
    graph = build_graph(Component.UNET, module.half(), SHAPES)
    onnx_fp16.build(graph, tmp_path)
    model = onnx_fp16.read(tmp_path / "model.onnx")
    embedding = [node for node in model.graph if node.op_type == "Gemm"][1].outputs[0]
    onnx_fp16.round_to_half(model)
    model.graph.outputs.insert(0, embedding)
    path = onnx_fp16.save_beside(model, tmp_path / "model.onnx", tmp_path / "r")
    feeds = {name: value.float().numpy() for name, value in graph.inputs.items()}
    assert feeds["timestep"] == 999.0
    found = evaluate(path, feeds)[0]
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()

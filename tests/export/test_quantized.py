"""Bundles of ONNX graphs with integer weights: what was lost is measured, what they were made from is proven."""

from dataclasses import replace

import pytest

from hypersd_export.export import export
from hypersd_export.refit import refit_spec
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.spec import PlanFlags


@pytest.fixture(scope="module")
def spec(tiny_spec):
    return replace(tiny_spec, plan=PlanFlags(steps=(2,), scheduler="ddim", guidance=1.0), quantize="int8")


@pytest.fixture(scope="module")
def quantized(spec, tmp_path_factory):
    return export(replace(spec, out=tmp_path_factory.mktemp("bundles") / "int8"), isolate=False)


def test_it_is_smaller_and_near_and_its_source_is_exact(quantized, exported):
    target, parity = quantized.manifest.targets["onnx"], quantized.manifest.parity
    assert target["quantize"] == "int8"
    stored = {name: figures.get("quantized") for name, figures in target["components"].items()}
    assert stored["vae_decoder"] is stored["vae_encoder"] is None
    assert stored["unet"]["bytes"] < 0.3 * stored["unet"]["bytes_before"]
    assert (
        target["components"]["unet"]["weight_bytes"]
        < 0.5 * exported.manifest.targets["onnx"]["components"]["unet"]["weight_bytes"]
    )
    assert 30 < parity["unet"]["psnr_db"] < 80
    assert parity["unet fp32"]["psnr_db"] > 110
    assert parity["image fp32"]["psnr_db"] > 50
    assert parity["unet"]["least_db"] == 15
    pipeline = Pipeline.from_bundle(quantized.path)
    assert pipeline.golden().passed
    assert pipeline.golden().min_psnr_db <= parity["image"]["psnr_db"] - 2.9


def test_one_graph_unpacks_its_weights_outside_of_the_loop(spec, quantized, tmp_path):
    import onnx_ir

    done = export(replace(spec, single_graph=True, out=tmp_path / "one"), isolate=False)
    model = onnx_ir.load(done.path / "pipeline.onnx")
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("DequantizeLinear") > 10
    (loop,) = (node for node in model.graph if node.op_type == "Loop")
    assert not [node for node in loop.attributes["body"].as_graph() if node.op_type == "DequantizeLinear"]
    mine, loops = (Pipeline.from_bundle(each.path)("a cat", seed=3) for each in (done, quantized))
    assert abs(mine.latents - loops.latents).max() < 1e-3 * abs(loops.latents).max()


def test_a_refit_keeps_the_form(quantized, lora_file, tmp_path):
    assert refit_spec(quantized.path, [str(lora_file)], tmp_path / "other").quantize == "int8"


@pytest.mark.slow
def test_four_bits(spec, tmp_path):
    done = export(replace(spec, quantize="int4", opset=21, precision="fp16", out=tmp_path / "int4"), isolate=False)
    assert done.manifest.parity["unet"]["psnr_db"] > 15
    assert done.manifest.parity["unet fp16"]["psnr_db"] > 60

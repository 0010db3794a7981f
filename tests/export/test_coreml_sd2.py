"""Core ML packages of a Stable Diffusion 2.x: text states of width 1024, linear projections, v-prediction."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from hypersd_export import build_coreml
from hypersd_export.coreml_worker import Conversion
from hypersd_export.diffusion import Guidance
from hypersd_export.export import export
from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.spec import PlanFlags
from hypersd_export.targets import Target
from hypersd_export.verify.metrics import psnr
from hypersd_export.verify.mil import open_package
from hypersd_export.verify.reference import text_outputs, unet_output
from hypersd_export.verify.source import SourceRequest, open_source
from tests.tiny import COMPONENTS

pytest.importorskip("coremltools")

WIDTH = 1024


@pytest.fixture(scope="module")
def base(tiny_base, tmp_path_factory):
    """The tiny pipeline with SD 2's kind of text encoder and UNet.

    Diffusers' files of SD 2 have OpenCLIP's tower without its last layer, so that the last state, behind the final
    norm, is the penultimate one that the UNet was trained on.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None, requires_safety_checker=False)
    old = pipeline.text_encoder.config
    torch.manual_seed(0)
    pipeline.register_modules(
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=old.vocab_size, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
                num_attention_heads=16, max_position_embeddings=16, projection_dim=512, hidden_act="gelu",
                pad_token_id=old.pad_token_id, bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id,
            )
        ),
        unet=UNet2DConditionModel(
            sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=(2, 4), cross_attention_dim=WIDTH, use_linear_projection=True,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=pipeline.scheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("sd2") / "model"
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_export_is_torchs(base, tiny_spec, tmp_path, monkeypatch):
    monkeypatch.setattr(build_coreml, "run_apart", lambda asked, folder, *, progress: asked.run(folder, progress))
    plan = PlanFlags(steps=(2,), scheduler="ddim", guidance=3.0)
    spec = replace(tiny_spec, base=str(base), targets=(Target.COREML,), plan=plan, out=tmp_path / "bundle")
    done = export(spec, isolate=False)
    assert done.manifest.base["family"] == "sd21"
    entry = json.loads((done.path / "plan.json").read_text())["entries"][0]
    assert entry["plan"]["prediction_type"] == "v_prediction"
    parity = done.manifest.parity
    assert all(55 < parity[name]["psnr_db"] < 100 for name in COMPONENTS)
    assert parity["image"]["psnr_db"] > 45


@pytest.mark.parametrize("component", [Component.TEXT_ENCODER, pytest.param(Component.UNET, marks=pytest.mark.slow)])
def test_apples_layout_is_torchs(component, base, tmp_path):
    source = SourceRequest(base=str(base))
    shapes = Shapes(
        batch=1, unet_batch=2, channels=4, latent_height=4, latent_width=4, vae_scale=4, tokens=16, text_width=WIDTH
    )
    conversion = Conversion(
        source=source, component=component, shapes=shapes, precision="fp16", deployment_target="iOS17",
        attention="split-einsum" if component is Component.UNET else "original", layout="apple",
    )  # fmt: skip
    conversion.run(tmp_path, lambda _: None)
    package = open_package(tmp_path / f"{component}.mlpackage")
    module, _ = open_source(source).load(component.source, torch.float32)
    rng = np.random.default_rng(0)
    if component is Component.TEXT_ENCODER:
        ids = rng.integers(0, 500, (1, 16))
        found = package.evaluate({"input_ids": ids.astype(np.float32)})["last_hidden_state"]
        expected = text_outputs(module, ids)["last_hidden_state"]
    else:
        sample, states = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 4, 4), (2, 16, WIDTH)))
        rows = states.transpose(0, 2, 1)[:, :, None]
        feeds = {"sample": sample, "timestep": np.full(2, 999, np.float32), "encoder_hidden_states": rows}
        found = package.evaluate(feeds)["noise_pred"]
        expected = unet_output(module, sample, 999.0, {"encoder_hidden_states": states}, Guidance.of(1.0))
    assert psnr(found, expected) > 55

"""AutoencoderTiny in the VAE's place (`--vae`): the picture is diffusers' own, from latents that need no scale."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline

from hypersd_export.errors import ModelError
from hypersd_export.export import export
from hypersd_export.model.base import open_base
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.spec import PlanFlags


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("taesd")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), latent_channels=4,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_the_picture_is_that_of_diffusers(vae, tiny_base, tiny_spec, tmp_path):
    plan = PlanFlags(steps=(2,), scheduler="ddim", guidance=1.0)
    done = export(replace(tiny_spec, vae=str(vae), plan=plan, out=tmp_path / "bundle"), isolate=False)
    assert json.loads((done.path / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderTiny"]
    assert done.manifest.parity["vae_decoder"]["psnr_db"] > 110
    assert done.manifest.parity["vae_encoder"]["psnr_db"] > 110
    own = StableDiffusionPipeline.from_pretrained(
        tiny_base, vae=AutoencoderTiny.from_pretrained(vae), safety_checker=None, requires_safety_checker=False
    )
    own.scheduler = DDIMScheduler.from_pretrained(done.path / "scheduler")
    own.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    theirs = own(
        "a cat", latents=torch.from_numpy(noise), num_inference_steps=2, guidance_scale=1.0, height=16, width=16,
        output_type="np",
    ).images[0]  # fmt: skip
    pipeline = Pipeline.from_bundle(done.path)
    mine = pipeline("a cat", noise=noise).images[0]
    assert np.abs(np.asarray(mine).astype(float) - np.round(theirs * 255)).max() <= 1
    latents = pipeline._image_latents(mine, pipeline.size)
    expected = own.vae.encode(own.image_processor.preprocess(mine)).latents.detach().numpy()
    np.testing.assert_allclose(latents, expected, atol=1e-4)


def test_another_latent_depth_is_refused(vae, tiny_spec, tmp_path):
    deep = tmp_path / "deep"
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), latent_channels=16,
    ).save_pretrained(deep)  # fmt: skip
    with pytest.raises(ModelError, match="latents of 4 channels and its VAE has 16; give a VAE of its kind"):
        open_base(tiny_spec.base, vae=deep).require_exportable()

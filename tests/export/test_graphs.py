"""graphs/: the modules that are exported are diffusers' own, and their shapes fit the pipeline."""

import pytest
import torch
from diffusers import AutoencoderKL, LatentConsistencyModelPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from hypersd_export.errors import ModelError, OptionError
from hypersd_export.graphs.components import build_graph, check_unet, guidance_embedding
from hypersd_export.graphs.spec import Component, Shapes, resolve_shapes, unet_down_factor, vae_scale_factor

TEXT = {"hidden_size": 32}
UNET = {"sample_size": 8, "in_channels": 4, "cross_attention_dim": 32, "block_out_channels": [8, 16]}
VAE = {"latent_channels": 4, "block_out_channels": [8, 8, 8]}
CONFIGS = {"text_encoder": TEXT, "unet": UNET, "vae": VAE}
SHAPES = Shapes(
    batch=2, unet_batch=4, channels=4, latent_height=4, latent_width=6, vae_scale=4, tokens=16, text_width=32
)


def resolved(size=None, **changes):
    configs = {name: {**config, **changes.get(name, {})} for name, config in CONFIGS.items()}
    return resolve_shapes(configs, tokens=16, batch=1, cfg=False, size=size)


@torch.no_grad()
def run(graph):
    out = graph.module(*graph.inputs.values())
    return dict(zip(graph.output_names, out if isinstance(out, tuple) else (out,), strict=True))


def test_text_encoder(tiny_base):
    module = CLIPTextModel.from_pretrained(tiny_base / "text_encoder").eval()
    graph = build_graph(Component.TEXT_ENCODER, module, SHAPES)
    ids = graph.inputs["input_ids"]
    assert (ids.dtype, tuple(ids.shape)) == (torch.int64, (2, 16))
    with torch.no_grad():
        reference = module(ids)
    out = run(graph)
    torch.testing.assert_close(out["last_hidden_state"], reference.last_hidden_state)
    torch.testing.assert_close(out["pooler_output"], reference.pooler_output)


def test_unet(tiny_base):
    module = UNet2DConditionModel.from_pretrained(tiny_base / "unet").eval()
    graph = build_graph(Component.UNET, module, SHAPES)
    assert list(graph.inputs) == ["sample", "timestep", "encoder_hidden_states"]
    sample, timestep, states = graph.inputs.values()
    assert [tuple(value.shape) for value in (sample, timestep, states)] == [(4, 4, 4, 6), (), (4, 16, 32)]
    assert timestep.dtype == torch.float32
    with torch.no_grad():
        reference = module(sample, timestep, encoder_hidden_states=states).sample
    torch.testing.assert_close(run(graph)["out_sample"], reference)


def test_vae_with_its_quantising_convolutions(tiny_base):
    module = AutoencoderKL.from_pretrained(tiny_base / "vae").eval()
    decoder = build_graph(Component.VAE_DECODER, module, SHAPES)
    encoder = build_graph(Component.VAE_ENCODER, module, SHAPES)
    latents, image = decoder.inputs["latent_sample"], encoder.inputs["sample"]
    assert (tuple(latents.shape), tuple(image.shape)) == ((2, 4, 4, 6), (2, 3, 16, 24))
    assert float(image.min()) >= -1
    assert float(image.max()) <= 1
    with torch.no_grad():
        torch.testing.assert_close(run(decoder)["sample"], module.decode(latents).sample)
        torch.testing.assert_close(run(encoder)["latent_parameters"], module.encode(image).latent_dist.parameters)
    module.quant_conv = None  # VAEs with use_quant_conv=False
    with torch.no_grad():
        expected = module.encode(image).latent_dist.parameters
    torch.testing.assert_close(run(build_graph(Component.VAE_ENCODER, module, SHAPES))["latent_parameters"], expected)


def test_sample_inputs_are_seeded(tiny_base):
    module = AutoencoderKL.from_pretrained(tiny_base / "vae").eval()
    first, same, other = (
        build_graph(Component.VAE_DECODER, module, SHAPES, seed=seed).inputs["latent_sample"] for seed in (0, 0, 1)
    )
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("width", [256, 7])
@pytest.mark.parametrize("scale", [1.0, 3.5, 8.0])
def test_guidance_embedding_is_that_of_diffusers(scale, width):
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1]), embedding_dim=width
    )
    torch.testing.assert_close(guidance_embedding(scale, width), theirs)


def lcm_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=32, time_cond_proj_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def test_an_embedded_guidance_is_a_constant_of_the_graph():
    module = lcm_unet()
    graph = build_graph(Component.UNET, module, SHAPES, embedded_guidance=8.0)
    assert list(graph.inputs) == ["sample", "timestep", "encoder_hidden_states"]
    sample, timestep, states = graph.inputs.values()
    condition = guidance_embedding(8.0, 16).expand(4, -1)
    with torch.no_grad():
        reference = module(sample, timestep, encoder_hidden_states=states, timestep_cond=condition).sample
        other = module(sample, timestep, encoder_hidden_states=states, timestep_cond=0 * condition).sample
    torch.testing.assert_close(run(graph)["out_sample"], reference)
    assert not torch.allclose(reference, other)


def test_unet_and_plan_must_agree_on_embedded_guidance(tiny_base):
    with pytest.raises(OptionError, match="the UNet embeds its guidance"):
        check_unet(lcm_unet(), None)
    with pytest.raises(OptionError, match="the UNet has no time_cond_proj_dim"):
        check_unet(UNet2DConditionModel.from_pretrained(tiny_base / "unet"), 8.0)


def test_shapes_of_the_base():
    assert resolved() == Shapes(
        batch=1, unet_batch=1, channels=4, latent_height=8, latent_width=8, vae_scale=4, tokens=16, text_width=32
    )
    assert (resolved().width, resolved().height) == (32, 32)
    cfg = resolve_shapes(CONFIGS, tokens=16, batch=3, cfg=True, size=None)
    assert (cfg.batch, cfg.unet_batch) == (3, 6)
    assert resolved(unet={"sample_size": [6, 10]}).to_json()["latent_width"] == 10


def test_a_size_in_pixels():
    shapes = resolved(size=(48, 32))
    assert (shapes.latent_width, shapes.latent_height, shapes.width, shapes.height) == (12, 8, 48, 32)
    for size in ((44, 32), (32, 30), (4, 8)):
        with pytest.raises(OptionError, match=rf"--size {size[0]}x{size[1]}: both sides must be multiples of 8"):
            resolved(size=size)
    with pytest.raises(OptionError, match="the nearest is 48x32"):
        resolved(size=(50, 33))


def test_components_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="takes 4 latent channels and the VAE makes 16"):
        resolved(vae={"latent_channels": 16})
    with pytest.raises(ModelError, match="width 32 and the base makes ones of 64"):
        resolved(text_encoder={"hidden_size": 64})


def test_defaults_of_absent_keys_are_those_of_diffusers(tiny_base):
    assert vae_scale_factor({}) == 2 ** (len(AutoencoderKL().config.block_out_channels) - 1)
    assert unet_down_factor({}) == 8
    assert vae_scale_factor(AutoencoderKL.from_pretrained(tiny_base / "vae").config) == 4

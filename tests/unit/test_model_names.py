"""The original ("LDM", "SGM") names of UNet and VAE modules, against diffusers' own converters and by hand."""

from typing import Any

import pytest
import torch

from hypersd_export.model.ldm_names import unet_ldm_names, vae_ldm_names
from tests.lora_files import LCM_TARGETS, targets


@pytest.fixture(scope="module")
def sd15() -> Any:
    """The full Stable Diffusion 1.5 UNet without memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)


def converted(module: Any, names: dict[str, str], convert: Any, prefix: str) -> dict[str, str]:
    """{parameter: the name that diffusers' converter gives its original one}; tensors are told apart by a number."""
    parameters = list(module.state_dict())
    checkpoint = {}
    for number, parameter in enumerate(parameters):
        owner, _, leaf = parameter.rpartition(".")
        checkpoint[f"{prefix}{names[owner]}.{leaf}"] = torch.tensor([[float(number)]])
    made = convert(checkpoint, dict(module.config))
    return {parameters[int(value.item())]: name for name, value in made.items()}


def test_the_278_modules_of_hyper_sd_map_one_to_one_on_the_full_sd15_unet(sd15: Any) -> None:
    modules = targets(sd15, LCM_TARGETS)
    assert len(modules) == 278
    table = unet_ldm_names(modules, sd15.config.layers_per_block)
    assert list(table) == modules
    back = {original.replace(".", "_"): name for name, original in table.items()}
    assert len(back) == 278
    assert {back[original.replace(".", "_")] for original in table.values()} == set(modules)
    plain = {name.replace(".", "_"): name for name in modules}
    assert len(plain) == 278
    assert not plain.keys() & back.keys()


def test_every_weight_of_the_sd15_unet_has_the_name_that_diffusers_converts(sd15: Any) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    owners = sorted({name.rpartition(".")[0] for name in sd15.state_dict()})
    table = unet_ldm_names(owners, 2)
    assert sorted(table) == owners
    made = converted(sd15, table, convert_ldm_unet_checkpoint, "model.diffusion_model.")
    assert made == {name: name for name in sd15.state_dict()}


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("down_blocks.0.resnets.1.conv2", "input_blocks.2.0.out_layers.3"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", "input_blocks.4.1.transformer_blocks.0.ff.net.2"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("down_blocks.3.resnets.1.time_emb_proj", "input_blocks.11.0.emb_layers.1"),
        ("mid_block.resnets.0.conv1", "middle_block.0.in_layers.2"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("mid_block.resnets.1.conv1", "middle_block.2.in_layers.2"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.3.attentions.2.proj_out", "output_blocks.11.1.proj_out"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ],
)  # fmt: skip
def test_names_of_sd15_by_hand(sd15: Any, name: str, original: str) -> None:
    assert unet_ldm_names([n for n, _ in sd15.named_modules()], 2)[name] == original


def test_one_layer_per_block_and_a_list_of_layers() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    names = [name for name, _ in unet.named_modules()]
    table = unet_ldm_names(names, 1)
    assert table == unet_ldm_names(names, [1, 1])
    assert table["down_blocks.0.downsamplers.0.conv"] == "input_blocks.2.0.op"
    assert table["down_blocks.1.resnets.0.conv1"] == "input_blocks.3.0.in_layers.2"
    assert table["up_blocks.0.upsamplers.0.conv"] == "output_blocks.1.1.conv"
    assert table["up_blocks.1.attentions.1.proj_in"] == "output_blocks.3.1.proj_in"
    assert unet_ldm_names(["down_blocks.0.downsamplers.0.other", "up_blocks.0.resnets.0.norm9", "x"], 1) == {}


def test_every_weight_of_the_sd15_vae_has_the_name_that_diffusers_converts() -> None:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    owners = sorted({name.rpartition(".")[0] for name in vae.state_dict()})
    table = vae_ldm_names(owners, 4)
    assert sorted(table) == owners
    made = converted(vae, table, convert_ldm_vae_checkpoint, "first_stage_model.")
    assert made == {name: name for name in vae.state_dict()}
    assert table["encoder.mid_block.attentions.0.to_out.0"] == "encoder.mid.attn_1.proj_out"
    assert table["decoder.up_blocks.0.upsamplers.0.conv"] == "decoder.up.3.upsample.conv"
    assert vae_ldm_names(["decoder.other", "decoder.mid_block.attentions.0.x"], 4) == {}

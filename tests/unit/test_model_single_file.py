"""Single-file checkpoints in the original layout: configs from shapes, weights by name, no network."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hypersd_export.errors import ModelError
from hypersd_export.model.base import open_base
from hypersd_export.model.families import Family, family_of_checkpoint
from hypersd_export.model.ldm_names import unet_ldm_names, vae_ldm_names
from hypersd_export.model.open_clip import LAYER
from tests.lora_files import one_line, one_thread  # noqa: F401 - a fixture for the whole module
from tests.tiny import tiny_tokenizer

Weights = dict[str, torch.Tensor]


def original(module: torch.nn.Module, table: dict[str, str], prefix: str) -> Weights:
    """A module's weights under their original names; the VAE's attention as 1x1 convolutions, as published."""
    result = {}
    for name, tensor in module.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        attends = prefix.startswith("first") and ".attentions." in name and tensor.ndim == 2
        result[f"{prefix}{table[owner]}.{leaf}"] = tensor[:, :, None, None].contiguous() if attends else tensor
    return result


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    """A small pipeline with what is fixed in SD1.x: 32 groups, 8 heads in the UNet, text heads of 64."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    return {
        "unet": UNet2DConditionModel(
            sample_size=64, block_out_channels=(32, 64, 64), layers_per_block=2, attention_head_dim=8,
            cross_attention_dim=128,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ),
        "vae": AutoencoderKL(
            block_out_channels=(32, 32, 64), layers_per_block=1, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(
            vocab_size=518, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        )),
    }  # fmt: skip


@pytest.fixture(scope="module")
def tensors(modules: dict[str, Any]) -> Weights:
    unet, vae, text = modules["unet"], modules["vae"], modules["text_encoder"]
    owners = {n: [name for name, _ in m.named_modules()] for n, m in modules.items()}
    result = original(unet, unet_ldm_names(owners["unet"], 2), "model.diffusion_model.")
    result |= original(vae, vae_ldm_names(owners["vae"], 3), "first_stage_model.")
    level = "" if hasattr(text, "text_model") else "text_model."
    result |= {f"cond_stage_model.transformer.{level}{name}": t for name, t in text.state_dict().items()}
    result["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    result["alphas_cumprod"] = torch.ones(1000)
    return result


@pytest.fixture
def checkpoint(tensors: Weights, tmp_path: Path) -> Path:
    """The checkpoint with its tokenizer beside it (its vocabulary is not CLIP's)."""
    tiny_tokenizer(tmp_path / "tokenizer")
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def refused(*args: Any, match: str, **kwargs: Any) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        open_base(*args, **kwargs)
    return one_line(caught.value)


def test_every_weight_and_what_the_modules_compute(checkpoint: Path, modules: dict[str, Any]) -> None:
    model = open_base(checkpoint)
    model.require_exportable()
    assert model.name == "model"
    assert (model.family, model.vae_scale_factor, model.native_size) == (Family.sd15, 4, 256)
    assert model.scaling_factor == 0.18215
    loaded = {
        "unet": model.load_unet(torch.float32),
        "vae": model.load_vae(torch.float32),
        "text_encoder": model.load_text_encoder(torch.float32),
    }
    for name, module in loaded.items():
        expected = modules[name].state_dict()
        assert module.state_dict().keys() == expected.keys()
        for key, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)
    loaded = copy.deepcopy(loaded)  # a mapped file's weights lie anywhere, and kernels round as their alignment has it
    torch.manual_seed(1)
    x, states, ids = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 128), torch.randint(0, 500, (1, 16))
    with torch.no_grad():
        for module in modules.values():
            module.eval()
        left = loaded["unet"](x, 9, states).sample
        torch.testing.assert_close(left, modules["unet"](x, 9, states).sample, rtol=0, atol=1e-6)
        left = loaded["vae"].decode(x).sample
        torch.testing.assert_close(left, modules["vae"].decode(x).sample, rtol=0, atol=1e-6)
        left = loaded["text_encoder"](ids).last_hidden_state
        torch.testing.assert_close(left, modules["text_encoder"](ids).last_hidden_state, rtol=0, atol=1e-6)


def test_what_diffusers_itself_makes_of_the_file(checkpoint: Path, tensors: Weights, modules: dict[str, Any]) -> None:
    from diffusers.loaders import single_file_utils as theirs

    made = theirs.convert_ldm_unet_checkpoint(dict(tensors), dict(modules["unet"].config))
    assert made.keys() == modules["unet"].state_dict().keys()
    vae = theirs.convert_ldm_vae_checkpoint(dict(tensors), dict(modules["vae"].config))
    loaded = open_base(checkpoint).load_vae(torch.float32).state_dict()
    assert vae.keys() == loaded.keys()
    for name, tensor in vae.items():
        torch.testing.assert_close(tensor.reshape(loaded[name].shape), loaded[name], rtol=0, atol=0)


def test_schedule_of_the_file(checkpoint: Path, tensors: Weights) -> None:
    config = open_base(checkpoint).scheduler_config
    assert (config["_class_name"], config["beta_schedule"], config["prediction_type"]) == (
        "DDIMScheduler", "scaled_linear", "epsilon",
    )  # fmt: skip
    assert not config["clip_sample"]
    save_file(tensors, checkpoint, metadata={"modelspec.prediction_type": "v"})
    assert open_base(checkpoint).scheduler_config["prediction_type"] == "v_prediction"
    save_file(tensors | {"v_pred": torch.ones(0), "ztsnr": torch.ones(0)}, checkpoint)
    config = open_base(checkpoint).scheduler_config
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_the_same_file_as_a_pickle(checkpoint: Path, tensors: Weights, tmp_path: Path) -> None:
    expected = open_base(checkpoint).load_unet(torch.float32).state_dict()
    torch.save({"state_dict": tensors, "global_step": 1}, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", match="a pickle, which can run code")
    model = open_base(tmp_path / "model.ckpt", allow_pickle=True)
    for name, tensor in model.load_unet(torch.float32).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert model.scheduler_config["prediction_type"] == "epsilon"


def test_text_encoder_without_its_upper_level(checkpoint: Path, tensors: Weights) -> None:
    expected = open_base(checkpoint).load_text_encoder(torch.float32).state_dict()
    save_file({k.replace("transformer.text_model.", "transformer."): v for k, v in tensors.items()}, checkpoint)
    for name, tensor in open_base(checkpoint).load_text_encoder(torch.float32).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_the_tokenizer_must_fit(checkpoint: Path, tensors: Weights) -> None:
    shutil.rmtree(checkpoint.parent / "tokenizer")
    assert str(checkpoint.parent / "tokenizer") in refused(
        checkpoint, match="518 tokens where CLIP's tokenizer has 49408"
    )
    embedding = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    save_file(tensors | {embedding: torch.zeros(49408, 128)}, checkpoint)
    model = open_base(checkpoint)
    assert model.tokenizer.vocabulary["<|endoftext|>"] == 49407
    assert model.tokenizer.max_length == 16


def test_a_unet_or_a_vae_of_its_own(checkpoint: Path, tensors: Weights, tmp_path: Path) -> None:
    base = open_base(checkpoint)
    for prefix, name, key in (
        ("model.diffusion_model.", "unet", "conv_in.bias"),
        ("first_stage_model.", "vae", "decoder.conv_in.bias"),
    ):
        own = {k.removeprefix(prefix): v + 1 for k, v in tensors.items() if k.startswith(prefix)}
        save_file(own, tmp_path / f"{name}.safetensors")
        save_file({f"{prefix}{k}": v for k, v in own.items()}, tmp_path / f"full-{name}.safetensors")
        for file in (f"{name}.safetensors", f"full-{name}.safetensors"):
            model = open_base(checkpoint, **{name: tmp_path / file})
            load = f"load_{name}"
            left = getattr(model, load)(torch.float32).state_dict()[key]
            torch.testing.assert_close(left, getattr(base, load)(torch.float32).state_dict()[key] + 1, rtol=0, atol=0)
            assert model.digest != base.digest


def test_files_that_are_no_checkpoint(checkpoint: Path, tensors: Weights, tmp_path: Path) -> None:
    def written(content: Weights) -> Path:
        save_file(content, tmp_path / "other.safetensors")
        return tmp_path / "other.safetensors"

    one = torch.ones(1)
    refused(written({"lora_unet_x.lora_up.weight": one}), match="a LoRA, not a base model; pass it as --lora")
    refused(written({"down_blocks.0.resnets.0.conv1.weight": one}), match="a UNet alone in diffusers' layout")
    refused(written({"decoder.conv_in.weight": one}), match="a VAE or an encoder alone")
    refused(written({"x": one}), match="not a Stable Diffusion checkpoint")
    for prefix, part in (("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")):
        refused(written({k: v for k, v in tensors.items() if not k.startswith(prefix)}), match=f"so it has no {part}")
    missing = {k: v for k, v in tensors.items() if not k.endswith("first_stage_model.encoder.conv_in.weight")}
    refused(written(missing), match=r"encoder\.conv_in\.weight is missing")
    few = {k: v for k, v in tensors.items() if not k.startswith("model.diffusion_model.input_blocks.8.")}
    refused(written(few), match="8 input blocks with 2 downsamplers")
    wide = "model.diffusion_model.input_blocks.0.0.weight"
    refused(written(tensors | {wide: torch.ones(16, 4, 3, 3)}), match="starts with 16 and goes on with 32")
    gone = {k: v for k, v in tensors.items() if k != "model.diffusion_model.middle_block.0.in_layers.2.weight"}
    extra = tensors | {"model.diffusion_model.control.weight": torch.ones(1), "first_stage_model.loss.x": torch.ones(1)}
    for content, said in (
        (gone, r"mid_block\.resnets\.0\.conv1\.weight"),
        (extra, r"1 tensors too many \(model.*control"),
    ):
        model = open_base(written(content))
        with pytest.raises(ModelError, match=said) as caught:
            model.load_unet(torch.float32)
        one_line(caught.value)
        model.load_vae(torch.float32)
    refused(checkpoint, variant="fp16", match="a single file has no variant 'fp16'")


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", Family.sd3),
        ("double_blocks.0.img_attn.qkv.weight", Family.flux),
        ("cond_stage_model.model.token_embedding.weight", Family.sd21),
    ],
)
def test_other_families_are_told_by_their_names(key: str, family: Family, tmp_path: Path) -> None:
    save_file({key: torch.ones(1)}, tmp_path / "x.safetensors")
    model = open_base(tmp_path / "x.safetensors")
    assert model.family is family
    with pytest.raises(ModelError) as caught:
        model.require_exportable()
    assert "x: " in one_line(caught.value)
    with pytest.raises(ModelError):
        model.load_unet(torch.float32)


def test_an_sdxl_unet_with_its_label_embedding() -> None:
    names = ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"]
    assert family_of_checkpoint(names) is Family.sdxl


def test_linear_projections(modules: dict[str, Any], tensors: Weights, checkpoint: Path) -> None:
    linear = {k: v.flatten(1) if k.endswith(("proj_in.weight", "1.proj_out.weight")) else v for k, v in tensors.items()}
    save_file(linear, checkpoint)
    config = open_base(checkpoint).component_config("unet")
    assert config["use_linear_projection"]
    assert config["attention_head_dim"] == [1, 1, 1]


def open_clip(module: torch.nn.Module, prefix: str, layers: int | None = None) -> Weights:
    """A text encoder's weights as OpenCLIP has them; a further layer of `layers` that nobody reads."""
    own = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}
    result = {
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "ln_final.weight": own["final_layer_norm.weight"], "ln_final.bias": own["final_layer_norm.bias"],
        "logit_scale": torch.ones(()),
    }  # fmt: skip
    if "text_projection.weight" in own:
        result["text_projection"] = own["text_projection.weight"].T.contiguous()
    count = 1 + max(int(name.split(".")[2]) for name in own if name.startswith("encoder.layers."))
    for place in range(layers or count):
        layer = f"encoder.layers.{min(place, count - 1)}"
        block = f"transformer.resblocks.{place}"
        for kind in ("weight", "bias"):
            thirds = [own[f"{layer}.self_attn.{each}_proj.{kind}"] for each in "qkv"]
            result[f"{block}.attn.in_proj_{kind}"] = torch.cat(thirds)
            for theirs, ours in LAYER.items():
                result[f"{block}.{theirs}.{kind}"] = own[f"{layer}.{ours}.{kind}"]
    return {f"{prefix}{name}": tensor.clone() for name, tensor in result.items()}


def xl_modules() -> dict[str, Any]:
    """A small SDXL with what is fixed in it: 32 groups, heads of 64 channels, other depths at each level."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)

    def text(width: int, layers: int, **more: Any) -> Any:
        return CLIPTextConfig(
            vocab_size=518, hidden_size=width, intermediate_size=96, num_hidden_layers=layers,
            num_attention_heads=width // 64, max_position_embeddings=16, bos_token_id=0, eos_token_id=2, **more,
        )  # fmt: skip

    return {
        "unet": UNet2DConditionModel(
            sample_size=128, block_out_channels=(32, 64, 128), layers_per_block=2, attention_head_dim=(1, 1, 2),
            cross_attention_dim=192, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=6 * 256 + 40,
            transformer_layers_per_block=(1, 2, 3),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        "vae": AutoencoderKL(
            block_out_channels=(32, 32, 64), layers_per_block=1, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        ),
        "text_encoder": CLIPTextModel(text(64, 2)),
        "text_encoder_2": CLIPTextModelWithProjection(text(128, 3, projection_dim=40, hidden_act="gelu")),
    }  # fmt: skip


def test_an_sdxl_checkpoint(tmp_path: Path) -> None:
    """Every weight of two text encoders, a UNet of unequal depths and a VAE; and what diffusers makes of the UNet."""
    from diffusers.loaders import single_file_utils as theirs

    modules = xl_modules()
    owners = {name: [each for each, _ in module.named_modules()] for name, module in modules.items()}
    tensors = original(modules["unet"], unet_ldm_names(owners["unet"], 2), "model.diffusion_model.")
    tensors |= original(modules["vae"], vae_ldm_names(owners["vae"], 3), "first_stage_model.")
    level = "" if hasattr(modules["text_encoder"], "text_model") else "text_model."
    first = modules["text_encoder"].state_dict()
    tensors |= {f"conditioner.embedders.0.transformer.{level}{name}": each for name, each in first.items()}
    second = open_clip(modules["text_encoder_2"], "conditioner.embedders.1.model.")
    tensors |= second
    for name in ("tokenizer", "tokenizer_2"):
        tiny_tokenizer(tmp_path / name)
    path = tmp_path / "xl.safetensors"
    save_file(tensors, path)
    model = open_base(path)
    model.require_exportable()
    assert (model.family, model.zero_empty, model.scaling_factor) == (Family.sdxl, True, 0.13025)
    assert model.vae_config["force_upcast"] is True
    assert model.unet_config["transformer_layers_per_block"] == [1, 2, 3]
    assert set(model.tokenizers) == {"tokenizer", "tokenizer_2"}
    for name, module in modules.items():
        loaded = model.load(name, torch.float32).state_dict()
        assert loaded.keys() == module.state_dict().keys()
        for key, tensor in module.state_dict().items():
            torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=0)
    ids = torch.randint(0, 500, (2, 16))
    mine = model.load("text_encoder_2", torch.float32)(ids)
    torch.testing.assert_close(mine.text_embeds, modules["text_encoder_2"].eval()(ids).text_embeds, rtol=0, atol=1e-6)
    made = theirs.convert_ldm_unet_checkpoint(dict(tensors), dict(modules["unet"].config))
    assert made.keys() == modules["unet"].state_dict().keys()
    save_file(tensors | {"conditioner.embedders.1.model.extra": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=r"1 tensors too many \(conditioner\.embedders\.1\.model\.extra"):
        open_base(path).load("text_encoder_2", torch.float32)
    save_file({name: each for name, each in tensors.items() if "resblocks.1.attn.in_proj_bias" not in name}, path)
    with pytest.raises(ModelError, match=r"3 of .* tensors are missing"):
        open_base(path).load("text_encoder_2", torch.float32)
    save_file({name: each for name, each in tensors.items() if name not in second}, path)
    refused(path, match="so it has no text_encoder_2")


def test_a_checkpoint_of_stable_diffusion_2(tensors: Weights, tmp_path: Path) -> None:
    """Its text encoder without the last layer; a file that does not say what it predicts is refused."""
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=518, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=2, pad_token_id=1, hidden_act="gelu",
    ))  # fmt: skip
    tiny_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "two.safetensors"
    own = {name: each for name, each in tensors.items() if not name.startswith("cond_stage_model.")}
    own |= open_clip(text, "cond_stage_model.model.", layers=3)
    save_file(own, path)
    with pytest.raises(ModelError, match="does not say whether it predicts epsilon or v; pass its diffusers folder"):
        open_base(path).require_exportable()
    save_file(own, path, metadata={"modelspec.prediction_type": "v"})
    model = open_base(path)
    assert (model.family, model.scheduler_config["prediction_type"]) == (Family.sd21, "v_prediction")
    loaded = model.load("text_encoder", torch.float32).state_dict()
    for key, tensor in text.state_dict().items():
        torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=0)
    save_file(own, path, metadata={"modelspec.prediction_type": "epsilon"})
    assert open_base(path).scheduler_config["prediction_type"] == "epsilon"

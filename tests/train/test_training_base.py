import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hypersd_export.diffusion import PredictionType
from hypersd_export.errors import ModelError, OptionError
from hypersd_export.model.base import open_base
from hypersd_export.model.families import Family
from tests.lora_files import one_line
from tests.tiny import tiny_sd
from tests.train.tiny_sdxl import tiny_sdxl
from tests.unit.test_model_single_file import checkpoint, modules, tensors  # noqa: F401
from trainer.base import encode_pictures, noise_schedule, open_training_base

PROMPTS = ["a cat", "a dog! on a very very long rug that is cut off", "", "kočka 猫 🐈"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def folder(tiny_base, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(name: object, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        open_training_base(str(name))
    one_line(caught.value)


def same(mine: torch.Tensor | None, theirs: torch.Tensor) -> None:
    assert mine is not None
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_the_builtin_base_is_described_as_the_exporter_describes_it():
    base, exported = open_training_base("builtin"), open_base("builtin")
    assert (base.name, base.family, base.digest) == ("builtin", Family.sd15, exported.digest)
    assert base.prediction_type is PredictionType.EPSILON
    assert base.native_size == 32
    assert base.latent_shape(32) == (8, 8, 8)  # an f4 VAE of 8 channels
    with pytest.raises(OptionError, match="multiple of 4"):
        base.latent_shape(30)


def test_conditioning_is_that_of_stable_diffusion_pipeline(tiny_base):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    expected, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    encoder = open_training_base(str(tiny_base)).prompt_encoder(torch.float32)
    mine = encoder(PROMPTS, size=(16, 16))
    assert mine.pooled is None
    assert mine.time_ids is None
    same(mine.states, expected)
    same(encoder.empty().states, negative[:1])
    many = encoder(PROMPTS * 40, size=(16, 16))  # more than go through the encoder at once
    torch.testing.assert_close(many.states[-4:], expected, rtol=0, atol=1e-5)


def test_a_text_encoder_that_asks_for_the_mask_gets_it(folder):
    from diffusers import StableDiffusionPipeline

    plain = open_training_base(str(folder)).prompt_encoder(torch.float32)(["a cat"], size=(16, 16))
    edit(folder / "text_encoder" / "config.json", use_attention_mask=True)
    expected, _ = StableDiffusionPipeline.from_pretrained(folder).encode_prompt(["a cat"], "cpu", 1, False)
    masked = open_training_base(str(folder)).prompt_encoder(torch.float32)(["a cat"], size=(16, 16))
    same(masked.states, expected)
    assert (masked.states - plain.states).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_conditioning_is_that_of_stable_diffusion_xl_pipeline(sdxl, size):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    states, no_states, pooled, no_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
    time_ids = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, text_encoder_projection_dim=20)
    encoder = open_training_base(str(sdxl)).prompt_encoder(torch.float32)
    mine, empty = encoder(PROMPTS, size=size), encoder.empty(size=size)
    same(mine.states, states)
    same(mine.pooled, pooled)
    same(mine.time_ids, time_ids.repeat(4, 1))
    assert not no_states.any()  # force_zeros_for_empty_prompt
    same(empty.states, no_states[:1])
    same(empty.pooled, no_pooled[:1])
    same(empty.time_ids, time_ids)
    same(encoder.empty().time_ids, torch.tensor([[16.0, 16, 0, 0, 16, 16]]))  # the native size


def test_an_sdxl_base_without_forced_zeros_encodes_the_empty_prompt(sdxl, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    copy = Path(shutil.copytree(sdxl, tmp_path / "model"))
    edit(copy / "model_index.json", force_zeros_for_empty_prompt=False)
    _, negative, _, pooled = StableDiffusionXLPipeline.from_pretrained(copy).encode_prompt(["x"], device="cpu")
    empty = open_training_base(str(copy)).prompt_encoder(torch.float32).empty()
    same(empty.states, negative)
    same(empty.pooled, pooled)
    assert empty.states.abs().max() > 0.1


def test_an_sdxl_base_loads_whole_and_its_unet_takes_the_conditioning(sdxl):
    from diffusers import StableDiffusionXLPipeline

    base, pipeline = open_training_base(str(sdxl)), StableDiffusionXLPipeline.from_pretrained(sdxl)
    assert base.family is Family.sdxl
    assert base.digest == open_base(sdxl).digest
    assert (base.native_size, base.latent_shape(32)) == (16, (4, 8, 8))
    unet, vae = base.load_unet(torch.float32), base.load_vae(torch.float32)
    for mine, theirs in ((unet, pipeline.unet), (vae, pipeline.vae)):
        assert not mine.training
        assert not any(p.requires_grad for p in mine.parameters())
        for name, tensor in theirs.state_dict().items():
            same(mine.state_dict()[name], tensor)
    text = base.prompt_encoder(torch.float32)(["a cat", "a dog"], size=(16, 16))
    x = torch.randn(2, 4, 4, 4)
    assert unet(x, torch.tensor([1, 999]), **text.unet_kwargs()).sample.shape == x.shape
    assert base.prompt_encoder(torch.float16)(["a cat"], size=(16, 16)).states.dtype is torch.float16


def test_the_schedule_is_that_of_the_config(folder):
    from diffusers import DDIMScheduler, PNDMScheduler

    config = folder / "scheduler" / "scheduler_config.json"
    stated = {"beta_start": 0.001, "beta_end": 0.014, "beta_schedule": "scaled_linear"}
    PNDMScheduler(**stated, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    base = open_training_base(str(folder))
    expected = DDIMScheduler(**stated).alphas_cumprod
    assert base.alphas_cumprod.dtype is torch.float64
    torch.testing.assert_close(base.alphas_cumprod.float(), expected, rtol=1e-5, atol=1e-7)
    assert base.prediction_type is PredictionType.V_PREDICTION
    edit(config, rescale_betas_zero_snr=True)
    assert open_training_base(str(folder)).alphas_cumprod[-1] == 0
    edit(config, prediction_type="flow?")
    refused(folder, match=r"scheduler_config\.json cannot be used")
    edit(config, _class_name="FlowMatchEulerDiscreteScheduler")
    refused(folder, match="FlowMatchEulerDiscreteScheduler")
    edit(config, _class_name="DDIMScheduler", trained_betas=[0.1])
    refused(folder, match="trained_betas")


def test_what_a_config_leaves_out_has_its_class_defaults():
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    for cls in (EulerDiscreteScheduler, LCMScheduler):
        alphas, prediction_type = noise_schedule({"_class_name": cls.__name__}, "x")
        torch.testing.assert_close(alphas.float(), cls().alphas_cumprod, rtol=1e-4, atol=1e-7)
        assert prediction_type is PredictionType.EPSILON


def test_bases_that_cannot_be_distilled_are_refused_by_name(folder, sdxl, tmp_path):
    refused("no/such/folder/at/all", match="no such file or folder")
    unet = folder / "unet" / "config.json"
    edit(unet, in_channels=9)
    refused(folder, match="takes 9 channels")
    edit(unet, in_channels=4, time_cond_proj_dim=256)
    refused(folder, match="time_cond_proj_dim=256")
    edit(unet, time_cond_proj_dim=None)
    edit(folder / "vae" / "config.json", latents_mean=[0.0] * 4)
    refused(folder, match="latents_mean")
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    refused(folder, match="FLUX .* cannot be distilled")
    refiner = Path(shutil.copytree(sdxl, tmp_path / "refiner"))
    edit(refiner / "model_index.json", text_encoder=[None, None])
    refused(refiner, match="text_encoder is None, where CLIPTextModel")


def test_an_sdxl_base_with_holes_is_refused(sdxl, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(sdxl, tmp_path / "model"))
    weights = copy / "text_encoder_2" / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "layers.1" not in k}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match="tensors are missing") as caught:
        open_training_base(str(copy)).prompt_encoder(torch.float32)
    one_line(caught.value)
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(copy, match="truncated")
    weights.unlink()
    refused(copy, match="no weights")


def test_a_hub_id_fetches_what_sdxl_has_and_a_failure_is_one_line(sdxl, monkeypatch):
    import huggingface_hub

    asked: list[str] = []

    def snapshot(hub_id, *, revision, allow_patterns):
        asked.extend(allow_patterns)
        return str(sdxl)

    def broken(hub_id, *, revision, allow_patterns):
        if any("text_encoder_2" in pattern for pattern in allow_patterns):
            raise ConnectionError("no route")
        return str(sdxl)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert open_training_base("owner/sdxl").family is Family.sdxl
    weights = [pattern for pattern in asked if pattern.endswith("l.safetensors")]
    assert weights == [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
    ]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    refused("owner/sdxl", match="hub cannot be reached")


def test_digests_follow_what_they_depend_on(folder, tmp_path, sdxl):
    before = open_training_base(str(folder))
    digests = before.digest, before.encoders_digest
    other = Path(shutil.copytree(tiny_sd(tmp_path / "second", seed=1), tmp_path / "other"))
    shutil.rmtree(folder / "unet")
    shutil.copytree(other / "unet", folder / "unet")  # a fine-tuned UNet beside the same VAE and text encoder
    after = open_training_base(str(folder))
    assert after.digest != digests[0]
    assert after.encoders_digest == digests[1]
    shutil.copytree(other / "vae", folder / "vae", dirs_exist_ok=True)
    assert open_training_base(str(folder)).encoders_digest != digests[1]
    copy = Path(shutil.copytree(sdxl, tmp_path / "sdxl"))
    digest = open_training_base(str(copy)).encoders_digest
    edit(copy / "text_encoder_2" / "config.json", note=1)
    assert open_training_base(str(copy)).encoders_digest != digest


def test_a_single_file_is_a_base(checkpoint, modules):  # noqa: F811
    base = open_training_base(str(checkpoint))
    assert (base.name, base.digest, base.native_size) == ("model", open_base(checkpoint).digest, 256)
    assert base.prediction_type is PredictionType.EPSILON
    text = base.prompt_encoder(torch.float32)(["a cat"], size=(16, 16))
    ids = base._load_tokenizer("tokenizer", base.model.tokenizer_folder)(
        ["a cat"], padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        expected = modules["text_encoder"].eval()(ids.input_ids).last_hidden_state
    same(text.states, expected)
    assert len(base.encoders_digest) == 64


def test_a_checkpoint_without_a_tokenizer_has_the_packaged_one(tiny_base):
    base = open_training_base(str(tiny_base))
    without = replace(base, model=replace(base.model, tokenizer_folder=None))
    ids = without._load_tokenizer("tokenizer", None)(["a photo of a cat"]).input_ids
    assert ids == [[49406, 320, 1125, 539, 320, 2368, 49407]]  # openai/clip-vit-large-patch14's


def test_an_sdxl_file_without_tokenizers_pads_as_both_do(sdxl):
    base = open_training_base(str(sdxl))
    bare = replace(base, model=replace(base.model, tokenizer_folder=None, tokenizer_2_folder=None))
    first, second = (bare._load_tokenizer(*each) for each in bare._tokenizer_folders().items())
    rows = [each(["a"], padding="max_length", max_length=6).input_ids[0] for each in (first, second)]
    assert rows == [[49406, 320, 49407, 49407, 49407, 49407], [49406, 320, 49407, 0, 0, 0]]


def test_encoded_pictures_are_the_scaled_mode(tiny_base):
    from diffusers import AutoencoderKL

    vae = open_training_base(str(tiny_base)).load_vae(torch.float32)
    pictures = torch.rand(3, 3, 16, 16) * 2 - 1
    expected = AutoencoderKL.from_pretrained(tiny_base / "vae").encode(pictures).latent_dist.mode() * 0.5
    with torch.autocast("cpu", torch.bfloat16):  # a training's autocast must not reach the VAE
        torch.testing.assert_close(encode_pictures(vae, pictures), expected.detach(), rtol=0, atol=1e-6)

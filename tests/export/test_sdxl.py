"""SDXL: two text encoders, a pooled state and the picture's size for the UNet, and zeros for an empty prompt."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from typer.testing import CliRunner

from hypersd_export.bundle.texts import ZERO_EMPTY, encoders_of
from hypersd_export.errors import ModelError, OptionError
from hypersd_export.export import export
from hypersd_export.graphs.spec import Component
from hypersd_export.model.base import open_base
from hypersd_export.runtime.cli import app
from hypersd_export.runtime.images import to_sample
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.runtime.text import SizeHints
from hypersd_export.spec import PlanFlags
from hypersd_export.verify.metrics import psnr
from tests.lora_files import ATTENTION, TEXT_ATTENTION, kohya, random_pairs, write
from tests.train.tiny_sdxl import POOLED, WIDTH, WIDTH_2, tiny_sdxl

PROMPT, NEGATIVE = "a cat and a dog", "dog"
PLAN = PlanFlags(steps=(2,), scheduler="ddim", guidance=5.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def lora_file(base, tmp_path_factory):
    """A random LoRA for the UNet and both text encoders, by kohya's names."""
    modules, tensors = open_base(base), {}
    for seed, (component, te) in enumerate(
        {"unet": "", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}.items()
    ):
        ends = TEXT_ATTENTION if te else ATTENTION
        pairs = random_pairs(modules.load(component, torch.float32), ends, seed=seed)
        bare = {name.removeprefix("text_model."): pair for name, pair in pairs.items()}
        tensors |= kohya(bare, component, te=te)
    return write(tmp_path_factory.mktemp("lora") / "xl.safetensors", tensors)


@pytest.fixture(scope="module")
def spec(base, lora_file, tiny_spec):
    return replace(tiny_spec, base=str(base), loras=(f"{lora_file}:0.7",), plan=PLAN)


@pytest.fixture(scope="module")
def exported(spec, tmp_path_factory):
    return export(replace(spec, out=tmp_path_factory.mktemp("bundles") / "xl"), isolate=False)


@pytest.fixture(scope="module")
def pipeline(exported):
    return Pipeline.from_bundle(exported.path)


@pytest.fixture(scope="module")
def theirs(base, exported, lora_file):
    """diffusers' own pipeline with the LoRA loaded and the bundle's scheduler; draws from our noise."""
    own = StableDiffusionXLPipeline.from_pretrained(base)
    own.load_lora_weights(lora_file.parent, weight_name=lora_file.name)
    own.fuse_lora(lora_scale=0.7, components=["unet", "text_encoder", "text_encoder_2"])
    own.scheduler = DDIMScheduler.from_pretrained(exported.path / "scheduler")
    own.set_progress_bar_config(disable=True)

    def draw(noise, **options):
        picture = own(
            PROMPT, latents=torch.from_numpy(noise), num_inference_steps=2, guidance_scale=5.0, height=16, width=16,
            output_type="np", **options,
        ).images[0]  # fmt: skip
        return np.round(picture * 255)

    return draw


def noise_of(seed):
    return np.random.default_rng(seed).standard_normal((1, 4, 4, 4)).astype(np.float32)


def closeness(mine, theirs):
    return np.abs(np.asarray(mine).astype(float) - theirs).max()


def test_parts_shapes_and_parity(exported):
    shapes = exported.manifest.options["shapes"]
    assert (shapes["text_width"], shapes["pooled"], shapes["unet_batch"]) == (WIDTH + WIDTH_2, POOLED, 2)
    assert set(exported.manifest.parity) == {*Component, "image"}
    assert all(figures["psnr_db"] > 110 for figures in exported.manifest.parity.values())
    index = json.loads((exported.path / "model_index.json").read_text())
    assert (index["_class_name"], index[ZERO_EMPTY]) == ("StableDiffusionXLPipeline", True)
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert {report["component"] for report in exported.manifest.targets["onnx"]["fused"]} == {
        "unet", "text_encoder", "text_encoder_2",
    }  # fmt: skip


def test_the_second_tokenizer_pads_with_its_own_token(exported, pipeline):
    first, second = pipeline.texts.ids("cat")
    assert first[0, -1] != second[0, -1]
    np.testing.assert_array_equal(first[0, :3], second[0, :3])
    for name, row in (("prompt_ids", 0), ("prompt_ids_2", 1)):
        stored = np.load(exported.path / "golden" / f"{name}.npy")
        golden = json.loads((exported.path / "golden" / "golden.json").read_text())["prompt"]
        np.testing.assert_array_equal(stored, pipeline.texts.ids(golden)[row])
    assert pipeline.golden().passed


@pytest.mark.parametrize("negative", [None, NEGATIVE], ids=["zeros", "negative"])
def test_the_picture_is_that_of_diffusers(negative, pipeline, theirs):
    noise = noise_of(1)
    mine = pipeline(PROMPT, negative_prompt=negative or "", noise=noise).images[0]
    assert closeness(mine, theirs(noise, negative_prompt=negative)) <= 1


def test_the_sizes_that_it_is_told(pipeline, theirs):
    noise, hints = noise_of(2), SizeHints(original=(64, 32), crop=(3, 5), target=(24, 48))
    mine = pipeline(PROMPT, noise=noise, size_hints=hints).images[0]
    told = theirs(noise, original_size=(32, 64), crops_coords_top_left=(5, 3), target_size=(48, 24))
    assert closeness(mine, told) <= 1
    assert closeness(mine, theirs(noise)) > 1


def test_an_empty_prompt_is_text_where_the_model_says_so(exported, theirs, tmp_path):
    bundle = shutil.copytree(exported.path, tmp_path / "text")
    path = bundle / "text_encoder_2" / "config.json"
    config = json.loads(path.read_text())
    assert config[ZERO_EMPTY] is True
    path.write_text(json.dumps(config | {ZERO_EMPTY: False}))
    noise = noise_of(3)
    mine = Pipeline.from_bundle(bundle, check=False)(PROMPT, noise=noise).images[0]
    assert closeness(mine, theirs(noise, negative_prompt="")) <= 1  # given by name, diffusers encodes it
    assert closeness(mine, theirs(noise)) > 1


def test_image_to_image(pipeline):
    first = pipeline(PROMPT, seed=4).images[0]
    again = pipeline(PROMPT, seed=5, init_image=first, strength=0.5)
    assert again.latents.shape == (1, 4, 4, 4)
    assert to_sample(again.images[0], 16, 16).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("unroll", [False, True])
def test_the_single_graph_is_the_loop(unroll, spec, pipeline, tmp_path):
    done = export(replace(spec, single_graph=True, unroll=unroll, out=tmp_path / "one"), isolate=False)
    inputs = done.manifest.targets["onnx"]["single_graph"]["inputs"]
    assert list(inputs) == [
        "input_ids", "input_ids_2", "negative_input_ids", "negative_input_ids_2", "time_ids", "noise",
    ]  # fmt: skip
    one, hints = Pipeline.from_bundle(done.path), SizeHints(original=(64, 32))
    for options in ({}, {"negative_prompt": NEGATIVE}, {"size_hints": hints}):
        mine, loop = (each(PROMPT, seed=6, num_images=2, **options) for each in (one, pipeline))
        assert psnr(mine.latents, loop.latents) > 100
        assert all(closeness(a, np.asarray(b)) <= 1 for a, b in zip(mine.images, loop.images, strict=True))
    assert one.golden().passed


@pytest.mark.slow
def test_half_precision(spec, tmp_path):
    done = export(replace(spec, precision="fp16", out=tmp_path / "half"), isolate=False)
    parity = done.manifest.parity
    assert all(60 < parity[name]["psnr_db"] < 100 for name in Component)
    assert parity["image"]["psnr_db"] > 45


def test_names_of_the_states():
    configs = {"text_encoder": {"num_hidden_layers": 12}, "text_encoder_2": {"num_hidden_layers": 32}}
    first, second = encoders_of(configs)
    assert (first.states, second.states, second.pooled) == ("hidden_states.11", "hidden_states.31", "text_embeds")
    assert (first.suffix, second.suffix) == ("", "_2")
    (only,) = encoders_of({"text_encoder": {}})
    assert only.outputs == ("last_hidden_state",)


def test_what_does_not_fit_is_refused(base, tiny_base, tmp_path):
    refiner = shutil.copytree(base, tmp_path / "refiner")
    path = refiner / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"projection_class_embeddings_input_dim": 5 * 8 + POOLED}))
    with pytest.raises(ModelError, match=r"told 5 numbers .* refiner"):
        open_base(refiner).require_exportable()
    with pytest.raises(ModelError, match="addition_embed_type=None, where a UNet of SDXL"):
        open_base(base, unet=tiny_base / "unet").require_exportable()
    with pytest.raises(ModelError, match=r"addition_embed_type='text_time', where a UNet of Stable Diffusion 1\.x"):
        open_base(tiny_base, unet=base / "unet").require_exportable()
    index = json.loads((base / "model_index.json").read_text())
    other = shutil.copytree(base, tmp_path / "other")
    (other / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": [None, None]}))
    with pytest.raises(ModelError, match="its text_encoder_2 is None, where CLIPTextModelWithProjection"):
        open_base(other)


def test_sizes_are_checked():
    with pytest.raises(OptionError, match="original size 0x4"):
        SizeHints(original=(0, 4))
    with pytest.raises(OptionError, match="crop -1,0"):
        SizeHints(crop=(-1, 0))
    np.testing.assert_array_equal(SizeHints(crop=(3, 5)).time_ids((24, 16)), [[16, 24, 5, 3, 16, 24]])


def test_the_command_line_says_the_sizes(exported, tmp_path, pipeline):
    out = tmp_path / "cat.png"
    arguments = [str(exported.path), "--prompt", PROMPT, "--seed", "9", "--out", str(out)]
    hints = ["--original-size", "64x32", "--crop", "3,5", "--target-size", "24x48"]
    assert CliRunner().invoke(app, [*arguments, *hints]).exit_code == 0
    told = SizeHints(original=(64, 32), crop=(3, 5), target=(24, 48))
    np.testing.assert_array_equal(np.asarray(Image.open(out)), pipeline(PROMPT, seed=9, size_hints=told).images[0])
    refused = CliRunner().invoke(app, [*arguments, "--crop", "3;5"])
    assert (refused.exit_code, refused.stderr) == (1, "error: --crop 3;5: two whole numbers with ',' between them\n")


def test_other_families_are_told_nothing(tiny_base, tiny_spec, tmp_path):
    done = export(replace(tiny_spec, base=str(tiny_base), out=tmp_path / "sd"), isolate=False)
    with pytest.raises(OptionError, match="are what SDXL is told"):
        Pipeline.from_bundle(done.path)(PROMPT, size_hints=SizeHints())

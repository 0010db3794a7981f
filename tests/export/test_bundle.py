"""What an export gives: a bundle that is complete, valid, equal to torch, and equal to diffusers' own pipeline."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from hypersd_export.bundle import schemas
from hypersd_export.bundle.manifest import read_manifest, verify_files
from hypersd_export.diffusion import initial_noise
from hypersd_export.export import ASSEMBLE, LOAD, VERIFY
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.verify.metrics import psnr
from tests.export.conftest import PLANS

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
PROMPT = "a cat and a dog"


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(params=["exported", "lora_exported"])
def bundle(request):
    return request.getfixturevalue(request.param).path


def test_layout(bundle):
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    step_noise = {"golden/step_noise.npy"} if bundle.name == "lora" else set()
    golden = ("golden.json", "initial_noise.npy", "prompt_ids.npy", "negative_ids.npy", "latents.npy", "expected.png")
    tokenizer = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    assert files == step_noise | {
        "manifest.json", "plan.json", "model_index.json", "README.md", "LICENSES", "scheduler/scheduler_config.json",
        *(f"golden/{name}" for name in golden), *(f"tokenizer/{name}" for name in tokenizer),
        *(f"{component}/{name}" for component in COMPONENTS for name in ("model.onnx", "config.json")),
    }  # fmt: skip
    verify_files(bundle)


def test_json_files_follow_their_schemas(bundle):
    from jsonschema import Draft202012Validator

    for name, path in (("manifest", "manifest.json"), ("plan", "plan.json"), ("golden", "golden/golden.json")):
        Draft202012Validator(schemas.load(name)).validate(read(bundle / path))


def test_nothing_names_a_path_of_this_machine(bundle, tiny_base, lora_file):
    for path in bundle.rglob("*"):
        if path.suffix in (".json", ".md", ".txt", ".onnx") or path.name == "LICENSES":
            content = path.read_bytes()
            for folder in (tiny_base, lora_file.parent, bundle):
                assert str(folder).encode() not in content, path


def test_the_torch_free_runtime_reproduces_golden(bundle):
    golden = Pipeline.from_bundle(bundle).golden()
    assert golden.passed
    assert golden.psnr_db > 50
    assert golden.ids_equal
    assert golden.latents_max_abs < 1e-4


def test_the_manifest_tells_of_parity_stages_and_options(exported):
    manifest = read_manifest(exported.path)
    assert set(manifest.parity) == {*COMPONENTS, "image"}
    assert all(manifest.parity[name]["psnr_db"] > 100 for name in COMPONENTS)
    assert [step["t"] for step in manifest.parity["unet"]["per_step"]] == [999, 499, 749, 249]
    assert [step["steps"] for step in manifest.parity["image"]["per_step"]] == [2, 4]
    assert [stage["name"] for stage in manifest.stages] == [
        LOAD, *(f"onnx-{component}" for component in COMPONENTS), ASSEMBLE, VERIFY,
    ]  # fmt: skip
    assert all(stage["seconds"] >= 0 and stage["peak_mb"] > 50 for stage in manifest.stages)
    # the other stages may come from the cache that the workers of xdist share; test_interrupted has their reuse
    assert not any(stage["cached"] for stage in manifest.stages if stage["name"] in (LOAD, ASSEMBLE))
    assert (manifest.options["width"], manifest.options["height"], manifest.options["batch"]) == (16, 16, 1)
    assert manifest.targets["onnx"]["opset"] == 20
    assert manifest.versions["torch"] == torch.__version__
    assert exported.digest == Pipeline.from_bundle(exported.path).digest


def test_the_manifest_of_a_fused_export(lora_exported, lora_file):
    manifest = read_manifest(lora_exported.path)
    [record] = manifest.loras
    assert (record["file"], record["scale"], record["format"]) == (lora_file.name, 0.8, "kohya")
    assert record["plan_source"] == f"metadata of {lora_file.name}"
    fused = {report["component"]: report for report in manifest.targets["onnx"]["fused"]}
    assert set(fused) == {"text_encoder", "unet"}
    assert all(report["relative_norm"] > 0 and report["zero_modules"] == 0 for report in fused.values())
    options = manifest.options
    assert (options["width"], options["height"], options["batch"], options["shapes"]["unet_batch"]) == (24, 16, 2, 4)
    assert min(manifest.parity[name]["psnr_db"] for name in COMPONENTS) > 100
    plans = read(lora_exported.path / "plan.json")
    assert [entry["plan"] for entry in plans["entries"]] == [plan.to_json() for plan in PLANS]


def test_component_configs_say_what_loaders_need(bundle):
    unet, vae = read(bundle / "unet/config.json"), read(bundle / "vae_decoder/config.json")
    assert (unet["time_cond_proj_dim"], unet["in_channels"]) == (None, 4)
    assert unet["sample_size"] == ([4, 6] if bundle.name == "lora" else 4)
    assert (vae["scaling_factor"], vae["latent_channels"], len(vae["block_out_channels"])) == (0.5, 4, 3)
    assert read(bundle / "vae_encoder/config.json") == vae
    assert read(bundle / "text_encoder/config.json")["max_position_embeddings"] == 16
    index = read(bundle / "model_index.json")
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    scheduler = read(bundle / "scheduler/scheduler_config.json")
    assert index["scheduler"] == ["diffusers", scheduler["_class_name"]]


def diffusers_image(pipeline, bundle, *, steps: int, guidance: float, seed: int, index: int = 0) -> np.ndarray:
    """The picture of diffusers' own pipeline, with our noise and the scheduler that the bundle carries or DDIM."""
    config = read(bundle / "scheduler/scheduler_config.json")
    pipeline.scheduler = DDIMScheduler.from_config(
        {**config, "_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    )
    pipeline.set_progress_bar_config(disable=True)
    size = {key: read(bundle / "manifest.json")["options"][key] for key in ("width", "height")}
    shape = (4, size["height"] // 4, size["width"] // 4)
    noise = torch.from_numpy(initial_noise(seed=seed, index=index, shape=shape)[None])
    result = pipeline(
        PROMPT, num_inference_steps=steps, guidance_scale=guidance, latents=noise, output_type="np", **size
    )
    return (result.images[0] * 255).round().astype(np.uint8)


def test_the_picture_is_that_of_diffusers_own_pipeline(exported, tiny_base):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    theirs = diffusers_image(pipeline, exported.path, steps=4, guidance=1.0, seed=5)
    ours = Pipeline.from_bundle(exported.path)(PROMPT, steps=4, seed=5).images[0]
    assert psnr(np.asarray(ours), theirs) > 50


def test_the_fused_picture_is_that_of_diffusers_with_the_lora_loaded(lora_exported, tiny_base, lora_file):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.load_lora_weights(lora_file.parent, weight_name=lora_file.name)
    pipeline.fuse_lora(lora_scale=0.8)
    images = Pipeline.from_bundle(lora_exported.path)(PROMPT, steps=2, seed=5, num_images=3).images
    for index in (0, 2):  # in the first full batch and in the second, which is filled up
        theirs = diffusers_image(pipeline, lora_exported.path, steps=2, guidance=3.0, seed=5, index=index)
        assert psnr(np.asarray(images[index]), theirs) > 50
    plain = StableDiffusionPipeline.from_pretrained(tiny_base)
    unfused = diffusers_image(plain, lora_exported.path, steps=2, guidance=3.0, seed=5, index=2)
    assert psnr(theirs, unfused) < 40


def test_golden_is_torchs_and_holds_the_noise_of_the_plan(lora_exported):
    folder = lora_exported.path / "golden"
    golden = read(folder / "golden.json")
    assert (golden["steps"], golden["guidance"], golden["seed"], golden["min_psnr_db"]) == (3, 3.0, 0, 50.0)
    np.testing.assert_array_equal(
        np.load(folder / "initial_noise.npy"), initial_noise(seed=0, index=0, shape=(4, 4, 6))[None]
    )
    assert np.load(folder / "step_noise.npy").shape == (2, 1, 4, 4, 6)  # TCD's last step adds none
    assert np.load(folder / "prompt_ids.npy").shape == (1, 16)
    assert np.asarray(Image.open(folder / "expected.png")).shape == (16, 24, 3)


def test_the_card_names_plan_base_and_parity(bundle):
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert "use_io_binding=False" in card
    assert "num_inference_steps=" in card
    assert read_manifest(bundle).base["digest"][:16] in card
    assert "not stated by the base" in (bundle / "LICENSES").read_text(encoding="utf-8")


def test_the_same_seed_is_the_same_picture(exported):
    pipeline = Pipeline.from_bundle(exported.path)
    first, second, other = (np.asarray(pipeline(PROMPT, seed=seed).images[0]) for seed in (3, 3, 4))
    assert psnr(first, second) == math.inf
    assert psnr(first, other) < 40

"""The pipeline against NumPy: every picture of the hand-made bundle is known exactly."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersd_export.bundle.digest import sha256_file
from hypersd_export.diffusion.noise import initial_noise, step_noise
from hypersd_export.diffusion.plan import FewStepPlan, Guidance, GuidanceKind, Solver
from hypersd_export.errors import BundleError, MissingBackend, OptionError
from hypersd_export.runtime import Pipeline
from hypersd_export.runtime.onnx import OnnxGraph
from hypersd_export.runtime.tokenizer import PromptTruncated
from tests.bundles import (
    CFG_PLANS,
    CHANNELS,
    HEIGHT,
    PLAIN_PLANS,
    SCALING,
    WIDTH,
    ids_of,
    latents_of,
    make_bundle,
    pixels_of,
    seal,
    states_of,
)

SHAPE = (CHANNELS, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def cfg_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("cfg") / "bundle")


@pytest.fixture(scope="module")
def plain_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("plain") / "bundle", PLAIN_PLANS)


@pytest.fixture(scope="module")
def cfg(cfg_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(cfg_bundle)


@pytest.fixture(scope="module")
def plain(plain_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(plain_bundle)


@pytest.fixture
def copy(cfg_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cfg_bundle, tmp_path / "bundle"))


def known_latents(
    plan: FewStepPlan, prompt: str, negative: str | None, weight: float, seed: int, index: int
) -> np.ndarray:
    """By NumPy alone; `negative` None without guidance."""
    return latents_of(
        plan,
        initial_noise(seed=seed, index=index, shape=SHAPE),
        states_of(ids_of(prompt)),
        None if negative is None else states_of(ids_of(negative)),
        weight,
        lambda step: step_noise(seed=seed, index=index, step=step, shape=SHAPE),
    )


def assert_picture(image: Image.Image, latents: np.ndarray) -> None:
    difference = np.asarray(image).astype(int) - pixels_of(latents)
    assert np.abs(difference).max() <= 1  # a float32 that falls on the other side of a half
    assert (difference != 0).mean() < 0.01


@pytest.mark.parametrize("plan", CFG_PLANS, ids=lambda plan: str(plan.solver))
def test_with_guidance(cfg: Pipeline, plan: FewStepPlan) -> None:
    result = cfg("cat hat", negative_prompt="dog", steps=plan.num_steps, seed=3, num_images=2)
    assert cfg.size == (2 * WIDTH, 2 * HEIGHT)
    for index in range(2):
        latents = known_latents(plan, "cat hat", "dog", 3.0, 3, index)
        np.testing.assert_allclose(result.latents[index], latents, rtol=0, atol=5e-6)
        assert_picture(result.images[index], latents)
    assert (result.plan.plan, result.guidance, result.seed) == (plan, 3.0, 3)


def test_the_first_table_is_the_default(cfg: Pipeline) -> None:
    assert cfg("cat").plan.steps == 4
    with pytest.raises(OptionError, match="steps 3: this bundle has tables for 4, 2"):
        cfg("cat", steps=3)


def test_without_guidance(plain: Pipeline) -> None:
    result = plain("cat", seed=2**64 - 1)
    latents = known_latents(PLAIN_PLANS[0], "cat", None, 1.0, 2**64 - 1, 0)
    np.testing.assert_allclose(result.latents[0], latents, rtol=0, atol=5e-6)
    assert result.guidance is None


@pytest.mark.parametrize(("scale", "weight"), [(5.0, 5.0), (1.0, 1.0), (0.0, 1.0)])
def test_guidance_override(cfg: Pipeline, scale: float, weight: float) -> None:
    """Up to 1 means none, as in diffusers."""
    result = cfg("cat", guidance=scale, steps=2)
    np.testing.assert_allclose(
        result.latents[0], known_latents(CFG_PLANS[1], "cat", "", weight, 0, 0), rtol=0, atol=1e-5
    )
    assert result.guidance == weight


def test_both_branches_run_in_one_call_as_uncond_then_cond(cfg: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    real = OnnxGraph.run

    def spy(self: OnnxGraph, **feeds: Any) -> Any:
        if "timestep" in feeds:
            calls.append(feeds)
        return real(self, **feeds)

    monkeypatch.setattr(OnnxGraph, "run", spy)
    cfg("cat", negative_prompt="dog")
    assert [float(call["timestep"]) for call in calls] == [999.0, 759.0, 499.0, 259.0]
    for call in calls:
        np.testing.assert_array_equal(call["sample"][0], call["sample"][1])
        np.testing.assert_allclose(call["encoder_hidden_states"][0], states_of(ids_of("dog")), atol=1e-6)
        np.testing.assert_allclose(call["encoder_hidden_states"][1], states_of(ids_of("cat")), atol=1e-6)


def test_options_without_effect_are_refused(plain: Pipeline, cfg: Pipeline) -> None:
    with pytest.raises(OptionError, match=r"guidance 3\.0: the 3-step plan of this bundle has guidance none"):
        plain("cat", guidance=3.0)
    with pytest.raises(OptionError, match="a negative prompt has no effect"):
        plain("cat", negative_prompt="dog")
    for value in (-1.0, float("nan")):
        with pytest.raises(OptionError, match="guidance"):
            cfg("cat", guidance=value)
    for seed in (-1, 2**64):
        with pytest.raises(OptionError, match="seed"):
            cfg("cat", seed=seed)
    with pytest.raises(OptionError, match="num_images 0"):
        cfg("cat", num_images=0)


@pytest.mark.parametrize("prompt", ["", " ", "🐱", "日本語", "кошка", "zzzz \u0378 qqq", "<|endoftext|>", "x\x00y"])
def test_any_text_gives_a_picture(cfg: Pipeline, prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = cfg(prompt, steps=2)
    assert result.images[0].size == (12, 8)
    assert np.isfinite(result.latents).all()


def test_one_warning_for_a_prompt_that_is_too_long(cfg: Pipeline) -> None:
    with pytest.warns(PromptTruncated, match="dropped 'dog dog'") as caught:
        cfg("cat " * 14 + "dog dog", num_images=3)
    assert len(caught) == 1


def test_seeds_and_image_numbers(cfg: Pipeline) -> None:
    four = cfg("cat", seed=5, num_images=4)
    np.testing.assert_array_equal(four.latents, cfg("cat", seed=5, num_images=4).latents)
    np.testing.assert_array_equal(four.latents[:1], cfg("cat", seed=5).latents)
    assert np.abs(cfg("cat", seed=6).latents - four.latents[:1]).max() > 0.1
    for i in range(3):
        assert np.abs(four.latents[i] - four.latents[i + 1]).max() > 0.1


@pytest.mark.parametrize(("options", "batch"), [({"batch": 2}, 1), ({"dynamic": True}, 1), ({"dynamic": True}, 3)])
@pytest.mark.parametrize("plans", [CFG_PLANS, PLAIN_PLANS], ids=["cfg", "plain"])
def test_graphs_of_other_batch_sizes_make_the_same_pictures(
    tmp_path: Path, cfg: Pipeline, plain: Pipeline, options: dict[str, Any], batch: int, plans: Any
) -> None:
    other = Pipeline.from_bundle(make_bundle(tmp_path / "b", plans, **options), batch=batch)
    expected = (cfg if plans is CFG_PLANS else plain)("cat", seed=5, num_images=5)
    for count in (5, 1):
        result = other("cat", seed=5, num_images=count)
        np.testing.assert_allclose(result.latents, expected.latents[:count], rtol=0, atol=1e-6)
        assert len(result.images) == count


def test_a_plan_with_and_one_without_guidance_share_a_unet(tmp_path: Path) -> None:
    plans = (*CFG_PLANS, PLAIN_PLANS[0])
    pipeline = Pipeline.from_bundle(make_bundle(tmp_path / "b", plans))
    result = pipeline("cat", steps=3, num_images=3)
    for index in range(3):
        latents = known_latents(PLAIN_PLANS[0], "cat", None, 1.0, 0, index)
        np.testing.assert_allclose(result.latents[index], latents, rtol=0, atol=5e-6)


def test_half_precision_and_a_timestep_of_rank_one(tmp_path: Path, cfg: Pipeline) -> None:
    pipeline = Pipeline.from_bundle(make_bundle(tmp_path / "b", half=True, timestep_rank=1))
    result = pipeline("cat")
    assert result.latents.dtype == np.float32
    np.testing.assert_allclose(result.latents, cfg("cat").latents, rtol=0, atol=0.05)


def test_noise_of_the_callers_own(cfg: Pipeline) -> None:
    noise = np.stack([initial_noise(seed=9, index=i, shape=SHAPE) for i in range(2)])
    given = cfg("cat", steps=2, num_images=2, noise=noise, seed=1)
    np.testing.assert_array_equal(given.latents, cfg("cat", steps=2, num_images=2, seed=9).latents)
    with pytest.raises(OptionError, match=r"noise of shape \(2, 4, 4, 6\): this bundle wants \(1, 4, 4, 6\)"):
        cfg("cat", noise=noise)


def test_euler_scales_its_noise_and_inputs(tmp_path: Path) -> None:
    plan = FewStepPlan(solver=Solver.EULER, num_steps=3)
    assert plan.table().init_noise_sigma > 1
    result = Pipeline.from_bundle(make_bundle(tmp_path / "b", [plan]))("cat")
    np.testing.assert_allclose(result.latents[0], known_latents(plan, "cat", None, 1.0, 0, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("strength", "start"), [(1.0, 0), (0.6, 2), (0.25, 3)])
def test_image_to_image(cfg: Pipeline, strength: float, start: int) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    result = cfg("cat", init_image=Image.fromarray(pixels), strength=strength, seed=8, num_images=2)
    sample = pixels.transpose(2, 0, 1) / 127.5 - 1
    rgb = sample.reshape(3, HEIGHT, 2, WIDTH, 2).mean((2, 4))
    z0 = np.concatenate([rgb, rgb.mean(0, keepdims=True)]) * SCALING
    rows = CFG_PLANS[0].table().rows[start:]
    for index in range(2):
        x = rows[0].p * z0 + rows[0].q * initial_noise(seed=8, index=index, shape=SHAPE).astype(np.float64)
        for number, row in enumerate(rows, start=start + 1):
            means = [0.3 * states_of(ids_of(text)).mean(0)[:, None, None] for text in ("", "cat")]
            u, c = (0.9 * row.k * x + 0.0005 * row.t + mean for mean in means)
            x = row.a * x + row.b * (u + 3.0 * (c - u))
            if row.c:
                x = x + row.c * step_noise(seed=8, index=index, step=number, shape=SHAPE)
        np.testing.assert_allclose(result.latents[index], x, rtol=0, atol=1e-5)
    assert "vae_encoder" in result.seconds


def test_image_to_image_refusals(cfg: Pipeline, copy: Path) -> None:
    image = Image.new("RGB", (12, 8))
    with pytest.raises(OptionError, match=r"strength 0\.1 leaves none of 4 steps"):
        cfg("cat", init_image=image, strength=0.1)
    with pytest.raises(OptionError, match=r"strength 1\.5"):
        cfg("cat", init_image=image, strength=1.5)
    shutil.rmtree(copy / "vae_encoder")
    with pytest.raises(BundleError, match="has no vae_encoder"):
        Pipeline.from_bundle(seal(copy))("cat", init_image=image)


def test_loading_counts_for_the_component(cfg_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from hypersd_export.runtime import onnx as module

    real = module.open_graph

    def slow(path: Path, **options: Any) -> OnnxGraph:
        time.sleep(0.05)
        return real(path, **options)

    monkeypatch.setattr(module, "open_graph", slow)
    seconds = Pipeline.from_bundle(cfg_bundle)("cat").seconds
    assert all(value >= 0.05 for value in seconds.values()), seconds


def test_metadata_and_seconds(cfg: Pipeline, cfg_bundle: Path) -> None:
    result = cfg("cat", negative_prompt="dog", seed=4, num_images=2)
    assert set(result.seconds) == {"text_encoder", "unet", "vae_decoder"}
    assert all(value > 0 for value in result.seconds.values())
    data = json.loads(json.dumps(result.metadata(1)))
    assert (data["prompt"], data["negative_prompt"], data["seed"], data["index"]) == ("cat", "dog", 4, 1)
    assert data["plan"] == json.loads((cfg_bundle / "plan.json").read_text())["entries"][0]
    assert data["bundle_digest"] == sha256_file(cfg_bundle / "manifest.json") == cfg.digest


# What can be wrong with a bundle


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b / "unet" / "model.onnx").write_bytes(b"other"), r"unet/model\.onnx was changed"),
        (lambda b: (b / "vae_decoder" / "config.json").unlink(), r"vae_decoder/config\.json is missing"),
        (lambda b: (b / "unet" / "model.onnx_data").write_text("x"), r"unet/model\.onnx_data is not in the manifest"),
        (lambda b: (b / "manifest.json").unlink(), r"has no manifest\.json"),
        (lambda b: shutil.rmtree(b), "no bundle at"),
    ],
)
def test_a_bundle_that_was_changed(copy: Path, damage: Any, message: str) -> None:
    damage(copy)
    with pytest.raises(BundleError, match=message) as caught:
        Pipeline.from_bundle(copy)
    assert "\n" not in str(caught.value)


def test_without_the_check_a_bundle_can_be_changed(copy: Path, cfg: Pipeline) -> None:
    (copy / "notes.txt").write_text("mine")
    np.testing.assert_array_equal(Pipeline.from_bundle(copy, check=False)("cat").latents, cfg("cat").latents)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "hypersd-plan/2", "entries": []}', "'hypersd-plan/2', expected 'hypersd-plan/1'"),
        ("{", "cannot read"),
        ("[]", "no JSON object"),
        ('{"format": "hypersd-plan/1", "entries": []}', "no entries"),
    ],
)
def test_a_plan_that_cannot_be_used(copy: Path, text: str, message: str) -> None:
    (copy / "plan.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        Pipeline.from_bundle(seal(copy))


def test_a_provider_that_is_not_there_is_refused_at_once(cfg_bundle: Path) -> None:
    with pytest.raises(MissingBackend, match="onnxruntime-gpu"):
        Pipeline.from_bundle(cfg_bundle, provider="cuda")
    with pytest.raises(OptionError, match="batch 0"):
        Pipeline.from_bundle(cfg_bundle, batch=0)


def test_configurations_that_do_not_say_enough(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", dynamic=True)
    (bundle / "vae_decoder" / "config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"vae_decoder/config\.json has no scaling_factor"):
        Pipeline.from_bundle(seal(bundle))("cat")
    (bundle / "unet" / "config.json").write_text("{}")
    pipeline = Pipeline.from_bundle(seal(bundle))
    assert pipeline.latent_shape == SHAPE, "the graph says it"


def test_latents_whose_size_nobody_knows(tmp_path: Path) -> None:
    from onnx import helper

    from tests.bundles import save_graph, value_info

    bundle = make_bundle(tmp_path / "b")
    shape = ["b", CHANNELS, "h", "w"]
    node = helper.make_node("Identity", ["sample"], ["out_sample"])
    save_graph(
        bundle / "unet" / "model.onnx", [node], [value_info("sample", shape)], [value_info("out_sample", shape)], {}
    )
    assert Pipeline.from_bundle(seal(bundle)).latent_shape == SHAPE, "the configuration says it"
    (bundle / "unet" / "config.json").write_text('{"in_channels": 4}')
    with pytest.raises(BundleError, match="does not say how large its latents are"):
        _ = Pipeline.from_bundle(seal(bundle)).latent_shape


def test_a_unet_with_further_inputs_is_refused(tmp_path: Path) -> None:
    from onnx import helper

    from tests.bundles import TOKENS, save_graph, value_info

    bundle = make_bundle(tmp_path / "b", PLAIN_PLANS)
    shape = [1, *SHAPE]
    inputs = [
        value_info("sample", shape),
        value_info("timestep", []),
        value_info("encoder_hidden_states", [1, TOKENS, CHANNELS]),
        value_info("time_ids", [1, 6]),
    ]
    node = helper.make_node("Identity", ["sample"], ["out_sample"])
    save_graph(bundle / "unet" / "model.onnx", [node], inputs, [value_info("out_sample", shape)], {})
    with pytest.raises(BundleError, match="also wants time_ids"):
        Pipeline.from_bundle(seal(bundle))("cat")


def test_guidance_needs_an_even_number_of_rows(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", PLAIN_PLANS)
    other = make_bundle(tmp_path / "c")
    shutil.copy(other / "plan.json", bundle / "plan.json")
    with pytest.raises(BundleError, match="has 1 rows, and guidance needs an even number"):
        Pipeline.from_bundle(seal(bundle))("cat")


def test_an_export_that_was_killed_between_its_renames_is_mended(copy: Path, cfg: Pipeline) -> None:
    copy.rename(copy.with_name(".bundle.hypersd-old-1-2"))
    np.testing.assert_array_equal(Pipeline.from_bundle(copy)("cat").latents, cfg("cat").latents)
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]


def test_embedded_guidance_is_a_constant_of_the_graph(tmp_path: Path) -> None:
    plan = FewStepPlan(solver=Solver.LCM, num_steps=2, guidance=Guidance(kind=GuidanceKind.EMBEDDED, scale=8.0))
    pipeline = Pipeline.from_bundle(make_bundle(tmp_path / "b", [plan]))
    result = pipeline("cat")
    np.testing.assert_allclose(result.latents[0], known_latents(plan, "cat", None, 1.0, 0, 0), rtol=0, atol=5e-6)
    with pytest.raises(OptionError, match="guidance embedded, fixed at export"):
        pipeline("cat", guidance=4.0)

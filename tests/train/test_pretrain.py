"""The whole pretraining, two steps of each stage, through the command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer import cli
from trainer.pretrain import clip


def _run(*arguments: str):
    return CliRunner().invoke(cli.app, ["pretrain", *arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def embedded_once() -> Iterator[None]:
    """The captions' states of the one CLIP here, kept from one run to the next: a third of a run of three steps."""
    real, kept = clip.embed_captions, {}

    def embed(encoder, tokenizer, captions):
        if len(captions) not in kept:
            kept[len(captions)] = real(encoder, tokenizer, captions)
        return kept[len(captions)].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "embed_captions", embed)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, embedded_once: None) -> Path:
    out = tmp_path_factory.mktemp("run")
    result = _run("--out", str(out), "--recipe", "smoke", "--set", "unet.steps=3")
    assert result.exit_code == 0, result.output
    assert f"wrote {out / 'model'}" in result.output
    return out


def test_it_ends_in_a_diffusers_pipeline_that_draws(finished):
    import numpy as np
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(finished / "model", torch_dtype=torch.float32)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline.vae_scale_factor == 4
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a fox", num_inference_steps=2, output_type="np", height=32, width=32).images[0]
    assert image.shape == (32, 32, 3)
    assert np.isfinite(image).all()


def test_no_file_says_where_it_was_trained(finished):
    for path in (finished / "model").rglob("*.json"):
        assert str(finished) not in path.read_text(encoding="utf-8")


def test_the_pipeline_s_text_encoder_is_the_clip_s_text_tower(finished):
    import torch
    from transformers import CLIPModel, CLIPTextModel

    ids = torch.tensor([[948, 5, 7, 949] + [949] * 28])
    whole = CLIPModel.from_pretrained(finished / "clip").eval()
    alone = CLIPTextModel.from_pretrained(finished / "model" / "text_encoder", torch_dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole.text_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(alone(ids).last_hidden_state, expected, rtol=0, atol=5e-3)  # fp16 weights


def test_a_finished_stage_is_not_trained_again_and_a_longer_one_goes_on(finished):
    result = _run("--out", str(finished), "--recipe", "smoke", "--set", "unet.steps=5", "--stage", "unet")
    assert result.exit_code == 0, result.output
    record = json.loads((finished / "unet.json").read_text())
    assert record["steps"] == 5
    again = _run(
        "--out", str(finished), "--recipe", "smoke", "--set", "unet.steps=5", "--stage", "unet", "--stage", "vae"
    )
    assert again.exit_code == 0
    assert json.loads((finished / "vae.json").read_text())["figures"]["psnr_held_out_db"] > 0


def test_dry_run_prints_the_configuration_and_writes_nothing(tmp_path):
    result = _run("--out", str(tmp_path / "none"), "--dry-run", "--set", "unet.steps=12")
    assert json.loads(result.output)["unet"]["steps"] == 12
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "gan"], "--stage 'gan' is not a stage; there are: vae, clip, unet"),
        (["--resume", "maybe"], "neither 'latest' nor 'never'"),
        (["--recipe", "sd9"], "is not a pretraining recipe"),
        (["--set", "a=1"], "unknown key 'a'"),
    ],
)
def test_bad_options_are_one_line_and_exit_1(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hypersd-train", "pretrain", "--out", str(tmp_path / "x"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert message in error
    assert error.count("\n") == 1


def test_resume_never_refuses_a_folder_that_has_a_run(finished):
    result = _run("--out", str(finished), "--recipe", "smoke", "--resume", "never")
    assert result.exit_code == 1
    assert "has a run already" in str(result.exception)


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "diffusers" else object())
    result = _run("--out", str(tmp_path / "x"), "--dry-run")
    assert str(result.exception) == (
        "hypersd-train needs diffusers, which is not installed: pip install 'hypersd[train]'"
    )


def test_the_shipped_clip_is_that_of_the_shipped_text_encoder_and_tells_drawings_apart():
    import torch
    from torch.nn.functional import normalize
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    from hypersd_export.builtin import model_dir
    from trainer.pretrain.clip import BUILTIN_CLIP, tokenize
    from trainer.pretrain.drawings import read_drawings
    from trainer.pretrain.scenes import SceneRenderer, draw_specs, held_out_mask

    clip = CLIPModel.from_pretrained(BUILTIN_CLIP).float().eval()
    encoder = CLIPTextModel.from_pretrained(model_dir() / "text_encoder").float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(model_dir() / "tokenizer")
    generator = torch.Generator().manual_seed(8)
    spec = draw_specs(96, held_out_mask(), generator)
    ids = tokenize(tokenizer, spec.captions())
    pictures = SceneRenderer(read_drawings(), 32)(spec, generator)
    with torch.no_grad():
        assert torch.equal(clip.text_model(input_ids=ids).last_hidden_state, encoder(ids).last_hidden_state)
        text = normalize(clip.get_text_features(input_ids=ids).pooler_output, dim=1)
        image = normalize(clip.get_image_features(pixel_values=pictures).pooler_output, dim=1)
    found = spec.concept[(image @ text.T).argmax(1)] == spec.concept
    assert found.float().mean() > 0.8

"""The CLIP reward is transformers' CLIP score, and its gradient leads uphill."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hypersd_export.errors import ModelError, OptionError
from hypersd_export.model.base import open_base
from tests.train import small_rewards
from trainer.pretrain.clip import BUILTIN_CLIP
from trainer.pretrain.drawings import read_drawings
from trainer.pretrain.scenes import SceneRenderer, draw_specs
from trainer.rewards.clip import ClipReward
from trainer.rewards.preprocess import BUILTIN_PREPROCESS, Preprocess

OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@pytest.fixture(scope="module")
def reward():
    return ClipReward()


@pytest.fixture(scope="module")
def scenes():
    generator = torch.Generator().manual_seed(3)
    spec = draw_specs(6, np.ones((102, 3, 8), bool), generator)
    return SceneRenderer(read_drawings(), 32)(spec, generator), spec.captions()


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A CLIPModel folder of random weights as the hub has them: with a preprocessor and a tokenizer."""
    return small_rewards.small_clip(tmp_path_factory.mktemp("clip"))


def test_equals_transformers_own_logits(reward, scenes):
    from transformers import CLIPModel, CLIPTokenizer

    pictures, captions = scenes
    model = CLIPModel.from_pretrained(BUILTIN_CLIP).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(open_base("builtin").tokenizer_folder)
    inputs = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs, pixel_values=pictures)
    want = 100 * out.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(reward(pictures, captions), want, rtol=0, atol=1e-3)


def test_the_right_caption_scores_higher(reward, scenes):
    pictures, captions = scenes
    right, wrong = reward(pictures, captions), reward(pictures, captions[1:] + captions[:1])
    assert right.shape == (6,)
    assert float((right - wrong).min()) > 0


def test_a_gradient_step_raises_every_score_and_reaches_the_pictures_alone(reward, scenes):
    pictures = scenes[0].clone().requires_grad_()
    before = reward(pictures, scenes[1])
    (gradient,) = torch.autograd.grad(before.sum(), pictures)
    norms = gradient.flatten(1).norm(dim=1)
    assert float(norms.min()) > 0
    step = 1e-3 * gradient / norms.view(-1, 1, 1, 1)
    gained = reward((pictures + step).detach(), scenes[1]) - before.detach()
    torch.testing.assert_close(gained, 1e-3 * norms, rtol=0.05, atol=1e-4)  # first order: |gradient| times the length
    assert not any(p.requires_grad for p in reward._model.parameters())


def test_gradient_matches_finite_differences_in_float64(small_clip):
    reward = ClipReward(small_clip)
    reward._model.double()
    pixels = torch.rand(1, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text = reward.text_features(["cat"])

    def score(images):
        pooled = reward._model.vision_model(pixel_values=reward.preprocess(images)).pooler_output
        return (torch.nn.functional.normalize(reward._model.visual_projection(pooled), dim=1) * text).sum()

    pixels.requires_grad_()
    (gradient,) = torch.autograd.grad(score(pixels), pixels)
    direction = torch.randn(pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    numeric = (score(pixels + 1e-5 * direction) - score(pixels - 1e-5 * direction)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric.detach()), rel=1e-6)


@pytest.mark.parametrize("size", [(24, 24), (60, 48), (48, 100), (20, 30)])
def test_preprocessing_is_clips_image_processor_but_for_8_bits(small_clip, size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    height, width = size
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    smooth = np.stack([0.5 + 0.3 * np.sin(3 * x + y), 0.2 + 0.6 * y * x, 0.5 + 0.2 * np.cos(2 * y)], -1)
    image = (smooth * 255).round().astype(np.uint8)
    want = CLIPImageProcessorPil.from_pretrained(small_clip)(Image.fromarray(image), return_tensors="pt").pixel_values
    ours = Preprocess.of(small_clip)(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)
    assert ours.shape == want.shape == (1, 3, 24, 24)
    rounding = 0.5 / 255 / min(OPENAI["std"])
    assert float((ours - want).abs().max()) < 2.5 * rounding  # PIL rounds after each of its two passes


def test_preprocessing_of_the_builtin_is_the_identity():
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(BUILTIN_PREPROCESS(pictures), pictures)


def test_whole_path_of_another_clip_equals_transformers(small_clip):
    from transformers import CLIPModel, CLIPTokenizer

    pictures = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    prompts = ["cat", "a dog and a cat and a very long tail that is cut off"]
    model, tokenizer = CLIPModel.from_pretrained(small_clip).eval(), CLIPTokenizer.from_pretrained(small_clip)
    ids = tokenizer(prompts, padding=True, truncation=True, max_length=12, return_tensors="pt").input_ids
    mean, std = (torch.tensor(OPENAI[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=(pictures / 2 + 0.5 - mean) / std)
    want = 100 * out.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(ClipReward(small_clip)(pictures, prompts), want, rtol=0, atol=1e-4)


def test_float32_under_autocast(reward, scenes):
    plain = reward(*scenes)
    with torch.autocast("cpu", torch.bfloat16):
        inside = reward(scenes[0].bfloat16().float(), scenes[1])
        same = reward(*scenes)
    assert inside.dtype == torch.float32
    assert torch.equal(same, plain)


def test_never_the_judge():
    import trainer.rewards.clip as module

    assert "benchmarks" not in module.BUILTIN_CLIP.parts
    assert BUILTIN_CLIP.parent.name == "pretrain"


def test_errors_are_one_line_with_the_way_out(small_clip, tmp_path):
    reward = ClipReward(small_clip)
    with pytest.raises(OptionError, match=r"\[1, 3, 24, 24\] with 2 prompts"):
        reward(torch.zeros(1, 3, 24, 24), ["a", "b"])
    with pytest.raises(ModelError, match=r"preprocessor_config\.json is missing; pass preprocess="):
        ClipReward(tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer"):
        ClipReward(tmp_path, preprocess=BUILTIN_PREPROCESS)
    with pytest.raises(ModelError, match=r"no config\.json"):
        ClipReward(tmp_path, preprocess=BUILTIN_PREPROCESS, tokenizer=small_clip)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded as a CLIP") as error:
        ClipReward(tmp_path, preprocess=BUILTIN_PREPROCESS, tokenizer=small_clip)
    assert "\n" not in str(error.value)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 24, "image_mean": [0.5]}))
    with pytest.raises(ModelError, match="cannot be read"):
        Preprocess.of(tmp_path)
    with pytest.raises(ModelError, match="950 tokens where the text tower"):
        ClipReward(small_clip, tokenizer=open_base("builtin").tokenizer_folder)

"""CLIP score is the published one: against transformers' own preprocessing and torchmetrics' formula."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.bench.eyes import EightBit, open_eye, to_signed
from benchmarks.judge import Judge
from benchmarks.metrics import clip_scores, unit
from hypersd_export.errors import ModelError, OptionError
from tests.bench.clips import tiny_clip

RNG = np.random.default_rng(0)
TEXTS = ["a cat", "dog dog dog", "", "a long caption " * 10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


def torchmetrics_clip_scores(folder, pixels, texts):
    """`torchmetrics.functional.multimodal.clip_score` restated, one value a pair before its mean: the processor's
    pixels and ids, truncated to the text tower, both features normalised, 100 · cosine; the mean is cut off at 0."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, words = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processed = CLIPImageProcessorPil.from_pretrained(folder)([Image.fromarray(p) for p in pixels], return_tensors="pt")
    ids = words(texts, padding=True, return_tensors="pt")
    longest = model.config.text_config.max_position_embeddings
    with torch.no_grad():
        image = model.get_image_features(pixel_values=processed.pixel_values).pooler_output
        # torchmetrics cuts the ids off behind the last position, end token and all
        ended = torch.cat([ids.input_ids[:, : longest - 1], ids.input_ids[:, -1:]], 1)
        whole = ended if ids.input_ids.shape[1] > longest else ids.input_ids
        text = model.get_text_features(input_ids=whole).pooler_output
    image, text = (f / f.norm(p=2, dim=-1, keepdim=True) for f in (image, text))
    return (100 * (image * text).sum(-1)).numpy()


@pytest.mark.parametrize("size", [(16, 16), (40, 40), (24, 50), (33, 17)])
def test_clip_score_equals_torchmetrics(folder, size):
    pixels = RNG.integers(0, 256, (4, size[1], size[0], 3), dtype=np.uint8)
    eye = open_eye(str(folder))
    theirs = torchmetrics_clip_scores(folder, pixels, TEXTS)
    images, captions = eye.pictures(pixels), eye.captions(TEXTS)
    np.testing.assert_allclose(100 * (unit(images) * unit(captions)).sum(1), theirs, atol=1e-4)
    np.testing.assert_allclose(clip_scores(images, captions), theirs.clip(min=0), atol=1e-4)
    assert theirs.std() > 0.01


def test_features_have_one_length_and_a_protocol(folder):
    eye = open_eye(str(folder), prefix="A photo depicts ")
    features = eye.pictures(np.zeros((2, 16, 16, 3), np.uint8))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), np.sqrt(24))
    assert eye.protocol == {
        "name": "tiny-clip", "model": "tiny-clip", "size_px": 16, "prefix": "A photo depicts ",
        "crop": "shorter side to the size, bicubic; centre",
    }  # fmt: skip
    plain = open_eye(str(folder))
    assert eye.digest != plain.digest
    np.testing.assert_array_equal(eye.captions(["a cat"]), plain.captions(["A photo depicts a cat"]))


def test_a_picture_of_the_right_size_is_not_resampled():
    pixels = RNG.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    same = EightBit(size_px=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))(to_signed(pixels))
    torch.testing.assert_close(same, to_signed(pixels))


def test_the_judge_looks_at_8_bits_as_at_floats():
    pixels = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    eye, judge = open_eye("builtin"), Judge()
    np.testing.assert_allclose(eye.pictures(pixels), judge.pictures(to_signed(pixels)))
    np.testing.assert_allclose(eye.captions(["a fox"]), judge.captions(["a fox"]))
    with pytest.raises(OptionError, match="the judge sees 32 x 32 px, and these pictures have 64 x 32; give --clip"):
        eye.pictures(np.zeros((1, 32, 64, 3), np.uint8))
    with pytest.raises(OptionError, match="--clip-prefix 'x'"):
        open_eye("builtin", prefix="x")


def test_a_clip_of_the_wrong_kind_is_one_line(folder, tiny_base, tmp_path):
    no_config = tmp_path / "empty"
    no_config.mkdir()
    for name, message in (
        (str(no_config), "preprocessor_config.json is missing"),
        (str(tmp_path / "none"), "preprocessor_config.json is missing"),
        (str(_without_vision(folder, tmp_path / "text-only")), "weights are missing"),
        (str(_of_another_kind(folder, tmp_path / "bert")), "cannot be loaded as a CLIP|weights are missing"),
    ):
        with pytest.raises(ModelError, match=message) as raised:
            open_eye(name)
        assert "\n" not in str(raised.value)


def _without_vision(folder, to):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    weights = {n: w for n, w in load_file(to / "model.safetensors").items() if not n.startswith("vision_model")}
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def _of_another_kind(folder, to):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    BertModel(config).save_pretrained(to)
    for name in ("preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            (to / name).write_text((folder / name).read_text())
    assert json.loads((to / "config.json").read_text())["model_type"] == "bert"
    return to

"""Rewards as figures: the very scores of `trainer.rewards`, and the option in one line."""

import numpy as np
import pytest

from benchmarks.bench.eyes import to_signed
from benchmarks.bench.scorers import open_scorers, parse
from benchmarks.feature_cache import FeatureCache
from hypersd_export.errors import ModelError, OptionError
from tests.bench.clips import tiny_clip
from tests.bench.test_quality import Colours, candidate, colour_eye, question
from trainer.rewards.clip import ClipReward
from trainer.rewards.registry import Kind


def test_a_score_is_the_rewards_and_is_kept(tmp_path):
    from benchmarks.bench.gallery import Gallery
    from benchmarks.bench.quality import METRICS, Exam

    clip = tiny_clip(tmp_path / "clip")
    (scorer,) = open_scorers([f"clip={clip}"])
    assert scorer.metric == "reward_clip"
    drawer, asked = Colours(), question(40, reference=None)
    gallery = Gallery(
        cache=FeatureCache(tmp_path / "cache"), eye=colour_eye(), scorers=[scorer], tell=lambda text: None
    )
    exam = Exam(gallery=gallery, question=asked)
    exam.draw([candidate("a", drawer)])
    pictures, texts = Colours().draw(asked.measured.prompts, 0), list(asked.measured.prompts)
    wanted = ClipReward(clip)(to_signed(pictures), texts).detach().numpy()
    np.testing.assert_allclose(gallery.scores(drawer, asked.measured, scorer), wanted, atol=1e-4)
    assert exam.estimates(candidate("a", drawer))["reward_clip"].value == pytest.approx(wanted.mean(), abs=1e-4)
    assert gallery.cache.misses == len(list(gallery.cache.folder.iterdir()))
    assert {f"reward_{kind}" for kind in Kind} <= set(METRICS)


def test_options(tmp_path):
    assert parse("hps=a.safetensors,words").tokenizer == "words"
    assert parse("aesthetic=a").model == "a"
    for texts, error, message in (
        (["beauty"], OptionError, "--reward beauty: choose from clip, aesthetic"),
        (["clip", "clip"], OptionError, "--reward clip --reward clip: each kind once"),
        (["pick_score"], OptionError, "its model is missing"),
        ([f"clip={tmp_path}"], ModelError, "preprocessor_config.json is missing"),
    ):
        with pytest.raises(error, match=message):
            open_scorers(texts)

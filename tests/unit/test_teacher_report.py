"""The teacher's report: its figures on features whose answers are known, and its Markdown."""

import numpy as np
import pytest
import torch

from benchmarks.judge import candidates
from benchmarks.teacher import SAME_CONCEPT, Question, fully_named, interval, markdown
from trainer.pretrain.concepts import CONCEPTS
from trainer.pretrain.scenes import SceneSpec

SPEC = SceneSpec(*(torch.zeros(40, dtype=torch.int64) for _ in range(5)))


@pytest.fixture(scope="module")
def question():
    rng = np.random.default_rng(0)
    choices = rng.normal(size=(40, 100, 8))
    real = choices[:, 0] + 0.01 * rng.normal(size=(40, 8))
    return Question(SPEC, choices[:, 0], choices, real, real + 0.01 * rng.normal(size=(40, 8)))


def test_captions_that_are_their_own_pictures_score_everything(question):
    figures = question.measure(question.captions)
    assert figures["clip_score"]["value"] == pytest.approx(100)
    assert figures["retrieval_top1"]["value"] == figures["concept_top1"]["value"] == 1
    assert figures["fd"]["value"] == pytest.approx(0, abs=0.01)
    assert figures["precision"] == figures["recall"] == 1


def test_another_style_is_wrong_but_of_the_right_concept(question):
    """Pictures that are candidate 5 (same concept) for half of the prompts, candidate 60 (another) for the rest."""
    features = np.concatenate([question.choices[:20, 5], question.choices[20:, 60]])
    figures = question.measure(features)
    assert figures["retrieval_top1"]["value"] == 0
    assert figures["concept_top1"]["value"] == 0.5
    low, high = (figures["concept_top1"][key] for key in ("low", "high"))
    assert low < 0.5 < high
    assert high - low == pytest.approx(4 * (0.5 * 0.5 / 40) ** 0.5, rel=0.2)


def test_the_first_candidates_have_the_right_concept():
    rng = np.random.default_rng(1)
    found = candidates(7, 1, 2, rng)
    assert len(found) == len(set(found)) == 100
    assert [CONCEPTS[7].replace("-", " ") in text or CONCEPTS[7] in text for text in found] == [
        i < SAME_CONCEPT for i in range(100)
    ]


def test_intervals_hold_the_figure_and_count_the_prompts():
    values = np.arange(50.0)
    found = interval(lambda rows: float(values[rows].mean()), 50)
    assert (found["value"], found["count"]) == (24.5, 50)
    assert found["low"] < 24.5 < found["high"]


def test_markdown_has_every_row_and_the_share_of_the_real(question):
    real, half = question.measure(question.captions), question.measure(question.choices[:, 60])
    half["retrieval_top1"] = {"value": 0.42, "low": 0.4, "high": 0.44, "count": 40}
    result = {
        "prompts_per_set": 40, "guidance": 3.0, "seeds": "0 to 39", "machine": "m", "torch": "t", "bootstrap_rounds": 9,
        "seen": {"real": real, "25": half}, "held_out": {"real": real, "1": half},
        "diversity": {"real": {"value": 0.5, "low": 0.4, "high": 0.6, "count": 3}},
    }  # fmt: skip
    text = markdown(result)
    assert "| 25 steps | 42.0 [40.0, 44.0] | 42.0 |" in text
    assert "| 1 step | 42.0 [40.0, 44.0] |" in text
    assert "| real | 50.0 [40.0, 60.0] |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {10, 3}


def test_fully_named_scenes_say_style_and_background():
    spec = SceneSpec(*(torch.tensor([v]) for v in (3, 1, 2, -1, -1)))
    assert fully_named(spec).named_style.item() == 1
    assert fully_named(spec).named_background.item() == 2

"""What an ablation asks for: verdicts and signs with known answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import ablation
from benchmarks.distilled_tables import METRICS, Cell, Row, markdown
from benchmarks.stats import Estimate
from trainer.distill.guard import saturation, texture

NOISE = np.array([-1.0, 0.0, 1.0])


def cell(noise=0.0, **values):
    figures = {name: Estimate(values.get(name, 1.0), values.get(name, 1.0) + noise * NOISE) for name in METRICS}
    return Cell(updates=1, seeds=(0,), figures=(figures,))


def row(label, trained=True, steps=1, **values):
    return Row(label=label, cells={steps: cell(**values)}, trained=trained)


TEACHER = cell(clip_score=80.0, diversity=0.2, saturation=0.5, texture=0.1)


def test_looks_are_those_of_each_picture_and_rewards_see_eight_bits():
    pictures = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked = []

    def score(pixels, captions):
        asked.append((pixels.dtype, pixels.shape, list(captions)))
        return pixels.mean((1, 2, 3))

    found = ablation.looks(pictures, ["a", "b", "c"], [SimpleNamespace(metric="reward_clip", score=score)])
    assert asked == [(np.uint8, (3, 4, 4, 3), ["a", "b", "c"])]
    assert found["texture"] == pytest.approx([texture(p[None]) for p in pictures])
    assert found["saturation"].mean() == pytest.approx(saturation(pictures))
    np.testing.assert_allclose(found["reward_clip"], (pictures.mean((1, 2, 3)) + 1) * 127.5, atol=0.5)


def test_precision_and_recall_are_the_shares_that_the_metrics_give_and_have_intervals():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((40, 4))
    fake = np.concatenate([real[:30] + 1e-6, rng.standard_normal((10, 4)) + 100])
    found = ablation.further({"texture": np.arange(40.0)}, fake, real, rounds=50)
    assert found["precision"].value == 0.75
    assert found["precision"].interval[0] < 0.75 < found["precision"].interval[1]
    assert found["texture"].value == 19.5
    assert ablation.further({}, real, real, rounds=5)["recall"].value == 1.0


@pytest.mark.parametrize(("values", "met"), [
    ({"clip_score": 79.0, "fd_t": 0.4, "diversity": 0.21}, [True, True, True]),
    ({"clip_score": 78.5, "fd_t": 0.4, "diversity": 0.21}, [True, True, True]),
    ({"clip_score": 79.0, "fd_t": 0.6, "diversity": 0.18}, [True, False, False]),
    ({"clip_score": 70.0, "fd_t": 0.5, "diversity": 0.23}, [False, True, False]),
])  # fmt: skip
def test_the_aims_are_met_where_they_are(values, met):
    rows = [row("teacher", trained=False), row("LCM", fd_t=1.0), row("TCD", fd_t=2.0), row("all", **values)]
    found = ablation.aims(rows, TEACHER, ["LCM", "TCD"])
    assert [entry["label"] for entry in found] == ["LCM", "TCD", "all"]
    assert list(found[-1]["met"].values()) == met
    assert found[-1]["clip_score"]["value"] == pytest.approx(values["clip_score"] / 80 - 1)
    assert found[-1]["fd_t"]["TCD"]["value"] == pytest.approx(values["fd_t"] / 2)


def test_it_is_the_lower_bound_of_the_paired_difference_that_counts():
    rows = [row("all", clip_score=79.5, noise=2.0)]
    assert not ablation.aims(rows, TEACHER, [])[0]["met"]["clip_score"]
    moved_alike = cell(clip_score=80.0, noise=2.0)
    assert ablation.aims(rows, moved_alike, [])[0]["met"]["clip_score"]


def test_signs_are_a_reward_that_rises_while_the_judge_falls_and_a_look_that_is_loud():
    rows = [
        row("TSCD", clip_score=75, reward_clip=75, saturation=0.5, texture=0.1),
        row("honest", clip_score=76, reward_clip=78, saturation=0.54, texture=0.1),
        row("fooled", clip_score=74, reward_clip=78, saturation=0.5, texture=0.12),
        row("alone", steps=2),
    ]
    assert ablation.signs(rows, TEACHER, "LCM") == []  # which is not among them
    assert "Signs of exploited" not in ablation.markdown(ablation.aims(rows, TEACHER, ()), [], "LCM")
    honest, fooled = ablation.signs(rows, TEACHER, "TSCD")
    assert (honest["label"], honest["signs"]) == ("honest", [])
    assert (fooled["label"], fooled["signs"]) == ("fooled", ["reward_clip", "texture"])
    assert fooled["reward_clip"]["value"] == 3
    text = ablation.markdown(ablation.aims(rows, TEACHER, ["TSCD"]), [honest, fooled], "TSCD")
    assert "| fooled | 1 | -1.00 [-1.00, -1.00] | +3.00 [+3.00, +3.00] |" in text
    assert "reward_clip, texture |" in text


def test_a_table_shows_the_figures_that_all_of_its_rows_have():
    plain = Row(label="plain", cells={1: Cell(updates=1, seeds=(0,), figures=({"clip_score": Estimate(1.0, NOISE)},))})
    assert markdown([plain], TEACHER).count("**CLIP score of the judge") == 1
    assert "Texture" not in markdown([plain], TEACHER)
    assert "Texture" in markdown([row("full")], TEACHER)

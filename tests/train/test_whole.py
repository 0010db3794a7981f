"""`hypersd-train all`: three runs in turn, each from the one before; the released LoRAs, and the report."""

import json
from dataclasses import replace

import pytest

from hypersd_export.errors import OptionError
from hypersd_export.model.lora import read_lora
from tests.train.small_run import finish, small_config
from tests.train.test_feedback import bright, small  # noqa: F401 (bright is a fixture)
from trainer.distill.config import ScoreConfig, StageConfig
from trainer.whole import FEEDBACK, PARTS, SCORE, TSCD, UNIFIED_STEPS, configurations, last_figures, run_all


def test_assignments_are_for_all_parts_or_for_one():
    found = configurations("builtin", ["batch=8", "tscd.lora.rank=4", "score.stages.0.lr=0.5", "score.score.pairs=7"])
    assert {part: config.method for part, config in found.items()} == {part: part for part in PARTS}
    assert {config.batch for config in found.values()} == {8}
    assert (found[TSCD].lora.rank, found[FEEDBACK].lora.rank) == (4, 32)
    assert (found[SCORE].stages[0].lr, found[SCORE].score.pairs, found[TSCD].score.pairs) == (0.5, 7, 1024)
    assert found[SCORE].score.steps == UNIFIED_STEPS
    assert {config.data.source for config in configurations("sd15", data="./pictures").values()} == {"./pictures"}
    with pytest.raises(OptionError, match="they need the same base"):
        configurations("builtin", ["tscd.base=other"])
    with pytest.raises(OptionError, match="nothing"):
        configurations("builtin", ["score.nothing=1"])


@pytest.fixture
def configs(tiny_base):
    """The whole on the tiny pipeline: two stages of TSCD, then one of each other part."""
    tscd = small_config(tiny_base)
    one = (StageConfig(segments=1, points=4, steps=2, lr=1e-3),)
    score = replace(tscd, method=SCORE, stages=one, score=ScoreConfig(steps=(1, 2), pairs=0))
    return {TSCD: tscd, FEEDBACK: small(tiny_base, "", count=2), SCORE: score}


def test_all_of_it_and_again(configs, tmp_path, bright):  # noqa: F811
    said, ran = [], []

    def distil(config, out):
        before = len(list(out.rglob("*-lora.safetensors")))
        finish(config, out)
        ran.append((out.name, before == 0))

    run_all(configs, tmp_path, distil, say=said.append)
    assert ran == [(TSCD, True), (FEEDBACK, True), (SCORE, True)]
    assert [line.partition(",")[0] for line in said[:3]] == ["1/3 tscd", "2/3 feedback", "3/3 score"]
    report = json.loads((tmp_path / "report.json").read_text())
    [first, unified] = report["loras"]
    assert (first["file"], first["updates"]) == ("stage1-k2-lora.safetensors", 3)
    assert (unified["file"], unified["updates"]) == ("unified-lora.safetensors", 3 + 3 + 2 + 2)
    assert {row["step"] for row in report["parts"][TSCD]} == {2}
    assert (len(report["parts"][TSCD]), len(report["parts"][SCORE])) == (2, 1)
    assert report["merged"]["error"] < 1
    assert "| unified-lora.safetensors | " in (tmp_path / "report.md").read_text()
    for entry in json.loads((tmp_path / "loras.json").read_text()):
        lora = read_lora(tmp_path / entry["lora"])
        assert {entry["sampler"], *map(type, entry["steps"])} == {"own", int}
        assert lora.components["unet"]
    weights = (tmp_path / "loras" / "unified-lora.safetensors").read_bytes()
    run_all(configs, tmp_path, distil, say=said.append)  # everything is finished: nothing changes
    assert ran[3:] == [(TSCD, False), (FEEDBACK, False), (SCORE, False)]
    assert (tmp_path / "loras" / "unified-lora.safetensors").read_bytes() == weights


def test_what_a_log_says_last(tmp_path):
    assert last_figures(tmp_path / "none.jsonl") == []
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"stage": 1, "step": 0, "loss": 3}\n{"stage": 1, "step": 1, "loss": 2}\n'
        '{"stage": 1, "step": 1, "guard_worse": 0.5}\n{"stage": 2, "step": 0}\n'
    )
    assert last_figures(log) == [{"stage": 1, "step": 1, "loss": 2, "guard_worse": 0.5}, {"stage": 2, "step": 0}]

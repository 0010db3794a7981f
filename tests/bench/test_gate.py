"""The gate: what is within its noise passes, what is worse by more fails, and better is never worse."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.bench.cli import app
from benchmarks.bench.gate import run_gate
from benchmarks.bench.parts import write_part
from benchmarks.bench.report import write_report
from hypersd_export.errors import DataError
from tests.bench.reports import MACHINE, candidate, entrant, latency, not_run, quality

SCORES = np.random.default_rng(0).normal(75, 5, 64)


def scored(name, shift=0.0, noise=0.0, **more):
    scores = SCORES + shift + noise * np.random.default_rng(1).standard_normal(64)
    return candidate(name, float(scores.mean()), half=1.2, scores=scores.round(3).tolist(), **more)


def parts(**changes):
    found = {
        "peer": 2.0, "bundle": 0.5, "half": 0.05, "score": scored("onnx-4"), "fd": 0.5, "cpu": MACHINE["cpu"],
        **changes,
    }  # fmt: skip
    rows = [
        entrant("onnx-4", 50.0, 1.0), entrant("optimum", 100.0, found["peer"], kind="optimum", half=found["half"]),
        entrant("onnx-1", 25.0, found["bundle"], half=found["half"]), not_run("openvino", "not installed"),
    ]  # fmt: skip
    timed = latency(*rows) | {"machine": MACHINE | {"cpu": found["cpu"]}}
    return timed, quality(found["score"], candidate("onnx-1", 70.0, fd=found["fd"]))


def gate(tmp_path, before, after):
    for name, (timed, judged) in (("before", before), ("after", after)):
        write_part(tmp_path / name, "latency.json", timed)
        write_part(tmp_path / name, "quality.json", judged)
    write_report(tmp_path / "before")
    return run_gate(tmp_path / "after", tmp_path / "before" / "report.json")


def test_the_same_run_passes(tmp_path):
    verdict = gate(tmp_path, parts(), parts())
    assert (verdict.passed, verdict.compared, verdict.left_out) == (True, 6, ())


def test_better_is_not_worse(tmp_path):
    assert gate(tmp_path, parts(), parts(peer=3.0, bundle=0.3, fd=0.1, score=scored("onnx-4", 3.0))).passed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peer": 1.8}, "optimum: time over the first's 1.80, before 2.00 (11.1 %, noise 7.3 %)"),
        ({"bundle": 0.56}, "onnx-1: time over the first's 0.56, before 0.50 (12.0 %, noise 7.3 %)"),
        ({"fd": 0.7}, "onnx-1: FD-T 0.700, before 0.500 (noise 0.141)"),
        ({"score": scored("onnx-4", -0.5, 0.3)}, "onnx-4: CLIP score "),
    ],
)
def test_worse_by_more_than_the_noise_fails(tmp_path, change, words):
    verdict = gate(tmp_path, parts(), parts(**change))
    assert len(verdict.falls) == 1
    assert words in verdict.falls[0]


def test_worse_within_the_noise_passes(tmp_path):
    assert gate(tmp_path, parts(), parts(peer=1.9, bundle=0.52, fd=0.6, score=scored("onnx-4", -0.02, 0.3))).passed
    assert gate(tmp_path, parts(half=0.2), parts(half=0.2, peer=1.6)).passed  # a noisy machine


def test_pairs_tell_what_two_intervals_cannot(tmp_path):
    """The drop of 0.5 is far inside the intervals of 1.2: without the pictures' own scores it would not be seen."""
    plain = [candidate("onnx-4", float(SCORES.mean()) + shift, half=1.2) for shift in (0.0, -0.5)]
    assert gate(tmp_path, parts(score=plain[0]), parts(score=plain[1])).passed


def test_psnr_counts_only_where_it_can_be_seen(tmp_path):
    def with_psnr(value):
        row = scored("onnx-4")
        figure = {"value": value, "low": value - 1, "high": value + 1, "count": 64}
        return {**row, "figures": {**row["figures"], "psnr_db": figure}}

    assert gate(tmp_path, parts(score=with_psnr(200.0)), parts(score=with_psnr(90.0))).passed
    verdict = gate(tmp_path, parts(score=with_psnr(90.0)), parts(score=with_psnr(30.0)))
    assert verdict.falls == ("onnx-4: PSNR to torch, dB 30.0, before 90.0 (noise 1.4)",)


def test_who_is_gone_is_worse(tmp_path):
    timed, judged = parts()
    timed["entrants"][1] = not_run("optimum", "not installed: make peer-optimum", "optimum")
    judged["candidates"] = judged["candidates"][:1]
    verdict = gate(tmp_path, parts(), (timed, judged))
    assert verdict.falls == (
        "optimum: was timed before, and is not now: not installed: make peer-optimum",
        "onnx-1: its pictures were measured before, and are not now",
    )


def test_what_does_not_compare_is_said(tmp_path):
    verdict = gate(tmp_path, parts(), parts(cpu="Slow 1"))
    assert verdict.left_out == ("latency: another processor (Slow 1, before Fast 9000)",)
    assert verdict.passed
    timed, judged = parts(cpu="Slow 1")
    with pytest.raises(DataError, match=r"cannot be compared: latency: another processor .*; quality: other eye than"):
        gate(tmp_path, parts(), (timed, judged | {"eye": {"name": "vit-b-32"}}))


def test_the_command(tmp_path):
    gate(tmp_path, parts(), parts(peer=1.0))
    baseline = ["--baseline", str(tmp_path / "before" / "report.json")]
    good = CliRunner().invoke(app, ["gate", str(tmp_path / "before"), *baseline])
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout.splitlines()[-1])["passed"]
    bad = CliRunner().invoke(app, ["gate", str(tmp_path / "after"), *baseline])
    assert bad.exit_code == 1
    assert bad.stderr.splitlines()[0].startswith("worse: optimum: time over the first's 1.00, before 2.00")
    missing = CliRunner().invoke(app, ["gate", str(tmp_path / "after"), "--baseline", str(tmp_path / "none.json")])
    assert missing.exit_code == 1
    assert "none.json: no such file; it is the report.json of hypersd-bench report" in missing.stderr

"""What the race reads off an export's own words, and how it sums up; the exports themselves are slow and elsewhere."""

import sys

import pytest

from benchmarks import export_race
from benchmarks.export_race import race, stages, summary, timed
from hypersd_export.errors import HypersdError
from tests.bundles import seal

STAGES = {
    "load": {"s": 0.4, "mb": 117.0},
    "onnx-fp16-unet": {"s": 44.4, "mb": 2773.0},
    "onnx-fp16-scan": {"s": 1122.6, "mb": 14373.0},
    "verify": {"s": 58.4, "mb": 8806.0},
}


def test_stages_are_those_of_the_manifest(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    assert stages(seal(tmp_path)) == {"unet": {"s": 0.1, "mb": 10.0}}


def test_the_summary_is_of_medians():
    def run(s, mb, *parts):
        return {"s": s, "mb": mb, "stages": {str(n): {"s": part, "mb": mb / 2 - n} for n, part in enumerate(parts)}}

    found = {
        "ours": [run(30.0, 2000.0, 15.0, 5.0), run(50.0, 3000.0, 25.0), run(40.0, 2500.0, 90.0)],
        "optimum": [{"s": 100.0, "mb": 9e3}, {"s": 120.0, "mb": 8e3}, {"s": 500.0, "mb": 7e3}],
    }
    done = summary(found, {"stages": STAGES})
    assert done["median"]["ours"] == {"s": 40.0, "mb": 2500.0}
    assert done["median"]["our export alone"] == {"s": 25.0, "mb": 1250.0}
    assert done["optimum_over_ours"] == {"whole command": 3.0, "export alone": 4.8}
    assert done["verification"] == {"s": pytest.approx(1181.0), "mb": 14373.0, "over_export": pytest.approx(47.24)}


def test_all_run_in_turn_and_the_lora_only_where_one_is_given(tmp_path, monkeypatch, capsys):
    asked = []

    def ours(pipeline, scratch, *options, lora="none"):
        assert scratch.is_dir()
        asked.append((lora, "--no-verify" in options))
        return {"s": 2.0, "mb": 1.0, "stages": STAGES}

    monkeypatch.setattr(export_race, "ours", ours)
    monkeypatch.setattr(export_race, "optimums", lambda *_: asked.append("optimum") or {"s": 10.0, "mb": 3.0})
    done = race(tmp_path, 2, None)
    assert asked == [("none", True), "optimum"] * 2 + [("none", False)]
    assert set(done["rounds"]) == {"ours", "optimum"}
    asked.clear()
    done = race(tmp_path, 1, tmp_path / "l.safetensors")
    assert asked == [("none", True), "optimum", (str(tmp_path / "l.safetensors"), True), ("none", False)]
    assert done["median"]["ours with a LoRA"] == {"s": 2.0, "mb": 1.0}
    assert done["optimum_over_ours"]["whole command"] == 5.0
    assert "round 1: ours with a LoRA 2.0 s, 1 MB" in capsys.readouterr().err


def test_a_command_that_fails_is_one_line(tmp_path, monkeypatch):
    assert timed([sys.executable, "-c", "pass"], {})["s"] > 0
    with pytest.raises(HypersdError, match="failed: no such weights"):
        timed([sys.executable, "-c", "import sys; sys.exit('no such weights')"], {})
    monkeypatch.setattr(export_race.peers, "python_of", lambda name: None)
    with pytest.raises(HypersdError, match="optimum is not installed: make peer-optimum"):
        export_race.optimums(tmp_path, tmp_path)

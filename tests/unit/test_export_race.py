"""What the race reads off an export's own words, and how it sums up; the exports themselves are slow and elsewhere."""

import sys

import pytest

from benchmarks import export_race
from benchmarks.export_race import stages, summary, timed
from hypersd_export.errors import HypersdError

SAID = """\
plan: 1 step of tcd, eta 0, epsilon, no guidance (flags)
load                     0.4 s      117 MB
onnx-fp16-unet          44.4 s    2,773 MB
onnx-fp16-scan       1,122.6 s   14,373 MB
verify                  58.4 s    8,806 MB
export in all           77.6 s    6,383 MB, verification apart
"""


def test_stages_are_read_off_the_exports_own_words():
    found = stages(SAID)
    assert list(found) == ["load", "onnx-fp16-unet", "onnx-fp16-scan", "verify", "export in all"]
    assert found["onnx-fp16-scan"] == {"s": 1122.6, "mb": 14373.0}


def test_the_summary_is_of_medians():
    def run(s, mb, export=0.0):
        return {"s": s, "mb": mb, "stages": {"export in all": {"s": export, "mb": mb / 2}}}

    found = {
        "ours": [run(30.0, 2000.0, 20.0), run(50.0, 3000.0, 25.0), run(40.0, 2500.0, 90.0)],
        "optimum": [{"s": 100.0, "mb": 9e3}, {"s": 120.0, "mb": 8e3}, {"s": 500.0, "mb": 7e3}],
    }
    done = summary(found, {"stages": stages(SAID)})
    assert done["median"]["ours"] == {"s": 40.0, "mb": 2500.0}
    assert done["median"]["our export alone"] == {"s": 25.0, "mb": 1250.0}
    assert done["optimum_over_ours"] == {"whole command": 3.0, "export alone": 4.8}
    assert done["verification"] == {"s": pytest.approx(1181.0), "mb": 14373.0, "over_export": pytest.approx(47.24)}


def test_a_command_that_fails_is_one_line(tmp_path, monkeypatch):
    figures, said = timed([sys.executable, "-c", "import sys; print('a  1.0 s  2 MB', file=sys.stderr)"], {})
    assert figures["s"] > 0
    assert stages(said) == {"a": {"s": 1.0, "mb": 2.0}}
    with pytest.raises(HypersdError, match="failed: no such weights"):
        timed([sys.executable, "-c", "import sys; sys.exit('no such weights')"], {})
    monkeypatch.setattr(export_race.peers, "python_of", lambda name: None)
    with pytest.raises(HypersdError, match="optimum is not installed: make peer-optimum"):
        export_race.optimums(tmp_path, tmp_path)

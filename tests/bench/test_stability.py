"""Two runs: ratios inside each other's intervals, and orders that reverse."""

import json

import pytest

from benchmarks.stability import compare, main, ratios
from hypersd_export.errors import DataError


def run(**values):
    return {name: {"value": v, "again_low": v - 0.1, "again_high": v + 0.1} for name, v in values.items()}


def test_what_lies_outside_and_what_reverses():
    same = compare(run(a=2.0, b=3.0, only=9.0), run(a=2.05, b=2.95))
    assert same == {"ratios": 4, "inside": 1.0, "outside": [], "reversed": []}
    other = compare(run(a=2.0, b=3.0, c=4.0), run(a=3.5, b=3.0, c=4.0))
    assert (other["ratios"], other["outside"], other["reversed"]) == (6, ["a"], [["a", "b"]])
    assert other["inside"] == pytest.approx(4 / 6)
    near = compare(run(a=2.0, b=2.15), run(a=2.12, b=2.05))  # their intervals meet: no order was stated
    assert near["reversed"] == []
    wide = run(a=2.0)
    wide["a"] |= {"again_low": 1.0, "again_high": 4.0}
    assert compare(wide, run(a=3.5))["inside"] == 0.5  # the one holds the other, and not the other way round
    with pytest.raises(DataError, match="no contestant in common"):
        compare(run(a=1.5), run(b=1.5))


def test_the_command(tmp_path, capsys):
    rows = [{"name": "first", "ratio": {"value": 1.0}}, {"name": "peer", "status": "not run"},
            {"name": "a", "ratio": run(a=2.0)["a"]}]  # fmt: skip
    one, two, none = (tmp_path / name for name in ("one.json", "two.json", "none.json"))
    one.write_text(json.dumps({"entrants": rows}))
    two.write_text(json.dumps({"latency": {"entrants": rows}}))
    assert list(ratios(one)) == list(ratios(two)) == ["a"]
    assert main([str(one), str(two), "--out", str(tmp_path / "new")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "new" / "stability.json").read_text())
    rows[2]["ratio"] = run(a=5.0)["a"]
    two.write_text(json.dumps({"entrants": rows}))
    assert main([str(one), str(two)]) == 1
    none.write_text("{}")
    assert main([str(one), str(none)]) == 1
    assert "no report of hypersd-bench latency" in capsys.readouterr().err

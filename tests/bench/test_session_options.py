"""The benchmark of session options: each variant runs, differs from what ships in its option alone, and is reported."""

import json

import onnxruntime
import pytest

from benchmarks import session_options as bench
from hypersd_export.errors import HypersdError
from hypersd_export.runtime.onnx import session_options
from tests.bundles import write_unet

CHANGED = {
    "arena": {"enable_cpu_mem_arena": True},
    "no memory pattern": {"enable_mem_pattern": False},
    "by priority": {"execution_order": onnxruntime.ExecutionOrder.PRIORITY_BASED},
    "basic rewriting": {"graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC},
    "extended rewriting": {"graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED},
    "one thread": {"intra_op_num_threads": 1},
}
ENTRIES = {
    "spinning": ("session.intra_op.allow_spinning", "1"),
    "no prepacking": ("session.disable_prepacking", "1"),
    "denormals are zero": ("session.set_denormal_as_zero", "1"),
}


@pytest.fixture
def graph(tmp_path):
    write_unet(tmp_path / "unet", 1)
    return tmp_path / "unet" / "model.onnx"


@pytest.mark.parametrize("variant", bench.VARIANTS)
def test_a_variant_changes_its_option_alone(variant, graph):
    shipped, changed = session_options(onnxruntime), session_options(onnxruntime)
    bench.VARIANTS[variant](onnxruntime, changed)
    names = {name for options in CHANGED.values() for name in options}
    found = {name: getattr(changed, name) for name in names if getattr(changed, name) != getattr(shipped, name)}
    assert found == CHANGED.get(variant, {})
    for name, (entry, value) in ENTRIES.items():
        if name == variant:
            assert changed.get_session_config_entry(entry) == value
    done = bench.measured(graph, variant, 2)
    assert len(done["call_s"]) == 2
    assert min(done["load_s"], *done["call_s"], done["peak_mb"]) > 0


def test_figures_are_medians_and_ratios_to_what_ships():
    def run(load, calls, peak):
        return {"load_s": load, "call_s": calls, "peak_mb": peak}

    found = bench.rows({
        bench.SHIPPED: [run(1.0, [2.0, 2.0, 9.0], 100.0)] * 3,
        "spinning": [run(2.0, [1.0, 1.0, 7.0], 50.0)] * 3,
    })  # fmt: skip
    assert found["spinning"]["call_s"] == {"median": 1.0, "ratio": {"value": 0.5, "low": 0.5, "high": 0.5}}
    assert found["spinning"]["load_s"]["ratio"]["value"] == 2.0
    assert found[bench.SHIPPED]["peak_mb"]["ratio"]["value"] == 1.0
    text = bench.page({"a/unet": found}, "# About\n\n", "a machine")
    assert "| spinning | 2.00 | 2.00 [2.00, 2.00] | 1.000 | 0.50 [0.50, 0.50] | 50 | 0.50 [0.50, 0.50] |" in text
    assert text.startswith("# About\n\n## a/unet\n\n")
    assert text.endswith("\na machine\n")


def test_the_command(graph, tmp_path, monkeypatch, capsys):
    def run_module(command):
        assert bench.main(command[1:]) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(bench, "run_module", run_module)
    options = ["--rounds", "2", "--calls", "1", "--variants", "spinning", "--out", str(tmp_path / "out")]
    assert bench.main([str(graph), *options]) == 0
    data = json.loads((tmp_path / "out" / "session_options.json").read_text())
    assert [list(found) for found in data["graphs"].values()] == [[bench.SHIPPED, "spinning"]]
    assert (tmp_path / "out" / "session_options.md").is_file()


def test_refusals(tmp_path, capsys):
    write_unet(tmp_path / "unet", "rows")
    with pytest.raises(HypersdError, match="has the free axes rows"):
        bench.measured(tmp_path / "unet" / "model.onnx", bench.SHIPPED, 1)
    assert bench.main(["x.onnx", "--rounds", "0", "--out", str(tmp_path)]) == 1
    assert bench.main(["x.onnx"]) == 1
    assert "--rounds 0 --calls 10: at least 1 of each" in (said := capsys.readouterr().err)
    assert "error: --out is missing" in said

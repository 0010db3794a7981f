"""The race, with painters that are scripts, and its figures on times whose answers are known."""

import json
import sys

import numpy as np
import psutil
import pytest

from benchmarks.bench import figures, latency
from benchmarks.bench.entrants import Entrant
from benchmarks.bench.latency import Options, Times, race
from benchmarks.bench.layout import latency_table, not_run_table
from benchmarks.bench.machine import Energy, clocks, cpu_name, describe, gpu, gpu_memory_mb
from benchmarks.bench.tables import interval, number
from benchmarks.bench.work import count, roofline
from hypersd_export.errors import OptionError

NO_ENERGY = Energy((), "none here")


def fake(name, **request):
    command = (sys.executable, "-m", "tests.bench.painters", json.dumps(request))
    return Entrant(name=name, kind="bundle", command=command, facts={"steps": 4, "unet_rows": 1, "precision": "fp32"})


def test_everybody_in_turn_and_who_fails_is_out(monkeypatch):
    monkeypatch.setattr(latency, "PAUSE_S", 0.0)
    entrants = [
        fake("a"), fake("b", work_s=0.004), fake("dies", dies_at=6), fake("refuses", refuses=True),
        Entrant(name="peer", kind="optimum", missing="not installed: make peer-optimum"),
    ]  # fmt: skip
    options = Options(rounds=6, sessions=2, warmup=1, batches=(3,), timeout=60)
    told = []
    times = race(entrants, options, NO_ENERGY, tell=told.append)
    assert set(times) == {"a", "b", "dies", "refuses"}
    for name in ("a", "b"):
        assert len(times[name].cold_s) == len(times[name].load_s) == len(times[name].first_s) == 2
        assert {images: len(seconds) for images, seconds in times[name].whole_s.items()} == {1: 6, 3: 4}
        assert times[name].parts_s == {"unet": [0.25] * 6}
        assert (times[name].pixels == latency.CHECK_SEED % 256).all()
        np.testing.assert_allclose(times[name].cold_s, np.add(times[name].load_s, times[name].first_s))
    assert min(times["b"].whole_s[1]) >= 0.004
    assert min(times["b"].whole_s[3]) >= 0.012
    assert times["dies"].failed.startswith("dies: its process ended with exit code 3")
    assert times["refuses"].failed == "refuses: no such weights"
    starts = [text.split(": ")[1] for text in told if text.endswith("starts")]
    assert starts == ["a starts", "b starts", "dies starts", "refuses starts", "b starts", "a starts"]

    report = figures.report(
        entrants, times, options, speed=None, work={}, energy=NO_ENERGY, machine={}, prompt="p", command=["x"]
    )
    rows = {row["name"]: row for row in report["entrants"]}
    assert [rows[name]["status"] for name in rows] == ["measured", "measured", "failed", "not run", "not run"]
    assert rows["peer"]["why"] == "not installed: make peer-optimum"
    assert rows["b"]["ratio"]["value"] > 1
    assert rows["b"]["picture_psnr_db"] == 200.0
    assert "ratio" not in rows["dies"]
    json.dumps(report, allow_nan=False)
    assert [cells[0] for cells in latency_table({"latency": report}).rows] == ["a", "b"]
    assert not_run_table({"latency": report}).rows[1] == ("refuses", "latency", "refuses: no such weights")


def times_of(seconds, **more):
    return Times(
        cold_s=[1.0, 3.0, 2.0], load_s=[0.5, 2.5, 1.5], first_s=[0.5] * 3, whole_s={1: list(seconds)},
        parts_s={"unet": [s / 2 for s in seconds]}, peak_mb=100.04, **more,
    )  # fmt: skip


def test_figures_have_known_answers():
    seconds = np.arange(1, 101) / 1000
    options = Options(rounds=100, sessions=4)
    found = figures.measured_figures(times_of(seconds, joules=[1.0, 3.0]), options)
    assert found["image_ms"] == {
        "count": 100, "p50": 50.5, "p90": 90.1, "p99": 99.01, "mean": 50.5, "min": 1.0, "max": 100.0,
    }  # fmt: skip
    assert found["components_ms"]["unet"]["p50"] == 25.25
    assert found["cold_start_s"] == {"median": 2.0, "all": [1.0, 3.0, 2.0]}
    assert found["images_per_s"]["1"]["value"] == pytest.approx(1 / 0.0505)
    assert found["joules"]["mean"] == 2.0
    assert "p90" not in found["joules"]
    assert found["peak_mb"] == 100.0
    few = figures.measured_figures(times_of(seconds[:9]), Options(rounds=9, sessions=3))
    assert {"p50", "p90", "p99"} & set(few["image_ms"]) == {"p50"}


def test_ratios_hold_what_sessions_differ_by():
    rng = np.random.default_rng(0)
    slow_sessions = np.repeat([1.0, 1.3, 1.0, 1.2, 1.1], 20)
    base = rng.normal(0.1, 0.001, 100)
    other = 2 * slow_sessions * rng.normal(0.1, 0.001, 100)
    options = Options(rounds=100, sessions=5)
    found = figures.compared(times_of(other), times_of(base), options)["ratio"]
    assert found["value"] == pytest.approx(2.2, abs=0.02)
    assert found["low"] < 2.05
    assert found["high"] > 2.35
    assert 0 < found["again_low"] < found["low"] < found["high"] < found["again_high"]
    assert figures.compared(times_of(base), times_of(base), options)["ratio"] == {
        "value": 1.0, "low": 1.0, "high": 1.0, "again_low": 1.0, "again_high": 1.0,
    }  # fmt: skip


def test_pictures_are_compared_where_they_are_of_one_size():
    options = Options(rounds=5, sessions=5)
    black, grey = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 51, np.uint8)
    base = times_of([1.0] * 5, pixels=black)
    assert figures.compared(times_of([1.0] * 5, pixels=grey), base, options)["picture_psnr_db"] == 13.98
    assert "picture_psnr_db" not in figures.compared(times_of([1.0] * 5, pixels=grey[:, :2]), base, options)


def test_the_share_of_the_peak():
    facts = {"gemm_flop": 2e9, "copy_bytes": 4e8, "side": 1000, "device": "cpu", "precision": "fp32"}
    speed = Times(facts=facts)
    speed.parts_s = {"gemm": [0.02, 0.01, 0.04], "copy": [0.1, 0.1, 0.1]}
    peak = figures.peak_of(speed, Options(threads=2))
    assert (peak["gemm_gflop_per_s"], peak["best_gemm_gflop_per_s"], peak["copy_gb_per_s"]) == (100.0, 200.0, 4.0)
    assert figures.peak_of(None, Options()) is None
    work = {"flop": 1e9, "parameters": 1e6}
    found = roofline(
        work, steps=4, rows=2, unet_s=0.2, flop_per_s=100e9, copy_bytes_per_s=4e9, bytes_each=4
    )  # 8 GFLOP in 0.2 s; 0.02 s a call by arithmetic, 0.001 s by memory
    assert found == pytest.approx(
        {"gflop": 8.0, "gflop_per_s": 40.0, "of_gemm": 0.4, "roof_s": 0.08, "of_roof": 0.4}
    )  # fmt: skip
    bound = roofline(work, steps=1, rows=1, unet_s=1.0, flop_per_s=1e15, copy_bytes_per_s=4e6, bytes_each=2)
    assert bound["roof_s"] == 0.5
    row = {"steps": 4, "unet_rows": 2, "precision": "fp16"}
    assert figures._roofline(row, times_of([0.4]), work, peak)["roofline"]["of_gemm"] == 0.4
    assert figures._roofline(row, times_of([0.4]), {"reason": "no torch"}, peak) == {}


def test_flops_are_those_of_every_layer(tiny_base):
    """Convolutions and linear layers by hooks on a real pass; attention by its formula."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    total = 0

    def layer(module, inputs, output):
        nonlocal total
        total += 2 * output.numel() * module.weight[0].numel()

    def attention(module, arguments, settings, output):
        nonlocal total
        del arguments, output
        other = settings.get("encoder_hidden_states")
        queries, width = shapes[module]
        keys = queries if other is None else other.shape[1]
        total += 2 * 2 * queries * keys * width

    shapes = {}

    def remember(module, arguments, settings):
        hidden = arguments[0] if arguments else settings["hidden_states"]
        shapes[module] = hidden.shape[1:]

    for module in unet.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(layer)
        if type(module).__name__ == "Attention":
            module.register_forward_pre_hook(remember, with_kwargs=True)
            module.register_forward_hook(attention, with_kwargs=True)
    with torch.no_grad():
        unet(torch.zeros(1, 4, 4, 6), torch.tensor(1.0), torch.zeros(1, 16, 32))
    sizes = {"channels": 4, "latent_height": 4, "latent_width": 6, "tokens": 16, "text_width": 32}
    found = count(unet.config, sizes)
    assert found == {"flop": total, "parameters": sum(p.numel() for p in unet.parameters())}


def test_options_in_one_line():
    assert Options(rounds=7, sessions=3).session_rounds(1) == [3, 2, 2]
    assert Options(rounds=100, sessions=5).session_rounds(4) == [2] * 5
    for settings, message in (
        ({"rounds": 2}, "--rounds 2 --sessions 5: at least one round in each session"),
        ({"threads": 0}, "--warmup 3 --threads 0"),
        ({"batches": (0,)}, "--batch 0: whole numbers above 0"),
    ):
        with pytest.raises(OptionError, match=message):
            Options(**settings)


def test_energy_where_the_system_counts_it(tmp_path):
    assert Energy.find(tmp_path / "none").reason == "this system has no /sys/class/powercap"
    assert Energy.find(tmp_path).reason == "no RAPL zone under /sys/class/powercap"
    for name, value in (("intel-rapl:0", "900000"), ("intel-rapl:1", "5"), ("intel-rapl:0:0", "1"), ("dtpm", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(value + "\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000\n")
    energy = Energy.find(tmp_path)
    assert [zone.name for zone in energy.zones] == ["intel-rapl:0", "intel-rapl:1"]
    assert energy.read() == (900000, 5)
    assert energy.joules((900000, 5), (100000, 2000005)) == pytest.approx(0.2 + 2.0)  # the first went round
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert "energy_uj cannot be read (No such file" in Energy.find(tmp_path).reason


def test_the_machine_is_described(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Fast 9000\ncpu MHz\t\t: 2400.018\nprocessor\t: 1\n")
    assert cpu_name(info) == "Fast 9000"
    assert clocks(info, tmp_path)["mhz"] == [2400]
    assert clocks(tmp_path / "none", tmp_path) == {"mhz": None, "governor": None}
    described = describe(3)
    assert (described["threads"], described["versions"]["numpy"]) == (3, np.__version__)
    assert described["cores"] >= described["usable_cores"] >= 1
    json.dumps(described, allow_nan=False)


SMI = """#!/bin/sh
case "$1" in
  --query-gpu*) echo "NVIDIA H100 80GB HBM3, 580.159.04, 81559" ;;
  *) printf '%s\\n' "77, 512" "78, [N/A]" ;;
esac
"""


def test_what_nvidia_smi_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (gpu(), gpu_memory_mb()) == (None, {})
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    assert gpu() == {"name": "NVIDIA H100 80GB HBM3", "driver": "580.159.04", "memory_mb": 81559 * 2**20 / 1e6}
    assert gpu_memory_mb() == {77: 512 * 2**20 / 1e6}
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert (gpu(), gpu_memory_mb()) == (None, {})


def test_what_is_held_of_the_gpu_is_the_most_of_all_sessions(monkeypatch):
    monkeypatch.setattr(latency, "PAUSE_S", 0.0)
    held = iter([300.0, 200.0])

    def of_all():
        children = psutil.Process().children()
        return {1: 5.0, children[0].pid: next(held)}

    monkeypatch.setattr(latency, "gpu_memory_mb", of_all)
    times = race([fake("a")], Options(rounds=2, sessions=2, warmup=0, timeout=60), NO_ENERGY, tell=list)
    assert times["a"].vram_mb == 300.0
    report = figures.report(
        [fake("a")], times, Options(rounds=2, sessions=2), speed=None, work={}, energy=NO_ENERGY, machine={},
        prompt="p", command=["x"],
    )  # fmt: skip
    (row,) = report["entrants"]
    assert row["vram_mb"] == 300.0
    table = latency_table({"latency": report})
    assert table.rows[0][table.head.index("VRAM MB")] == "300"


def test_numbers_as_text():
    assert number(1234.567) == "1,234.57"
    assert number(None) == ""
    assert number(-0.001) == "0.00"
    assert interval({"value": 0.105, "low": 0.1, "high": 0.11}, 1, 100) == "10.5 [10.0, 11.0]"
    assert interval(None) == ""

"""The acceptance script's logic on a Mac of onnxruntime, its measuring for real; the exports are hand-made bundles."""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_measure, mac_acceptance
from benchmarks.mac_acceptance import FORMAT, FORMS, Case, Processes, Step, main, markdown, report
from hypersd_export.diffusion.plan import FewStepPlan, Solver
from hypersd_export.errors import HypersdError
from hypersd_export.runtime import mac
from hypersd_export.runtime.coreml import UNITS
from tests.coreml_bundles import FakeMac, make_package_bundle

pytestmark = pytest.mark.filterwarnings("ignore::hypersd_export.runtime.tokenizer.PromptTruncated")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeMac:
    device = FakeMac()
    monkeypatch.setattr(mac, "open_device", lambda: device)
    return device


class InProcess(Processes):
    """The workers' commands, in this process."""

    def _run(self, command: Sequence[str]) -> None:
        if command[0] == "benchmarks.gpu_measure":
            assert gpu_measure.main(command[1:]) == 0
            return
        assert command[0] == "hypersd_export.cli"
        options = dict(itertools.pairwise(command))
        plan = FewStepPlan(solver=Solver.DDIM, num_steps=int(options["--steps"]))
        make_package_bundle(Path(options["--out"]), [plan], onnx=True)


def workers(**options: Any) -> InProcess:
    return InProcess(**{"runs": 3, "warmup": 2, "timeout": 60.0, **options})


def steps_of(out: Path) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in json.loads((out / "mac_acceptance.json").read_text())["steps"]}


def test_all_of_it_on_a_mac_of_onnxruntime(device: FakeMac, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--steps", "1", "4", "--forms", "plain", "single", "--runs", "3"]
    assert main(arguments, workers()) == 0
    found = json.loads((out / "mac_acceptance.json").read_text())
    assert (found["format"], found["device"]) == (FORMAT, "Fake M9, macOS 99.0")
    steps = steps_of(out)
    cases = ("plain-1", "plain-4", "single-1", "single-4")
    assert list(steps) == [f"{case} {what}" for case in cases for what in ("export", *UNITS, "onnx")]
    measured = steps["plain-4 cpu-and-ne"]["figures"]
    assert measured["golden"]["passed"]
    assert measured["provider"] == "Fake M9, macOS 99.0, Core ML on cpu-and-ne"
    assert measured["image_ms"]["count"] == 3
    assert set(measured["components_ms"]) == {"text_encoder", "unet", "vae_decoder"}
    assert {units for _, _, units in device.loaded} == set(UNITS)
    assert set(steps["plain-1 export"]["figures"]["packages_mb"]) == {
        "text_encoder", "unet", "vae_decoder", "vae_encoder",
    }  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * 6
    assert lines[1].startswith("plain-1 all              passed")
    text = (out / "mac_acceptance.md").read_text()
    assert text.startswith("# Mac acceptance: Fake M9, macOS 99.0, passed\n")
    assert "24 steps, 0 failed, 0 left out." in text
    assert "| plain-4 cpu-and-ne | equal |" in text


def test_a_unit_that_is_wrong_or_refuses_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a stub: one unit adds a tenth to all it computes, another does not load."""

    class Half(FakeMac):
        def load(self, package: Path, digest: str, units: str, function: str | None = None) -> Any:
            self.spoil = 0.1 if units == "cpu-and-ne" else 0.0
            return super().load(package, digest, units, function)

    monkeypatch.setattr(mac, "open_device", lambda: Half(refuse=("cpu-and-gpu",)))
    out = tmp_path / "out"
    assert main(["--out", str(out), "--steps", "2", "--forms", "plain"], workers()) == 1
    steps = steps_of(out)
    assert {name: step["passed"] for name, step in steps.items()} == {
        "plain-2 export": True, "plain-2 all": True, "plain-2 cpu-only": True, "plain-2 cpu-and-gpu": False,
        "plain-2 cpu-and-ne": False, "plain-2 onnx": True,
    }  # fmt: skip
    assert steps["plain-2 cpu-and-ne"]["note"].startswith("golden: picture PSNR")
    assert "does not load on cpu-and-gpu: no such unit" in steps["plain-2 cpu-and-gpu"]["note"]
    assert "dB, FAILED |" in (out / "mac_acceptance.md").read_text()


def test_an_export_that_fails_is_told_and_measured_nowhere(device: FakeMac, tmp_path: Path) -> None:
    class Failing(InProcess):
        def export(self, case: Case, bundle: Path) -> None:
            raise HypersdError("the converter refuses\n node 7")

    steps = mac_acceptance.accept(
        [Case(form="plain", steps=1)], ["all"], Failing(runs=1, warmup=2, timeout=9), tmp_path, tell=lambda _: None
    )
    assert [(step.name, step.passed, step.note) for step in steps] == [
        ("plain-1 export", False, "the converter refuses node 7"),
        ("plain-1 all", False, "its export failed"),
        ("plain-1 onnx", False, "its export failed"),
    ]


def test_the_forms_are_options_that_the_export_takes(tmp_path: Path) -> None:
    """Through the command line's own parser, up to a base that does not exist."""
    from typer.testing import CliRunner

    from hypersd_export.cli import app

    for form in FORMS:
        arguments = [*Case(form=form, steps=2).command(tmp_path / "b"), "--base", str(tmp_path / "none")]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert "none" in result.output
        assert "--base" in result.output or "no such" in result.output.lower() or "not found" in result.output.lower()


def test_without_a_mac_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert main(["--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: runtime 'coreml': Core ML runs on a Mac only")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["--out", str(tmp_path / "out"), "--runs", "0"]) == 1
    assert "--runs 0 --warmup 10: at least 1 and 2" in capsys.readouterr().err


def test_report_of_nothing() -> None:
    steps = [Step(name="a export", passed=False, note="no"), Step(name="a onnx", note="left")]
    text = markdown(report("Fake", {"runs": 1, "warmup": 2}, steps))
    for said in ("- FAILED a export: no", "- left out a onnx: left", "Nothing was measured.", "Nothing was exported."):
        assert said in text

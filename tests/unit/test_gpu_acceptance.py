"""The acceptance script's logic on the device of NumPy memory; on a GPU the whole of it (`pytest -m gpu`)."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import gpu_acceptance, gpu_measure
from benchmarks.gpu_acceptance import (
    FORMAT,
    Case,
    Processes,
    Step,
    accept,
    capability_name,
    choose_device,
    export_commands,
    main,
)
from benchmarks.gpu_report import markdown, table
from benchmarks.stats import summary
from hypersd_export.bundle.digest import sha256_file
from hypersd_export.cli import app
from hypersd_export.diffusion.plan import FewStepPlan, Solver
from hypersd_export.errors import HypersdError, MissingBackend, OptionError
from hypersd_export.runtime import nvidia
from hypersd_export.targets import tensorrt_vendor
from tests.bundles import CFG_PLANS
from tests.engine_bundles import make_engine_bundle, make_single_engine_bundle, reseal, write_engine
from tests.fake_device import FakeDevice

pytestmark = pytest.mark.filterwarnings("ignore::hypersd_export.runtime.tokenizer.PromptTruncated")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    device = FakeDevice()
    monkeypatch.setattr(nvidia, "open_device", lambda flavour: device)
    return device


class InProcess(Processes):
    """The workers' commands, in this process: the measuring for real, the export as a hand-made bundle."""

    def _run(self, command: Sequence[str]) -> None:
        if command[0] == "benchmarks.gpu_measure":
            assert gpu_measure.main(command[1:]) == 0
            return
        assert command[0] == "hypersd_export.cli"
        if command[1] == "refit":
            Path(command[2]).rename(command[command.index("--out") + 1])
            return
        options = dict(itertools.pairwise(command))
        plans = [
            FewStepPlan(solver=Solver.TCD, num_steps=int(options["--steps"]), eta=0.3, guidance=CFG_PLANS[0].guidance)
        ]
        out = Path(options["--out"])
        made = out.with_name(f"{out.name}-made")
        if "--single-graph" in command:
            bundle, onnx = make_single_engine_bundle(made, plans)
            records = {"pipeline": write_engine(bundle, "pipeline", onnx / "pipeline.onnx")}
            shutil.copyfile(onnx / "pipeline.onnx", bundle / "pipeline.onnx")
        else:
            bundle, records = make_engine_bundle(made, plans)
            for name in records:
                shutil.copyfile(made / "onnx" / name / "model.onnx", bundle / name / "model.onnx")
        reseal(bundle, records, {"onnx": {"precision": "fp32", "opset": 18}})
        bundle.rename(out)


def workers(**options: Any) -> InProcess:
    return InProcess(**{"runs": 5, "warmup": 2, "timeout": 60.0, **options})


def steps_of(out: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((out / "gpu_acceptance.json").read_text())
    return {step["name"]: step for step in report["steps"]}


def test_all_of_it_on_the_device_of_numpy_memory(
    device: FakeDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "1",
        "4",
        "--forms",
        "components",
        "unrolled",
        "--runs",
        "5",
    ]
    assert main(arguments, workers()) == 0
    report = json.loads((tmp_path / "out" / "gpu_acceptance.json").read_text())
    assert (report["format"], report["passed"]) == (FORMAT, True)
    assert report["device"]["name"] == "Fake RTX"
    assert (report["device"]["capability"], report["device"]["driver"]) == ("8.9", "580.0 (CUDA 13.0)")
    assert report["machine"]["packages"]["numpy"] == np.__version__
    steps = steps_of(tmp_path / "out")
    cases = ("components-1", "components-4", "unrolled-1", "unrolled-4")
    assert list(steps) == [f"{case} {what}" for case in cases for what in ("export", "tensorrt", "onnx")]
    assert set(steps["unrolled-4 export"]["figures"]["engines"]) == {"pipeline"}
    measured = steps["components-4 tensorrt"]["figures"]
    assert measured["golden"]["passed"]
    assert (measured["precision"], measured["provider"]) == ("fp16", "Fake RTX, TensorRT rtx 1.7.1.116")
    assert measured["image_ms"]["count"] == 5
    assert measured["image_ms"]["p50"] <= measured["image_ms"]["p90"] <= measured["image_ms"]["p99"]
    assert {name: figures["count"] for name, figures in measured["components_ms"].items()} == {
        "text_encoder": 5, "unet": 5, "vae_decoder": 5,
    }  # fmt: skip
    assert measured["device_ms"]["unet"]["compute"]["count"] == 5 * 4
    # the fake clock counts what is enqueued: the replayed graph, and an event
    assert measured["device_ms"]["unet"]["compute"]["p99"] == 2.0
    assert set(measured["cuda_graph"].values()) == {True}
    assert steps["unrolled-4 tensorrt"]["figures"]["device_ms"]["pipeline"]["compute"]["count"] == 5
    for case in cases:  # onnxruntime has no CUDA here
        step = steps[f"{case} onnx"]
        assert step["passed"] is None
        assert "onnxruntime-gpu" in step["note"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert lines[1].startswith("components-1 tensorrt    passed")
    text = (tmp_path / "out" / "gpu_acceptance.md").read_text()
    assert text.startswith("# GPU acceptance: Fake RTX, passed\n")
    assert "driver 580.0 (CUDA 13.0)" in text
    assert "12 steps, 0 failed, 4 left out." in text
    assert "| unrolled-4, tensorrt fp16 | equal |" in text


def test_what_fails_is_recorded_and_hides_nothing(
    device: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(InProcess):
        def export(self, case: Case, bundle: Path, device: Any) -> None:
            if case.steps == 1:
                raise HypersdError("the parser refuses\n node 7")
            super().export(case, bundle, device)

        def measure(self, bundle: Path, runtime: str, provider: str | None) -> dict[str, Any]:
            if bundle.name == "components-2":
                raise ZeroDivisionError("a bug")
            figures = super().measure(bundle, runtime, provider)
            if bundle.name == "components-4":
                figures["golden"] |= {"passed": False, "line": "picture PSNR 12.0 dB", "equal": False, "psnr_db": 12.0}
            return figures

    out = tmp_path / "out"
    arguments = ["--out", str(out), "--steps", "1", "2", "4", "8", "--forms", "components"]
    assert main(arguments, Failing(runs=2, warmup=2, timeout=60)) == 1
    steps = steps_of(out)
    assert {name: step["note"] for name, step in steps.items() if step["passed"] is False} == {
        "components-1 export": "the parser refuses node 7",
        "components-1 tensorrt": "its export failed",
        "components-1 onnx": "its export failed",
        "components-2 tensorrt": "ZeroDivisionError: a bug",
        "components-2 onnx": "ZeroDivisionError: a bug",
        "components-4 tensorrt": "golden: picture PSNR 12.0 dB",
    }
    assert steps["components-8 tensorrt"]["passed"] is True
    text = (out / "gpu_acceptance.md").read_text()
    assert text.startswith("# GPU acceptance: Fake RTX, FAILED\n")
    assert "- FAILED components-2 tensorrt: ZeroDivisionError: a bug" in text
    assert "| components-4, tensorrt fp16 | 12.0 dB, FAILED |" in text


def test_a_picture_that_is_off_fails_by_the_golden_gate(device: FakeDevice, tmp_path: Path) -> None:
    """Not by a stub: the bundle's golden latents and picture are of other weights."""

    class Other(InProcess):
        def export(self, case: Case, bundle: Path, device: Any) -> None:
            super().export(case, bundle, device)
            noise = bundle / "golden" / "initial_noise.npy"
            np.save(noise, -np.load(noise))
            manifest = json.loads((bundle / "manifest.json").read_text())
            entry = manifest["files"]["golden/initial_noise.npy"]
            entry["sha256"], entry["bytes"] = sha256_file(noise), noise.stat().st_size
            (bundle / "manifest.json").write_text(json.dumps(manifest))

    steps = accept(
        [Case(form="components", steps=2)], device.info, Other(runs=1, warmup=2, timeout=9), tmp_path, tell=print
    )
    assert [step.passed for step in steps] == [True, False, None]
    assert steps[1].note.startswith("golden: picture PSNR")


def test_the_commands_of_the_export(tmp_path: Path, device: FakeDevice) -> None:
    commands: list[list[str]] = []

    class Spy(Processes):
        def _run(self, command: Sequence[str]) -> None:
            commands.append(list(command))

    spy = Spy(runs=1, warmup=2, timeout=1)
    spy.export(Case(form="unrolled", steps=8), tmp_path / "b", device.info)
    spy.export(Case(form="components", steps=1), tmp_path / "b", FakeDevice(flavour="classic", capability=(9, 0)).info)
    common = ["hypersd_export.cli", "--target", "tensorrt", "--target", "onnx", "--steps"]
    out = ["--out", str(tmp_path / "b"), "--overwrite"]
    assert commands == [
        [*common, "8", "--trt-flavour", "rtx", *out, "--single-graph", "--unroll", "--compute-capability", "8.9"],
        [*common, "1", "--trt-flavour", "classic", *out],
    ]


def test_real_processes(tmp_path: Path) -> None:
    """The measuring process on onnxruntime's CPU provider, and how a failing one is told."""
    _, records = make_engine_bundle(tmp_path)
    bundle = tmp_path / "bundle"
    for name in records:
        shutil.copyfile(tmp_path / "onnx" / name / "model.onnx", bundle / name / "model.onnx")
    reseal(bundle, records, {"onnx": {"precision": "fp32", "opset": 18}})
    real = Processes(runs=3, warmup=2, timeout=120)
    figures = real.measure(bundle, "onnx", "cpu")
    assert figures["golden"]["passed"]
    assert figures["image_ms"]["count"] == 3
    assert figures["provider"] == "cpu"
    assert "device_ms" not in figures
    with pytest.raises(HypersdError, match="provider 'quantum' is not known"):
        real.measure(bundle, "onnx", "quantum")
    with pytest.raises(HypersdError, match=r"No module named .*\(benchmarks.nothing, exit code 1\)"):
        real._run(["benchmarks.nothing"])
    with pytest.raises(HypersdError, match=r"took more than 0\.01 s and was ended"):
        Processes(runs=1, warmup=2, timeout=0.01)._run(["benchmarks.nothing"])
    assert not list(tmp_path.glob("bundle-*.json"))


# Which device


def test_flavours(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(capability: tuple[int, int], installed: Sequence[str]) -> None:
        def opened(flavour: str) -> FakeDevice:
            if flavour not in installed:
                raise MissingBackend(flavour, "extra", "runtime 'tensorrt'")
            return FakeDevice(capability=capability, flavour=flavour)

        monkeypatch.setattr(nvidia, "open_device", opened)
        monkeypatch.setattr(tensorrt_vendor, "gpu_capability", lambda: capability)
        monkeypatch.setattr(tensorrt_vendor, "installed", lambda flavour: flavour in installed)

    machine((8, 9), ("rtx", "classic"))
    assert choose_device("auto").flavour == "classic"
    assert choose_device("rtx").flavour == "rtx"
    machine((8, 9), ("rtx",))
    assert choose_device("auto").flavour == "rtx"
    machine((9, 0), ("rtx", "classic"))
    assert (choose_device("auto").flavour, capability_name(choose_device("auto"))) == ("classic", "9.0")
    machine((8, 9), ("classic",))
    assert choose_device("auto").flavour == "classic"
    with pytest.raises(MissingBackend, match="rtx"):
        choose_device("rtx")


@pytest.mark.parametrize("form", gpu_acceptance.FORMS)
@pytest.mark.parametrize("flavour", ["rtx", "classic"])
def test_the_commands_are_those_of_hypersd_export(
    form: str, flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one is read by the real command line; here it only says what it would do."""
    monkeypatch.setattr(tensorrt_vendor, "gpu_capability", lambda: (8, 9))
    monkeypatch.setattr(tensorrt_vendor, "installed_version", lambda flavour: "1.2.3.4")
    info = FakeDevice(capability=(8, 9), flavour=flavour).info
    bundle = tmp_path / "bundle"
    first, *more = export_commands(Case(form=form, steps=4), bundle, info)
    result = CliRunner().invoke(app, [*first, "--dry-run"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["options"]["engines"]["capabilities"] == (["8.9"] if flavour == "rtx" else None)
    assert plan["options"]["targets"] == ["tensorrt", "onnx"]
    scales = [lora["scale"] for lora in plan["loras"]]
    if form != "refit":
        assert (more, scales, plan["out"]) == ([], [1.0], str(bundle))
        return
    assert scales == [0.5]
    [again] = more
    result = CliRunner().invoke(app, again)
    assert result.exit_code == 1
    assert f"no bundle at {plan['out']}" in result.output  # its arguments were read


def test_without_a_driver_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_driver(flavour: str) -> Any:
        raise OptionError("runtime 'tensorrt' does not start on this machine: no NVIDIA driver")

    monkeypatch.setattr(nvidia, "open_device", no_driver)
    assert main(["--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: runtime 'tensorrt' does not start on this machine: no NVIDIA driver\n"
    assert not (tmp_path / "out").exists()


def test_options_that_cannot_be_used(device: FakeDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--warmup", "1"]) == 1
    assert "--runs 100 --warmup 1: at least 1 and 2" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert main(["--out", str(tmp_path / "file" / "out")]) == 1
    assert "choose another --out" in capsys.readouterr().err


# Arithmetic


def test_latency_by_a_clock_of_our_own() -> None:
    ticks = iter([0.0, 0.010, 1.0, 1.030])
    result = gpu_measure.latency(lambda seed: {"unet": 0.002 * (seed + 1)}, 2, clock=lambda: next(ticks))
    assert result["image_ms"]["min"] == 10.0
    assert result["image_ms"]["max"] == 30.0
    assert result["images_per_s"] == 50.0
    assert result["components_ms"]["unet"]["mean"] == 3.0


def test_report_of_nothing(device: FakeDevice) -> None:
    result = gpu_acceptance.report(
        device.info, {"runs": 1, "warmup": 2}, [Step(name="a export", passed=False, note="no")]
    )
    text = markdown(result)
    assert "FAILED a export: no" in text
    assert "Nothing was measured." in text
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"


def test_times_against_onnx(device: FakeDevice) -> None:
    figures = {
        "golden": {"passed": True, "equal": True, "psnr_db": None, "line": ""}, "precision": "fp16", "open_s": 1.0,
        "first_image_s": 1.0, "image_ms": summary([2.0]), "images_per_s": 500.0, "components_ms": {},
        "cuda_graph": {"text_encoder": True, "unet": False},
    }  # fmt: skip
    slower = {**figures, "image_ms": summary([5.0])}
    del slower["cuda_graph"]
    steps = [Step(name="loop-4 tensorrt", passed=True, figures=figures),
             Step(name="loop-4 onnx", passed=True, figures=slower)]  # fmt: skip
    text = markdown(gpu_acceptance.report(device.info, {"runs": 1, "warmup": 2}, steps))
    assert "| text_encoder only | 2.50 |" in text
    assert "| loop-4, onnx fp16 | equal | 1.00 | 1.00 | 5.00 |" in text


# Hardware


@pytest.mark.gpu
def test_on_this_gpu(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--steps", "1", "4", "--runs", "20"]) == 0, (
        tmp_path / "gpu_acceptance.md"
    ).read_text()
    steps = steps_of(tmp_path)
    assert len(steps) == 3 * 2 * 3
    assert all(steps[f"{form}-{count} tensorrt"]["figures"]["golden"]["passed"] for form in gpu_acceptance.FORMS
               for count in (1, 4))  # fmt: skip

"""What the acceptance scripts of a GPU and of a Mac share: things that are tried one after the other, each in a process
of its own; one that fails is in the report and in the exit code, and the others go on."""

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bench.machine import versions
from benchmarks.results import one_line_error, run_module, write_result
from hypersd_export.errors import HypersdError, OptionError


@dataclass(kw_only=True, slots=True)
class Step:
    """One thing that was tried. `passed` None: it was left out, and `note` says why."""

    name: str
    passed: bool | None = None
    seconds: float = 0.0
    note: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One bundle that is tried: one of the script's forms, and a number of steps."""

    form: str
    steps: int

    @property
    def name(self) -> str:
        """Such as loop-4."""
        return f"{self.form}-{self.steps}"


class NotInstalled(HypersdError):  # noqa: N818 (says what is wrong, as errors.py does)
    """What is measured against is not installed: that is left out, and no failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trials:
    """The steps so far; `tell` is given each one as it ends."""

    tell: Callable[[Step], None]
    steps: list[Step] = field(default_factory=list)

    @contextmanager
    def trying(self, name: str) -> Iterator[Step]:
        """Try the body: it passes unless it says otherwise or raises, whatever that is."""
        step, began = Step(name=name), time.perf_counter()
        self.steps.append(step)
        try:
            yield step
            step.passed = True if step.passed is None else step.passed
        except NotInstalled as error:
            step.passed, step.note = None, str(error)
        except Exception as error:  # whatever it is, the other steps are wanted
            kind = "" if isinstance(error, HypersdError) else f"{type(error).__name__}: "
            step.passed, step.note = False, " ".join(f"{kind}{error}".split())[:400]
        step.seconds = round(time.perf_counter() - began, 3)
        self.tell(step)

    def measure(self, name: str, exported: Step, measured: Callable[[], dict[str, Any]]) -> None:
        """Try to measure an exported bundle; a golden picture that is not reproduced fails."""
        with self.trying(name) as step:
            if not exported.passed:
                raise HypersdError("its export failed")
            step.figures = measured()
            if not step.figures["golden"]["passed"]:
                step.passed, step.note = False, f"golden: {step.figures['golden']['line']}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """Work in other processes. runs, warmup: images of a measurement. timeout: seconds that one process may take."""

    runs: int
    warmup: int
    timeout: float

    def __post_init__(self) -> None:
        if self.runs < 1 or self.warmup < 2:
            raise OptionError(f"--runs {self.runs} --warmup {self.warmup}: at least 1 and 2")

    def measure(self, bundle: Path, runtime: str, provider: str | None) -> dict[str, Any]:
        """`benchmarks.gpu_measure.measure`; HypersdError if that fails."""
        report = bundle.with_name(f"{bundle.name}-{runtime}.json")
        report.unlink(missing_ok=True)
        numbers = [str(self.runs), str(self.warmup)]
        self._run(["benchmarks.gpu_measure", str(bundle), runtime, provider or "", *numbers, str(report)])
        result: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        report.unlink()
        if runtime == "onnx" and result.get("kind") == "MissingBackend":
            raise NotInstalled(result["error"])
        if "error" in result:
            raise HypersdError(result["error"])
        return result

    def _run(self, command: Sequence[str]) -> None:
        run_module(command, timeout=self.timeout)


def parser(description: str | None, *, forms: Sequence[str], steps: Sequence[int]) -> argparse.ArgumentParser:
    """The options that both scripts have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="folder for the reports, and the bundles under it")
    made.add_argument("--steps", type=int, nargs="+", default=list(steps))
    made.add_argument("--forms", nargs="+", choices=list(forms), default=list(forms))
    made.add_argument("--runs", type=int, default=100, help="timed images; p99 wants a hundred")
    made.add_argument("--warmup", type=int, default=10, help="images before those")
    made.add_argument("--timeout", type=float, default=1800.0, help="seconds for one export or measurement")
    return made


def report(
    form: str, device: Any, packages: Sequence[str], options: Mapping[str, Any], steps: Sequence[Step]
) -> dict[str, Any]:
    """The JSON report; `form` is its format's name, `device` what it is about."""
    return {
        "format": form,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "machine": {
            "system": platform.platform(), "python": platform.python_version(), "packages": versions(*packages)
        },
        "options": dict(options),
        "passed": bool(steps) and all(step.passed is not False for step in steps),
        "steps": [asdict(step) for step in steps],
    }  # fmt: skip


def run(
    name: str, options: argparse.Namespace, work: Callable[[Path, dict[str, Any]], dict[str, Any]],
    page: Callable[[Mapping[str, Any]], str],
) -> int:  # fmt: skip
    """Write NAME.json and NAME.md of what `work` reports, which is given a folder for bundles and the options for the
    report: 0 if all passed, else 1."""
    with one_line_error(options.out) as ended:
        bundles = options.out / "bundles"
        asked = {option: value for option, value in vars(options).items() if option != "out"}
        result = work(bundles, asked)
        write_result(options.out, name, result, page(result))
        ended.code = 0 if result["passed"] else 1
    return ended.code


def print_step(step: Step) -> None:
    """One line on standard output."""
    word = {True: "passed", False: "FAILED", None: "left out"}[step.passed]
    print(f"{step.name:<24} {word:<9} {step.seconds:8.1f} s  {step.note}".rstrip(), flush=True)

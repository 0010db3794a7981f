"""What the acceptance scripts of a GPU and of a Mac share: things that are tried one after the other, each in a process
of its own; one that fails is in the report and in the exit code, and the others go on."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypersd_export.errors import HypersdError, OptionError


@dataclass(kw_only=True, slots=True)
class Step:
    """One thing that was tried. `passed` None: it was left out, and `note` says why."""

    name: str
    passed: bool | None = None
    seconds: float = 0.0
    note: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


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


def run_module(command: Sequence[str], *, timeout: float | None = None) -> None:
    """`python -m command`; HypersdError with the last line of stderr, or the signal, if it fails or takes too long."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, errors="replace", check=False,
            timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise HypersdError(f"{command[0]} took more than {timeout:g} s and was ended: give --timeout") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1].removeprefix("error: ")[:400] if lines else "it printed nothing"
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise HypersdError(f"{last} ({command[0]}, {ended})")


def all_passed(steps: Sequence[Step]) -> bool:
    """Whether there are steps and none failed."""
    return bool(steps) and all(step.passed is not False for step in steps)


def print_step(step: Step) -> None:
    """One line on standard output."""
    word = {True: "passed", False: "FAILED", None: "left out"}[step.passed]
    print(f"{step.name:<24} {word:<9} {step.seconds:8.1f} s  {step.note}".rstrip(), flush=True)

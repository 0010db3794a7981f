"""A stage in a process of its own: its lines are passed on, its report is read, and it never outlives us.

A worker is a module that is run as `python -m MODULE REQUEST`. It writes a report of JSON, in which `error` holds the
class and the line of a `HypersdError`, and ends with `INTERRUPTED` on Ctrl-C.
"""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypersd_export import errors
from hypersd_export.errors import HypersdError, MissingBackend

INTERRUPTED = 130


def run_worker(
    module: str, request: Path, report: Path, *, progress: Callable[[str], None],
    failure: Callable[[int, str], HypersdError], started: Callable[["subprocess.Popen[str]"], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """What the worker wrote into `report`; `progress` is told each line of its standard output, `started` its process.

    Raises `failure(exit code, standard error)` for one that ended without a report, and KeyboardInterrupt.
    """
    command = [sys.executable, "-m", module, str(request)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace") as worker,
    ):
        try:
            assert worker.stdout is not None
            started(worker)
            for line in worker.stdout:
                progress(line.strip())
        except BaseException:  # Ctrl-C: the worker must not outlive us
            worker.terminate()
            raise
        code = worker.wait()
        log.seek(0)
        said = log.read()
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0 or not report.is_file():
        raise failure(code, said)
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def reported_error(found: Mapping[str, str]) -> HypersdError:
    """A worker's error, as the class that it was there; `MissingBackend`, which has a constructor of its own, as the
    plain one."""
    kind: type[HypersdError] = getattr(errors, found["kind"], HypersdError)
    return HypersdError(found["message"]) if kind is MissingBackend else kind(found["message"])


def serve(work: Callable[[], Mapping[str, Any]], report: Path) -> int:
    """In the worker: do the work and write its report, or the one line of a `HypersdError`; returns the exit code."""
    try:
        found: Mapping[str, Any] = work()
    except HypersdError as error:
        found = {"error": {"kind": type(error).__name__, "message": str(error)}}
    except KeyboardInterrupt:
        return INTERRUPTED
    report.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    return 0


def why_died(what: str, code: int, log: str, *, way_out: str) -> str:
    """One line on a worker that ended without a report: killed for its memory, or with its last words."""
    if code == -signal.SIGKILL:
        return f"{what}: its process was killed (out of memory?); free some memory, or build on a larger machine"
    lines = log.strip().splitlines()
    last = f": {lines[-1][:200]}" if lines else ""
    ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return f"{what}: its process ended {ended}{last}; {way_out}"

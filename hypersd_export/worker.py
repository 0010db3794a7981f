"""A stage in a process of its own: its lines are passed on, its report is read, and it never outlives us.

A worker is a module that is run as `python -m MODULE REQUEST`. It writes a report of JSON, in which `error` holds the
class and the line of a `HypersdError`, and ends with `INTERRUPTED` on Ctrl-C.
"""

import json
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
    failure: Callable[[int, str], HypersdError],
) -> dict[str, Any]:  # fmt: skip
    """What the worker wrote into `report`; `progress` is told each line of its standard output.

    Raises `failure(exit code, standard error)` for one that ended without a report, and KeyboardInterrupt.
    """
    command = [sys.executable, "-m", module, str(request)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace") as worker,
    ):
        try:
            assert worker.stdout is not None
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

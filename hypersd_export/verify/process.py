"""Run the verification: in a process of its own, or (for tests) in this one."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypersd_export import errors
from hypersd_export.errors import HypersdError, ParityError
from hypersd_export.verify.request import VerifyRequest


def run_verification(
    request: VerifyRequest, *, progress: Callable[[str], None] = lambda _: None, isolate: bool = True
) -> dict[str, Any]:
    """Write golden/ into `request.out` and return the parity figures by component ({} if nothing was compared).

    Raises `ParityError` with all the gates that failed, or the worker's own error.
    """
    if isolate:
        report = _in_process_of_its_own(request, progress)
    else:
        from hypersd_export.verify.worker import verify

        report = verify(request, progress)
    if report["failures"]:
        failures = "; ".join(report["failures"])
        raise ParityError(f"not the same as torch: {failures}. Nothing was published; --no-verify exports without this")
    parity: dict[str, Any] = report["parity"]
    return parity


def _in_process_of_its_own(request: VerifyRequest, progress: Callable[[str], None]) -> dict[str, Any]:
    from hypersd_export.verify.worker import REPORT

    with tempfile.TemporaryDirectory(prefix="hypersd-verify-") as scratch, tempfile.TemporaryFile("w+") as log:
        path = Path(scratch) / "request.json"
        request.write(path)
        command = [sys.executable, "-m", "hypersd_export.verify.worker", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as worker:
            try:
                assert worker.stdout is not None
                for line in worker.stdout:
                    progress(line.strip())
            except BaseException:  # Ctrl-C: the worker must not outlive us
                worker.terminate()
                raise
        if worker.returncode == 130:
            raise KeyboardInterrupt
        report_path = request.out / REPORT
        if worker.returncode != 0 or not report_path.is_file():
            log.seek(0)
            raise ParityError(_why(worker.returncode, log.read()))
        report: dict[str, Any] = json.loads(report_path.read_text(encoding="utf-8"))
        report_path.unlink()
    if "error" in report:
        raise _error(report["error"])
    return report


def _why(code: int, log: str) -> str:
    if code < 0:
        hint = " (out of memory?)" if code == -9 else ""
        return f"the verification was ended by signal {-code}{hint}: free some memory, or pass --no-verify"
    lines = log.strip().splitlines()
    return f"the verification failed ({lines[-1][:200] if lines else f'exit code {code}'}): this is a bug"


def _error(found: dict[str, str]) -> HypersdError:
    """The worker's error, as the class that it was there."""
    kind = getattr(errors, found["kind"], HypersdError)
    if kind is errors.MissingBackend:  # has a constructor of its own
        kind = HypersdError
    error: HypersdError = kind(found["message"])
    return error

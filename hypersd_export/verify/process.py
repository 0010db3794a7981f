"""Run the verification: in a process of its own, or (for tests) in this one."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypersd_export.errors import ParityError
from hypersd_export.verify.request import VerifyRequest
from hypersd_export.worker import reported_error, run_worker

WORKER = "hypersd_export.verify.worker"


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

    report_path = request.out / REPORT
    with tempfile.TemporaryDirectory(prefix="hypersd-verify-") as scratch:
        path = Path(scratch) / "request.json"
        request.write(path)
        report = run_worker(WORKER, path, report_path, progress=progress, failure=_failure)
    report_path.unlink()
    if "error" in report:
        raise reported_error(report["error"])
    return report


def _failure(code: int, log: str) -> ParityError:
    if code < 0:
        hint = " (out of memory?)" if code == -9 else ""
        return ParityError(f"the verification was ended by signal {-code}{hint}: free some memory, or pass --no-verify")
    lines = log.strip().splitlines()
    return ParityError(f"the verification failed ({lines[-1][:200] if lines else f'exit code {code}'}): this is a bug")

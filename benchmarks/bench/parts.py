"""The parts of a report on disk: their names, their formats, reading and writing."""

import datetime
import json
from pathlib import Path
from typing import Any

from hypersd_export.bundle.disk import write_atomic
from hypersd_export.errors import DataError

LATENCY_FILE, LATENCY_FORMAT = "latency.json", "hypersd-latency/1"
QUALITY_FILE, QUALITY_FORMAT = "quality.json", "hypersd-quality/1"
REPORT_FILE, REPORT_FORMAT = "report.json", "hypersd-report/1"


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_part(out: Path | None, name: str, report: dict[str, Any]) -> None:
    """A part of the report, where one is wanted."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / name, (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_part(path: Path, wanted: str) -> dict[str, Any] | None:
    """A part of the format that is wanted, None where there is no such file; `DataError` for another, or a damaged one,
    in one line."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({str(error)[:80]}); make it again") from None
    found = data.get("format") if isinstance(data, dict) else None
    if found != wanted:
        raise DataError(f"{path}: is of format {str(found)[:40]!r}, and this version reads {wanted!r}; make it again")
    result: dict[str, Any] = data
    return result

"""What the benchmarks' commands share: modules run in processes of their own, files of results, one-line errors."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_export.bundle.disk import write_atomic
from hypersd_export.errors import HypersdError


def run_module(command: Sequence[str], *, timeout: float | None = None) -> str:
    """Standard output of `python -m command`.

    HypersdError with the last line of stderr, or the signal, if it fails or takes longer than `timeout` seconds.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, errors="replace", check=False,
            timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise HypersdError(f"{command[0]} took more than {timeout:g} s and was ended: give --timeout") from None
    if done.returncode != 0:
        last = last_line(done.stderr).removeprefix("error: ")[:400]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise HypersdError(f"{last} ({command[0]}, {ended})")
    return done.stdout


def last_line(text: str) -> str:
    """The last line of what a command printed, blank ones apart."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def write_result(folder: Path, name: str, data: Any, page: str | None = None) -> None:
    """NAME.json, and NAME.md if there is a page, each whole or not at all."""
    write_atomic(folder / f"{name}.json", (json.dumps(data, indent=1) + "\n").encode())
    if page is not None:
        write_atomic(folder / f"{name}.md", page.encode())


@dataclass(slots=True)
class Ended:
    """How a command ended: its exit code."""

    code: int = 0


@contextmanager
def one_line_error(out: Path | None = None) -> Iterator[Ended]:
    """A `HypersdError`, and with `out` what the system refuses there, is one line on standard error and code 1."""
    ended = Ended()
    try:
        yield ended
    except HypersdError as error:
        print(f"error: {error}", file=sys.stderr)
        ended.code = 1
    except OSError as error:
        if out is None:
            raise
        print(f"error: cannot write {out}: {error.strerror}; choose another --out", file=sys.stderr)
        ended.code = 1

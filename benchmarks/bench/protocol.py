"""How a painter and whoever times it talk: one line of JSON for each question, one for its answer.

    {"do": "load"}                          {"facts": {…}}
    {"do": "draw", "seed": 3, "images": 1}  {"whole_s": 0.05, "seconds": {"unet": 0.04, …}, "peak_mb": 812.0}
    {"do": "draw", …, "file": "x.npy"}      the same, and the pictures are in the file: uint8 [N, H, W, 3]

A question that fails is answered {"error": {"kind": "ModelError", "message": "one line"}}. The end of the questions is
the end of the painter. This module needs the standard library alone, so that the painters of other projects'
environments (`benchmarks/peers`) speak with it too; whatever their libraries print goes to standard error.
"""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from hypersd_export.errors import HypersdError

Seconds = dict[str, float]


class Painter(Protocol):
    """What draws pictures of one prompt, in a process of its own."""

    def load(self) -> Mapping[str, Any]:
        """Make ready whatever can be before a prompt is known; returns facts for the report, as plain JSON."""

    def draw(self, seed: int, images: int) -> tuple[Mapping[str, float], Any]:
        """Wall seconds by component, and the pictures: uint8 [images, H, W, 3], NumPy or whatever NumPy takes."""


class Clocked:
    """A network whose calls, and calls of its `decode`, add their wall time to `seconds[name]`; else it is the same.

    wait: called before the clock is read, for devices whose calls return before they are done.
    """

    def __init__(self, inner: Any, name: str, seconds: Seconds, wait: Callable[[], object] | None = None) -> None:
        self._inner, self._name, self._seconds, self._wait = inner, name, seconds, wait

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """The network's."""
        with self._clock():
            return self._inner(*arguments, **settings)

    def decode(self, *arguments: Any, **settings: Any) -> Any:
        """The VAE's."""
        with self._clock():
            return self._inner.decode(*arguments, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._wait is not None:
            self._wait()
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - began


def serve(open_painter: Callable[[], Painter]) -> int:
    """Answer what comes on standard input until it ends; the painter is opened by the first question. The exit code."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    sys.stdout = sys.stderr
    try:
        answer(open_painter, sys.stdin, answers)
    except KeyboardInterrupt:
        return 130
    return 0


def answer(open_painter: Callable[[], Painter], questions: Iterable[str], answers: TextIO) -> None:
    """The conversation itself, from a stream of lines to a stream of lines."""
    painter: list[Painter] = []

    def reply(question: Mapping[str, Any]) -> Mapping[str, Any]:
        if not painter:
            painter.append(open_painter())
        if question["do"] == "load":
            return {"facts": dict(painter[0].load())}
        began = time.perf_counter()
        seconds, pictures = painter[0].draw(int(question["seed"]), int(question["images"]))
        whole = time.perf_counter() - began
        if question.get("file"):
            import numpy as np

            np.save(question["file"], np.asarray(pictures, np.uint8))
        return {"whole_s": whole, "seconds": dict(seconds), "peak_mb": peak_mb()}

    for line in questions:
        try:
            said: Mapping[str, Any] = reply(json.loads(line))
        except Exception as error:  # whatever it is, the one who asked is to know
            said = {"error": {"kind": type(error).__name__, "message": _line(error)}}
        answers.write(json.dumps(said) + "\n")
        answers.flush()


def _line(error: Exception) -> str:
    """The line of a `HypersdError`; of anything else its type and first line, with the traceback on standard error."""
    if isinstance(error, HypersdError):
        return str(error)
    traceback.print_exception(error)
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def peak_mb(status: Path = Path("/proc/self/status")) -> float | None:
    """The most resident memory that this process has had so far, in MB (10^6 bytes); None where nobody says.

    Linux's VmHWM begins at the program's start; ru_maxrss there begins with what the parent process had.
    """
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024 / 1e6
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

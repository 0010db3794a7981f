"""Seconds and peak memory of a stage, over this process and everything that it started.

Memory is sampled: the sum of the resident sets of the whole process tree, every `INTERVAL_S`; new processes are looked
for every fourth time, as that reads all of the machine's. A resident set counts mapped files and shared pages too, so
the figure is an upper bound of what the machine has to hold. Uses psutil.
"""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hypersd_export.errors import MissingBackend

INTERVAL_S = 0.05
LISTED_EVERY = 4
MB = 1_000_000


@dataclass(slots=True)
class Usage:
    """Filled when `measure` ends: wall-clock seconds, and the peak in megabytes (10^6 bytes)."""

    seconds: float = 0.0
    peak_mb: float = 0.0


@dataclass(slots=True)
class _Sampler:
    process: Any
    usage: Usage
    stop: threading.Event = field(default_factory=threading.Event)

    def sample(self) -> None:
        self._see(tree(self.process))

    def run(self) -> None:
        for number in itertools.count():
            if number % LISTED_EVERY == 0:
                processes = tree(self.process)
            self._see(processes)
            if self.stop.wait(INTERVAL_S):
                return

    def _see(self, processes: Sequence[Any]) -> None:
        self.usage.peak_mb = max(self.usage.peak_mb, rss_mb(processes))


def tree(root: Any) -> list[Any]:
    """A psutil process and all its children, as far down as there are any."""
    return [root, *root.children(recursive=True)]


def rss_mb(processes: Sequence[Any]) -> float:
    """Resident megabytes of psutil processes; those that have ended have none."""
    psutil = _psutil()
    total = 0
    for one in processes:
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it ended since it was listed
            continue
    return total / MB


def tree_rss_mb() -> float:
    """Resident megabytes of this process and all its children."""
    return rss_mb(tree(_psutil().Process()))


@contextmanager
def measure() -> Iterator[Usage]:
    """Measure the body; the yielded `Usage` has its figures after the end, also when the body raises."""
    usage = Usage()
    sampler = _Sampler(_psutil().Process(), usage)
    thread = threading.Thread(target=sampler.run, name="memory sampler", daemon=True)
    sampler.sample()
    thread.start()
    start = time.perf_counter()
    try:
        yield usage
    finally:
        usage.seconds = time.perf_counter() - start
        sampler.stop.set()
        thread.join()
        sampler.sample()


def _psutil() -> Any:
    try:
        import psutil
    except ModuleNotFoundError as error:
        raise MissingBackend("psutil", "export", "measuring memory") from error
    return psutil

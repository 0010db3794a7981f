"""Seconds and peak memory of a stage, over this process and everything that it started.

Memory is sampled: the sum of the resident sets of the whole process tree, every `INTERVAL_S`. A resident set counts
mapped files and shared pages too, so the figure is an upper bound of what the machine has to hold. Uses psutil.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hypersd_export.errors import MissingBackend

INTERVAL_S = 0.05
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
        self.usage.peak_mb = max(self.usage.peak_mb, tree_rss_mb(self.process))

    def run(self) -> None:
        while not self.stop.wait(INTERVAL_S):
            self.sample()


def tree_rss_mb(process: Any = None) -> float:
    """Resident megabytes of a psutil process (this one by default) and all its children."""
    psutil = _psutil()
    root = psutil.Process() if process is None else process
    total = 0
    for one in [root, *root.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it ended between the listing and the reading
            continue
    return total / MB


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

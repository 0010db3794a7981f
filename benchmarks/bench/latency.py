"""How fast: everybody in turn, round by round, so that a noisy machine hurts all alike.

A session starts every painter's process (cold start: process start to first picture), draws a few pictures for nothing,
and then asks one painter after the other, in another order each round. Several sessions, each with fresh processes:
what differs from process to process (memory layout, which core) is seen too, and the bootstrap resamples sessions and
rounds within them.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench.conversation import Conversation
from benchmarks.bench.entrants import Entrant
from benchmarks.bench.machine import Energy, gpu_memory_mb
from hypersd_export.errors import HypersdError, OptionError

PAUSE_S = 0.01
"""Between two painters: threads that spin while they wait for more work go to sleep."""
FEWER = 10
"""Batches above one are drawn in so many times fewer rounds."""
CHECK_SEED = 1234


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """rounds: in all sessions together. warmup: pictures for nothing in each session. batches: pictures at once, beside
    one. timeout: seconds for one answer."""

    rounds: int = 100
    sessions: int = 5
    warmup: int = 3
    batches: tuple[int, ...] = ()
    threads: int = 1
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        if self.sessions < 1 or self.rounds < self.sessions:
            raise OptionError(f"--rounds {self.rounds} --sessions {self.sessions}: at least one round in each session")
        if self.warmup < 0 or self.threads < 1 or self.timeout <= 0:
            raise OptionError(
                f"--warmup {self.warmup} --threads {self.threads} --timeout {self.timeout:g}: from 0, 1 and above 0"
            )
        if any(batch < 1 for batch in self.batches):
            raise OptionError(f"--batch {','.join(map(str, self.batches))}: whole numbers above 0")

    def session_rounds(self, images: int) -> list[int]:
        """Rounds of each session at so many pictures at once."""
        total = self.rounds if images == 1 else max(2 * self.sessions, self.rounds // FEWER)
        return [len(part) for part in np.array_split(np.arange(total), self.sessions)]


@dataclass(slots=True)
class Times:
    """What was measured of one entrant: seconds in the order of the rounds, cold starts by session."""

    facts: dict[str, Any] = field(default_factory=dict)
    cold_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    whole_s: dict[int, list[float]] = field(default_factory=dict)
    parts_s: dict[str, list[float]] = field(default_factory=dict)
    joules: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    vram_mb: float | None = None
    pixels: Any = None
    failed: str = ""


def race(
    entrants: Sequence[Entrant], options: Options, energy: Energy, *, tell: Callable[[str], None]
) -> dict[str, Times]:
    """Measure all entrants that have a command; by name. One that fails says so in `failed` and the others go on."""
    times = {entrant.name: Times() for entrant in entrants if not entrant.missing}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.sessions):
            running = [entrant for entrant in entrants if entrant.name in times and not times[entrant.name].failed]
            with ExitStack() as stack:
                session = _Session(number, options, energy, times, Path(scratch), stack)
                for entrant in _turned(running, number):
                    tell(f"session {number + 1} of {options.sessions}: {entrant.name} starts")
                    session.start(entrant)
                session.warm_up()
                for images in (1, *sorted(set(options.batches) - {1})):
                    for turn in range(options.session_rounds(images)[number]):
                        tell(f"session {number + 1} of {options.sessions}: round {turn + 1}, {images} at once")
                        session.round(turn, images)
                session.read_vram()
    return times


def _turned(items: Sequence[Any], by: int) -> list[Any]:
    """The same items, beginning with another one."""
    by %= max(len(items), 1)
    return [*items[by:], *items[:by]]


@dataclass(slots=True)
class _Session:
    number: int
    options: Options
    energy: Energy
    times: dict[str, Times]
    scratch: Path
    stack: ExitStack
    painters: dict[str, Conversation] = field(default_factory=dict)

    def start(self, entrant: Entrant) -> None:
        """A process, from nothing to its first picture; nobody else draws meanwhile."""
        times, began = self.times[entrant.name], time.perf_counter()
        try:
            painter = Conversation(
                entrant.name, entrant.command, environment=entrant.environment, timeout=self.options.timeout
            )
            self.stack.enter_context(painter)
            times.facts = painter.ask(do="load")["facts"]
            loaded = time.perf_counter()
            painter.ask(do="draw", seed=0, images=1)
            ended = time.perf_counter()
        except HypersdError as error:
            times.failed = str(error)
            return
        times.cold_s.append(ended - began)
        times.load_s.append(loaded - began)
        times.first_s.append(ended - loaded)
        self.painters[entrant.name] = painter

    def warm_up(self) -> None:
        """Pictures for nothing at every batch size; in the first session one of them is kept, to be compared."""
        for name in list(self.painters):
            for images in sorted({1, *self.options.batches}):
                for turn in range(self.options.warmup):
                    self._ask(name, turn, images)
            if self.number == 0 and name in self.painters:
                file = self.scratch / "pixels.npy"
                if self._ask(name, CHECK_SEED, 1, file=str(file)) is not None:
                    self.times[name].pixels = np.load(file)

    def round(self, turn: int, images: int) -> None:
        """Everybody once."""
        for name in _turned(list(self.painters), turn):
            before = self.energy.read()
            answer = self._ask(name, turn + 1000 * self.number, images)
            if answer is None:
                continue
            times = self.times[name]
            times.whole_s.setdefault(images, []).append(answer["whole_s"])
            times.peak_mb = answer["peak_mb"]
            if images == 1:
                for part, seconds in answer["seconds"].items():
                    times.parts_s.setdefault(part, []).append(seconds)
                if self.energy.zones:
                    times.joules.append(self.energy.joules(before, self.energy.read()))
            time.sleep(PAUSE_S)

    def read_vram(self) -> None:
        """What everybody holds of the GPU at the end of the session: their allocators give nothing back, so it is the
        most that they had."""
        held = gpu_memory_mb()
        for name, painter in self.painters.items():
            if painter.pid in held:
                self.times[name].vram_mb = max(held[painter.pid], self.times[name].vram_mb or 0.0)

    def _ask(self, name: str, seed: int, images: int, **more: Any) -> dict[str, Any] | None:
        """An answer; None, and the painter is out, where there is none."""
        try:
            return self.painters[name].ask(do="draw", seed=seed, images=images, **more)
        except HypersdError as error:
            self.times[name].failed = str(error)
            del self.painters[name]
            return None

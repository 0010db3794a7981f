"""How long each stage of an export took, with the peak memory of the process tree, and who is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from hypersd_export.usage import measure


@dataclass(slots=True)
class StageRecord:
    """What a stage took: wall-clock seconds, the process tree's peak in MB, and whether the cache had it."""

    name: str
    seconds: float = 0.0
    peak_mb: float = 0.0
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        seconds, peak = round(self.seconds, 3), round(self.peak_mb, 1)
        return {"name": self.name, "seconds": seconds, "peak_mb": peak, "cached": self.cached}


class Reporter(Protocol):
    """Who wants to know how far the export is."""

    def note(self, text: str) -> None:
        """A decision and its reason, or a warning, in one line."""

    def begin(self, stage: str) -> None:
        """A stage begins."""

    def detail(self, text: str) -> None:
        """What the stage is at."""

    def end(self, record: StageRecord) -> None:
        """A stage ended."""


class Silent:
    """A reporter that says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin(self, stage: str) -> None:
        """Nothing."""

    def detail(self, text: str) -> None:
        """Nothing."""

    def end(self, record: StageRecord) -> None:
        """Nothing."""


@dataclass(slots=True)
class Clock:
    """Times the stages and tells the reporter."""

    reporter: Reporter
    records: list[StageRecord] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageRecord]:
        """Time the body; its record is kept when it ends well."""
        record = StageRecord(name)
        self.reporter.begin(name)
        with measure() as usage:
            yield record
        record.seconds, record.peak_mb = usage.seconds, usage.peak_mb
        self.records.append(record)
        self.reporter.end(record)

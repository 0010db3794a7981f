"""What a real data source yields before it is encoded, and the account of what could not be used."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

FileInfo = tuple[str, int, int]
"""Name relative to the source, bytes, mtime in ns: what a cache is keyed by."""


class Reason(StrEnum):
    """Why a sample is not used; the values are what reports say."""

    NO_CAPTION = "no caption"
    EMPTY_CAPTION = "empty caption"
    NOT_TEXT = "caption is not text"
    NOT_UTF8 = "caption is not UTF-8"
    BAD_LINE = "metadata line is not JSON with a file_name"
    MISSING = "listed, but there is no such file"
    NO_IMAGE = "caption without an image"
    DUPLICATE = "duplicate name"
    UNREADABLE = "unreadable image"
    NO_PIXELS = "image without pixels"
    TOO_MANY_PIXELS = "too many pixels"
    TOO_SMALL = "smaller than the training size"
    NOT_8_BIT = "not an 8-bit image"
    BAD_SHARD = "unreadable shard, or the rest of it"


class BadSample(Exception):  # noqa: N818 (an account, not an error of the caller)
    """One sample cannot be used: `reason`, and what exactly was found."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}{f' ({detail})' if detail else ''}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One sample as its source has it, nothing decoded: the picture is a path or the bytes of a file.

    `problem` is set, and the rest may be missing, where the source itself is at fault.
    """

    name: str
    caption: object = None
    picture: Path | bytes | None = None
    problem: BadSample | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """A source: `files` are all that its samples come from, `records` reads them in the same order at every call.

    kind names the layout, total is the number of records, 0 if that is not known before they are read.
    """

    kind: str
    files: Sequence[FileInfo]
    records: Callable[[], Iterator[Record]]
    total: int = 0


@dataclass(slots=True)
class Skipped:
    """What was left out: names by reason, in the order in which they were found."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one sample."""
        self.names.setdefault(str(reason), []).append(name)

    def extend(self, other: "Skipped") -> None:
        """Count what another account counts."""
        for reason, names in other.names.items():
            self.names.setdefault(reason, []).extend(names)

    @property
    def total(self) -> int:
        """How many samples."""
        return sum(len(names) for names in self.names.values())

    def lines(self, shown: int = 3) -> list[str]:
        """One line per reason, the most frequent first: the count, and the first few names."""
        ranked = sorted(self.names.items(), key=lambda item: -len(item[1]))
        return [
            f"{len(names)} × {reason}: {', '.join(names[:shown])}{', …' if len(names) > shown else ''}"
            for reason, names in ranked
        ]


def file_info(path: Path, name: str) -> FileInfo:
    """(name, bytes, mtime in ns) of a file."""
    found = path.stat()
    return name, found.st_size, found.st_mtime_ns


def matching(path: Path) -> list[Path]:
    """The file of this path, or the files that its name matches with `*`, `?` and `[…]`, sorted."""
    if not set(path.name) & set("*?[") or path.exists():
        return [path] if path.is_file() else []
    return sorted(found for found in path.parent.glob(path.name) if found.is_file())

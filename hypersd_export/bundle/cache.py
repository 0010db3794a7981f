"""Finished stages of an export, kept so that a second run reuses them.

    ROOT/NAME/KEY/stage.json   name, key, what it depends on, sha256 of each file
    ROOT/NAME/KEY/files/…      what `build` wrote
    ROOT/.building/…           stages being built, each by one process

The key is the digest of everything that the stage depends on. That a file exists proves nothing: an entry counts
only if its stage.json names the key and every file still has its digest. A stage is built in a folder of its own
and renamed into place, so a Ctrl-C or a kill never leaves half of one, and two processes that build the same stage
at once end with one entry and no mixture: the first to finish wins, and the second uses that.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hypersd_export.bundle.digest import digest_json, sha256_file
from hypersd_export.bundle.disk import (
    disk_full,
    is_abandoned,
    is_disk_full,
    make_held,
    reason,
    release,
    remove_tree,
    token,
)
from hypersd_export.errors import DestinationError, HypersdError

FORMAT = "hypersd-stage/1"

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/hypersd`, or `~/.cache/hypersd`; a relative `XDG_CACHE_HOME` is ignored, as XDG says."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "hypersd"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage that is there: its folder (read only, by agreement), and how it came about."""

    name: str
    key: str
    path: Path
    cached: bool
    seconds: float
    """What building it took; 0.0 if it was cached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry of the cache, for listings."""

    name: str
    key: str
    size_bytes: int
    last_used: float
    """Seconds since the epoch."""


Build = Callable[[Path], Mapping[str, str] | None]
"""Writes a stage's files into an empty folder; may return the SHA-256 of those that it knows, by name."""


def _digests(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: known.get(name) or sha256_file(path) for name, path in files.items()}


def noted_digests(copies: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of copies of stages' files (or folders) by the names of the copies, as the stages noted them when
    they were built or looked up; nothing for what lies outside a stage."""
    noted: dict[str, str] = {}
    for name, source in copies.items():
        files = next((folder for folder in source.parents if (folder.parent / "stage.json").is_file()), None)
        if files is None:
            continue
        of_stage = json.loads((files.parent / "stage.json").read_text(encoding="utf-8"))["files"]
        inside = source.relative_to(files).as_posix()
        for file, digest in of_stage.items():
            if file == inside or file.startswith(f"{inside}/"):
                noted[name + file.removeprefix(inside)] = digest
    return noted


def _is_intact(entry: Path, key: str) -> bool:
    try:
        stage = json.loads((entry / "stage.json").read_text(encoding="utf-8"))
        return bool(stage["key"] == key and stage["files"] == _digests(entry / "files"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True)
class StageCache:
    """The cache under one folder. Making the object does no work; the folder is created by the first build."""

    root: Path

    def key(self, name: str, depends: Mapping[str, Any]) -> str:
        """The stage's key: the digest of its name and of all that it depends on (plain JSON data)."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"stage name {name!r} must be lower-case letters, digits, '_', '-' and '.'")
        return digest_json({"format": FORMAT, "name": name, "depends": depends})

    def lookup(self, name: str, depends: Mapping[str, Any]) -> Path | None:
        """The folder of a stage that is there and intact, else None. Marks the entry as used now."""
        key = self.key(name, depends)
        entry = self.root / name / key
        if not _is_intact(entry, key):
            return None
        with contextlib.suppress(OSError):  # a cache that is shared read only
            os.utime(entry / "stage.json")
        return entry / "files"

    def get(self, name: str, depends: Mapping[str, Any], build: Build) -> Stage:
        """The stage, built by `build(folder)` unless it is there.

        Args:
            name: what the stage is, such as "unet-onnx".
            depends: everything that the result depends on: digests of inputs, options, tool versions.
            build: writes the stage's files into the empty folder that it is given, and may return digests that it
                knows; all others are taken of what it wrote.

        Raises:
            DestinationError: the cache cannot be written, or the disk is full.
            Whatever `build` raises; the cache is then as it was.
        """
        key = self.key(name, depends)
        found = self.lookup(name, depends)
        if found is not None:
            return Stage(name=name, key=key, path=found, cached=True, seconds=0.0)
        began = time.perf_counter()
        self._build(name, key, depends, build)
        return Stage(
            name=name,
            key=key,
            path=self.root / name / key / "files",
            cached=False,
            seconds=time.perf_counter() - began,
        )

    def fetch(self, name: str, depends: Mapping[str, Any], build: Build) -> Path:
        """`get(...).path`."""
        return self.get(name, depends, build).path

    def absent(self, name: str, depends: Callable[[], Mapping[str, Any]]) -> bool:
        """Whether a stage is surely not there. What it depends on is not asked for where no stage has its name."""
        stages = self.root / name
        return not stages.is_dir() or not (stages / self.key(name, depends()) / "stage.json").is_file()

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A folder on the cache's disk, gone when the block ends; that of a killed process goes with the next one."""
        folder, lock = self._open_scratch(name)
        try:
            yield folder
        finally:
            release(lock)
            remove_tree(folder)

    def _build(self, name: str, key: str, depends: Mapping[str, Any], build: Build) -> None:
        with self.scratch(name) as scratch, self._told_if_full():
            files = scratch / "files"
            files.mkdir()
            digests = _digests(files, build(files) or {})
            stage = {"format": FORMAT, "name": name, "key": key, "depends": depends, "files": digests}
            (scratch / "stage.json").write_text(json.dumps(stage, indent=1), encoding="utf-8")
            self._install(scratch, self.root / name / key, key)

    @contextlib.contextmanager
    def _told_if_full(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if is_disk_full(error) and not isinstance(error, HypersdError):
                raise disk_full(self.root, "free some (hypersd-export cache prune), or use --cache-dir") from error
            raise

    def _open_scratch(self, name: str) -> tuple[Path, int | None]:
        building = self.root / ".building"
        scratch = building / f"{name}-{token()}"
        try:
            building.mkdir(parents=True, exist_ok=True)
            self._sweep()
            return scratch, make_held(scratch)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self.root, "free some (hypersd-export cache prune), or use --cache-dir") from error
            message = f"cannot write the cache {self.root}: {reason(error)}; name another with --cache-dir"
            raise DestinationError(message) from error

    def _install(self, scratch: Path, entry: Path, key: str) -> None:
        """Rename into place; an intact entry that came first stays, a damaged one goes."""
        entry.parent.mkdir(exist_ok=True)
        for _ in range(3):
            try:
                scratch.rename(entry)
                return
            except OSError:
                if not entry.exists():
                    raise
            if _is_intact(entry, key):
                return
            self._discard(entry)
        raise DestinationError(f"cannot replace the damaged cache entry {entry}: delete it")

    def _discard(self, entry: Path) -> int:
        """Take an entry out of the cache; returns the bytes that it held."""
        size = sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
        aside = self.root / ".building" / f"discarded-{token()}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        entry.rename(aside)
        remove_tree(aside)
        return size

    def _sweep(self) -> None:
        """Remove what killed processes left."""
        for scratch in (self.root / ".building").iterdir():
            if is_abandoned(scratch):
                remove_tree(scratch)

    def _folders(self) -> Iterator[Path]:
        for stage in sorted(self.root.iterdir() if self.root.is_dir() else ()):
            if stage.is_dir() and _NAME.fullmatch(stage.name):
                yield from sorted(entry for entry in stage.iterdir() if (entry / "stage.json").is_file())

    def entries(self) -> list[Entry]:
        """All entries, by name; their digests are not checked."""
        return [
            Entry(
                name=folder.parent.name,
                key=folder.name,
                size_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
                last_used=(folder / "stage.json").stat().st_mtime,
            )
            for folder in self._folders()
        ]

    def prune(self, *, older_than_days: float | None = None) -> tuple[int, int]:
        """Delete entries not used for `older_than_days`, or all; returns (entries deleted, bytes freed).

        Only what the cache itself wrote is deleted: other files under its root stay.
        """
        limit = None if older_than_days is None else time.time() - older_than_days * 24 * 3600
        count = freed = 0
        for folder in list(self._folders()):
            if limit is None or (folder / "stage.json").stat().st_mtime < limit:
                freed += self._discard(folder)
                count += 1
        building = self.root / ".building"
        if building.is_dir():
            self._sweep()
            if not any(building.iterdir()):
                shutil.rmtree(building, ignore_errors=True)
        return count, freed

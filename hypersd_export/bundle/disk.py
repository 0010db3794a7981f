"""Small, careful file operations that the cache, the publish and the image writer share.

A folder that is being built is *held* with an advisory lock on the folder itself (`flock`), which follows it
through renames and which the kernel drops when its process dies, however it dies. A folder that carries the name
of a build and that nobody holds is therefore a leftover and can be recovered or removed.
"""

import errno
import os
import secrets
import shutil
import stat
import sys
import time
from pathlib import Path

from hypersd_export.errors import DestinationError

if sys.platform != "win32":
    import fcntl

# Where folders cannot be locked (Windows, some network file systems) only age tells a leftover.
STALE_SECONDS = 24 * 3600.0

_FULL = (errno.ENOSPC, errno.EDQUOT)


def token() -> str:
    """A fresh name part for files that must not collide with those of another process."""
    return f"{os.getpid():x}-{secrets.token_hex(4)}"


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, says that the disk or the quota is full.

    Writers in native code (safetensors, protobuf, torch) raise their own types, so the text is looked at too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if "No space left on device" in str(seen) or "os error 28" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def disk_full(place: Path, advice: str) -> DestinationError:
    """The error for a full disk under `place`: how much is free there, and the way out."""
    ancestor = existing_ancestor(place)
    free = shutil.disk_usage(ancestor).free / 1e6
    return DestinationError(f"no space left on the disk of {place} ({free:,.0f} MB free): {advice}")


def existing_ancestor(path: Path) -> Path:
    """`path` itself if it exists, else the nearest folder above it that does."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def reason(error: OSError) -> str:
    """The operating system's word for what went wrong, without number and file name."""
    return error.strerror or str(error)


def make_parents(folder: Path) -> list[Path]:
    """Create `folder` and what is missing above it; returns what was created, innermost first."""
    missing = []
    path = folder
    while not path.exists():
        missing.append(path)
        path = path.parent
    for created in reversed(missing):
        created.mkdir(exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove the folders that `make_parents` created, as far as they are empty again."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _make_writable(path: Path) -> None:
    for folder in (path, *(p for p in path.rglob("*") if p.is_dir() and not p.is_symlink())):
        folder.chmod(folder.stat().st_mode | stat.S_IRWXU)


def remove_tree(path: Path) -> None:
    """Delete a folder as far as that is possible; never raises for what cannot be deleted."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():  # a read-only folder inside
        try:
            _make_writable(path)
        except OSError:
            return
        shutil.rmtree(path, ignore_errors=True)


def hold(folder: Path) -> int | None:
    """Mark `folder` as in use by this process; None where folders cannot be locked. Undo with `release`."""
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def release(descriptor: int | None) -> None:
    """End what `hold` began."""
    if descriptor is not None:
        os.close(descriptor)


def make_held(folder: Path) -> int | None:
    """Create `folder` and hold it, also if another process clears leftovers at the very moment between the two."""
    while True:
        folder.mkdir()
        try:
            lock = hold(folder)
        except FileNotFoundError:
            continue
        if folder.exists():
            return lock
        release(lock)


def is_abandoned(folder: Path) -> bool:
    """Whether the process that built `folder` is gone; by age where folders cannot be locked."""
    if sys.platform != "win32":
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
        else:
            return True
        finally:
            os.close(descriptor)
    return time.time() - folder.stat().st_mtime > STALE_SECONDS


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, even when the process is killed.

    Raises:
        DestinationError: the folder cannot be written, or the disk is full. What stood at `path` is untouched.
    """
    scratch = path.with_name(f".{path.name}.{token()}.part")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path, "free some, or write elsewhere with --out") from error
        if isinstance(error, OSError):
            raise DestinationError(f"cannot write {path}: {reason(error)}; choose another --out") from error
        raise

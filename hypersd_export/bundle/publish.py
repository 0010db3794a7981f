"""Build a bundle beside its destination and rename it into place, so that a destination is never half a bundle.

With `overwrite` the order is: old aside, new in, old deleted. Three kinds of hidden siblings exist meanwhile:

    .NAME.hypersd-new-TOKEN     being built; worthless without its process
    .NAME.hypersd-old-TOKEN     the previous bundle, set aside; restored if NAME is missing
    .NAME.hypersd-trash-TOKEN   the previous bundle, replaced, being deleted

A kill can leave any of them. `recover` (called by `check_destination`, by `staged` and by the runtime) puts things
right: whatever the moment of the kill, afterwards NAME is the whole old bundle or the whole new one.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from hypersd_export.bundle.disk import (
    disk_full,
    existing_ancestor,
    hold,
    is_abandoned,
    is_disk_full,
    make_held,
    make_parents,
    reason,
    release,
    remove_empty,
    remove_tree,
    token,
)
from hypersd_export.errors import DestinationError, HypersdError

NEW, OLD, TRASH = "new", "old", "trash"


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.hypersd-{role}-{token()}")


def _siblings(target: Path, role: str) -> list[Path]:
    """The hidden siblings of one role, the latest first."""
    prefix = f".{target.name}.hypersd-{role}-"
    try:
        found = [path for path in target.parent.iterdir() if path.name.startswith(prefix)]
    except OSError:
        return []
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def is_bundle(folder: Path) -> bool:
    """Whether `folder` has a manifest.json of ours; says nothing about its files."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and str(manifest.get("format", "")).startswith("hypersd-bundle/")


def recover(out: Path) -> bool:
    """Mend what a killed run left beside `out`; True if the previous bundle was restored.

    Leftovers of a process that still lives are not touched.
    """
    target = out.resolve()
    restored = False
    for aside in _siblings(target, OLD):
        if not is_abandoned(aside):
            continue
        if _is_empty_folder(target):
            target.rmdir()
        if target.exists():
            _delete(aside, target)
        else:
            aside.rename(target)
            restored = True
    for staging in _siblings(target, NEW):
        if is_abandoned(staging):
            remove_tree(staging)
    for trash in _siblings(target, TRASH):
        remove_tree(trash)
    return restored


def _check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuse a destination that holds something which must not be deleted."""
    if not target.exists():
        return
    if not target.is_dir():
        raise DestinationError(f"{target} is a file: --out must name a folder")
    try:
        empty = _is_empty_folder(target)
    except OSError as error:
        raise DestinationError(f"cannot read {target}: {reason(error)}; choose another --out") from error
    if empty:
        return
    if not overwrite:
        raise DestinationError(f"{target} is not empty: pass --overwrite to replace it, or choose another --out")
    if not is_bundle(target):
        raise DestinationError(
            f"{target} is not a bundle (it has no manifest.json of hypersd), so --overwrite does not delete it: "
            "choose another --out"
        )


def check_destination(out: Path, *, overwrite: bool = False) -> Path:
    """Whether a bundle can be published at `out`, asked before the work begins; nothing is created.

    Args:
        out: the bundle's folder; what is missing above it will be created.
        overwrite: a bundle that stands there may be replaced. A folder that is not a bundle never is.

    Returns:
        The absolute destination, symbolic links resolved.

    Raises:
        DestinationError: `out` is a file, not empty, not ours, the current folder, or its parent is not writable.
    """
    target = out.resolve()
    if Path.cwd().is_relative_to(target):
        raise DestinationError(f"--out {out} is the current folder or one above it: name a folder of its own")
    if target.exists() and os.path.ismount(target):
        raise DestinationError(f"--out {target} is a mount point, which cannot be renamed: name a folder inside it")
    recover(target)
    _check_replaceable(target, overwrite)
    ancestor = existing_ancestor(target.parent)
    if not ancestor.is_dir():
        raise DestinationError(f"cannot create {target}: {ancestor} is a file; choose another --out")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise DestinationError(f"cannot create {target}: {ancestor} is not writable; choose another --out")
    return target


def _delete(folder: Path, target: Path) -> None:
    """Delete a replaced bundle; renamed first, because half a deleted bundle must not look like one set aside."""
    trash = _sibling(target, TRASH)
    folder.rename(trash)
    remove_tree(trash)


def publish(staging: Path, target: Path, *, overwrite: bool = False) -> None:
    """Put the finished folder `staging` at `target`, on the same file system.

    If this is interrupted, by an exception or by a kill, `target` is the old bundle or the new one (see `recover`).

    Raises:
        DestinationError: the destination changed since it was checked, or cannot be renamed.
    """
    _check_replaceable(target, overwrite)
    aside = _sibling(target, OLD)
    lock = None
    try:
        if _is_empty_folder(target):
            target.rmdir()
        elif target.exists():
            lock = hold(target)
            target.rename(aside)
        staging.rename(target)
    except BaseException as error:
        if aside.exists() and not target.exists():
            aside.rename(target)
        if isinstance(error, OSError) and not is_disk_full(error):
            raise DestinationError(f"cannot put the bundle at {target}: {reason(error)}") from error
        raise
    else:
        if aside.exists():
            _delete(aside, target)
    finally:
        release(lock)


def _open_staging(target: Path) -> tuple[Path, int | None, list[Path]]:
    staging = _sibling(target, NEW)
    created: list[Path] = []
    try:
        created = make_parents(target.parent)
        lock = make_held(staging)
    except OSError as error:
        remove_empty(created)
        if is_disk_full(error):
            raise disk_full(target, "free some, or choose another --out") from error
        raise DestinationError(f"cannot create {target}: {reason(error)}; choose another --out") from error
    return staging, lock, created


@contextlib.contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh folder beside `out`, published there when the block ends without an exception.

    Any exception, KeyboardInterrupt included, deletes the folder and leaves `out` as it was.

    Raises:
        DestinationError: see `check_destination`; or the disk got full, with the space that is free.
    """
    target = check_destination(out, overwrite=overwrite)
    staging, lock, created = _open_staging(target)
    try:
        yield staging
        publish(staging, target, overwrite=overwrite)
    except BaseException as error:
        remove_tree(staging)
        remove_empty(created)
        if isinstance(error, Exception) and not isinstance(error, HypersdError) and is_disk_full(error):
            raise disk_full(target, "free some, or choose another --out") from error
        raise
    finally:
        release(lock)

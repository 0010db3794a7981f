"""File operations that must be whole or not at all."""

import errno
import time
from pathlib import Path

import pytest

from hypersd_export.bundle import disk
from hypersd_export.errors import DestinationError


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    disk.write_atomic(tmp_path / "f", b"one")
    disk.write_atomic(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_write_atomic_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DestinationError, match=r"no space left on the disk of .* \([\d,]+ MB free\): free some"):
        disk.write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_write_atomic_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", denied)
    with pytest.raises(DestinationError, match="Permission denied; choose another --out"):
        disk.write_atomic(tmp_path / "f", b"new")
    assert list(tmp_path.iterdir()) == []


def test_write_atomic_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        disk.write_atomic(tmp_path / "f", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_known_through_other_libraries_errors() -> None:
    assert disk.is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert disk.is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not disk.is_disk_full(OSError(errno.EACCES, "Permission denied"))
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert disk.is_disk_full(wrapped)


def test_a_held_folder_is_not_abandoned_wherever_it_is_moved(tmp_path: Path) -> None:
    lock = disk.make_held(tmp_path / "work")
    assert lock is not None
    (tmp_path / "work").rename(tmp_path / "moved")
    assert not disk.is_abandoned(tmp_path / "moved")
    disk.release(lock)
    assert disk.is_abandoned(tmp_path / "moved")
    assert not disk.is_abandoned(tmp_path / "never")


def test_a_second_holder_gets_nothing(tmp_path: Path) -> None:
    lock = disk.hold(tmp_path)
    assert disk.hold(tmp_path) is None
    disk.release(lock)


def test_where_locks_do_not_work_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import os

    def unsupported(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert disk.hold(tmp_path) is None
    assert not disk.is_abandoned(tmp_path)
    old = time.time() - disk.STALE_SECONDS - 10
    os.utime(tmp_path, (old, old))
    assert disk.is_abandoned(tmp_path)


def test_make_held_survives_a_sweep_at_the_wrong_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = disk.hold, []

    def swept_before(folder: Path) -> int | None:
        calls.append(folder)
        if len(calls) == 1:
            folder.rmdir()  # another process saw it unheld
        return real(folder)

    def swept_after(folder: Path) -> int | None:
        lock = real(folder)
        calls.append(folder)
        if len(calls) == 1:
            folder.rmdir()
        return lock

    for sweep in (swept_before, swept_after):
        calls.clear()
        monkeypatch.setattr(disk, "hold", sweep)
        disk.release(disk.make_held(tmp_path / sweep.__name__))
        assert len(calls) == 2
        assert (tmp_path / sweep.__name__).is_dir()


def test_parents_are_made_and_taken_back(tmp_path: Path) -> None:
    made = disk.make_parents(tmp_path / "a" / "b")
    assert made == [tmp_path / "a" / "b", tmp_path / "a"]
    assert disk.make_parents(tmp_path / "a" / "b") == []
    disk.remove_empty(made)
    assert not (tmp_path / "a").exists()
    made = disk.make_parents(tmp_path / "a" / "b")
    (tmp_path / "a" / "f").write_text("mine")
    disk.remove_empty(made)
    assert (tmp_path / "a" / "f").exists()


def test_remove_tree_takes_read_only_folders_too(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "f").write_text("x")
    (folder / "inner").chmod(0o500)
    disk.remove_tree(folder)
    assert not folder.exists()
    disk.remove_tree(folder)  # nothing there is fine


def test_remove_tree_insists_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may delete anything, so the first attempt is made to fail."""
    real, calls = disk.shutil.rmtree, []

    def first_fails(path: Path, *, ignore_errors: bool) -> None:
        calls.append(path)
        if len(calls) > 1:
            real(path, ignore_errors=ignore_errors)

    (tmp_path / "t" / "inner").mkdir(parents=True)
    (tmp_path / "t" / "inner").chmod(0o500)
    monkeypatch.setattr(disk.shutil, "rmtree", first_fails)
    disk.remove_tree(tmp_path / "t")
    assert len(calls) == 2
    assert not (tmp_path / "t").exists()

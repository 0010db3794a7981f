"""Publishing: a destination is always one whole bundle, whatever happens and whenever."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from hypersd_export.bundle import publish
from hypersd_export.bundle.publish import check_destination, recover, staged
from hypersd_export.errors import BundleError, DestinationError

ROOT = Path(__file__).parents[2]


def fill(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(json.dumps({"format": "hypersd-bundle/1"}))
    (folder / "model.txt").write_text(text)


def bundle(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    fill(folder, text)
    return folder


def content(folder: Path) -> str:
    return (folder / "model.txt").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_publishes_into_parents_that_do_not_exist(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with staged(out) as folder:
        assert folder.parent == out.parent
        assert not out.exists()
        fill(folder, "new")
    assert content(out) == "new"
    assert names(out.parent) == ["out"]
    assert out.stat().st_mode & 0o777 == out.parent.stat().st_mode & 0o777, "no private mode of a temporary folder"


def test_publishes_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as folder:
        fill(folder, "new")
    assert content(tmp_path / "out") == "new"


def test_overwrite_replaces_everything(tmp_path: Path) -> None:
    out = bundle(tmp_path / "out", "old")
    (out / "left.txt").write_text("x")
    with staged(out, overwrite=True) as folder:
        assert content(out) == "old"
        fill(folder, "new")
    assert content(out) == "new"
    assert names(out) == ["manifest.json", "model.txt"]
    assert names(tmp_path) == ["out"]


def test_follows_a_symbolic_link(tmp_path: Path) -> None:
    bundle(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    with staged(tmp_path / "link", overwrite=True) as folder:
        fill(folder, "new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == "new"


def refused(out: Path, message: str, *, overwrite: bool = False) -> None:
    with pytest.raises(DestinationError, match=message) as caught:
        check_destination(out, overwrite=overwrite)
    assert "\n" not in str(caught.value)
    with pytest.raises(DestinationError, match=message), staged(out, overwrite=overwrite):
        pytest.fail("the block must not run")


def test_refuses_what_is_not_empty(tmp_path: Path) -> None:
    bundle(tmp_path / "out", "old")
    refused(tmp_path / "out", r"is not empty: pass --overwrite")
    assert content(tmp_path / "out") == "old"


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"manifest_version": 3}'])
def test_overwrite_never_deletes_what_is_not_ours(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    if manifest is not None:
        (tmp_path / "out" / "manifest.json").write_text(manifest)
    refused(tmp_path / "out", "is not a bundle", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    refused(tmp_path / "out", "is a file", overwrite=True)
    refused(tmp_path / "out" / "below", "is a file", overwrite=True)


def test_refuses_the_current_folder_and_those_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(Path(), "is the current folder")
    refused(Path(".."), "is the current folder")
    check_destination(Path("../there"))


def test_refuses_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    refused(tmp_path / "out", "is a mount point")


def test_refuses_a_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(tmp_path / "a" / "out", "is not writable; choose another --out")
    assert names(tmp_path) == []


def test_refuses_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle(tmp_path / "out", "old")

    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(publish, "_is_empty_folder", denied)
    refused(tmp_path / "out", "cannot read .*Permission denied")


@pytest.mark.parametrize(("code", "message"), [(errno.EROFS, "Read-only"), (errno.ENOSPC, "no space left")])
def test_a_staging_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def fails(folder: Path) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(publish, "make_held", fails)
    with pytest.raises(DestinationError, match=message), staged(tmp_path / "a" / "out"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), BundleError("bad"), SystemExit(3)])
def test_an_exception_leaves_the_destination_alone(tmp_path: Path, error: BaseException) -> None:
    out = bundle(tmp_path / "out", "old")
    for place, overwrite in ((out, True), (tmp_path / "x" / "y", False)):
        with pytest.raises(type(error)), staged(place, overwrite=overwrite) as folder:  # noqa: PT012
            fill(folder, "new")
            raise error
    assert content(out) == "old"
    assert names(tmp_path) == ["out"]


def test_a_full_disk_is_one_line_with_the_free_space(tmp_path: Path) -> None:
    with (
        pytest.raises(DestinationError, match=r"MB free\): free some, or choose another --out"),
        staged(tmp_path / "o"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DestinationError, match=r"MB free\)"), staged(tmp_path / "o"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert names(tmp_path) == []


def test_a_destination_that_fills_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DestinationError, match="is not empty"), staged(out) as folder:  # noqa: PT012
        fill(folder, "mine")
        bundle(out, "theirs")
    assert content(out) == "theirs"
    assert names(tmp_path) == ["out"]


def rename_that_fails_at(number: int, error: BaseException) -> Callable[[Path, Path], Path]:
    real, calls = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == number:
            raise error
        return real(self, target)

    return rename


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.EBUSY, "Device or resource busy"), DestinationError, "cannot put .* Device or resource busy"),
        (OSError(errno.ENOSPC, "No space left on device"), DestinationError, "no space left"),
    ],
)
def test_a_rename_that_fails_restores_the_old_bundle(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: BaseException,
    raised: type,
    message: str | None | None,
) -> None:
    out = bundle(tmp_path / "out", "old")
    monkeypatch.setattr(Path, "rename", rename_that_fails_at(number, error))
    with pytest.raises(raised, match=message), staged(out, overwrite=True) as folder:
        fill(folder, "new")
    assert content(out) == "old"
    assert names(tmp_path) == ["out"]


def test_ctrl_c_while_the_old_one_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(tmp_path / "out", "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_that_fails_at(3, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt), staged(out, overwrite=True) as folder:
            fill(folder, "new")
    assert content(out) == "new"
    assert not recover(out)
    assert names(tmp_path) == ["out"]


KILLED = """
import os, sys
from pathlib import Path
from hypersd_export.bundle import publish
from tests.unit.test_bundle_publish import fill

moment, out = sys.argv[1], Path(sys.argv[2])
rename, remove, calls = Path.rename, publish.remove_tree, []

def killed_rename(self, target):
    calls.append(target)
    if moment == f"before rename {len(calls)}":
        os._exit(9)
    rename(self, target)
    if moment == f"after rename {len(calls)}":
        os._exit(9)

def killed_remove(path):
    if moment == "half deleted":
        (path / "manifest.json").unlink()
        os._exit(9)

Path.rename = killed_rename
publish.remove_tree = killed_remove
with publish.staged(out, overwrite=True) as folder:
    fill(folder, "half")
    if moment == "building":
        os._exit(9)
    fill(folder, "new")
"""


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("building", "old"),
        ("before rename 1", "old"),
        ("after rename 1", "old"),  # between the renames: nothing stands at the destination
        ("after rename 2", "new"),
        ("after rename 3", "new"),
        ("half deleted", "new"),
    ],
)
def test_a_kill_at_any_moment_is_mended_by_the_next_run(tmp_path: Path, moment: str, expected: str) -> None:
    out = bundle(tmp_path / "out", "old")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), moment, str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert (moment == "after rename 1") == (not out.exists())
    with pytest.raises(DestinationError, match="not empty"):
        check_destination(out)
    assert content(out) == expected
    assert names(tmp_path) == ["out"]
    with staged(out, overwrite=True) as folder:
        fill(folder, "second")
    assert content(out) == "second"
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_made_after_the_kill_does_not_cost_the_old_bundle(tmp_path: Path) -> None:
    bundle(tmp_path / ".out.hypersd-old-1-2", "old")
    (tmp_path / "out").mkdir()
    assert recover(tmp_path / "out")
    assert content(tmp_path / "out") == "old"


def test_what_a_living_process_works_on_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as first:
        fill(first, "first")
        assert not recover(out)
        assert first.exists()
        other = tmp_path / ".other.hypersd-new-1-2"
        other.mkdir()
        check_destination(out)
        assert other.exists(), "a leftover of another destination"
    assert content(out) == "first"


def test_an_aside_of_a_living_process_is_not_restored(tmp_path: Path) -> None:
    aside = bundle(tmp_path / ".out.hypersd-old-1-2", "old")
    lock = publish.hold(aside)
    assert not recover(tmp_path / "out")
    publish.release(lock)
    assert recover(tmp_path / "out")


def test_recovering_beside_a_parent_that_is_not_there(tmp_path: Path) -> None:
    assert not recover(tmp_path / "no" / "out")

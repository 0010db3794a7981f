"""The stage cache: reused when everything that it depends on is the same, whole or absent, never a mixture."""

import errno
import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from hypersd_export.bundle import cache as cache_module
from hypersd_export.bundle.cache import StageCache, default_cache_dir, noted_digests
from hypersd_export.errors import DestinationError, OptionError


class Builder:
    """Writes one file and counts how often it was asked to."""

    def __init__(self, text: str = "weights") -> None:
        self.text = text
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        assert list(folder.iterdir()) == []
        (folder / "sub").mkdir()
        (folder / "sub" / "model.onnx").write_text(self.text)


@pytest.fixture
def cache(tmp_path: Path) -> StageCache:
    return StageCache(tmp_path / "cache")


def test_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "hypersd"
    monkeypatch.setenv("HOME", "/home/someone")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_cache_dir() == Path("/home/someone/.cache/hypersd")


def test_a_stage_is_built_once(cache: StageCache) -> None:
    build = Builder()
    first = cache.get("unet", {"base": "a", "options": {"opset": 20, "size": (1, 2)}}, build)
    again = cache.get("unet", {"options": {"size": [1, 2], "opset": 20}, "base": "a"}, build)
    assert (first.cached, again.cached, build.calls) == (False, True, 1)
    assert (
        first.path == again.path == cache.fetch("unet", {"base": "a", "options": {"opset": 20, "size": [1, 2]}}, build)
    )
    assert (first.path / "sub" / "model.onnx").read_text() == "weights"
    assert first.seconds > 0
    assert again.seconds == 0
    assert not any((cache.root / ".building").iterdir())


def test_copies_of_its_files_have_the_digests_that_it_noted(cache: StageCache, tmp_path: Path) -> None:
    stage = cache.get("unet", {"weights": "a"}, Builder())
    (tmp_path / "outside").write_text("x")
    digest = hashlib.sha256(b"weights").hexdigest()
    copies = {
        "unet/model.onnx": stage.path / "sub" / "model.onnx",
        "package": stage.path / "sub",
        "other": stage.path / "su",
        "outside": tmp_path / "outside",
    }
    assert noted_digests(copies) == {"unet/model.onnx": digest, "package/model.onnx": digest}


def test_everything_that_it_depends_on_is_in_the_key(cache: StageCache) -> None:
    build = Builder()
    for name, depends in (("unet", {"a": 1}), ("unet", {"a": 2}), ("unet", {"a": 1, "b": None}), ("vae", {"a": 1})):
        assert not cache.get(name, depends, build).cached
    assert build.calls == 4
    assert len(cache.entries()) == 4


@pytest.mark.parametrize("name", ["", "../x", "UNet", ".building", "a/b"])
def test_names_are_plain(cache: StageCache, name: str) -> None:
    with pytest.raises(ValueError, match="stage name"):
        cache.fetch(name, {}, Builder())


@pytest.mark.parametrize("damage", ["changed", "missing", "extra", "no stage.json", "broken stage.json", "other key"])
def test_a_damaged_entry_is_built_again(cache: StageCache, damage: str) -> None:
    build = Builder()
    files = cache.fetch("unet", {"a": 1}, build)
    stage = files.parent / "stage.json"
    {
        "changed": lambda: (files / "sub" / "model.onnx").write_text("weighty"),
        "missing": lambda: (files / "sub" / "model.onnx").unlink(),
        "extra": lambda: (files / "x").write_text("x"),
        "no stage.json": stage.unlink,
        "broken stage.json": lambda: stage.write_text("[1"),
        "other key": lambda: stage.write_text(stage.read_text().replace(files.parent.name, "0" * 64)),
    }[damage]()
    assert cache.lookup("unet", {"a": 1}) is None
    again = cache.get("unet", {"a": 1}, build)
    assert (again.cached, build.calls) == (False, 2)
    assert (again.path / "sub" / "model.onnx").read_text() == "weights"
    assert [path.name for path in again.path.rglob("*")] == ["sub", "model.onnx"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug"), OptionError("bad")])
def test_an_interrupted_stage_leaves_nothing_and_finished_ones_stay(cache: StageCache, error: BaseException) -> None:
    done, build = Builder(), Builder()
    cache.fetch("text", {"a": 1}, done)

    def interrupted(folder: Path) -> None:
        build(folder)
        raise error

    with pytest.raises(type(error)):
        cache.fetch("unet", {"a": 1}, interrupted)
    assert not any((cache.root / ".building").iterdir())
    assert cache.lookup("unet", {"a": 1}) is None
    assert cache.get("text", {"a": 1}, done).cached
    assert not cache.get("unet", {"a": 1}, build).cached
    assert build.calls == 2


def test_what_a_kill_leaves_is_swept_by_the_next_build(cache: StageCache) -> None:
    half = cache.root / ".building" / "unet-1-2" / "files"
    half.mkdir(parents=True)
    (half / "model.onnx").write_text("hal")

    def build(folder: Path) -> None:
        assert not half.exists()
        Builder()(folder)

    cache.fetch("unet", {"a": 1}, build)


def test_two_builders_of_one_stage_end_with_one_entry(cache: StageCache) -> None:
    meet = threading.Barrier(2)
    stages = []

    def build(folder: Path) -> None:
        Builder()(folder)
        meet.wait(timeout=10)  # both are building, neither swept the other's folder

    def work() -> None:
        stages.append(cache.get("unet", {"a": 1}, build))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [stage.path for stage in stages] == [cache.lookup("unet", {"a": 1})] * 2
    assert len(cache.entries()) == 1
    assert not any((cache.root / ".building").iterdir())


def test_a_full_disk_is_one_line(cache: StageCache) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DestinationError, match=r"no space left .* MB free\): .*cache prune.*--cache-dir"):
        cache.fetch("unet", {}, full)
    assert cache.entries() == []


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "no space left"), (errno.EACCES, "name another with")])
def test_a_cache_that_cannot_be_written(
    cache: StageCache, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def fails(folder: Path) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(cache_module, "make_held", fails)
    with pytest.raises(DestinationError, match=message):
        cache.fetch("unet", {}, Builder())


def test_a_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(DestinationError, match=r"cannot write the cache .*--cache-dir"):
        StageCache(tmp_path / "f").fetch("unet", {}, Builder())


def test_install_gives_up_on_what_cannot_be_replaced(cache: StageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    files = cache.fetch("unet", {}, Builder())
    (files / "x").write_text("damage")
    monkeypatch.setattr(StageCache, "_discard", lambda self, entry: 0)
    with pytest.raises(DestinationError, match="delete it"):
        cache.fetch("unet", {}, Builder())


def test_install_reports_a_rename_that_fails(cache: StageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        cache.fetch("unet", {}, Builder())


def test_prune_by_age_and_all(cache: StageCache) -> None:
    old = cache.fetch("unet", {"a": 1}, Builder()).parent
    cache.fetch("unet", {"a": 2}, Builder("larger weights"))
    past = time.time() - 10 * 24 * 3600
    os.utime(old / "stage.json", (past, past))
    entry = next(entry for entry in cache.entries() if entry.key == old.name)
    assert (entry.name, entry.last_used) == ("unet", pytest.approx(past))
    assert cache.prune(older_than_days=30) == (0, 0)
    assert cache.prune(older_than_days=7) == (1, entry.size_bytes)
    cache.fetch("unet", {"a": 1}, Builder())
    (cache.root / "mine.txt").write_text("keep")
    count, freed = cache.prune()
    assert count == 2
    assert freed > len("weights" + "larger weights")
    assert cache.entries() == []
    assert (cache.root / "mine.txt").exists()
    assert StageCache(cache.root / "never").prune() == (0, 0)


def test_use_makes_an_entry_young_again(cache: StageCache) -> None:
    stage = cache.fetch("unet", {}, Builder()).parent / "stage.json"
    os.utime(stage, (0, 0))
    assert cache.lookup("unet", {}) is not None
    assert cache.prune(older_than_days=1) == (0, 0)


def test_a_stage_of_an_unknown_name_is_absent_whatever_it_depends_on(cache: StageCache) -> None:
    asked = []

    def depends() -> dict[str, str]:
        asked.append(True)
        return {"weights": "a"}

    assert cache.absent("unet", depends)
    assert not asked
    cache.get("unet", {"weights": "b"}, Builder())
    assert cache.absent("unet", depends)
    cache.get("unet", {"weights": "a"}, Builder())
    assert not cache.absent("unet", depends)
    assert len(asked) == 2


def test_a_scratch_folder_is_of_the_caches_disk_and_goes(cache: StageCache) -> None:
    def break_off() -> None:
        with cache.scratch("helper") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "model.onnx").write_text("half of it")
            assert folder.parent.parent == cache.root
            raise ValueError("body")

    with pytest.raises(ValueError, match="body"):
        break_off()
    assert not any((cache.root / ".building").iterdir())
    assert cache.entries() == []

"""Bad data: every kind is counted, named, and skipped or refused."""

import io
import json

import pytest
from PIL import Image

from tests.train.data_files import SIZE, as_folder, as_shards, opened, png, refused, write_tar
from trainer.base import TrainingBase, open_training_base
from trainer.data import Skipped


@pytest.fixture(scope="module")
def base(tiny_base) -> TrainingBase:
    return open_training_base(str(tiny_base))


def picture(mode: str, size: tuple[int, int] = (20, 20), form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, form)
    return out.getvalue()


def zero_pixels() -> bytes:
    data = bytearray(picture("RGB"))
    data[16:24] = bytes(8)  # IHDR's width and height
    return bytes(data)


HARMS = {
    "truncated": (lambda f: (f / "x.png").write_bytes(png(9)[:-60]), "unreadable image"),
    "not an image": (lambda f: (f / "x.png").write_bytes(b"<html>"), "unreadable image"),
    "empty file": (lambda f: (f / "x.png").write_bytes(b""), "unreadable image"),
    "zero size": (lambda f: (f / "x.png").write_bytes(zero_pixels()), "unreadable image|image without pixels"),
    "16 bit": (lambda f: (f / "x.png").write_bytes(picture("I;16")), "not an 8-bit image"),
    "small": (lambda f: (f / "x.png").write_bytes(png(9, (40, 15))), "smaller than the training size"),
    "no caption": (lambda f: (f / "x.txt").unlink(), "no caption"),
    "empty caption": (lambda f: (f / "x.txt").write_text(" \n"), "empty caption"),
    "latin-1": (lambda f: (f / "x.txt").write_bytes("un café".encode("latin-1")), "caption is not UTF-8"),
    "utf-16": (lambda f: (f / "x.txt").write_bytes("a cat".encode("utf-16")), "caption is not UTF-8"),
}


@pytest.mark.parametrize("kind", HARMS)
def test_bad_files_are_counted_and_named_or_refused(base, tmp_path, kind):
    folder = as_folder(tmp_path / "in", 2)
    (folder / "x.png").write_bytes(png(9))
    (folder / "x.txt").write_text("a caption")
    harm, reason = HARMS[kind]
    harm(folder)
    line = refused(folder, base, tmp_path / "cache", on_error="stop", match=rf"x\.png: ({reason})")
    assert "data.on_error=skip" in line
    source = opened(folder, base, tmp_path / "cache")
    assert len(source) == 2
    assert list(source.skipped.names.values()) == [["x.png"]]
    assert next(iter(source.skipped.names)) in reason.split("|")
    refused(folder, base, tmp_path / "cache", on_error="stop", match="x.png")  # of the finished cache, too


def test_pictures_beyond_pils_limit(base, tmp_path, monkeypatch):
    folder = as_folder(tmp_path / "in", 2)
    (folder / "p000.png").write_bytes(png(0, (30, 30)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # warned about by PIL
    assert opened(folder, base, tmp_path / "cache").skipped.names == {"too many pixels": ["p000.png"]}
    (folder / "p000.png").write_bytes(png(0, (50, 50)))  # refused by PIL
    assert opened(folder, base, tmp_path / "cache").skipped.names == {"too many pixels": ["p000.png"]}


def test_captions_in_other_scripts_are_captions(base, tmp_path):
    captions = ["кошка на красном фоне", "赤い背景の猫", "قطة على خلفية حمراء", "बिल्ली", "🐈 on 🟥", "a\u0301 café"]
    folder = tmp_path / "in"
    folder.mkdir()
    for i, caption in enumerate(captions):
        (folder / f"{caption} {i}.png").write_bytes(png(i))
        (folder / f"{caption} {i}.txt").write_text(caption, encoding="utf-8-sig" if i % 2 else "utf-8")
    source = opened(folder, base, tmp_path / "cache", on_error="stop")
    assert not source.skipped.total
    batch = source.batch(range(6))
    assert sorted(batch.captions) == sorted(captions)
    assert len({tuple(row.flatten()[16:64].tolist()) for row in batch.conditioning.states}) == 6
    assert sorted(batch.names) == sorted(f"{caption} {i}.png" for i, caption in enumerate(captions))


def test_bad_metadata(base, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate("abcde"):
        (folder / f"{name}.png").write_bytes(png(i))
    rows = [
        b'{"file_name": "a.png", "text": "first"}', b'{"file_name": "a.png", "text": "again"}', b"not json",
        b'{"text": "of nothing"}', b'{"file_name": "gone.png", "text": "gone"}', b'{"file_name": "b.png"}',
        b'{"file_name": "c.png", "text": ["a", "list"]}', b'{"file_name": "d.png", "text": "caf\xe9"}', b"[]",
        b'{"file_name": "e.png", "text": "half \\ud83d"}',
    ]  # fmt: skip
    (folder / "metadata.jsonl").write_bytes(b"\n".join(rows))
    source = opened(folder, base, tmp_path / "cache")
    assert source.batch([0]).captions == ("first",)
    assert source.skipped.names == {
        "no caption": ["b.png", "d.png"], "caption is not text": ["c.png"], "duplicate name": ["a.png"],
        "metadata line is not JSON with a file_name": ["metadata.jsonl:3", "metadata.jsonl:4", "metadata.jsonl:9"],
        "listed, but there is no such file": ["gone.png"], "caption is not UTF-8": ["e.png", "metadata.jsonl:8"],
    }  # fmt: skip


def test_two_images_of_one_text_file(base, tmp_path):
    folder = as_folder(tmp_path / "in", 2)
    (folder / "p000.webp").write_bytes(picture("RGB", form="WEBP"))
    assert opened(folder, base, tmp_path / "cache").skipped.names == {"duplicate name": ["p000.webp"]}


def test_hidden_files_and_text_alone_are_no_samples(base, tmp_path):
    folder = as_folder(tmp_path / "in", 2)
    (folder / "._p000.png").write_bytes(b"what a Mac leaves")
    (folder / ".thumbs").mkdir()
    (folder / ".thumbs" / "a.png").write_bytes(png(0))
    (folder / "README.txt").write_text("about")
    assert not opened(folder, base, tmp_path / "cache").skipped.total


def test_bad_shards(base, tmp_path):
    folder = tmp_path / "shards"
    pattern = as_shards(folder, 6, per_shard=2)
    write_tar(folder / "000.tar", [
        ("a.png", png(0)), ("a.txt", b"a"), ("a.png", png(1)), ("b.png", png(1)), ("c.txt", b"c"), ("d.png", png(2)),
        ("d.txt", b"caf\xe9"), ("e.png", png(3)), ("e.json", b"{"), ("f.png", png(3)), ("f.json", b"[1]"),
        ("g.png", png(4)), ("g.txt", b"g"), ("__meta__", b"?"),
    ])  # fmt: skip
    write_tar(folder / "001.tar", [("g.png", png(5)), ("g.txt", b"again"), ("h.png", png(6)), ("h.txt", b"h")])
    whole = (folder / "002.tar").read_bytes()
    (folder / "002.tar").write_bytes(whole[: whole.rindex(b"p005.png") + 600])
    source = opened(pattern, base, tmp_path / "cache")
    assert sorted(source.batch(range(4)).captions) == ["a", "caption 4", "g", "h"]
    assert source.skipped.names == {
        "no caption": ["b", "f"], "caption without an image": ["c"], "caption is not UTF-8": ["d"],
        "caption is not text": ["e"], "duplicate name": ["000.tar/a.png", "g"],
        "unreadable shard, or the rest of it": ["002.tar"],
    }  # fmt: skip
    (folder / "001.tar").write_bytes(b"")
    assert "001.tar" in opened(pattern, base, tmp_path / "cache").skipped.names["unreadable shard, or the rest of it"]


def test_bad_rows(base, tmp_path):
    rows = [
        {"image": "p000.png", "text": "fine"}, {"image": "gone.png", "text": "x"}, {"image": None, "text": "x"},
        {"image": "p001.png", "text": None}, {"image": "bad.png", "text": "x"},
    ]  # fmt: skip
    folder = as_folder(tmp_path / "in", 2)
    (folder / "bad.png").write_bytes(png(0)[:40])
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(folder / "rows.jsonl", base, tmp_path / "cache")
    assert source.batch([0]).captions == ("fine",)
    assert source.skipped.names == {
        "listed, but there is no such file": ["row 1 (gone.png)"], "caption without an image": ["row 2"],
        "no caption": ["row 3 (p001.png)"], "unreadable image": ["row 4 (bad.png)"],
    }  # fmt: skip


def test_nothing_left_is_an_error_with_counts(base, tmp_path):
    (tmp_path / "in").mkdir()
    refused(tmp_path / "in", base, tmp_path / "cache", match="there is not one image in it")
    folder = as_folder(tmp_path / "in", 5)
    for i in range(4):
        (folder / f"p00{i}.png").write_bytes(png(i, (15, 15)))
    (folder / "p004.txt").unlink()
    line = refused(folder, base, tmp_path / "cache", match="none of its 5 samples can be used")
    assert "4 × smaller than the training size: p000.png, p001.png, p002.png, …; 1 × no caption: p004.png" in line
    assert f"{SIZE} px (data.size_px)" in line
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_the_account_shows_the_first_few_names():
    skipped = Skipped()
    for i in range(5):
        skipped.add("no caption", f"{i}.png")
    skipped.add("unreadable image", "x.png")
    assert skipped.total == 6
    assert skipped.lines(2) == ["5 × no caption: 0.png, 1.png, …", "1 × unreadable image: x.png"]

"""Digests: known answers, and what must and must not change them."""

import hashlib
from pathlib import Path

import pytest

from hypersd_export.bundle.digest import canonical_json, digest_json, digest_tree, sha256_file


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_json_digest_ignores_order_and_nothing_else() -> None:
    assert canonical_json({"b": (1, 2.5), "a": "ä"}) == '{"a":"ä","b":[1,2.5]}'
    assert digest_json({"b": [1], "a": None}) == digest_json({"a": None, "b": (1,)})
    assert digest_json({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    assert digest_json({"a": 1}) != digest_json({"a": "1"})


def test_json_digest_refuses_what_json_cannot_say() -> None:
    with pytest.raises(TypeError):
        digest_json({"path": Path("x")})
    with pytest.raises(ValueError):
        digest_json(float("nan"))


def test_tree_digest_follows_names_and_contents(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "f.py").write_text("x = 1")
    assert digest_tree(tmp_path / "one") == digest_tree(tmp_path / "two")
    (tmp_path / "two" / "notes.txt").write_text("x")
    assert digest_tree(tmp_path / "one", "*.py") == digest_tree(tmp_path / "two", "*.py")
    assert digest_tree(tmp_path / "one") != digest_tree(tmp_path / "two")
    (tmp_path / "two" / "sub" / "f.py").rename(tmp_path / "two" / "sub" / "g.py")
    assert digest_tree(tmp_path / "one", "*.py") != digest_tree(tmp_path / "two", "*.py")

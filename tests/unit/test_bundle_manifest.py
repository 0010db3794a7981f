"""The manifest: round trip, and every way in which a bundle can differ from it."""

import json
from pathlib import Path

import pytest

from hypersd_export.bundle import manifest as manifest_module
from hypersd_export.bundle.digest import sha256_file
from hypersd_export.bundle.manifest import (
    Manifest,
    bundle_digest,
    bundle_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from hypersd_export.errors import BundleError
from tests.bundles import seal


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    bundle = tmp_path / "bundle"
    (bundle / "unet").mkdir(parents=True)
    (bundle / "unet" / "model.onnx").write_bytes(b"weights")
    (bundle / "plan.json").write_text("{}")
    return seal(bundle)


def test_lists_every_file_but_itself(sealed: Path) -> None:
    manifest = read_manifest(sealed)
    assert list(manifest.files) == ["plan.json", "unet/model.onnx"]
    entry = manifest.files["unet/model.onnx"]
    assert (entry.sha256, entry.bytes) == (sha256_file(sealed / "unet" / "model.onnx"), 7)
    assert verify_files(sealed) == manifest
    assert bundle_digest(sealed) == sha256_file(sealed / "manifest.json")


def test_what_is_noted_is_not_hashed_again(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = read_manifest(sealed)
    settings = {key: value for key, value in known.to_json().items() if key not in ("format", "files")}
    read: list[str] = []

    def hashed(path: Path) -> str:
        read.append(path.name)
        return known.files[path.relative_to(sealed).as_posix()].sha256

    monkeypatch.setattr(manifest_module, "sha256_file", hashed)
    noted = {"unet/model.onnx": known.files["unet/model.onnx"].sha256}
    assert write_manifest(sealed, **settings, noted=noted) == known
    assert "model.onnx" not in read
    assert "plan.json" in read


def test_round_trip(sealed: Path) -> None:
    data = json.loads((sealed / "manifest.json").read_text())
    assert Manifest.from_json(data, sealed).to_json() == data


def test_hidden_files_are_outside_and_links_are_files(sealed: Path) -> None:
    (sealed / ".DS_Store").write_text("x")
    (sealed / ".cache").mkdir()
    (sealed / ".cache" / "x").write_text("x")
    verify_files(sealed)
    blob = sealed.parent / "blob"
    (sealed / "plan.json").rename(blob)
    (sealed / "plan.json").symlink_to(blob)  # as download caches do
    verify_files(sealed)
    blob.unlink()
    assert list(bundle_files(sealed)) == ["unet/model.onnx"]


def test_all_differences_are_named_in_one_line(sealed: Path) -> None:
    (sealed / "unet" / "model.onnx").write_bytes(b"weightS")
    (sealed / "plan.json").unlink()
    (sealed / "extra.bin").write_text("x")
    with pytest.raises(BundleError) as caught:
        verify_files(sealed)
    text = str(caught.value)
    for part in ("unet/model.onnx was changed", "plan.json is missing", "extra.bin is not in the manifest"):
        assert part in text
    assert "\n" not in text


def test_a_long_list_is_cut(sealed: Path) -> None:
    for i in range(10):
        (sealed / f"x{i}").write_text("x")
    with pytest.raises(BundleError, match="and 6 more"):
        verify_files(sealed)


def test_another_size_is_seen_without_reading(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sealed / "unet" / "model.onnx").write_bytes(b"weights and more")
    read = []
    monkeypatch.setattr(manifest_module, "sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    with pytest.raises(BundleError, match=r"unet/model\.onnx was changed"):
        verify_files(sealed)
    assert read == ["plan.json"]


def test_large_bundles_are_read_in_parallel_with_the_same_result(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_PARALLEL_BYTES", 1)
    verify_files(sealed)
    (sealed / "unet" / "model.onnx").write_bytes(b"weightS")
    with pytest.raises(BundleError, match=r"unet/model\.onnx was changed"):
        verify_files(sealed)


def test_a_file_that_cannot_be_read(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(manifest_module, "sha256_file", denied)
    with pytest.raises(BundleError, match=r"cannot read .*plan\.json \(Permission denied\): check its permissions"):
        verify_files(sealed)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "no JSON object"),
        ('{"format": "hypersd-bundle/2"}', "is of format 'hypersd-bundle/2', and this version reads"),
        ("{}", "is of format 'None'"),
        ('{"format": "hypersd-bundle/1"}', "has no usable created, hypersd, base"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=message) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a\\b"])
def test_paths_outside_the_bundle_are_refused(sealed: Path, name: str) -> None:
    data = json.loads((sealed / "manifest.json").read_text())
    data["files"][name] = data["files"]["plan.json"]
    (sealed / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="outside the bundle"):
        read_manifest(sealed)


@pytest.mark.parametrize("entry", [None, {"sha256": 1, "bytes": 1}, {"sha256": "0"}])
def test_file_entries_are_checked(sealed: Path, entry: object) -> None:
    data = json.loads((sealed / "manifest.json").read_text())
    data["files"]["plan.json"] = entry
    (sealed / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"no sha256 and bytes for 'plan\.json'"):
        read_manifest(sealed)

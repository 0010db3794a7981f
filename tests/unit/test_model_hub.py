"""Models by hub id, with a stand-in for the hub: what is fetched, and one line for everything that goes wrong."""

import json
import shutil
from pathlib import Path

import pytest

from hypersd_export.errors import ModelError
from hypersd_export.model.base import open_base
from hypersd_export.model.families import Family
from tests.lora_files import one_line


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "pipeline"))


def refused(base: object, match: str, **options: str) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        open_base(str(base), **options)  # type: ignore[arg-type]
    return one_line(caught.value)


class Hub:
    """A stand-in for `huggingface_hub.snapshot_download` that copies what the patterns ask for."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.calls = source, []  # type: ignore[var-annotated]
        self.folder = cache / "models--owner--name" / "snapshots" / "0123"

    def __call__(self, hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        from fnmatch import fnmatch

        self.calls.append((hub_id, revision, allow_patterns))
        for path in self.source.rglob("*"):
            relative = path.relative_to(self.source).as_posix()
            if path.is_file() and any(fnmatch(relative, pattern) for pattern in allow_patterns):
                (self.folder / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.folder / relative)
        self.folder.mkdir(parents=True, exist_ok=True)
        return str(self.folder)


def test_hub_fetches_only_what_is_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not wanted")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not wanted")
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    model = open_base("owner/name", revision="v1")
    assert model.name == "owner/name"
    assert {call[:2] for call in hub.calls} == {("owner/name", "v1")}
    assert sorted(p.name for p in (hub.folder / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert open_base(hub.folder).name == "owner/name"
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    refused("owner/name", variant="fp16", match="truncated")
    open_base(folder, unet="owner/name")


def test_hub_repositories_that_are_no_pipeline(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusion3Pipeline"}))
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert open_base("owner/name").family is Family.sd3
    assert len(hub.calls) == 1  # no weights of a family that cannot be exported
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path / "empty", tmp_path / "cache2"))
    refused("owner/name", match="it is not a diffusers pipeline")


HUB_ERRORS = {
    "RepositoryNotFoundError": "neither a local path nor a public repository",
    "GatedRepoError": "accept its terms",
    "RevisionNotFoundError": "has no revision 'r'",
    "LocalEntryNotFoundError": "the hub cannot be reached",
    "OfflineModeIsEnabled": "the hub cannot be reached",
    "HFValidationError": "nor a valid hub id",
    "ConnectError": "the hub cannot be reached",
}


@pytest.mark.parametrize(("name", "said"), HUB_ERRORS.items())
def test_hub_errors_are_one_line(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    # the HTTP library's own error, whichever the client uses
    kind = getattr(errors, name, None) or type(name, (Exception,), {"__module__": "httpx2._exceptions"})
    error = kind.__new__(kind)  # their constructors want a response of that library
    Exception.__init__(error, "many\nlines")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "owner/name" in refused("owner/name", revision="r", match=said)


def test_a_bug_in_the_hub_client_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ZeroDivisionError):
        open_base("owner/name")

"""Models by hub id: only the files that are needed, and one line when the hub cannot be reached."""

import re
from collections.abc import Sequence
from pathlib import Path

from hypersd_export.errors import MissingBackend, ModelError
from hypersd_export.model.folder import PICKLES, STEMS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HTTP_PACKAGES = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")  # httpx and httpx2
CONFIG_FILES = ("model_index.json", "*.json", "*/*.json", "*/*.txt", "README.md")


def looks_like_hub_id(text: str) -> bool:
    """`owner/name`, and not the name of a file."""
    return HUB_ID.fullmatch(text) is not None and not text.endswith((".safetensors", ".ckpt", ".bin", ".pt"))


def fetch_configs(hub_id: str, revision: str | None) -> Path:
    """Every config and tokenizer file of a repository, without weights; the folder in the hub's cache."""
    return fetch_files(hub_id, revision, CONFIG_FILES)


def fetch_component(
    hub_id: str, revision: str | None, name: str, *, variant: str | None, allow_pickle: bool, subfolder: bool = True
) -> Path:
    """The weights of one component in one variant, whole or in shards; the repository's folder in the hub's cache."""
    place, stem, middle = f"{name}/" if subfolder else "", STEMS[name], f".{variant}" if variant else ""
    patterns = [f"{place}{stem}{middle}.safetensors", f"{place}{stem}{middle}-0*-of-*.safetensors", f"{place}*.json"]
    if variant:
        patterns.append(f"{place}{stem}-0*-of-*{middle}.safetensors")
    if allow_pickle:
        pickle_stem, _, suffix = PICKLES[name].partition(".")
        patterns.append(f"{place}{pickle_stem}{middle}.{suffix}")
    return fetch_files(hub_id, revision, patterns)


def fetch_files(hub_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The files of a repository whose paths match; its folder in the hub's cache. ModelError in one line."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as e:
        raise MissingBackend("huggingface_hub", "export", f"the hub id {hub_id}") from e
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as e:
        raise ModelError(f"{hub_id}: gated on the hub; accept its terms there and log in with `hf auth login`") from e
    except errors.RevisionNotFoundError as e:
        raise ModelError(f"{hub_id}: has no revision {revision!r} on the hub; check --revision") from e
    except errors.RepositoryNotFoundError as e:
        raise ModelError(
            f"{hub_id}: neither a local path nor a public repository on the hub; check the name, or log in"
        ) from e
    except errors.HFValidationError as e:
        raise ModelError(f"{hub_id}: neither a local path nor a valid hub id; check the name") from e
    except (OSError, ConnectionError, errors.EntryNotFoundError) as e:
        raise _unreachable(hub_id, e) from e
    except Exception as e:  # the HTTP library's own errors, which differ between releases of the hub's client
        if not type(e).__module__.startswith(HTTP_PACKAGES):
            raise
        raise _unreachable(hub_id, e) from e


def _unreachable(hub_id: str, cause: Exception) -> ModelError:
    return ModelError(
        f"{hub_id}: no such local path, and the hub cannot be reached ({type(cause).__name__}); "
        "check the path, or download the model elsewhere and pass its folder"
    )

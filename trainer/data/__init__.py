"""Where training samples come from: the built-in scenes, or real pictures through one latent and text cache.

`open_source` finds out what `data.source` names and gives a `trainer.batch.Source`. Real sources are encoded once,
into the cache folder; the built-in scenes are drawn and encoded as they are needed, and kept there too.
"""

import re
from pathlib import Path
from typing import Any

from hypersd_export.errors import DataError, OptionError
from hypersd_export.model.files import exists, user_path
from hypersd_export.model.hub import looks_like_hub_id
from trainer.base import TrainingBase
from trainer.data.builtin import BuiltinScenes
from trainer.data.cache import FORMAT, Encoder, Progress, make_cache, refusal
from trainer.data.cached import CachedSource
from trainer.data.folder import read_folder
from trainer.data.hub import FORMATS, is_saved_dataset, read_dataset
from trainer.data.prompts import Prompts, is_prompts
from trainer.data.records import Listing, Reason, Skipped
from trainer.data.shards import read_shards
from trainer.data.store import digest, unwritable
from trainer.distill.config import DataConfig

__all__ = ["BuiltinScenes", "CachedSource", "Prompts", "Reason", "Skipped", "is_prompts", "open_source"]

CHOICES = (
    "builtin, an image folder (metadata.jsonl or name.txt), a folder that datasets saved, .parquet or .json files, "
    "webdataset shards ('shards/{000..015}.tar'), the hub id of a dataset, or prompts alone (a .txt)"
)


def open_source(
    config: DataConfig, base: TrainingBase, *, seed: int, cache: Path, progress: Progress | None = None,
    device: str | None = None,
) -> BuiltinScenes | CachedSource | Prompts:  # fmt: skip
    """The samples that `config` describes, as a `trainer.batch.Source` for `base`.

    `cache` is the folder for all that is kept (the caller applies `config.cache` and its default); `progress` is called
    while a real source is encoded; `device` encodes (None: the first CUDA device, or the CPU). Several processes may
    call this at once on one machine: one encodes, the others wait. All kinds of source have `skipped`, to be shown.

    OptionError for a choice that is none; DataError for data that cannot be read, and for a damaged cache.
    """
    size_px = config.size_px or base.native_size
    base.latent_shape(size_px)
    if config.on_error not in ("skip", "stop"):
        raise OptionError(f"data.on_error {config.on_error!r}: must be skip or stop")
    if config.max_samples < 0:
        raise OptionError(f"data.max_samples {config.max_samples}: must be 0 (all) or more")
    if not config.source:
        raise OptionError(f"data.source is empty; set it to {CHOICES}")
    place = device or _default_device()
    if config.source == "builtin":
        return BuiltinScenes(
            base, seed=seed, cache=cache, size_px=size_px, device=place, max_samples=config.max_samples
        )  # fmt: skip
    if is_prompts(config.source):
        return Prompts(
            user_path(config.source), base, seed=seed, cache=cache, size_px=size_px, device=place,
            max_samples=config.max_samples,
        )  # fmt: skip
    listing = _listing(config, cache)
    key = _key(listing, config, base, size_px)
    folder = cache / f"data-{key['digest'][:16]}"
    _ensure(listing, folder, key, config, base, size_px=size_px, device=place, progress=progress)
    source = CachedSource(folder, seed=seed)
    if config.on_error == "stop" and source.skipped.total:
        raise refusal(source.skipped)
    return source


def _ensure(
    listing: Listing, folder: Path, key: dict[str, Any], config: DataConfig, base: TrainingBase, *, size_px: int,
    device: str, progress: Progress | None,
) -> None:  # fmt: skip
    """Make the cache unless it is there, while no other process does."""
    from filelock import FileLock

    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        lock.acquire()
    except OSError as e:
        raise unwritable(folder, e) from e
    try:
        if not folder.exists():
            make_cache(
                listing, folder, key, lambda: Encoder(base, size_px, device), size_px=size_px,
                max_samples=config.max_samples, stop=config.on_error == "stop", progress=progress,
            )  # fmt: skip
    finally:
        lock.release()


def _listing(config: DataConfig, cache: Path) -> Listing:
    """What the source names, read as what it looks like."""
    source, place = config.source, user_path(config.source)
    columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    if source.endswith((".tar", ".tar}")) or (not exists(place) and re.search(r"\.tar\b", source)):
        return read_shards(source, caption_column=config.caption_column)
    if exists(place) and place.is_dir() and not is_saved_dataset(place):
        return read_folder(place, caption_column=config.caption_column)
    if exists(place) or place.suffix.lower() in FORMATS:
        if place.is_file() and place.suffix.lower() not in FORMATS:
            raise DataError(f"data.source {source}: a file of no known kind; pass {CHOICES}")
        return read_dataset(source, **columns, cache=cache)
    if looks_like_hub_id(source):
        return read_dataset(source, **columns, cache=cache)
    raise DataError(f"data.source {source}: no such file or folder; pass {CHOICES}")


def _key(listing: Listing, config: DataConfig, base: TrainingBase, size_px: int) -> dict[str, Any]:
    """All that the cache depends on, and its digest. on_error is not in it: it changes no sample."""
    key: dict[str, Any] = {
        "format": FORMAT, "source": listing.kind, "files": len(listing.files), "listing": digest(listing.files),
        "encoders": base.encoders_digest, "zero_empty": base.zero_empty, "size_px": size_px,
        "image_column": config.image_column, "caption_column": config.caption_column,
        "max_samples": config.max_samples,
    }  # fmt: skip
    return {**key, "base": base.name, "digest": digest(key)}


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

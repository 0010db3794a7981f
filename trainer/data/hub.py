"""Hugging Face `datasets`: a folder that `save_to_disk` wrote, parquet or JSON files, or a dataset on the hub."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypersd_export.errors import DataError, MissingBackend
from hypersd_export.model.files import user_path
from trainer.data.records import BadSample, FileInfo, Listing, Reason, Record, file_info, matching

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_dataset(source: str, *, image_column: str, caption_column: str, cache: Path) -> Listing:
    """The rows of the `train` split, or of the only one.

    Images are an Image column, bytes, or paths (relative ones to the folder of the source). What datasets makes of
    parquet and JSON files is kept under `cache`, which hub datasets do not use. DataError for a missing column or
    split, naming those there are, and for all that datasets itself refuses.
    """
    try:
        import datasets
    except ImportError as e:
        raise MissingBackend("datasets", "train", f"the data source {source}") from e
    place = user_path(source)
    root = place if place.is_dir() else place.parent
    given = _source_files(place)
    data = _only_split(_load(datasets, source, place, given, cache), source)
    files = [file_info(path, path.name) for path in given] or [(f"{source} {data._fingerprint}", len(data), 0)]
    for option, column in (("caption_column", caption_column), ("image_column", image_column)):
        if column not in data.column_names:
            raise DataError(
                f"data.{option} {column!r}: not a column of {source}; there are: {', '.join(data.column_names)}"
            )
    data = data.select_columns([image_column, caption_column])
    if isinstance(data.features[image_column], datasets.Image):
        data = data.cast_column(image_column, datasets.Image(decode=False))  # damaged images are ours to count

    def records() -> Iterator[Record]:
        for number, row in enumerate(data):
            yield _record(number, row[image_column], row[caption_column], root)

    files = [*files, *_named_images(data, image_column, root)]
    return Listing(kind="dataset", files=files, records=records, total=len(data))


def _source_files(place: Path) -> list[Path]:
    """The files of a local source, none for a hub id."""
    if place.is_dir():
        return sorted(p for p in place.rglob("*") if p.suffix in (".arrow", ".json") and p.is_file())
    return matching(place)


def _load(datasets: Any, source: str, place: Path, files: list[Path], cache: Path) -> Any:
    """A Dataset or DatasetDict; whatever goes wrong is one line."""
    form = FORMATS.get(place.suffix.lower())
    if form is not None and not files:
        raise DataError(f"data.source {source}: no such file; check the path")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if place.is_dir():
            return datasets.load_from_disk(str(place))
        if form is not None:
            names = [str(path) for path in files]
            return datasets.load_dataset(form, data_files=names, cache_dir=str(cache / "datasets"))
        return datasets.load_dataset(source)
    except Exception as e:  # its own errors, pyarrow's and the HTTP library's
        reason = (str(e.__cause__ or e).strip() or type(e).__name__).splitlines()[0][:200]
        way = "check the file" if form or place.is_dir() else "check the id and the connection, or pass a local path"
        raise DataError(f"data.source {source}: datasets cannot read it ({reason}); {way}") from e


def _only_split(data: Any, source: str) -> Any:
    if not isinstance(data, dict):
        return data
    if "train" not in data and len(data) != 1:
        raise DataError(
            f"data.source {source}: has no split 'train' among {', '.join(data)}; save the one you mean to disk"
        )
    return data["train"] if "train" in data else next(iter(data.values()))


def _named_images(data: Any, image_column: str, root: Path) -> list[FileInfo]:
    """The images, where the rows only name them."""
    if not len(data) or not isinstance(_picture(data[0][image_column], root), Path):
        return []
    paths = (_picture(value, root) for value in data[image_column])
    return [file_info(path, str(path)) for path in paths if isinstance(path, Path) and path.is_file()]


def _picture(value: Any, root: Path) -> Path | bytes | None:
    """What an image cell holds: bytes of a file, or a path (relative to `root`)."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return root / value
    return value if isinstance(value, bytes) and value else None


def _record(number: int, image: Any, caption: Any, root: Path) -> Record:
    path = image.get("path") if isinstance(image, dict) else image
    name = f"row {number}" + (f" ({Path(path).name})" if isinstance(path, str) and path else "")
    picture = _picture(image, root)
    if picture is None:
        return Record(name=name, problem=BadSample(Reason.NO_IMAGE, "the cell is empty"))
    if isinstance(picture, Path) and not picture.is_file():
        return Record(name=name, problem=BadSample(Reason.MISSING, str(picture)))
    return Record(name=name, caption=caption, picture=picture)

"""webdataset shards: local tar files, a sample being files of one name (`key.jpg`, `key.txt` or `key.json`)."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hypersd_export.errors import DataError, MissingBackend
from hypersd_export.model.files import user_path
from trainer.data.pictures import SUFFIXES
from trainer.data.records import BadSample, Listing, Reason, Record, file_info, matching


def read_shards(pattern: str, *, caption_column: str) -> Listing:
    """The shards that `pattern` names, with braces and stars: `data/{000..015}.tar`, `data/*.tar`.

    Only local files are opened, never what webdataset would run (`pipe:`) or fetch. DataError if one is missing.
    """
    try:
        import braceexpand
        import webdataset  # noqa: F401
    except ImportError as e:
        raise MissingBackend("webdataset", "train", f"the data source {pattern}") from e
    try:
        named = [user_path(text) for text in braceexpand.braceexpand(pattern)]
    except ValueError as e:
        raise DataError(f"data.source {pattern}: its braces cannot be expanded ({e}); write e.g. {{000..015}}") from e
    absent = [path for path in named if not matching(path)]
    if absent:
        raise DataError(
            f"data.source {pattern}: {len(absent)} of its {len(named)} shards are not there ({absent[0]}); "
            "check the path"
        )
    paths = [path for place in named for path in matching(place)]

    def records() -> Iterator[Record]:
        for path in paths:
            yield from _read_shard(path, caption_column)

    return Listing(kind="shards", files=[file_info(path, path.name) for path in paths], records=records)


def _read_shard(path: Path, caption_column: str) -> Iterator[Record]:
    """The samples of one tar; where it breaks off, the samples before that still count."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    twice: list[str] = []
    broken: list[str] = []

    def handle(error: Exception) -> bool:
        if isinstance(error, ValueError) and "duplicate file name" in str(error.args[0]):
            twice.append(str(error.args[0]).split(":", 1)[0])
            return True  # goes on with the next file of the shard
        raise error

    def files() -> Iterator[dict[str, Any]]:
        try:
            with path.open("rb") as stream:
                yield from tar_file_expander([{"url": str(path), "stream": stream}], handler=handle)
        except Exception as e:  # tarfile's, zlib's and the disk's errors
            broken.append(_what(e))

    for sample in group_by_keys(files(), handler=handle):
        yield _record(sample, caption_column)
    for what in broken:
        yield Record(name=path.name, problem=BadSample(Reason.BAD_SHARD, what))
    for name in twice:
        yield Record(name=f"{path.name}/{name}", problem=BadSample(Reason.DUPLICATE, "twice in one shard"))


def _record(sample: Mapping[str, Any], caption_column: str) -> Record:
    name = str(sample["__key__"])
    picture = next((sample[s[1:]] for s in SUFFIXES if s[1:] in sample), None)
    if picture is None:
        return Record(name=name, problem=BadSample(Reason.NO_IMAGE, f"has {', '.join(_suffixes(sample))}"))
    if "txt" not in sample and "json" not in sample:
        return Record(name=name, problem=BadSample(Reason.NO_CAPTION, f"has {', '.join(_suffixes(sample))}"))
    try:
        if "txt" in sample:
            return Record(name=name, caption=sample["txt"].decode("utf-8-sig"), picture=picture)
        row = json.loads(sample["json"].decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        return Record(name=name, problem=BadSample(Reason.NOT_UTF8, f"{e.reason} at byte {e.start}"))
    except ValueError as e:
        return Record(name=name, problem=BadSample(Reason.NOT_TEXT, f"its json: {e}"))
    caption = row.get(caption_column) if isinstance(row, dict) else None
    return Record(name=name, caption=caption, picture=picture)


def _suffixes(sample: Mapping[str, Any]) -> list[str]:
    return [f".{key}" for key in sample if not key.startswith("__")]


def _what(error: Exception) -> str:
    """The message without the stream's repr that webdataset adds."""
    return str(error.args[0] if error.args else error).split(" @ ")[0][:160] or type(error).__name__

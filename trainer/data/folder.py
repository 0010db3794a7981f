"""A folder of images with captions: `metadata.jsonl` (the convention of datasets' ImageFolder), or `name.txt` beside.

Read recursively. A `metadata.jsonl` speaks for the folder that it lies in and those below, the nearest one first; an
image that none of them lists may still have its text file. Hidden files and folders, and links to folders, are passed
over.
"""

import json
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path

from trainer.data.pictures import SUFFIXES
from trainer.data.records import BadSample, FileInfo, Listing, Reason, Record, file_info

METADATA = "metadata.jsonl"
Stated = dict[str, object]


def read_folder(root: Path, *, caption_column: str) -> Listing:
    """List the images under `root`, sorted by their relative path, and what their captions come from."""
    files = _walk(root)
    names = {info[0] for info in files}
    images = [name for name in sorted(names) if name.lower().endswith(SUFFIXES)]
    metadata = [name for name in names if posixpath.basename(name) == METADATA]
    metadata.sort(key=lambda name: (name.count("/"), name))  # the deeper one is read later, and has the last word

    def records() -> Iterator[Record]:
        stated: Stated = {}
        problems: list[Record] = []
        for name in metadata:
            stated |= _read_metadata(root, name, names, caption_column, problems)
        stems: set[str] = set()
        for name in images:
            stem = posixpath.splitext(name)[0]
            yield _record(root, name, stated, names, taken=stem in stems)
            stems.add(stem)
        yield from problems

    return Listing(kind="folder", files=files, records=records, total=len(images))


def _walk(root: Path) -> list[FileInfo]:
    """The images, text files and metadata under `root`, sorted."""
    found = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and (name.lower().endswith((*SUFFIXES, ".txt")) or name == METADATA):
                path = Path(place, name)
                if path.is_file():
                    found.append(file_info(path, path.relative_to(root).as_posix()))
    return sorted(found)


def _read_metadata(
    root: Path, name: str, names: set[str], caption_column: str, problems: list[Record]
) -> Stated:  # fmt: skip
    """{image: caption} of one metadata.jsonl; lines that are no use are added to `problems`."""
    stated: Stated = {}
    for number, line in enumerate((root / name).read_bytes().splitlines(), 1):
        place = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
            image = posixpath.normpath(posixpath.join(posixpath.dirname(name), row["file_name"]))
        except UnicodeDecodeError:
            problems.append(Record(name=place, problem=BadSample(Reason.NOT_UTF8)))
            continue
        except (ValueError, KeyError, TypeError) as e:
            problems.append(Record(name=place, problem=BadSample(Reason.BAD_LINE, str(e))))
            continue
        if image not in names:
            problems.append(Record(name=image, problem=BadSample(Reason.MISSING, f"named in {place}")))
        elif image in stated:
            problems.append(Record(name=image, problem=BadSample(Reason.DUPLICATE, f"again in {place}")))
        else:
            stated[image] = row.get(caption_column)
    return stated


def _record(root: Path, name: str, stated: Stated, names: set[str], *, taken: bool) -> Record:
    """One image with its caption; `taken`: another image already has the same name but for the suffix."""
    if name in stated:
        return Record(name=name, caption=stated[name], picture=root / name)
    side = posixpath.splitext(name)[0] + ".txt"
    if side not in names:
        return Record(name=name, problem=BadSample(Reason.NO_CAPTION, f"neither {METADATA} nor {side}"))
    if taken:
        return Record(name=name, problem=BadSample(Reason.DUPLICATE, f"two images for {side}"))
    try:
        caption = (root / side).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        return Record(name=name, problem=BadSample(Reason.NOT_UTF8, f"{side}: {e.reason} at byte {e.start}"))
    return Record(name=name, caption=caption, picture=root / name)

"""Tensors on disk that are whole or not there: safetensors written beside and renamed, with a checksum of each row."""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hypersd_export.errors import DataError
from hypersd_export.model.files import read_header, write_tensors

CHECKSUMS = "crc32"


def digest(content: Any) -> str:
    """Hex sha256 of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors, whose rows belong together, with a CRC-32 per row; DataError if the disk is full or closed.

    Written under a name of this process and renamed, so that two processes that write the same file cannot mix.
    """
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    sums = [row_checksum(plain, row) for row in range(len(next(iter(plain.values()))))]
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(partial, plain, {CHECKSUMS: json.dumps(sums)})
        partial.replace(path)
    except (OSError, SafetensorError) as e:
        partial.unlink(missing_ok=True)
        raise unwritable(path, e) from e


def open_tensors(path: Path, delete: Path) -> tuple[dict[str, torch.Tensor], list[int]]:
    """(tensors, CRC-32 of each row), mapped from disk: rows are read when they are used, and should be checked then.

    DataError, which names `delete` as what to remove, if the file is missing, cut short or not one of `save_tensors`.
    """
    try:
        read_header(path, DataError)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            sums = json.loads(file.metadata()[CHECKSUMS])
    except (DataError, OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise damaged(path, str(e), delete) from e
    if {len(tensor) for tensor in tensors.values()} != {len(sums)}:
        raise damaged(path, "its rows and checksums differ in number", delete)
    return tensors, sums


def load_tensors(path: Path, delete: Path) -> dict[str, torch.Tensor]:
    """The tensors, every row checked."""
    tensors, sums = open_tensors(path, delete)
    check_rows(path, tensors, sums, range(len(sums)), delete)
    return tensors


def check_rows(
    path: Path, tensors: Mapping[str, torch.Tensor], sums: Sequence[int], rows: Sequence[int], delete: Path
) -> None:  # fmt: skip
    """DataError if one of the rows is not what was written."""
    wrong = [row for row in rows if row_checksum(tensors, row) != sums[row]]
    if wrong:
        raise damaged(path, f"row {wrong[0]} is not what was written", delete)


def row_checksum(tensors: Mapping[str, torch.Tensor], row: int) -> int:
    """CRC-32 over one row of every tensor, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        data: Any = tensors[name][row].reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(data, value)
    return value


def damaged(path: Path, what: str, delete: Path) -> DataError:
    """The one line for a cache that cannot be trusted."""
    first = (what.strip() or "unreadable").splitlines()[0].removeprefix(f"{path}: ").split("; ")[0]
    return DataError(f"{path}: damaged data cache ({first}); delete {delete} and it is made again")


def unwritable(path: Path, error: Exception) -> DataError:
    """The one line for a disk that does not take a cache."""
    reason = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"{path}: the data cache cannot be written ({reason}); free some space or set data.cache")

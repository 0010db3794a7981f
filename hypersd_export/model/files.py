"""Weight files before anything is loaded: what they are, what they hold, and whether they are whole.

Reads only the header of a safetensors file (8 bytes of length, JSON, then the data:
https://github.com/huggingface/safetensors, "Format"), so a damaged 4 GB file is refused in a millisecond.
No torch here, except in `read_tensors`.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import HypersdError, ModelError

if TYPE_CHECKING:
    import torch

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl"})
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "C64": 64}
ITEM_BITS |= {"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor of a header: safetensors dtype name (`F32`, `F16`, …) and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The tensors of a safetensors file by name, and its `__metadata__`."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path, error: type[HypersdError] = ModelError) -> Header:
    """Check that a safetensors file is whole and return its header; raises `error` in one line if it is not."""
    size = _existing_size(path, error)
    with path.open("rb") as file:
        start = file.read(512)
        _refuse_impostor(path, start, size, error)
        length = int.from_bytes(start[:8], "little")
        if length > min(size - 8, MAX_HEADER):
            raise error(
                f"{path}: truncated or not safetensors ({size} bytes, its header claims {length}); download it again"
            )
        file.seek(8)
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        tensors = {
            name: TensorInfo(dtype=str(entry["dtype"]), shape=tuple(int(n) for n in entry["shape"]))
            for name, entry in header.items()
        }
        spans = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise error(f"{path}: corrupt safetensors, its header is not readable ({e}); download it again") from e
    needed = 8 + length + max(ends, default=0)
    if size != needed:
        what = "truncated" if size < needed else "corrupt"
        raise error(f"{path}: {what} safetensors, {size} bytes where its header says {needed}; download it again")
    for name, info in tensors.items():
        bits = ITEM_BITS.get(info.dtype)
        if bits is not None and math.prod(info.shape) * bits != spans[name] * 8:
            raise error(f"{path}: corrupt safetensors, {name} has {spans[name]} bytes for {info}; download it again")
    return Header(tensors=tensors, metadata={str(k): str(v) for k, v in metadata.items()})


def user_path(text: str | Path) -> Path:
    """A path as the user wrote it, with `~` expanded where that means something."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # a ~name that is no user
        return Path(text)


def public_name(text: str | None) -> str | None:
    """What may be told of a path: the last part of a local one; hub ids, patterns and `builtin` as they are."""
    return Path(text).name if text and (exists(Path(text)) or Path(text).is_absolute()) else text


def exists(path: Path) -> bool:
    """Whether there is something at a path; False, not an error, for a text that cannot be a path."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _existing_size(path: Path, error: type[HypersdError]) -> int:
    if not exists(path):
        raise error(f"{path}: no such file; check the path")
    if not path.is_file():
        raise error(f"{path}: a folder, where one weight file is needed; name the file inside it")
    try:
        with path.open("rb"):
            return path.stat().st_size
    except OSError as e:
        raise error(f"{path}: cannot be read ({e.strerror}); check its permissions") from e


def _refuse_impostor(path: Path, start: bytes, size: int, error: type[HypersdError]) -> None:
    """Name the usual wrong downloads, which the safetensors library reports as `header too large`."""
    text = start.lstrip().lower()
    if size < 8 or not start.strip(b"\0"):
        raise error(f"{path}: {size} bytes, empty or an interrupted download; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise error(f"{path}: a git-LFS pointer of {size} bytes, not the weights; run `git lfs pull` in its folder")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise error(f"{path}: an HTML page, not weights; download the file itself (the `resolve` link, not `blob`)")
    json_follows = start[8:9] == b"{"  # safetensors: its header's length comes first and may begin as a pickle does
    if not json_follows and start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise error(f"{path}: a pickle under another name; {convert_hint(path)}")
    if start.startswith(b"GGUF"):
        raise error(f"{path}: a GGUF file, which is quantised; pass the original safetensors")


def convert_hint(path: Path, target: Path | None = None) -> str:
    """The way out of a refused pickle: the command that converts it, or the flag that accepts it."""
    target = target or path.with_suffix(".safetensors")
    if target == path:
        target = path.with_name(f"{path.stem}-converted.safetensors")
    return f"convert it with `python -m hypersd_export.model.convert {path} {target}`, or pass --allow-pickle"


def is_pickle(path: Path) -> bool:
    """Whether the name says that the file is a pickle (.bin, .ckpt, .pt, .pth, .pkl)."""
    return path.suffix.lower() in PICKLE_SUFFIXES


def check_weights(path: Path, *, allow_pickle: bool, error: type[HypersdError] = ModelError) -> None:
    """Raise `error` unless the file is whole safetensors, or a pickle and pickles are allowed."""
    if not is_pickle(path):
        read_header(path, error)
        return
    size = _existing_size(path, error)
    if not allow_pickle:
        raise error(f"{path}: a pickle, which can run code when it is read; {convert_hint(path)}")
    with path.open("rb") as file:
        start = file.read(512)
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        _refuse_impostor(path, start, size, error)
        raise error(f"{path}: not a torch checkpoint; download it again")


def write_tensors(
    path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: "Mapping[str, str] | None" = None
) -> None:  # fmt: skip
    """Write a safetensors file in place, with the permissions that any new file has.

    The safetensors library gives its files to their owner alone (0600), so that nobody else could use a shared cache
    or a published LoRA. Whatever the disk refuses is the library's own exception.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode)


def read_tensors(path: Path, error: type[HypersdError] = ModelError) -> "dict[str, torch.Tensor]":
    """All tensors of a file, mapped from disk (a private mapping: writing to one does not change the file).

    A pickle is read with `weights_only=True`; a training checkpoint's `state_dict` is unwrapped, and what is not
    a tensor is left out. Call `check_weights` first.
    """
    import torch

    if not is_pickle(path):
        from safetensors import safe_open

        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"PK"  # only the zip format can be mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise error(f"{path}: cannot be read as plain weights ({reason[:120]}); get its safetensors version") from e
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise error(f"{path}: holds a {type(content).__name__}, not weights by name; get its safetensors version")
    return {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}


def read_json(path: Path, error: type[HypersdError] = ModelError) -> dict[str, Any]:
    """A JSON object from a file; raises `error` in one line if it is missing, damaged or something else."""
    if not path.is_file():
        raise error(f"{path}: no such file; the folder is not complete, download it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise error(f"{path}: not readable as JSON ({e}); download it again") from e
    if not isinstance(content, dict):
        raise error(f"{path}: holds a {type(content).__name__} where an object is needed; download it again")
    return content


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(files: Iterable[tuple[str, Path]]) -> str:
    """Hex sha256 over named files: of the sorted lines `name sha256`, so that it does not depend on where they lie."""
    lines = sorted(f"{name} {sha256_file(path)}" for name, path in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

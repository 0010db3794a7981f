"""Checkpoints of a distillation: one safetensors file each, with a sha256 over all that is in it.

`stage2-step000500.safetensors` is the state before step 500 (counted from 0) of stage 2: every adapter, the optimiser's
moments, discriminator, scalers, and the configuration as JSON in the metadata. A file is written beside its place and
renamed, so that what has a checkpoint's name is whole, unless the disk damaged it: then the sha256 does not fit, which
is an error that names the older checkpoint that does. Nothing is unpickled.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hypersd_export.errors import DataError, DestinationError
from hypersd_export.model.files import write_tensors

FOLDER = "checkpoints"
FORMAT = 1
SET_ASIDE = ".set-aside"
_NAME = re.compile(r"stage(\d+)-step(\d+)\.safetensors")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a run stands: the stage, from 1, and the step within it that comes next."""

    stage: int
    step: int

    @property
    def name(self) -> str:
        """The checkpoint's file name."""
        return f"stage{self.stage}-step{self.step:06d}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """tensors by name, on the CPU; `extra`: plain JSON data (configuration, base digest, scalers …)."""

    place: Place
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    extra: Mapping[str, Any]


def checkpoints(out: Path) -> list[tuple[Place, Path]]:
    """The checkpoints of the run in `out`, oldest first."""
    found = [(match, path) for path in (out / FOLDER).glob("*.safetensors") if (match := _NAME.fullmatch(path.name))]
    return sorted((Place(int(match[1]), int(match[2])), path) for match, path in found)


def save_snapshot(out: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write a checkpoint, then delete all but the `keep` newest; DestinationError if the disk is full, in which case
    every older checkpoint is still there."""
    path = out / FOLDER / snapshot.place.name
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in snapshot.tensors.items()}
    state = json.dumps({"stage": snapshot.place.stage, "step": snapshot.place.step, **snapshot.extra})
    with writing(path) as partial:
        write_tensors(partial, tensors, {"format": str(FORMAT), "state": state, "sha256": digest(tensors, state)})
    for _, old in checkpoints(out)[: -max(1, keep)]:
        old.unlink(missing_ok=True)
    return path


def load_snapshot(path: Path) -> Snapshot:
    """Read and check a checkpoint; DataError if it is damaged, truncated or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if set(metadata) != {"format", "state", "sha256"}:
            raise ValueError("not a checkpoint of a distillation")
        if metadata["format"] != str(FORMAT):
            raise ValueError(f"format {metadata['format']}, and this version reads {FORMAT}")
        if digest(tensors, metadata["state"]) != metadata["sha256"]:
            raise ValueError("its sha256 does not fit: it was changed or damaged after it was written")
        state = json.loads(metadata["state"])
        place = Place(int(state.pop("stage")), int(state.pop("step")))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot resume from this checkpoint: {why}") from error
    return Snapshot(place=place, tensors=tensors, extra=state)


def newest(out: Path) -> Snapshot | None:
    """The newest checkpoint in `out`, None if there is none. If it is damaged: a DataError that names the newest one
    that is whole and how to use it, because steps would be lost and that is the caller's to decide."""
    stored = checkpoints(out)
    if not stored:
        return None
    try:
        return load_snapshot(stored[-1][1])
    except DataError as error:
        older = next((path for _, path in reversed(stored[:-1]) if _is_whole(path)), None)
        way_out = "there is no older one that is whole: start again in another --out"
        if older is not None:
            way_out = f"the one before it is whole: --resume {older}"
        raise DataError(f"{error}; {way_out}") from error


def _is_whole(path: Path) -> bool:
    try:
        load_snapshot(path)
    except DataError:
        return False
    return True


def set_aside_newer(out: Path, place: Place) -> None:
    """Rename the checkpoints of `out` that are newer than `place`, so that "latest" is the branch that goes on."""
    for other, path in checkpoints(out):
        if other > place:
            path.replace(path.with_name(path.name + SET_ASIDE))


def digest(tensors: Mapping[str, torch.Tensor], state: str) -> str:
    """sha256 over every tensor's name, type, shape and bytes, and the metadata."""
    total = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and renames it into place at the end; a failure leaves nothing there.

    DestinationError, in one line, for whatever the disk refuses.
    """
    partial = path.with_name(path.name + ".partial")
    with disk(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _flush(partial)
            partial.replace(path)
            _flush(path.parent)
        except Exception:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """What the disk refuses while `path` is written becomes a DestinationError of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DestinationError(refusal(path, error)) from error


def refusal(path: Path, error: Exception) -> str:
    """One line that says why `path` could not be written, and what to do."""
    reason = (error.strerror if isinstance(error, OSError) else "") or str(error).splitlines()[0]
    if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
        return f"{path}: the disk is full; free some space and run the same command again, nothing older was touched"
    return f"{path}: cannot be written ({reason}); mend that, or take another --out"


def _flush(path: Path) -> None:
    """Bring what was written to the disk itself, so that a rename never outlives the content it stands for."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

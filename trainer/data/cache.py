"""The latent and text-embedding cache of a real data source: every picture and caption is encoded once.

A cache is a folder, keyed by the digest of all that it depends on: `shard-00000.safetensors` … with latents in float32
and text states in float16 (they are several times larger, and the text encoders run in float16 elsewhere too),
`empty.safetensors` (the empty prompt) and `index.json` (names, captions, what was skipped and why). It is made in
`<key>.partial` beside its place and renamed when it is whole. A run that was killed goes on after the last whole shard.
"""

import json
import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hypersd_export.errors import DataError
from trainer.base import PromptEncoder, TrainingBase, encode_pictures
from trainer.batch import Conditioning
from trainer.data.pictures import read_picture
from trainer.data.records import BadSample, Listing, Reason, Record, Skipped
from trainer.data.store import damaged, save_tensors, unwritable

FORMAT = 1
INDEX, EMPTY = "index.json", "empty.safetensors"
SHARD_SAMPLES, SHARD_BYTES = 2048, 512 * 2**20
WORKERS = min(8, os.cpu_count() or 1)
PIXELS_AT_ONCE = 2**21  # through the VAE: 8 pictures of 512 px, 2 of 1024 px

Progress = Callable[[int, int], None]
"""Called with (records done, records in all or 0 if that is not known)."""
Picture = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(kw_only=True, slots=True)
class Part:
    """One shard and its place in the source: `done` records were read when it was written.

    Its file is named by its number; `bytes` is 0 for a last part without samples, which only accounts for the skipped.
    """

    file: str
    done: int
    bytes: int = 0
    names: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "file": self.file, "done": self.done, "bytes": self.bytes, "names": self.names, "captions": self.captions,
            "skipped": self.skipped.names,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Part":
        """What `to_json` gave; KeyError or TypeError for anything else."""
        return cls(**{**data, "skipped": Skipped(dict(data["skipped"]))})


class Encoder:
    """VAE and text encoders of a base at one size, in float32 on one device; loaded when they are first needed."""

    def __init__(self, base: TrainingBase, size_px: int, device: str) -> None:
        self.size_px = size_px
        self._vae: Any = base.load_vae(torch.float32).to(torch.device(device))
        self._text: PromptEncoder = base.prompt_encoder(torch.float32).to(device)

    def empty(self) -> dict[str, torch.Tensor]:
        """The empty prompt, float32: states, and pooled and time_ids for SDXL."""
        return _tensors(self._text.empty(size=(self.size_px, self.size_px)))

    def __call__(self, pictures: list[Picture], captions: list[str]) -> dict[str, torch.Tensor]:
        """latents float32 [B, C, h, w], states float16 [B, S, D], pooled float16 [B, P] for SDXL; on the CPU."""
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        text = self._text(captions, size=(self.size_px, self.size_px))
        tensors = {name: tensor.half() for name, tensor in _tensors(text).items() if name != "time_ids"}
        tensors["latents"] = encode_pictures(self._vae, pixels).cpu()
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise DataError(
                    f"{name} of {captions[0]!r} and the next {len(captions) - 1} samples are not finite; "
                    "the base's VAE or text encoder is damaged, pass another base"
                )
        return tensors


def make_cache(
    listing: Listing, folder: Path, key: dict[str, Any], encoder: Callable[[], Encoder], *, size_px: int,
    max_samples: int = 0, stop: bool = False, progress: Progress | None = None,
) -> None:  # fmt: skip
    """Encode the source into `folder`, which must not exist; DataError if nothing in it can be used.

    With `stop` the first sample that cannot be used is the error; else it is counted. max_samples: 0 for all.
    """
    stage = folder.with_name(f"{folder.name}.partial")
    parts = _resume(stage)
    if stop and (before := next((part.skipped for part in parts if part.skipped.total), None)):
        raise refusal(before)
    model = encoder()
    save_tensors(stage / EMPTY, model.empty())
    job = _Job(listing, stage, model, parts, size_px=size_px, max_samples=max_samples, stop=stop)
    job.run(progress)
    if not any(part.names for part in job.parts):
        shutil.rmtree(stage)
        raise DataError(_nothing(job.parts, size_px))
    _write_json(stage / INDEX, {"format": FORMAT, "key": key, "parts": [part.to_json() for part in job.parts]})
    try:
        for leftover in stage.glob("part-*.json"):
            leftover.unlink()
        stage.replace(folder)
    except OSError as e:
        raise unwritable(folder, e) from e


class _Job:
    """The loop of `make_cache`, with what has piled up since the last shard."""

    def __init__(
        self, listing: Listing, stage: Path, encoder: Encoder, parts: list[Part], *, size_px: int, max_samples: int,
        stop: bool,
    ) -> None:  # fmt: skip
        self.parts = parts
        self._listing, self._stage, self._encoder, self._size_px, self._stop = listing, stage, encoder, size_px, stop
        self._at_once = max(1, min(64, PIXELS_AT_ONCE // size_px**2))
        self._room = max_samples or 2**62
        self._known = {name for part in parts for name in part.names}
        self._tensors: list[dict[str, torch.Tensor]] = []
        self._part = self._new_part(parts[-1].done if parts else 0)

    def _new_part(self, done: int) -> Part:
        return Part(file=f"shard-{len(self.parts):05d}.safetensors", done=done)

    def run(self, progress: Progress | None) -> None:
        """Read on from where the parts end."""
        from PIL.Image import DecompressionBombWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DecompressionBombWarning)  # such pictures are refused, and counted
            try:
                self._run(progress)
            except OSError as e:  # what cannot be written is a DataError already
                raise DataError(f"data.source: cannot be read on ({e}); check the disk and start again") from e

    def _run(self, progress: Progress | None) -> None:
        done = self._part.done
        pictures: list[Picture] = []
        records = islice(self._listing.records(), done, None)
        for record, picture in _ahead(records, self._size_px) if len(self._known) < self._room else ():
            done += 1
            if self._take(record, picture):
                pictures.append(picture)  # type: ignore[arg-type]  # _take says that it is one
            full = len(self._known) == self._room
            if pictures and (len(pictures) == self._at_once or full):
                self._encode(pictures)
                pictures = []
            if not pictures and self._pending_is_large():
                self._flush(done)
            if progress is not None:
                progress(done, self._listing.total)
            if full:
                break
        if pictures:
            self._encode(pictures)
        if self._part.names or self._part.skipped.total:
            self._flush(done)

    def _take(self, record: Record, picture: Picture | BadSample) -> bool:
        """Whether the sample is used; if not, it is counted, or the error."""
        problem = record.problem or _problem(record, self._known) or (
            picture if isinstance(picture, BadSample) else None
        )  # fmt: skip
        if problem is None:
            self._known.add(record.name)
            self._part.names.append(record.name)
            self._part.captions.append(str(record.caption).strip())
            return True
        self._part.skipped.add(problem.reason, record.name)
        if self._stop:
            raise refusal(self._part.skipped, problem.detail)
        return False

    def _encode(self, pictures: list[Picture]) -> None:
        self._tensors.append(self._encoder(pictures, self._part.captions[-len(pictures) :]))

    def _pending_is_large(self) -> bool:
        count = len(self._part.names)
        size = sum(tensor.nbytes for tensors in self._tensors for tensor in tensors.values())
        return count >= SHARD_SAMPLES or size >= SHARD_BYTES

    def _flush(self, done: int) -> None:
        """Write the shard, then the note that says that it is there."""
        part, self._part.done = self._part, done
        if part.names:
            path = self._stage / part.file
            save_tensors(path, {n: torch.cat([t[n] for t in self._tensors]) for n in self._tensors[0]})
            part.bytes = path.stat().st_size
        _write_json(self._stage / f"part-{len(self.parts):05d}.json", part.to_json())
        self.parts.append(part)
        self._tensors, self._part = [], self._new_part(done)


def _ahead(records: Iterator[Record], size_px: int) -> Iterator[tuple[Record, Picture | BadSample]]:
    """Records in order, each with its picture, which threads decode some way ahead."""
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting: deque[tuple[Record, Future[Picture | BadSample]]] = deque()
        try:
            for record in records:
                waiting.append((record, pool.submit(_decode, record, size_px)))
                if len(waiting) > 4 * WORKERS:
                    first, picture = waiting.popleft()
                    yield first, picture.result()
            while waiting:
                first, picture = waiting.popleft()
                yield first, picture.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _decode(record: Record, size_px: int) -> Picture | BadSample:
    if record.picture is None:
        return BadSample(Reason.NO_IMAGE)
    try:
        return read_picture(record.picture, size_px)
    except BadSample as problem:
        return problem


def _problem(record: Record, known: set[str]) -> BadSample | None:
    """What is wrong with a record apart from its picture."""
    if record.name in known:
        return BadSample(Reason.DUPLICATE)
    if record.caption is None:
        return BadSample(Reason.NO_CAPTION)
    if not isinstance(record.caption, str):
        return BadSample(Reason.NOT_TEXT, f"a {type(record.caption).__name__}")
    if any("\ud800" <= letter <= "\udfff" for letter in record.caption):  # JSON can spell half a character
        return BadSample(Reason.NOT_UTF8, "a lone surrogate")
    return None if record.caption.strip() else BadSample(Reason.EMPTY_CAPTION)


def _resume(stage: Path) -> list[Part]:
    """The parts that a killed run left whole; what came after them is made again."""
    parts: list[Part] = []
    while (note := stage / f"part-{len(parts):05d}.json").is_file():
        try:
            part = Part.from_json(json.loads(note.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as e:
            raise damaged(note, str(e), stage) from e
        shard = stage / part.file
        if part.names and (not shard.is_file() or shard.stat().st_size != part.bytes):
            raise damaged(shard, "missing or cut short", stage)
        parts.append(part)
    return parts


def refusal(skipped: Skipped, detail: str = "") -> DataError:
    """The error of on_error=stop."""
    reason, names = next(iter(skipped.names.items()))
    shown = f"{reason} ({detail})" if detail else reason
    return DataError(f"{names[0]}: {shown}; mend or remove it, or set data.on_error=skip to count such samples")


def all_skipped(parts: list[Part]) -> Skipped:
    """What the parts left out, together."""
    skipped = Skipped()
    for part in parts:
        skipped.extend(part.skipped)
    return skipped


def _nothing(parts: list[Part], size_px: int) -> str:
    skipped = all_skipped(parts)
    if not skipped.total:
        return "data.source: there is not one image in it; check the path"
    way = f"; pictures must have {size_px} px (data.size_px)" if str(Reason.TOO_SMALL) in skipped.names else ""
    return f"data.source: none of its {skipped.total} samples can be used: {'; '.join(skipped.lines())}{way}"


def _tensors(conditioning: Conditioning) -> dict[str, torch.Tensor]:
    named = {"states": conditioning.states, "pooled": conditioning.pooled, "time_ids": conditioning.time_ids}
    return {name: tensor.detach().cpu() for name, tensor in named.items() if tensor is not None}


def _write_json(path: Path, content: Any) -> None:
    """ASCII JSON, written beside and renamed (file names that are not UTF-8 survive as escapes)."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        partial.write_text(json.dumps(content), encoding="ascii")
        partial.replace(path)
    except OSError as e:
        raise unwritable(path, e) from e

"""Reading a cache: random access to the samples of a real data source, in an endless shuffled stream."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.batch import Batch, Conditioning
from trainer.data.cache import EMPTY, FORMAT, INDEX, Part, all_skipped
from trainer.data.records import Skipped
from trainer.data.store import check_rows, damaged, load_tensors, open_tensors


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order of the samples in an epoch: int64 [count], a pure function of its arguments."""
    return np.random.default_rng([seed % 2**64, epoch]).permutation(count)


class CachedSource:
    """The `Source` of a cache folder. Position p is sample permutation(epoch)[p mod n] of epoch p div n.

    Opening checks that every shard is there with its size; a sample's checksum is checked when it is first read, so a
    cache of any size opens at once and a flipped bit is still found. `skipped` says what the source lost, and why.
    """

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder, self._seed = folder, seed
        self._parts = _read_index(folder)
        self.skipped: Skipped = all_skipped(self._parts)
        self._parts = [part for part in self._parts if part.names]
        self._starts = np.cumsum([0, *(len(part.names) for part in self._parts)])
        opened = [open_tensors(folder / part.file, folder) for part in self._parts]
        for part, (_, sums) in zip(self._parts, opened, strict=True):
            if not len(sums) == len(part.names) == len(part.captions):
                raise damaged(folder / part.file, f"{len(sums)} rows where the index has {len(part.names)}", folder)
        self._shards, self._sums = [tensors for tensors, _ in opened], [sums for _, sums in opened]
        self._checked = np.zeros(len(self), dtype=bool)
        self._empty = Conditioning(**load_tensors(folder / EMPTY, folder))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of every sample."""
        channels, height, width = self._shards[0]["latents"].shape[1:]
        return channels, height, width

    @property
    def empty(self) -> Conditioning:
        """The conditioning of the empty prompt: one row, float32."""
        return self._empty

    def sample_at(self, position: int) -> int:
        """The number of the sample (in the order of the source) that a position of the stream holds."""
        epoch, place = divmod(position, len(self))
        return int(permutation(len(self), self._seed, epoch)[place])

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions, everything in float32; DataError if one is not what was written."""
        rows = [self._find(self.sample_at(position)) for position in positions]
        parts = [self._parts[shard] for shard, _ in rows]

        def gather(name: str) -> torch.Tensor:
            return torch.stack([self._shards[shard][name][row] for shard, row in rows]).float()

        ids = self._empty.time_ids
        return Batch(
            latents=gather("latents"),
            conditioning=Conditioning(
                states=gather("states"), pooled=gather("pooled") if self._empty.pooled is not None else None,
                time_ids=None if ids is None else ids.repeat(len(rows), 1),
            ),
            captions=tuple(part.captions[row] for part, (_, row) in zip(parts, rows, strict=True)),
            names=tuple(part.names[row] for part, (_, row) in zip(parts, rows, strict=True)),
        )  # fmt: skip

    def _find(self, sample: int) -> tuple[int, int]:
        """(shard, row) of a sample, checked."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        row = sample - int(self._starts[shard])
        if not self._checked[sample]:
            path = self.folder / self._parts[shard].file
            check_rows(path, self._shards[shard], self._sums[shard], [row], self.folder)
            self._checked[sample] = True
        return shard, row


def _read_index(folder: Path) -> list[Part]:
    """The parts of a whole cache; DataError if the index or a shard is damaged."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="ascii"))
        parts = [Part.from_json(entry) for entry in index["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise damaged(path, str(e), folder) from e
    if index.get("format") != FORMAT or not any(part.names for part in parts):
        raise damaged(path, f"format {index.get('format')} with {len(parts)} parts", folder)
    for part in parts:
        shard = folder / part.file
        if part.names and (not shard.is_file() or shard.stat().st_size != part.bytes):
            raise damaged(shard, "missing or cut short", folder)
    return parts

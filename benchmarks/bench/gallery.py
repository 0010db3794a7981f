"""Pictures and features that are made once: in chunks, kept by the digest of all that they depend on.

A chunk is what is cached, what a killed run loses at most, and what processes share out among themselves: chunk n is
process n mod world's. As a chunk is drawn by itself whoever draws it, one process and two make the same pictures.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bench.drawers import Drawer
from benchmarks.bench.eyes import Eye
from benchmarks.feature_cache import FeatureCache

CHUNK = 32
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Prompts in order; picture i is of the noise of first_seed + i."""

    prompts: tuple[str, ...]
    first_seed: int

    def chunks(self) -> "Iterator[Series]":
        """The same in pieces."""
        for start in range(0, len(self.prompts), CHUNK):
            yield Series(prompts=self.prompts[start : start + CHUNK], first_seed=self.first_seed + start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which of several processes this is. `wait`: until all are there."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = field(default=lambda: None)

    @classmethod
    def of_launch(cls) -> "Share":
        """As `accelerate launch` started this process: gloo on CPUs; alone if it was not launched."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=True)
        return cls(rank=state.process_index, world=state.num_processes, wait=state.wait_for_everyone)


@dataclass(kw_only=True)
class Gallery:
    """Pictures by drawers and features by one eye, through the cache. `tell` hears how far it is."""

    cache: FeatureCache
    eye: Eye
    share: Share = field(default_factory=Share)
    tell: Callable[[str], None] = print

    def prepare(self, drawer: Drawer, series: Series, what: str) -> None:
        """Make this process's share of the pictures and features of a series."""
        chunks = list(series.chunks())
        for number, chunk in enumerate(chunks):
            if number % self.share.world == self.share.rank:
                self.tell(f"{what}: {number + 1} of {len(chunks)}")
                self._features(drawer, chunk)

    def pictures(self, drawer: Drawer, series: Series) -> Array:
        """uint8 [N, H, W, 3]."""
        return np.concatenate([self._pictures(drawer, chunk) for chunk in series.chunks()])

    def features(self, drawer: Drawer, series: Series) -> Array:
        """float64 [N, D], see `Eye`."""
        return np.concatenate([self._features(drawer, chunk) for chunk in series.chunks()])

    def captions(self, texts: Sequence[str]) -> Array:
        """Features of captions, float64 [N, D]."""
        key = {"captions": list(texts), "eye": self.eye.digest}
        return self.cache.get(key, lambda: {"features": self.eye.captions(texts)})["features"]

    def _pictures(self, drawer: Drawer, chunk: Series) -> Array:
        def compute() -> dict[str, Array]:
            return {"pictures": drawer.draw(chunk.prompts, chunk.first_seed)}

        return self.cache.get(picture_key(drawer, chunk), compute)["pictures"]

    def _features(self, drawer: Drawer, chunk: Series) -> Array:
        def compute() -> dict[str, Array]:
            return {"features": self.eye.pictures(self._pictures(drawer, chunk))}

        key = {"features_of": picture_key(drawer, chunk), "eye": self.eye.digest}
        return self.cache.get(key, compute)["features"]


def picture_key(drawer: Drawer, chunk: Series) -> dict[str, Any]:
    """What the pictures of a chunk depend on."""
    return {"drawer": dict(drawer.key), "prompts": list(chunk.prompts), "first_seed": chunk.first_seed}

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
from benchmarks.bench.scorers import Scorer
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
class Job:
    """A series that is drawn; whether the eye looks at it, and whether the rewards do."""

    drawer: Drawer
    series: Series
    looked_at: bool = True
    scored: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which of several processes this is. `wait`: until all are there."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = field(default=lambda: None)

    @classmethod
    def of_launch(cls) -> "Share":
        """As torchrun or `accelerate launch` started this process, through gloo; alone if it was not launched."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        if "LOCAL_RANK" in os.environ:
            os.environ["CUDA_VISIBLE_DEVICES"] = own_gpu(
                int(os.environ["LOCAL_RANK"]), os.environ.get("CUDA_VISIBLE_DEVICES")
            )  # onnxruntime takes the first GPU that it sees

        state = PartialState(cpu=True)
        return cls(rank=state.process_index, world=state.num_processes, wait=state.wait_for_everyone)


def own_gpu(rank: int, visible: str | None) -> str:
    """The GPU of a process, of those that are visible to all (None: every one)."""
    devices = visible.split(",") if visible else []
    return devices[rank % len(devices)] if devices else str(rank)


@dataclass(kw_only=True)
class Gallery:
    """Pictures by drawers, features by one eye and scores by rewards, through the cache. `tell` hears how far it is."""

    cache: FeatureCache
    eye: Eye
    scorers: Sequence[Scorer] = ()
    share: Share = field(default_factory=Share)
    tell: Callable[[str], None] = print

    def prepare(self, job: Job, what: str) -> None:
        """Do this process's share of a job, and give the drawer's model back."""
        chunks = list(job.series.chunks())
        for number, chunk in enumerate(chunks):
            if number % self.share.world == self.share.rank:
                self.tell(f"{what}: {number + 1} of {len(chunks)}")
                self._pictures(job.drawer, chunk)
                if job.looked_at:
                    self._features(job.drawer, chunk)
                for scorer in self.scorers if job.scored else ():
                    self._scores(job.drawer, chunk, scorer)
        job.drawer.close()

    def pictures(self, drawer: Drawer, series: Series) -> Array:
        """uint8 [N, H, W, 3]."""
        return np.concatenate([self._pictures(drawer, chunk) for chunk in series.chunks()])

    def features(self, drawer: Drawer, series: Series) -> Array:
        """float64 [N, D], see `Eye`."""
        return np.concatenate([self._features(drawer, chunk) for chunk in series.chunks()])

    def scores(self, drawer: Drawer, series: Series, scorer: Scorer) -> Array:
        """float64 [N], of each picture with its own prompt."""
        return np.concatenate([self._scores(drawer, chunk, scorer) for chunk in series.chunks()])

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

    def _scores(self, drawer: Drawer, chunk: Series, scorer: Scorer) -> Array:
        def compute() -> dict[str, Array]:
            return {"scores": scorer.score(self._pictures(drawer, chunk), chunk.prompts)}

        key = {"scores_of": picture_key(drawer, chunk), "reward": scorer.digest}
        return self.cache.get(key, compute)["scores"]


def picture_key(drawer: Drawer, chunk: Series) -> dict[str, Any]:
    """What the pictures of a chunk depend on."""
    return {"drawer": dict(drawer.key), "prompts": list(chunk.prompts), "first_seed": chunk.first_seed}

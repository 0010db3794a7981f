"""The built-in scenes as a source: drawn and encoded a chunk at a time, each once per seed, then read from disk.

Only combinations (concept, style, background) that every training may see are drawn (`held_out_mask`); the evaluation
has the others.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hypersd_export.errors import DataError
from hypersd_export.model.files import sha256_files
from trainer.base import PromptEncoder, TrainingBase, encode_pictures
from trainer.batch import Batch, Conditioning
from trainer.data.records import Skipped
from trainer.data.store import digest, load_tensors, save_tensors
from trainer.pretrain import concepts, scenes
from trainer.pretrain.canvases import Canvases, scene_canvases
from trainer.pretrain.drawings import ATLAS, read_drawings
from trainer.pretrain.scenes import SceneRenderer, SceneSpec, draw_specs, held_out_mask
from trainer.pretrain.unet import caption_index
from trainer.pretrain.vocabulary import all_captions
from trainer.rewards.structure import Instances

FORMAT = 1
CHUNK, CHUNKS = 256, 128
KEPT = 4
"""Chunks whose masks stay in memory."""


class BuiltinScenes:
    """Scene p of the stream is item p mod 256 of chunk p div 256; after 128 chunks it begins again.

    A chunk (scenes, pictures, latents) is a pure function of (seed, chunk number) and is made when it is first read,
    float32 throughout; so is the conditioning of the captions that it brings. Both are kept under `cache`, in
    `scenes-<digest>` and `captions-<digest>`. max_samples: the stream begins again after so many; 0 for all.
    """

    def __init__(
        self, base: TrainingBase, *, seed: int, cache: Path, size_px: int, device: str = "cpu", max_samples: int = 0
    ) -> None:
        self._base, self._seed, self._size_px, self._device = base, seed, size_px, device
        self._count = min(max_samples or CHUNK * CHUNKS, CHUNK * CHUNKS)
        self._shape = base.latent_shape(size_px)
        self._latents = torch.empty(CHUNKS, CHUNK, *self._shape)  # memory is only touched as chunks come
        self._captions = torch.zeros(CHUNKS, CHUNK, dtype=torch.int64)
        self._ready = [False] * CHUNKS
        drawn = {"drawings": ATLAS, "scenes": Path(scenes.__file__), "concepts": Path(concepts.__file__)}
        key = [FORMAT, base.encoders_digest, sha256_files(drawn.items()), seed, size_px, CHUNK]
        self._folder = cache / f"scenes-{digest(key)[:16]}"
        self._text = CaptionTable(base, all_captions(), cache, size_px=size_px, device=device)
        self._vae: Any = None
        self.skipped = Skipped()

    def __len__(self) -> int:
        return self._count

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of every sample."""
        return self._shape

    @property
    def empty(self) -> Conditioning:
        """The conditioning of the empty prompt: one row, float32."""
        return self._text.empty

    def specs(self, chunk: int) -> SceneSpec:
        """What the scenes of a chunk show."""
        return draw_specs(CHUNK, ~held_out_mask(), self._generator(chunk))

    def batch(self, positions: Sequence[int]) -> Batch:
        """The scenes at these positions, everything in float32."""
        places = torch.tensor([position % self._count for position in positions])
        chunk, item = places // CHUNK, places % CHUNK
        for number in sorted(set(chunk.tolist())):
            if not self._ready[number]:
                self._fill(number)
        index = self._captions[chunk, item]
        named = zip(chunk.tolist(), item.tolist(), strict=True)
        return Batch(
            latents=self._latents[chunk, item], conditioning=self._text.rows(index),
            captions=tuple(self._text.captions[i] for i in index.tolist()),
            names=tuple(f"scene {c}-{i}" for c, i in named),
        )  # fmt: skip

    def canvases(self, chunk: int) -> Canvases:
        """The very pictures of a chunk, drawn again, with the mask of each one's drawing."""
        generator = self._generator(chunk)
        spec = draw_specs(CHUNK, ~held_out_mask(), generator)
        return scene_canvases(renderer(self._size_px), spec, generator)

    def _fill(self, chunk: int) -> None:
        """Read a chunk, or make and keep it; and the conditioning that it needs."""
        path = self._folder / f"chunk-{chunk:03d}.safetensors"
        if not path.is_file():
            save_tensors(path, self._make(chunk))
        made = load_tensors(path, self._folder)
        self._latents[chunk], self._captions[chunk] = made["latents"], made["captions"]
        self._text.need(made["captions"])
        self._ready[chunk] = True

    def _generator(self, chunk: int) -> torch.Generator:
        state = np.random.SeedSequence([self._seed % 2**64, chunk]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    @torch.no_grad()
    def _make(self, chunk: int) -> dict[str, torch.Tensor]:
        if self._vae is None:
            self._vae = self._base.load_vae(torch.float32).to(torch.device(self._device))
        generator = self._generator(chunk)
        spec = draw_specs(CHUNK, ~held_out_mask(), generator)
        at_once = max(1, min(CHUNK, 2**20 // self._size_px**2))
        pictures = torch.split(renderer(self._size_px)(spec, generator), at_once)
        latents = [encode_pictures(self._vae, part).cpu() for part in pictures]
        return {"latents": torch.cat(latents), "captions": caption_index(spec)}


class BuiltinInstances:
    """Annotations of the built-in scenes: their own drawing, by its alpha. classes: the segmenter's numbers by name.

    DataError for a concept that the segmenter does not know, and a name that is no scene's.
    """

    def __init__(self, source: BuiltinScenes, classes: Mapping[str, int]) -> None:
        unknown = sorted(set(concepts.CONCEPTS) - set(classes))
        if unknown:
            raise DataError(
                f"feedback.structure: the segmenter has no class {unknown[0]!r} (of {len(unknown)} that the built-in "
                "scenes show); take model=builtin"
            )
        self._numbers = torch.tensor([classes[concept] for concept in concepts.CONCEPTS])
        self._chunk = lru_cache(maxsize=KEPT)(lambda chunk: source.canvases(chunk).truth)

    def __call__(self, names: Sequence[str]) -> list[Instances]:
        """The one instance of each scene: masks bool [1, size_px, size_px]."""
        return [self._of(name) for name in names]

    def _of(self, name: str) -> Instances:
        found = re.fullmatch(r"scene (\d+)-(\d+)", name)
        if not found:
            raise DataError(f"feedback.structure.annotations=builtin: {name!r} is no built-in scene")
        chunk, item = map(int, found.groups())
        known = self._chunk(chunk)[item]
        return Instances(known.masks, self._numbers[known.classes])


@lru_cache(maxsize=2)
def renderer(size_px: int) -> SceneRenderer:
    """The renderer of a size, made once a process: reading and scaling the drawings takes seconds."""
    return SceneRenderer(read_drawings(), size_px)


class CaptionTable:
    """The conditioning of a fixed list of captions, float32, encoded as rows are needed and kept on disk.

    Each `need` writes one file with the rows that it brought, and opening reads them all: so a run never waits for the
    whole table, and the next one has what the last one encoded.
    """

    def __init__(self, base: TrainingBase, captions: list[str], cache: Path, *, size_px: int, device: str) -> None:
        self.captions = captions
        self._base, self._size, self._device = base, (size_px, size_px), device
        key = [FORMAT, base.encoders_digest, base.zero_empty, captions, size_px]
        self._folder = cache / f"captions-{digest(key)[:16]}"
        self._encoder: PromptEncoder | None = None
        self._known = torch.zeros(len(captions), dtype=torch.bool)
        path = self._folder / "empty.safetensors"
        if not path.is_file():
            save_tensors(path, _tensors(self._encode_empty()))
        self.empty = Conditioning(**load_tensors(path, self._folder))
        self._table = {
            name: torch.empty(len(captions), *tensor.shape[1:])
            for name, tensor in _tensors(self.empty).items()
            if name != "time_ids"
        }
        for part in sorted(self._folder.glob("rows-*.safetensors")):
            self._put(load_tensors(part, self._folder))

    def rows(self, index: torch.Tensor) -> Conditioning:
        """The conditioning of these captions, which were needed before."""
        ids = self.empty.time_ids
        tensors = {name: table[index] for name, table in self._table.items()}
        return Conditioning(**tensors, time_ids=None if ids is None else ids.repeat(len(index), 1))

    def need(self, index: torch.Tensor) -> None:
        """Encode those of these captions that are not there yet, and write them to a file of their own."""
        missing = torch.unique(index[~self._known[index]])
        if not len(missing):
            return
        made = self._encoding()([self.captions[i] for i in missing.tolist()], size=self._size)
        tensors = {"index": missing, **{n: t for n, t in _tensors(made).items() if n != "time_ids"}}
        save_tensors(self._folder / f"rows-{digest(missing.tolist())[:16]}.safetensors", tensors)
        self._put(tensors)

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, table in self._table.items():
            table[tensors["index"]] = tensors[name]
        self._known[tensors["index"]] = True

    def _encoding(self) -> PromptEncoder:
        if self._encoder is None:
            self._encoder = self._base.prompt_encoder(torch.float32).to(self._device)
        return self._encoder

    def _encode_empty(self) -> Conditioning:
        return self._encoding().empty(size=self._size)


def _tensors(conditioning: Conditioning) -> dict[str, torch.Tensor]:
    named = {"states": conditioning.states, "pooled": conditioning.pooled, "time_ids": conditioning.time_ids}
    return {name: tensor.detach().float().cpu() for name, tensor in named.items() if tensor is not None}

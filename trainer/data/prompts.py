"""A list of prompts as a source, for methods that begin from noise: there are no pictures, and latents are zero."""

from collections.abc import Sequence
from pathlib import Path

import torch

from hypersd_export.errors import DataError
from trainer.base import TrainingBase
from trainer.batch import Batch, Conditioning
from trainer.data.builtin import CaptionTable
from trainer.data.cached import permutation
from trainer.data.records import Reason, Skipped

SUFFIX = ".txt"


def is_prompts(source: str) -> bool:
    """Whether a data source is a list of prompts."""
    return source.endswith(SUFFIX)


class Prompts:
    """A UTF-8 text file with a prompt a line. Position p is line permutation(epoch)[p mod n] of epoch p div n.

    Their conditioning is encoded as it is needed and kept under `cache`. max_samples: of the first lines, 0 for all.
    DataError for a file that cannot be read, or has no prompt.
    """

    def __init__(
        self, path: Path, base: TrainingBase, *, seed: int, cache: Path, size_px: int, device: str, max_samples: int = 0
    ) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); pass a prompt a line") from error
        self.skipped = Skipped()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                self.skipped.add(Reason.EMPTY_CAPTION, f"line {number}")
        captions = [line.strip() for line in lines if line.strip()][: max_samples or None]
        if not captions:
            raise DataError(f"{path}: has no prompts; pass a prompt a line")
        self._seed, self._shape = seed, base.latent_shape(size_px)
        self._text = CaptionTable(base, captions, cache, size_px=size_px, device=device)

    def __len__(self) -> int:
        return len(self._text.captions)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of what is drawn for them."""
        return self._shape

    @property
    def empty(self) -> Conditioning:
        """The conditioning of the empty prompt: one row, float32."""
        return self._text.empty

    def batch(self, positions: Sequence[int]) -> Batch:
        """The prompts at these positions, in float32; latents are zero."""
        index = torch.tensor([self._line(position) for position in positions])
        self._text.need(index)
        return Batch(
            latents=torch.zeros(len(index), *self._shape), conditioning=self._text.rows(index),
            captions=tuple(self._text.captions[i] for i in index.tolist()),
            names=tuple(f"prompt {i + 1}" for i in index.tolist()),
        )  # fmt: skip

    def _line(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        return int(permutation(len(self), self._seed, epoch)[place])

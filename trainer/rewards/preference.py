"""The built-in model's preference: a small convolutional network that learned which of two pictures is better drawn.

It knows no prompt, as LAION's aesthetic predictor does not; `trainer.pretrain.preference` trains it, from pairs that
needed no human.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from torch import nn

from hypersd_export.errors import ModelError
from hypersd_export.model.files import exists, read_header, read_tensors, user_path, write_tensors
from trainer.rewards.checkpoints import load_strictly
from trainer.rewards.clip import check_batch
from trainer.rewards.preprocess import identity

BUILTIN_PREFERENCE = Path(__file__).with_name("preference.safetensors")
KEY = "hypersd.preference"
"""Metadata: the network's size, and mean and deviation of its output over the preferred pictures, as JSON."""
GROUPS = 8


class PreferenceNet(nn.Module):
    """Pixels [B, 3, s, s] in [-1, 1] → [B]. Four levels, each of half the size and twice the width, and the mean."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        wide = [3, width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for level, (before, after) in enumerate(pairwise(wide)):
            layers += [nn.Conv2d(before, after, 3, stride=min(2, level + 1), padding=1), *_settled(after)]
            layers += [nn.Conv2d(after, after, 3, padding=1), *_settled(after)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(4 * width, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The raw score: only differences of two pictures mean anything."""
        score: torch.Tensor = self.head(self.body(pixels).mean((2, 3)))[:, 0]
        return score


def _settled(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(GROUPS, width), nn.SiLU()


class PreferenceReward:
    """A preference as a `Reward`, in float32 whatever autocast is on: 0 is the mean of the preferred pictures that it
    was trained on, 1 their deviation above it. ModelError for a file that is missing or something else."""

    def __init__(self, path: str | Path = BUILTIN_PREFERENCE, *, device: torch.device | str = "cpu") -> None:
        file = user_path(path)
        if not exists(file):
            raise ModelError(f"{file}: no such preference; make one with `hypersd-train preference --out DIR`")
        try:
            stated = json.loads(read_header(file).metadata[KEY])
            width, self.size_px = int(stated["width"]), int(stated["size_px"])
            self._mean, self._std = float(stated["mean"]), float(stated["std"])
        except (KeyError, ValueError, TypeError) as error:
            raise ModelError(f"{file}: not a preference ({KEY} is missing or damaged); pass another") from error
        self.name, self.preprocess = file.stem, identity(self.size_px)
        self._net = PreferenceNet(width)
        load_strictly(self._net, {n: t.float() for n, t in read_tensors(file).items()}, file, "a preference")
        self._net.eval().requires_grad_(False)
        self.to(device)

    def to(self, device: torch.device | str) -> Self:
        """Move the network; pictures must lie on the same device."""
        self._net.to(device)
        return self

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The score of each picture, whatever its prompt: float32 [B]."""
        check_batch(images, prompts)
        with torch.autocast(images.device.type, enabled=False):
            score: torch.Tensor = self._net(self.preprocess(images.float()))
            return (score - self._mean) / self._std


def save_preference(path: Path, net: PreferenceNet, *, width: int, size_px: int, preferred: torch.Tensor) -> None:
    """Write `net` in float16 with what `PreferenceReward` needs; `preferred`: its scores of the preferred pictures."""
    stated = {
        "width": width, "size_px": size_px, "mean": float(preferred.mean()), "std": float(preferred.std()),
    }  # fmt: skip
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in net.state_dict().items()}
    write_tensors(path, tensors, {"format": "pt", KEY: json.dumps(stated)})

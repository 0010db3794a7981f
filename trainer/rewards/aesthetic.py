"""LAION's aesthetic predictors on CLIP ViT-L/14: v1 a linear map, v2 (sac+logos+ava1-l14-linearMSE) five of them.

Both take unit picture features and know no prompt. v2's layers have nothing between them but dropout, so at inference
they are one linear map too, and are folded into one when they are read.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch

from hypersd_export.errors import ModelError
from trainer.rewards.checkpoints import read_weights
from trainer.rewards.clip import ClipTowers, check_batch

AESTHETIC_V2 = Path(__file__).with_name("aesthetic_v2.safetensors")
"""The v2 head as its authors trained it, all layers (Apache-2.0; ATTRIBUTION.md beside it)."""
LINEAR_LAYERS = (0, 2, 4, 6, 7)
"""Places of v2's layers. Its relative with ReLUs between (reluMSE) has others, and is no linear map."""


class AestheticReward:
    """An aesthetic predictor as a `Reward`, about 1 to 10. clip: a CLIP ViT-L/14 (OpenAI's) that may serve others too.

    head: v2's layers or v1's linear map, as safetensors, or with `allow_pickle` the authors' .pth. ModelError for
    another layout, and for a CLIP whose features have another width than the head.
    """

    def __init__(
        self, clip: ClipTowers, *, head: str | Path = AESTHETIC_V2, allow_pickle: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        path, tensors = read_weights(head, allow_pickle=allow_pickle)
        self.name, self._clip = path.stem, clip
        self._weight, self._bias = fold_linear(tensors, path)
        if self._weight.shape[1] != clip.width:
            raise ModelError(
                f"{path}: for features of {self._weight.shape[1]} values, and this CLIP's have {clip.width}; "
                "pass OpenAI's CLIP ViT-L/14"
            )
        self.to(device)

    def to(self, device: torch.device | str) -> Self:
        """Move head and CLIP; pictures must lie on the same device."""
        self._clip.to(device)
        self._weight, self._bias = self._weight.to(device), self._bias.to(device)
        return self

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The score of each picture, whatever its prompt: float32 [B]."""
        check_batch(images, prompts)
        with torch.autocast(images.device.type, enabled=False):
            return (self._clip.image_features(images) @ self._weight.T + self._bias)[:, 0]


def fold_linear(tensors: Mapping[str, torch.Tensor], path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [1, D], bias [1]) of a linear map, or of `layers.0` … `layers.7` one after the other; float32.

    ModelError if the layers are not these or do not lead from one to the next.
    """
    numbers = sorted({int(found[1]) for name in tensors if (found := re.fullmatch(r"layers\.(\d+)\.weight", name))})
    if numbers and tuple(numbers) != LINEAR_LAYERS:
        raise ModelError(
            f"{path}: layers {numbers}, where a head without activations has {list(LINEAR_LAYERS)}; "
            "pass sac+logos+ava1-l14-linearMSE or a linear head"
        )
    names = [f"layers.{number}." for number in numbers] or [""]
    weight, bias = None, torch.zeros(1)
    try:
        for name in names:
            w, b = tensors[f"{name}weight"].double(), tensors[f"{name}bias"].double()
            weight, bias = (w, b) if weight is None else (w @ weight, w @ bias + b)
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"{path}: no aesthetic or reward head ({str(error).splitlines()[0]}); pass another") from error
    if weight is None or weight.ndim != 2 or weight.shape[0] != 1 or bias.shape != (1,):
        raise ModelError(f"{path}: its head does not end in one score; pass another")
    return weight.float(), bias.float()

"""From pictures in [-1, 1] to the pixels that a reward's network takes: resize, crop or pad, normalise, on tensors.

One function for all rewards, differentiable throughout. transformers' image processors do the same with PIL on 8 bits,
which rounds after each pass and clips what bicubic overshoots: neither has a gradient, so neither is done here.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
import torch.nn.functional as F

from hypersd_export.errors import ModelError

PREPROCESSOR = "preprocessor_config.json"


class Fit(StrEnum):
    """How a picture becomes a square: its shorter side to the size and the centre of it (CLIP, BLIP), or its longer
    side to the size and black around it (HPSv2)."""

    CROP = "crop"
    PAD = "pad"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """A square of `size_px`, bicubic with antialiasing; mean and std are of pixels in [0, 1], as in CLIP's configs."""

    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit = Fit.CROP

    @classmethod
    def of(cls, folder: Path) -> "Preprocess":
        """What a transformers folder's preprocessor_config.json says; `ModelError` where there is none."""
        file = folder / PREPROCESSOR
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            size = config.get("crop_size", config["size"])
            edge = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
            mean, std = (tuple(float(value) for value in config[key]) for key in ("image_mean", "image_std"))
            red, green, blue = mean
            deviations = std[0], std[1], std[2]
            return cls(size_px=int(edge), mean=(red, green, blue), std=deviations)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = "is missing" if not file.exists() else f"cannot be read ({type(error).__name__}: {error})"
            raise ModelError(f"{file} {reason}; pass preprocess=Preprocess(size_px=…, mean=…, std=…)") from None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, H, W] in [-1, 1] → float32 [B, 3, size_px, size_px], normalised."""
        square = _cropped(images, self.size_px) if self.fit is Fit.CROP else _padded(images, self.size_px)
        return normalise(square, self.mean, self.std)


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(pixels − mean) / std of pictures [B, 3, H, W] in [-1, 1], where mean and std are of pixels in [0, 1]."""
    centre, spread = (images.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return images * (0.5 / spread) + (0.5 - centre) / spread


def identity(size_px: int) -> Preprocess:
    """For networks that were trained on pictures in [-1, 1]: nothing but the size changes."""
    return Preprocess(size_px=size_px, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _cropped(images: torch.Tensor, size_px: int) -> torch.Tensor:
    height, width = images.shape[2:]
    short = min(height, width)
    images = _resized(images, int(size_px * height / short), int(size_px * width / short))
    top, left = ((edge - size_px) // 2 for edge in images.shape[2:])
    return images[:, :, top : top + size_px, left : left + size_px]


def _padded(images: torch.Tensor, size_px: int) -> torch.Tensor:
    """As HPSv2's ResizeMaxSize; a picture whose longer side has the size already is padded too, where that one is left
    as it is and then does not fit the network."""
    height, width = images.shape[2:]
    scale = size_px / max(height, width)
    images = _resized(images, round(height * scale), round(width * scale))
    below, right = size_px - images.shape[2], size_px - images.shape[3]
    return F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2), value=-1.0)


def _resized(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if images.shape[2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI CLIP's, which OpenCLIP, BLIP and what was made from them use too."""
CLIP_PREPROCESS = Preprocess(size_px=224, mean=CLIP_MEAN, std=CLIP_STD)
BUILTIN_PREPROCESS = identity(32)
"""The built-in CLIP's."""

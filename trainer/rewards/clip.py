"""CLIP score as a reward: 100 · cos(picture, prompt), differentiable in the picture (arXiv 2104.08718, eq. 1, w = 1).

Deviation: the score is not cut off at 0, because a picture below it would get no gradient.
The built-in CLIP is the one whose text tower the built-in model reads with; `benchmarks.judge` is another model.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hypersd_export.errors import HypersdError, ModelError, OptionError
from hypersd_export.model.base import BUILTIN, open_base
from trainer.pretrain.clip import BUILTIN_CLIP

PREPROCESSOR = "preprocessor_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """From pictures in [-1, 1] to a CLIP's `pixel_values`; mean and std are of pixels in [0, 1], as in CLIP's configs.

    transformers' CLIPImageProcessor (bicubic to the shortest side, centre crop, normalise), without its rounding to
    8 bits and without its clipping of what bicubic overshoots: neither has a gradient.
    """

    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

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
        height, width = images.shape[2:]
        short = min(height, width)
        if short != self.size_px:
            edges = [int(self.size_px * edge / short) for edge in (height, width)]
            images = F.interpolate(images, edges, mode="bicubic", antialias=True, align_corners=False)
        top, left = ((edge - self.size_px) // 2 for edge in images.shape[2:])
        images = images[:, :, top : top + self.size_px, left : left + self.size_px]
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return images * (0.5 / std) + (0.5 - mean) / std


BUILTIN_PREPROCESS = Preprocess(size_px=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""The built-in CLIP was trained on pictures in [-1, 1] as they are."""


class ClipReward:
    """A frozen CLIP as a `Reward`, in float32 whatever autocast is on.

    folder: a transformers CLIPModel folder, the built-in CLIP by default. preprocess and tokenizer: the folder's own
    by default (the built-in CLIP shares the built-in model's). Raises `ModelError` where one of them is missing.
    """

    def __init__(
        self, folder: str | Path = BUILTIN_CLIP, *, preprocess: Preprocess | None = None,
        tokenizer: str | Path | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        folder = Path(folder)
        builtin = folder == BUILTIN_CLIP
        self.name = "builtin" if builtin else folder.name
        self.preprocess = preprocess or (BUILTIN_PREPROCESS if builtin else Preprocess.of(folder))
        self._model, self._tokenizer = _load(folder, Path(tokenizer) if tokenizer else _tokenizer_folder(folder))
        self.to(device)

    def to(self, device: torch.device | str) -> "ClipReward":
        """Move the model; pictures must lie on the same device."""
        self._model.to(device)
        return self

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """100 · cosine of each picture with its prompt: float32 [B]."""
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise OptionError(
                f"pictures {list(images.shape)} with {len(prompts)} prompts: CLIP takes [B, 3, H, W] and B prompts"
            )
        with torch.autocast(images.device.type, enabled=False):
            return 100 * (self.image_features(images) * self.text_features(prompts)).sum(1)

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Unit features of pictures, float32 [B, D], with gradient to them."""
        pixels = self.preprocess(images.float())
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self._model.visual_projection(pooled), dim=1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit features of prompts, float32 [B, D]; what the text tower cannot hold is cut off, as CLIP score does."""
        device = self._model.visual_projection.weight.device
        # attention is causal and the summary stands at the first end token, so padding has no effect
        ids = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").input_ids
        pooled = self._model.text_model(input_ids=ids.to(device)).pooler_output
        return F.normalize(self._model.text_projection(pooled), dim=1)


def _tokenizer_folder(folder: Path) -> Path:
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return folder
    own = open_base(BUILTIN).tokenizer_folder if folder == BUILTIN_CLIP else None
    if own is None:
        raise ModelError(f"{folder}: has no tokenizer ({' or '.join(TOKENIZER_FILES)}); pass tokenizer=FOLDER")
    return own


def _load(folder: Path, tokenizer_folder: Path) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPTokenizer

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json, so not a CLIP; pass a transformers CLIPModel folder")
    try:
        model, report = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    except HypersdError:
        raise
    except Exception as error:  # transformers raises whatever a damaged file brings about
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ModelError(f"{folder}: cannot be loaded as a CLIP ({reason}); pass a CLIPModel folder") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{folder}: {len(missing)} weights are missing ({', '.join(missing[:3])}); it is not a CLIP")
    positions = int(model.config.text_config.max_position_embeddings)
    tokenizer.model_max_length = min(int(tokenizer.model_max_length), positions)
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise ModelError(
            f"{tokenizer_folder}: {len(tokenizer)} tokens where the text tower of {folder} has "
            f"{model.config.text_config.vocab_size}; pass this CLIP's own tokenizer"
        )
    return model.float().eval().requires_grad_(False), tokenizer

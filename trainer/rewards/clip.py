"""CLIP score as a reward: 100 · cos(picture, prompt), differentiable in the picture (arXiv 2104.08718, eq. 1, w = 1).

Deviation: the score is not cut off at 0, because a picture below it would get no gradient.
The built-in CLIP is the one whose text tower the built-in model reads with; `benchmarks.judge` is another model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F

from hypersd_export.errors import ModelError, OptionError
from hypersd_export.model.base import BUILTIN, open_base
from trainer.base import one_line
from trainer.pretrain.clip import BUILTIN_CLIP
from trainer.rewards.preprocess import BUILTIN_PREPROCESS, Preprocess

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


class ClipTowers:
    """Two frozen CLIP towers as a `Reward`, in float32 whatever autocast is on: scale · cos(picture, prompt).

    model: a transformers CLIPModel; scale: None takes the model's own exp(logit_scale).
    """

    def __init__(
        self, model: Any, tokenizer: Any, preprocess: Preprocess, *, scale: float | None, device: torch.device | str
    ) -> None:  # fmt: skip
        self.preprocess, self._tokenizer = preprocess, tokenizer
        self._model = model.float().eval().requires_grad_(False).to(device)
        self.scale = float(model.logit_scale.exp()) if scale is None else scale

    def to(self, device: torch.device | str) -> Self:
        """Move the model; pictures must lie on the same device."""
        self._model.to(device)
        return self

    @property
    def width(self) -> int:
        """How long a feature is."""
        return int(self._model.config.projection_dim)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """scale · cosine of each picture with its prompt: float32 [B]."""
        check_batch(images, prompts)
        with torch.autocast(images.device.type, enabled=False):
            return self.scale * (self.image_features(images) * self.text_features(prompts)).sum(1)

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


class ClipReward(ClipTowers):
    """CLIP score, scale 100; with `scale=None` PickScore (arXiv 2305.01569), whose checkpoint is a CLIPModel folder.

    folder: a transformers CLIPModel folder, the built-in CLIP by default. preprocess and tokenizer: the folder's own
    by default (the built-in CLIP shares the built-in model's). Raises `ModelError` where one of them is missing.
    """

    def __init__(
        self, folder: str | Path = BUILTIN_CLIP, *, preprocess: Preprocess | None = None,
        tokenizer: str | Path | None = None, scale: float | None = 100.0, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        folder = Path(folder)
        builtin = folder == BUILTIN_CLIP
        self.name = "builtin" if builtin else folder.name
        preprocess = preprocess or (BUILTIN_PREPROCESS if builtin else Preprocess.of(folder))
        model, words = _load(folder, Path(tokenizer) if tokenizer else _tokenizer_folder(folder))
        super().__init__(model, words, preprocess, scale=scale, device=device)


def check_batch(images: torch.Tensor, prompts: Sequence[str]) -> None:
    """OptionError unless these are pictures [B, 3, H, W] and B prompts."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise OptionError(
            f"pictures {list(images.shape)} with {len(prompts)} prompts: a reward takes [B, 3, H, W] and B prompts"
        )


def _tokenizer_folder(folder: Path) -> Path:
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return folder
    own = open_base(BUILTIN).tokenizer_folder if folder == BUILTIN_CLIP else None
    if own is None:
        raise ModelError(f"{folder}: has no tokenizer ({' or '.join(TOKENIZER_FILES)}); pass tokenizer=FOLDER")
    return own


def _load(folder: Path, tokenizer_folder: Path) -> tuple[Any, Any]:
    from transformers import CLIPModel

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json, so not a CLIP; pass a transformers CLIPModel folder")
    try:
        model, report = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers raises whatever a damaged file brings about
        raise ModelError(
            f"{folder}: cannot be loaded as a CLIP ({one_line(error)}); pass a CLIPModel folder"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{folder}: {len(missing)} weights are missing ({', '.join(missing[:3])}); it is not a CLIP")
    return model, clip_tokenizer(tokenizer_folder, model.config.text_config, folder)


def clip_tokenizer(folder: Path, text_config: Any, model: Path) -> Any:
    """A CLIPTokenizer that cuts off at the text tower's length; ModelError if it is none, or another tower's."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder}: no CLIP tokenizer ({one_line(error)}); pass tokenizer=FOLDER") from error
    positions = int(text_config.max_position_embeddings)
    tokenizer.model_max_length = min(int(tokenizer.model_max_length), positions)
    if len(tokenizer) > text_config.vocab_size:
        raise ModelError(
            f"{folder}: {len(tokenizer)} tokens where the text tower of {model} has "
            f"{text_config.vocab_size}; pass this CLIP's own tokenizer"
        )
    return tokenizer

"""What looks at pictures: a CLIP by a named protocol. Figures of two of them, or of two prefixes, do not compare.

builtin     the judge of the built-in model (benchmarks.judge), 32 px
vit-b-32    openai/clip-vit-base-patch32, as Hyper-SD's table has it
vit-l-14    openai/clip-vit-large-patch14
or          the folder of any transformers CLIPModel, or its hub id
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from benchmarks.judge import WEIGHTS, Judge
from benchmarks.metrics import unit
from hypersd_export.bundle.digest import digest_json, digest_tree
from hypersd_export.errors import OptionError
from trainer.rewards.clip import ClipReward
from trainer.rewards.preprocess import Preprocess, normalise

Features = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
BUILTIN_EYE = "builtin"
HUB_IDS = {"vit-b-32": "openai/clip-vit-base-patch32", "vit-l-14": "openai/clip-vit-large-patch14"}
AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Eye:
    """Features of pictures and of captions, float64 [N, D], every row of length √D.

    protocol: model, size, crop and prefix, for the report. digest: of all that a feature depends on.
    pictures: uint8 [N, H, W, 3] → features. captions: texts, without the prefix, → features.
    """

    protocol: Mapping[str, Any]
    digest: str
    pictures: Callable[[Pixels], Features]
    captions: Callable[[Sequence[str]], Features]


def open_eye(name: str, *, prefix: str = "") -> Eye:
    """By the name of a protocol, a folder or a hub id; `ModelError` or `OptionError` in one line for another thing."""
    return _builtin(prefix) if name == BUILTIN_EYE else _clip(name, prefix)


def _builtin(prefix: str) -> Eye:
    from benchmarks.distilled import judge_digest

    if prefix:
        raise OptionError(f"--clip-prefix {prefix!r}: the built-in judge knows captions of its own kind alone")
    digest, judge = judge_digest(WEIGHTS), Judge(WEIGHTS)
    side = int(judge.model.config.vision_config.image_size)

    def pictures(pixels: Pixels) -> Features:
        if pixels.shape[1:3] != (side, side):
            raise OptionError(
                f"--clip builtin: the judge sees {side} x {side} px, and these pictures have {pixels.shape[2]} x "
                f"{pixels.shape[1]}; give --clip vit-b-32, or the folder of a CLIP"
            )
        return judge.pictures(to_signed(pixels))

    protocol = {"name": BUILTIN_EYE, "model": "benchmarks/judge_weights", "size_px": side, "crop": "none", "prefix": ""}
    return Eye(protocol=protocol, digest=digest, pictures=pictures, captions=lambda texts: judge.captions(list(texts)))


def _clip(name: str, prefix: str) -> Eye:
    folder = _folder(HUB_IDS.get(name, name))
    preprocess = EightBit.of(folder)
    towers = ClipReward(folder, preprocess=preprocess)

    def features(parts: Sequence[torch.Tensor]) -> Features:
        found: Features = unit(torch.cat(list(parts)).double().numpy()) * np.sqrt(towers.width)
        return found

    @torch.no_grad()
    def pictures(pixels: Pixels) -> Features:
        return features([towers.image_features(part) for part in torch.split(to_signed(pixels), AT_ONCE)])

    def captions(texts: Sequence[str]) -> Features:
        parts = [texts[i : i + AT_ONCE] for i in range(0, len(texts), AT_ONCE)]
        return features([towers.text_features([prefix + text for text in part]) for part in parts])

    weights = digest_json([digest_tree(folder, "*.json"), digest_tree(folder, "*.safetensors")])
    protocol = {
        "name": name if name in HUB_IDS else folder.name, "model": HUB_IDS.get(name, folder.name),
        "size_px": preprocess.size_px, "crop": "shorter side to the size, bicubic; centre", "prefix": prefix,
    }  # fmt: skip
    return Eye(
        protocol=protocol, digest=digest_json([weights, "8 bit", prefix]), pictures=pictures, captions=captions
    )  # fmt: skip


def _folder(name: str) -> Path:
    """A local folder, or the hub's copy of an id."""
    from hypersd_export.model import hub

    if not Path(name).exists() and hub.looks_like_hub_id(name):
        return hub.fetch_component(
            name, None, "text_encoder", variant=None, allow_pickle=False, subfolder=False
        )  # fmt: skip
    return Path(name)


def to_signed(pixels: Pixels) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 127.5 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EightBit(Preprocess):
    """CLIP's published preprocessing to the bit: PIL resizes 8-bit pictures, as OpenAI's code, transformers'
    CLIPImageProcessor and with it torchmetrics do. The rewards' own (`Preprocess`) has a gradient instead."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, H, W] in [-1, 1] → float32 [B, 3, size_px, size_px], normalised."""
        pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        square = torch.from_numpy(np.stack([self._square(Image.fromarray(picture)) for picture in pixels]))
        return normalise(square.permute(0, 3, 1, 2).float() / 127.5 - 1, self.mean, self.std)

    def _square(self, picture: Image.Image) -> Pixels:
        short = min(picture.size)
        width, height = (int(self.size_px * edge / short) for edge in picture.size)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size_px) // 2, (height - self.size_px) // 2
        return np.asarray(resized.crop((left, top, left + self.size_px, top + self.size_px)))

"""What a UNet is told beside latents and timestep: the states of texts, and with SDXL the size of the picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.bundle.texts import Encoder
from hypersd_export.errors import OptionError
from hypersd_export.runtime.graph import Run

Float = npt.NDArray[np.float32]
Ids = tuple[npt.NDArray[np.int64], ...]
"""The token ids of one text, int64 [1, S], for each text encoder."""
Text = Mapping[str, Float]
"""One text as the UNet sees it, by its inputs' names, each of one row: `encoder_hidden_states` [1, S, C], and with SDXL
`text_embeds` [1, P] and `time_ids` [1, 6]."""
TIME_IDS = "time_ids"


@dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """Texts for the UNet and the weight of u + weight (c - u); `uncond` None: no branch."""

    cond: Text
    uncond: Text | None
    weight: float

    def rows(self, each: int) -> dict[str, Float]:
        """The inputs of one call: `each` rows a branch, the unconditional ones first."""
        return rows([text for text in (self.uncond, self.cond) if text is not None], each)

    def denoise(self, network: Run, x: Float, timestep: npt.NDArray[Any]) -> Float:
        """The network's output for latents [N, C, h, w], both branches in one call, whose texts it was given before."""
        both = x if self.uncond is None else np.concatenate([x, x])
        out = network(sample=both, timestep=timestep)["out_sample"].astype(np.float32)
        if self.uncond is None:
            return out
        uncond, cond = np.split(out, 2)
        if self.weight == 1.0:
            return cond
        mixed: Float = uncond + np.float32(self.weight) * (cond - uncond)
        return mixed


def rows(texts: Sequence[Text], each: int) -> dict[str, Float]:
    """The inputs of one call: `each` rows of every text, one text after another."""
    return {name: np.repeat(np.concatenate([text[name] for text in texts]), each, axis=0) for name in texts[0]}


def text_of(encoders: Sequence[Encoder], outputs: Sequence[Mapping[str, Float]]) -> Text:
    """Texts, a row each, of what each encoder gave for them: states side by side, and the pooled state if any."""
    pairs = list(zip(encoders, outputs, strict=True))
    states = np.concatenate([given[encoder.states] for encoder, given in pairs], axis=-1)
    pooled = [given[encoder.pooled] for encoder, given in pairs if encoder.pooled is not None]
    text = {"encoder_hidden_states": states}
    return {**text, "text_embeds": pooled[0]} if pooled else text


def apart(texts: Text) -> list[Text]:
    """Each row as a text of its own."""
    count = len(texts["encoder_hidden_states"])
    return [{name: value[n : n + 1] for name, value in texts.items()} for n in range(count)]


def zeros(text: Text) -> Text:
    """What SDXL has for an empty prompt (`force_zeros_for_empty_prompt`): no states at all."""
    return {name: np.zeros_like(value) for name, value in text.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeHints:
    """What SDXL was told of its pictures in training; None is the size of the picture that is drawn.

    original: (width, height) in pixels before it was resized: small ones were blurred. crop: (left, top) of the part
    that was seen: anything but (0, 0) cuts objects off. target: (width, height) of the training picture.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, pair in (("original size", self.original), ("target size", self.target)):
            if pair is not None and min(pair) < 1:
                raise OptionError(f"{name} {pair[0]}x{pair[1]}: each side must be at least 1 pixel")
        if min(self.crop) < 0:
            raise OptionError(f"crop {self.crop[0]},{self.crop[1]}: left and top must be at least 0")

    def time_ids(self, size: tuple[int, int]) -> Float:
        """float32 [1, 6]: original height and width, crop top and left, target height and width (diffusers'
        `_get_add_time_ids`); `size` (width, height) is the picture's."""
        original, target = self.original or size, self.target or size
        return np.array([[*original[::-1], *self.crop[::-1], *target[::-1]]], dtype=np.float32)

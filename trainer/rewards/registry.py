"""Rewards by name: what a configuration says of one, and how it is opened."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

from hypersd_export.errors import OptionError
from trainer.rewards import Reward

if TYPE_CHECKING:
    import torch

    from trainer.rewards.clip import ClipReward


class Kind(StrEnum):
    """clip: CLIP score; aesthetic: LAION's, v1 or v2 by its head; image_reward, pick_score, hps (v2 or v2.1 by its
    file): learned from human choices; preference: the built-in model's, learned from pairs that needed no human."""

    CLIP = "clip"
    AESTHETIC = "aesthetic"
    IMAGE_REWARD = "image_reward"
    PICK_SCORE = "pick_score"
    HPS = "hps"
    PREFERENCE = "preference"


PLACES = {
    Kind.AESTHETIC: "a CLIP ViT-L/14 folder (openai/clip-vit-large-patch14)",
    Kind.IMAGE_REWARD: "ImageReward's checkpoint",
    Kind.PICK_SCORE: "PickScore's folder (yuvalkirstain/PickScore_v1)",
    Kind.HPS: "HPSv2's or HPSv2.1's checkpoint",
}
"""What `model` has to name, where there is no default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """One term of the feedback: weight · ReLU(target − reward).

    model: a CLIP's or PickScore's folder, a checkpoint of ImageReward, HPS or a preference; empty for the built-in ones
    (clip, preference). head: of `aesthetic`, the shipped v2 if empty. tokenizer: a folder, where the model has none.
    allow_pickle: for the authors' .pth and .pt, which are then read as plain weights.
    """

    kind: Kind
    weight: float = 1.0
    target: float = 0.0
    model: str = ""
    head: str = ""
    tokenizer: str = ""
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise OptionError(f"reward {self.kind}: weight {self.weight} must be above 0; or leave the reward out")


def check_rewards(configs: Sequence[RewardConfig]) -> None:
    """OptionError for a path that a reward needs and that is not set; nothing is opened."""
    for config in configs:
        if config.kind in PLACES and not config.model:
            what = PLACES[config.kind]
            raise OptionError(f"reward {config.kind}: its model is missing: set it to the path of {what}")
        if config.kind in (Kind.HPS, Kind.IMAGE_REWARD) and not config.tokenizer:
            raise OptionError(f"reward {config.kind}: set its tokenizer to a folder, as the checkpoint has none")


def open_rewards(configs: Sequence[RewardConfig], device: "torch.device | str" = "cpu") -> list[Reward]:
    """The rewards in order; a CLIP that several look with is loaded once.

    OptionError for a path that is missing, ModelError for one that is something else.
    """
    check_rewards(configs)
    from trainer.pretrain.clip import BUILTIN_CLIP
    from trainer.rewards.clip import ClipReward

    @cache
    def clip(folder: str, tokenizer: str) -> ClipReward:
        return ClipReward(folder or BUILTIN_CLIP, tokenizer=tokenizer or None, device=device)

    return [_open(config, clip, device) for config in configs]


def _open(config: RewardConfig, clip: "Callable[[str, str], ClipReward]", device: "torch.device | str") -> Reward:
    """One reward; `clip` opens a CLIP by folder and tokenizer."""
    if config.kind is Kind.CLIP:
        return clip(config.model, config.tokenizer)
    if config.kind is Kind.AESTHETIC:
        from trainer.rewards.aesthetic import AESTHETIC_V2, AestheticReward

        looked = clip(config.model, config.tokenizer)
        head = config.head or AESTHETIC_V2
        return AestheticReward(looked, head=head, allow_pickle=config.allow_pickle, device=device)
    if config.kind is Kind.PICK_SCORE:
        from trainer.rewards.clip import ClipReward

        return ClipReward(config.model, tokenizer=config.tokenizer or None, scale=None, device=device)
    if config.kind is Kind.PREFERENCE:
        from trainer.rewards.preference import BUILTIN_PREFERENCE, PreferenceReward

        return PreferenceReward(config.model or BUILTIN_PREFERENCE, device=device)
    if config.kind is Kind.HPS:
        from trainer.rewards.hps import HpsReward

        return HpsReward(config.model, tokenizer=config.tokenizer, allow_pickle=config.allow_pickle, device=device)
    from trainer.rewards.image_reward import ImageReward

    return ImageReward(config.model, tokenizer=config.tokenizer, allow_pickle=config.allow_pickle, device=device)

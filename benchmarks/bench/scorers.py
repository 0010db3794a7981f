"""Reward models as figures: the scores that `hypersd-train feedback` climbs, read as means over pictures.

    --reward KIND[=MODEL[,TOKENIZER[,pickle]]]    pick_score=FOLDER, hps=HPS_v2.1.safetensors,FOLDER, aesthetic=FOLDER

KIND is one of `trainer.rewards.registry.Kind`; clip and preference have the built-in models' by default. A reward that
a student was trained with says nothing about that student.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.bench.eyes import AT_ONCE, Pixels, to_signed
from hypersd_export.bundle.digest import digest_tree, sha256_file
from hypersd_export.errors import OptionError
from trainer.rewards.registry import Kind, RewardConfig, open_rewards

PICKLE = "pickle"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """Pictures uint8 [N, H, W, 3] and their N prompts → scores float64 [N]. metric: its key in the report. digest: of
    all that a score depends on."""

    metric: str
    digest: str
    score: Callable[[Pixels, Sequence[str]], npt.NDArray[np.float64]]


def open_scorers(texts: Sequence[str]) -> list[Scorer]:
    """The rewards of `--reward`; `OptionError` or `ModelError` in one line for what is none."""
    configs = [parse(text) for text in texts]
    kinds = [config.kind for config in configs]
    if len(set(kinds)) != len(kinds):
        raise OptionError(f"--reward {' --reward '.join(texts)}: each kind once")
    return [
        Scorer(metric=metric_of(config.kind), digest=_digest(config), score=_scoring(reward))
        for config, reward in zip(configs, open_rewards(configs), strict=True)
    ]


def parse(text: str) -> RewardConfig:
    """KIND[=MODEL[,TOKENIZER[,pickle]]]; the last allows a checkpoint that is a pickle, as ImageReward's is."""
    kind, _, rest = text.partition("=")
    model, tokenizer, pickle, *_ = (*rest.split(","), "", "")
    if kind not in list(Kind):
        raise OptionError(f"--reward {text}: choose from {', '.join(Kind)}, with =MODEL behind it")
    if rest.count(",") > 2 or pickle not in ("", PICKLE):
        raise OptionError(f"--reward {text}: write KIND=MODEL,TOKENIZER, and ,{PICKLE} for a pickle that you trust")
    return RewardConfig(kind=Kind(kind), model=model, tokenizer=tokenizer, allow_pickle=pickle == PICKLE)


def metric_of(kind: Kind) -> str:
    """The key of a kind's figure."""
    return f"reward_{kind}"


def _scoring(reward: Any) -> Callable[[Pixels, Sequence[str]], npt.NDArray[np.float64]]:
    @torch.no_grad()
    def score(pixels: Pixels, prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        starts = range(0, len(prompts), AT_ONCE)
        parts = [reward(to_signed(pixels[i : i + AT_ONCE]), prompts[i : i + AT_ONCE]) for i in starts]
        found: npt.NDArray[np.float64] = torch.cat(parts).double().numpy()
        return found

    return score


def _digest(config: RewardConfig) -> str:
    from trainer.pretrain.clip import BUILTIN_CLIP
    from trainer.rewards.preference import BUILTIN_PREFERENCE

    default = {Kind.CLIP: BUILTIN_CLIP, Kind.PREFERENCE: BUILTIN_PREFERENCE}.get(config.kind)
    path = Path(config.model) if config.model else default
    assert path is not None  # `open_rewards` has refused a kind without a model
    weights = sha256_file(path) if path.is_file() else digest_tree(path)
    return f"{config.kind}:{weights}:{config.tokenizer}"

"""What an ablation asks beside the tables' usual figures: the rewards that were trained on, how a picture looks that
exploits them, precision and recall, and whether the aims are met. NumPy, and torch for the pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.bench.scorers import Scorer
from benchmarks.distilled_tables import Cell, Row
from benchmarks.metrics import covered
from benchmarks.stats import ROUNDS, Estimate, estimate
from trainer.distill.guard import saturation, texture
from trainer.pretrain.vae import to_uint8

Array = np.ndarray
TRAINED_ON = ("clip", "preference")
"""The rewards of the built-in recipe; the judge is none of them."""
NEIGHBOURS = 3
CLIP_MARGIN, FD_RATIO, DIVERSITY = -0.02, 0.5, (0.95, 1.10)
"""The aims at one step: the CLIP score's difference as a share of the teacher's, FD-T over a rival's, diversity over
the teacher's."""
LOUD = 0.10
"""Saturation or texture further above the teacher's than this share is a sign of exploited rewards (ours)."""


def looks(pictures: torch.Tensor, captions: Sequence[str], scorers: Sequence[Scorer]) -> dict[str, Array]:
    """By figure, one value per picture of [N, 3, H, W] in [-1, 1]: every reward, saturation and texture."""
    pixels = to_uint8(pictures).permute(0, 2, 3, 1).numpy()
    single = [picture[None] for picture in pictures]
    return {
        **{scorer.metric: scorer.score(pixels, captions) for scorer in scorers},
        "saturation": np.array([saturation(picture) for picture in single]),
        "texture": np.array([texture(picture) for picture in single]),
    }


def further(
    looked: Mapping[str, Array], features: Array, reference: Array, *, rounds: int = ROUNDS
) -> dict[str, Estimate]:
    """Means of `looks`, and k-NN precision and recall of the judge's features [N, D] against the teacher's, whose
    intervals are over the points that are asked for, with the manifolds as they are."""
    k = min(NEIGHBOURS, len(features) - 1)
    columns = {
        **looked,
        "precision": covered(features, reference, k).astype(np.float64),
        "recall": covered(reference, features, k).astype(np.float64),
    }
    return {name: _mean(values, rounds) for name, values in columns.items()}


def _mean(values: Array, rounds: int) -> Estimate:
    return estimate(lambda rows: float(values[rows].mean()), len(values), rounds=rounds)


def over(a: Estimate, b: Estimate) -> Estimate:
    """a / b, round by round."""
    return Estimate(a.value / b.value, a.replicates / b.replicates)


def aims(rows: Sequence[Row], teacher: Cell, rivals: Sequence[str]) -> list[dict[str, Any]]:
    """For every trained row with one step: the figures that the aims are about, with intervals, and which are met.

    rivals: labels of the rows whose FD-T is halved.
    """
    steps = 1
    theirs = {row.label: row.cells[steps] for row in rows if row.label in rivals and steps in row.cells}
    found = []
    for row in rows:
        if not row.trained or steps not in row.cells:
            continue
        cell = row.cells[steps]
        clip = over(cell.mean("clip_score") - teacher.mean("clip_score"), teacher.mean("clip_score"))
        spread = over(cell.mean("diversity"), teacher.mean("diversity"))
        fd = {label: over(cell.mean("fd_t"), other.mean("fd_t")) for label, other in theirs.items()}
        met = {
            "clip_score": clip.interval[0] >= CLIP_MARGIN,
            "fd_t": bool(fd) and all(each.value <= FD_RATIO for each in fd.values()),
            "diversity": DIVERSITY[0] <= spread.value <= DIVERSITY[1],
        }
        found.append(
            {
                "label": row.label, "clip_score": clip.to_json(), "diversity": spread.to_json(), "met": met,
                "fd_t": {label: each.to_json() for label, each in fd.items()},
            }
        )  # fmt: skip
    return found


def signs(rows: Sequence[Row], teacher: Cell, base: str) -> list[dict[str, Any]]:
    """Signs of exploited rewards, for every trained row and step count that the row `base` has too.

    Of each reward and the judge the paired change to `base`; saturation and texture over the teacher's. A sign is a
    reward that rises while the judge falls, both outside their intervals, or a look that is louder than `LOUD`. None
    without such a row.
    """
    below = next((row for row in rows if row.label == base), None)
    if below is None:
        return []
    rewards = [name for name in next(iter(below.cells.values())).figures[0] if name.startswith("reward_")]
    found = []
    for row in rows:
        for steps in sorted(set(row.cells) & set(below.cells)) if row.trained and row is not below else ():
            cell, before = row.cells[steps], below.cells[steps]
            change = {name: cell.mean(name) - before.mean(name) for name in ("clip_score", *rewards)}
            louder = {name: over(cell.mean(name), teacher.mean(name)) for name in ("saturation", "texture")}
            judged = change["clip_score"]
            fooled = [n for n in rewards if change[n].interval[0] > 0 > judged.interval[1]]
            loud = [name for name, each in louder.items() if each.interval[0] > 1 + LOUD]
            changes = {name: each.to_json() for name, each in (*change.items(), *louder.items())}
            found.append({"label": row.label, "steps": steps, **changes, "signs": [*fooled, *loud]})
    return found


def markdown(aims: Sequence[Mapping[str, Any]], signs: Sequence[Mapping[str, Any]], base: str) -> str:
    """Both lists as tables."""
    rivals = list(dict.fromkeys(label for entry in aims for label in entry["fd_t"]))
    heads = [f"FD-T over {label}'s, at most {FD_RATIO:g}" for label in rivals]
    low, high = (f"{bound:.0%}" for bound in DIVERSITY)
    lines = [
        "## One step against the aims", "",
        "Lower bound of the CLIP score's difference to the teacher's 25 steps, as a share of theirs, at least "
        f"{CLIP_MARGIN:.0%}; FD-T at most half of the rivals'; diversity {low} to {high} of the teacher's. Bold: met.",
        "", f"| | CLIP score | {' | '.join([*heads, 'diversity'])} |", "|---" * (len(heads) + 3) + "|",
    ]  # fmt: skip
    for entry in aims:
        ratios = [_bold(_plain(entry["fd_t"].get(label)), entry["met"]["fd_t"]) for label in rivals]
        clip = _bold(_share(entry["clip_score"], sign="+"), entry["met"]["clip_score"])
        spread = _bold(_share(entry["diversity"]), entry["met"]["diversity"])
        lines.append(f"| {entry['label']} | {' | '.join([clip, *ratios, spread])} |")
    if not signs:
        return "\n".join(lines) + "\n"
    rewards = [name for name in signs[0] if name.startswith("reward_")]
    lines += [
        "", "## Signs of exploited rewards", "",
        f"Paired changes to {base} at the same step count; saturation and texture over the teacher's 25 steps. A sign: "
        "a reward rises while the judge's CLIP score falls, both outside their intervals, or saturation or texture is "
        f"more than {LOUD:.0%} above the teacher's.",
        "", f"| | steps | judge's CLIP score | {' | '.join([*rewards, 'saturation', 'texture', 'signs'])} |",
        "|---" * (len(rewards) + 6) + "|",
    ]  # fmt: skip
    for entry in signs:
        changes = [_plain(entry[name], sign="+") for name in ("clip_score", *rewards)]
        shares = [_share(entry[name]) for name in ("saturation", "texture")]
        shown = [*changes, *shares, ", ".join(entry["signs"]) or "none"]
        lines.append(f"| {entry['label']} | {entry['steps']} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _plain(figure: Mapping[str, float] | None, sign: str = "") -> str:
    if figure is None:
        return ""
    return f"{figure['value']:{sign}.2f} [{figure['low']:{sign}.2f}, {figure['high']:{sign}.2f}]"


def _share(figure: Mapping[str, float], sign: str = "") -> str:
    return f"{figure['value']:{sign}.1%} [{figure['low']:{sign}.1%}, {figure['high']:{sign}.1%}]"


def _bold(text: str, met: bool) -> str:
    return f"**{text}**" if met and text else text

"""The arithmetic behind the tables of `benchmarks.distilled`: estimates, rows, and Markdown. NumPy alone.

The unit that is resampled is the prompt, with all that was drawn for it (the contestant's picture and the teacher's).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.metrics import clip_scores, diversity, frechet_distance, paired_kid, retrieved
from benchmarks.stats import ROUNDS, Estimate, estimate, mean_of

Array = np.ndarray
METRICS = {
    "clip_score": ("CLIP score of the judge, higher is better", 1.0, 1),
    "fd_t": ("FD-T, lower is better", 1.0, 3),
    "kid_t": ("KID-T × 1000, lower is better", 1000.0, 2),
    "diversity": ("Diversity × 100, nearer to the teacher's 25 steps is better", 100.0, 1),
    "retrieval_top1": ("Own caption nearest of 100, in %, higher is better", 100.0, 1),
    "reward_clip": ("CLIP score of the pipeline's own CLIP, a reward that was trained on", 1.0, 1),
    "reward_preference": ("Preference, a reward that was trained on", 1.0, 2),
    "precision": ("k-NN precision to the teacher, in %, higher is better", 100.0, 1),
    "recall": ("k-NN recall of the teacher, in %, higher is better", 100.0, 1),
    "saturation": ("Saturation × 100, nearer to the teacher's 25 steps is better", 100.0, 1),
    "texture": ("Texture × 100, nearer to the teacher's 25 steps is better", 100.0, 2),
}
"""By key: heading, factor and decimals in Markdown; JSON has the plain values. Rows have the first five; those of an
ablation have all."""
HIGHER = {"clip_score", "retrieval_top1", "reward_clip", "reward_preference", "precision", "recall"}
NEARER = {"diversity", "saturation", "texture"}


def measure(
    features: Array, reference: Array, captions: Array, choices: Array, varied: Array, *, rounds: int = ROUNDS
) -> dict[str, Estimate]:
    """All figures of one cell from the judge's features: of its pictures and of the teacher's for the same prompts
    [N, D], of the captions [N, D] and their candidates [N, K, D], the right one first; of P prompts in S pictures each
    [P, S, D].
    """
    scores, hits = clip_scores(features, captions), retrieved(features, choices).astype(np.float64)
    spread, count = diversity(varied), len(features)
    return {
        "clip_score": estimate(lambda rows: float(scores[rows].mean()), count, rounds=rounds),
        "fd_t": estimate(lambda rows: frechet_distance(features[rows], reference[rows]), count, rounds=rounds),
        "kid_t": estimate(paired_kid(features, reference), count, rounds=rounds),
        "diversity": estimate(lambda rows: float(spread[rows].mean()), len(spread), rounds=rounds),
        "retrieval_top1": estimate(lambda rows: float(hits[rows].mean()), count, rounds=rounds),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A row at one step count: the figures of each training seed, and the student updates behind it."""

    updates: int
    seeds: tuple[int, ...]
    figures: tuple[Mapping[str, Estimate], ...]

    def mean(self, metric: str) -> Estimate:
        """Over the training seeds."""
        return mean_of([figures[metric] for figures in self.figures])

    def spread(self, metric: str) -> float | None:
        """Sample standard deviation over the training seeds, None for one."""
        values = [figures[metric].value for figures in self.figures]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Figures with intervals; with several training seeds also the figure of each, and their spread."""
        data: dict[str, Any] = {"updates": self.updates, "training_seeds": list(self.seeds)}
        for metric in self.figures[0]:
            data[metric] = self.mean(metric).to_json()
            if len(self.seeds) > 1:
                each = [figures[metric].value for figures in self.figures]
                data[metric] |= {"spread": self.spread(metric), "each": each}
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A contestant's cells by step count; `trained` is False for the teacher's rows, which compete with nobody."""

    label: str
    cells: Mapping[int, Cell] = field(default_factory=dict)
    trained: bool = True


def loss(metric: str, estimate: Estimate, teacher: Estimate) -> Estimate:
    """What a good row makes small: the figure, or its negative, or its distance to the teacher's."""
    if metric in NEARER:
        return abs(estimate - teacher)
    return -estimate if metric in HIGHER else estimate


def best_and_ties(rows: Sequence[Row], steps: int, metric: str, teacher: Estimate) -> tuple[str, set[str]]:
    """The best trained row of a column, and those whose paired difference to it has a 95 % interval with 0 in it."""
    losses = {
        r.label: loss(metric, r.cells[steps].mean(metric), teacher) for r in rows if r.trained and steps in r.cells
    }
    if not losses:
        return "", set()
    best = min(losses, key=lambda label: losses[label].value)
    return best, {label for label, other in losses.items() if label != best and (other - losses[best]).is_zero}


def unequal_columns(rows: Sequence[Row]) -> list[int]:
    """Step counts at which the trained rows do not all have the same number of student updates."""
    updates: dict[int, set[int]] = {}
    for row in rows:
        for steps, cell in row.cells.items() if row.trained else ():
            updates.setdefault(steps, set()).add(cell.updates)
    return sorted(steps for steps, counts in updates.items() if len(counts) > 1)


def markdown(rows: Sequence[Row], teacher: Cell) -> str:
    """One Markdown table per metric; `teacher` is the cell of its 25 steps, shown in every column."""
    columns = sorted({steps for row in rows for steps in row.cells}, reverse=True)
    first = Row(label="teacher, 25 steps", cells=dict.fromkeys(columns, teacher), trained=False)
    parts = []
    for metric, (heading, _, _) in METRICS.items():
        if not all(metric in cell.figures[0] for row in rows for cell in row.cells.values()):
            continue
        marks = {steps: best_and_ties(rows, steps, metric, teacher.mean(metric)) for steps in columns}
        lines = [f"| | updates | {' | '.join(_steps(c) for c in columns)} |", "|---" * (len(columns) + 2) + "|"]
        for row in (first, *rows):
            cells = [_cell(row, steps, metric, *marks[steps]) for steps in columns]
            lines.append(f"| {row.label} | {_updates(row, columns)} | {' | '.join(cells)} |")
        parts.append(f"**{heading}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def _updates(row: Row, columns: Sequence[int]) -> str:
    if not row.trained:
        return ""
    counts = [row.cells[steps].updates for steps in columns if steps in row.cells]
    return " · ".join(f"{count:,}" for count in (counts[:1] if len(set(counts)) == 1 else counts))


def _cell(row: Row, steps: int, metric: str, best: str, ties: set[str]) -> str:
    """`**63.1** [62.4, 63.8]`: bold is the best, † not told apart from it; `± 0.3 (3)` over three training seeds."""
    if steps not in row.cells:
        return ""
    cell, (_, factor, digits) = row.cells[steps], METRICS[metric]
    mean, spread = cell.mean(metric), cell.spread(metric)
    low, high = (f"{factor * bound:.{digits}f}" for bound in mean.interval)
    text = f"{factor * mean.value:.{digits}f}"
    if row.trained and row.label == best:
        text = f"**{text}**"
    elif row.trained and row.label in ties:
        text += "†"
    if spread is not None:
        text += f" ± {factor * spread:.{digits}f} ({len(cell.seeds)})"
    return f"{text} [{low}, {high}]"

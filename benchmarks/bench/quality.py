"""How good: figures of many pictures of the same prompts and seeds, with intervals, and paired differences.

FD-T, KID-T and CMMD-T compare with a reference pipeline's pictures of the same prompts from other seeds, precision and
recall with the same; `psnr_db` compares with torch's picture of the same prompt and seed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bench.drawers import Drawer
from benchmarks.bench.gallery import Gallery, Job, Series
from benchmarks.bench.prompts import Prompt
from benchmarks.metrics import clip_scores, diversity, frechet_distance, paired_cmmd, paired_kid, precision_recall
from benchmarks.stats import Estimate, estimate
from hypersd_export.errors import HypersdError, OptionError

FIRST_SEED, REFERENCE_SEED, VARIETY_SEED = 0, 1_000_000, 2_000_000
"""Of the pictures that are measured, of the reference's, and of those for diversity."""
VARIED, EACH = 32, 4
"""Diversity: so many prompts in so many pictures each."""
ROUNDS, LARGE_ROUNDS, LARGE = 1000, 100, 128
"""Bootstrap rounds; fewer for the FD of more than LARGE dimensions, as each round solves an eigenvalue problem."""
PSNR_CAP_DB = 200.0
METRICS: Mapping[str, tuple[str, bool, float, int]] = {
    "clip_score": ("CLIP score", True, 1.0, 2),
    "fd_t": ("FD-T", False, 1.0, 3),
    "kid_t": ("KID-T × 1000", False, 1000.0, 2),
    "cmmd_t": ("CMMD-T", False, 1.0, 3),
    "precision": ("precision", True, 1.0, 3),
    "recall": ("recall", True, 1.0, 3),
    "diversity": ("diversity × 100", True, 100.0, 2),
    "psnr_db": ("PSNR to torch, dB", True, 1.0, 1),
    "reward_clip": ("reward: CLIP", True, 1.0, 2),
    "reward_aesthetic": ("aesthetic", True, 1.0, 3),
    "reward_image_reward": ("ImageReward", True, 1.0, 3),
    "reward_pick_score": ("PickScore", True, 1.0, 3),
    "reward_hps": ("HPS", True, 1.0, 3),
    "reward_preference": ("preference", True, 1.0, 3),
}
"""By key: name, whether higher is better, factor and decimals for a reader; JSON has the plain values."""
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """Who is measured: its drawer, and torch's for the same weights and plan, or why there is none."""

    name: str
    kind: str
    facts: Mapping[str, Any]
    drawer: Drawer | None = None
    twin: Drawer | None = None
    missing: str = ""
    twin_missing: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked of every candidate; the diversity of `varied` prompts, none of 0."""

    prompts: tuple[Prompt, ...]
    varied: int = VARIED
    each: int = EACH
    reference: Drawer | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) < 2:
            raise OptionError(f"{len(self.prompts)} prompts: at least 2")
        if self.varied < 0:
            raise OptionError(f"--varied {self.varied}: prompts for the diversity, 0 for none")
        if self.each < 2:
            raise OptionError(f"{self.each} pictures of a prompt for the diversity: at least 2")

    @property
    def measured(self) -> Series:
        """The pictures that are measured."""
        return Series(prompts=tuple(prompt.text for prompt in self.prompts), first_seed=FIRST_SEED)

    @property
    def compared(self) -> Series:
        """The reference's."""
        return Series(prompts=self.measured.prompts, first_seed=REFERENCE_SEED)

    @property
    def spread(self) -> Series:
        """The pictures for diversity: those of one prompt beside each other."""
        texts = tuple(dict.fromkeys(self.measured.prompts))[: self.varied]
        return Series(prompts=tuple(text for text in texts for _ in range(self.each)), first_seed=VARIETY_SEED)

    def jobs(self, candidate: Candidate) -> list[Job]:
        """All that is drawn for a candidate."""
        assert candidate.drawer is not None
        jobs = [Job(drawer=candidate.drawer, series=self.measured, scored=True)]
        if self.varied:
            jobs.append(Job(drawer=candidate.drawer, series=self.spread))
        if candidate.twin is not None:
            jobs.append(Job(drawer=candidate.twin, series=self.measured, looked_at=False))
        return jobs


@dataclass(kw_only=True)
class Exam:
    """Draws and measures everybody. `failed`: why a candidate has no figures, by name."""

    gallery: Gallery
    question: Question
    failed: dict[str, str] = field(default_factory=dict)

    def draw(self, candidates: Sequence[Candidate]) -> None:
        """This process's share of all pictures and features; then wait for the others."""
        reference = self.question.reference
        if reference is not None:
            self.gallery.prepare(Job(drawer=reference, series=self.question.compared), "reference")
        for candidate in candidates:
            if candidate.drawer is None:
                continue
            try:
                for job in self.question.jobs(candidate):
                    self.gallery.prepare(job, candidate.name)
            except HypersdError as error:
                self.failed[candidate.name] = str(error)
        self.gallery.share.wait()

    def estimates(self, candidate: Candidate) -> dict[str, Estimate]:
        """The figures of one candidate whose pictures are all there."""
        gallery, question = self.gallery, self.question
        assert candidate.drawer is not None
        features = gallery.features(candidate.drawer, question.measured)
        captions = gallery.captions(question.measured.prompts)
        found = {"clip_score": mean_of_rows(clip_scores(features, captions))}
        if question.reference is not None:
            found |= against(features, gallery.features(question.reference, question.compared))
        for scorer in gallery.scorers:
            found[scorer.metric] = mean_of_rows(gallery.scores(candidate.drawer, question.measured, scorer))
        if question.varied:
            varied = gallery.features(candidate.drawer, question.spread)
            found["diversity"] = mean_of_rows(diversity(varied.reshape(-1, question.each, varied.shape[1])))
        if candidate.twin is not None:
            mine, torchs = (gallery.pictures(d, question.measured) for d in (candidate.drawer, candidate.twin))
            found["psnr_db"] = psnr_of(mine, torchs)
        return found

    def scores(self, candidate: Candidate) -> Array:
        """CLIP score of each picture [N]."""
        assert candidate.drawer is not None
        features = self.gallery.features(candidate.drawer, self.question.measured)
        return clip_scores(features, self.gallery.captions(self.question.measured.prompts))


def mean_of_rows(values: Array) -> Estimate:
    """The mean, rows resampled."""
    return estimate(lambda rows: float(values[rows].mean()), len(values), rounds=ROUNDS)


def against(features: Array, reference: Array) -> dict[str, Estimate]:
    """Distances to a reference's features [N, D] of the same prompts, and precision and recall."""
    count, rounds = len(features), ROUNDS if features.shape[1] <= LARGE else LARGE_ROUNDS
    neighbours = min(3, count - 1)
    both = precision_recall(reference, features, k=neighbours)
    precision, recall = (Estimate(value, np.full(1, value)) for value in both)
    statistics: dict[str, Callable[[Array], float]] = {
        "fd_t": lambda rows: frechet_distance(features[rows], reference[rows]),
        "kid_t": paired_kid(features, reference),
        "cmmd_t": paired_cmmd(features, reference),
    }
    found = {
        name: estimate(statistic, count, rounds=rounds if name == "fd_t" else ROUNDS)
        for name, statistic in statistics.items()
    }
    return {**found, "precision": precision, "recall": recall}


def psnr_of(mine: Array, theirs: Array) -> Estimate:
    """PSNR in dB over all pictures together (of the mean squared error of 8-bit values), at most PSNR_CAP_DB."""
    errors = np.square(mine.astype(np.float64) - theirs.astype(np.float64)).mean((1, 2, 3))

    def statistic(rows: Array) -> float:
        error = float(errors[rows].mean())
        return PSNR_CAP_DB if error == 0 else min(PSNR_CAP_DB, 10 * float(np.log10(255**2 / error)))

    return estimate(statistic, len(errors), rounds=ROUNDS, centred=False)


def figures_json(estimates: Mapping[str, Estimate], count: int) -> dict[str, Any]:
    """value, low, high, count; without an interval for what has no replicates."""
    found = {}
    for name, figure in estimates.items():
        plain = {"value": figure.value} if len(figure.replicates) < 2 else figure.to_json()
        found[name] = {**plain, "count": count}
    return found


def differences(mine: Mapping[str, Estimate], first: Mapping[str, Estimate]) -> dict[str, Any]:
    """Mine minus the first candidate's, paired by prompts; `apart`: 0 is not in the interval."""
    found = {}
    for name, figure in mine.items():
        other = first.get(name)
        if other is None or len(figure.replicates) < 2 or len(figure.replicates) != len(other.replicates):
            continue
        difference = figure - other
        found[name] = {**difference.to_json(), "apart": not difference.is_zero}
    return found


def by_category(scores: Array, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """CLIP score of each category, in the order of their first prompt; {} where there is only one."""
    names = list(dict.fromkeys(prompt.category for prompt in prompts))
    if len(names) < 2:
        return {}
    found = {}
    for name in names:
        rows = np.array([prompt.category == name for prompt in prompts])
        found[name or "none"] = {**mean_of_rows(scores[rows]).to_json(), "count": int(rows.sum())}
    return found


def rows_of(exam: Exam, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """A row of the report a candidate; the first that has figures is the one that the others are compared with."""
    rows, first = [], None
    for candidate in candidates:
        row: dict[str, Any] = {"name": candidate.name, "kind": candidate.kind, **candidate.facts}
        why = candidate.missing or exam.failed.get(candidate.name, "")
        if why or candidate.drawer is None:
            rows.append({**row, "status": "not run", "why": why})
            continue
        exam.gallery.tell(f"{candidate.name}: figures")
        try:
            estimates = exam.estimates(candidate)
        except HypersdError as error:  # another process could not draw its share, nor can this one
            rows.append({**row, "status": "not run", "why": str(error)})
            continue
        row |= {"status": "measured", "figures": figures_json(estimates, len(exam.question.prompts))}
        scores = exam.scores(candidate)
        row["categories"] = by_category(scores, exam.question.prompts)
        row["scores"] = [round(float(score), 3) for score in scores]
        if first is None:
            first = estimates
        else:
            row["differences"] = differences(estimates, first)
        if candidate.twin_missing:
            row["psnr_why"] = candidate.twin_missing
        rows.append(row)
    return rows

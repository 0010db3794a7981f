"""The statistics of every report: bootstrap estimates, paired differences, ratios, percentiles. NumPy alone.

What is resampled is a row: a prompt with all that was drawn for it, a round in which every contestant was timed once.
Two estimates over the same count and seed resample the same rows in the same rounds, so they can be averaged and
subtracted round by round, which makes their comparison a paired one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
ROUNDS = 1000
ALL_PERCENTILES: Mapping[int, int] = {50: 1, 90: 1, 99: 1}
LEAST: Mapping[int, int] = {50: 1, 90: 10, 99: 100}
"""How many values a percentile wants, so that one of them lies beyond it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its bootstrap replicates [rounds]."""

    value: float
    replicates: Array

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: the percentiles 2.5 and 97.5 of the replicates."""
        low, high = np.percentile(self.replicates, [2.5, 97.5])
        return float(low), float(high)

    @property
    def again(self) -> tuple[float, float]:
        """Where the figure of an equal, independent run lies in 95 of 100 cases: that figure scatters too, so the
        interval is √2 as wide."""
        low, high = (self.value + np.sqrt(2) * (bound - self.value) for bound in self.interval)
        return float(low), float(high)

    @property
    def is_zero(self) -> bool:
        """Of a difference: 0 is in its interval, the two are not told apart."""
        low, high = self.interval
        return low <= 0 <= high

    def to_json(self) -> dict[str, float]:
        """value, low and high."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high}

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.replicates - other.replicates)

    def __neg__(self) -> "Estimate":
        return Estimate(-self.value, -self.replicates)

    def __abs__(self) -> "Estimate":
        return Estimate(abs(self.value), np.abs(self.replicates))


def resamples(count: int, rounds: int, seed: int, groups: Sequence[int] | None = None) -> Iterator[Array]:
    """Rows 0 … count − 1 drawn with replacement, `rounds` times (Efron 1979).

    groups: lengths of runs of rows that belong together (they sum to `count`); then groups are drawn first, and rows
    within each that was drawn (Davison & Hinkley 1997, §3.8), so that what varies from group to group is seen too.
    """
    rng = np.random.default_rng(seed)
    if groups is None:
        for _ in range(rounds):
            yield rng.integers(count, size=count)
        return
    if sum(groups) != count:
        raise ValueError(f"groups of {sum(groups)} rows in all where there are {count}")
    starts = np.cumsum([0, *groups[:-1]])
    for _ in range(rounds):
        drawn = rng.integers(len(groups), size=len(groups))
        yield np.concatenate([starts[g] + rng.integers(groups[g], size=groups[g]) for g in drawn])


def estimate(
    statistic: Callable[[Array], float], count: int, *, rounds: int = ROUNDS, seed: int = 0, centred: bool = True,
    groups: Sequence[int] | None = None,
) -> Estimate:  # fmt: skip
    """`statistic(rows)` of all rows 0 … count − 1, and of resamples of them.

    centred: the replicates are shifted so that their mean is the figure. The shift is ours: FD is biased for few
    samples and a resample repeats some, so its replicates lie above the figure itself. Whatever is compared has the
    same count and so the same bias, and what is wanted is how far the figure scatters.
    """
    replicates = np.array([statistic(rows) for rows in resamples(count, rounds, seed, groups)])
    value = float(statistic(np.arange(count)))
    return Estimate(value, replicates - replicates.mean() + value if centred else replicates)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over training seeds: of the figures, and of the replicates round by round."""
    return Estimate(
        float(np.mean([e.value for e in estimates])), np.mean([e.replicates for e in estimates], axis=0)
    )  # fmt: skip


def ratio(
    a: Sequence[float], b: Sequence[float], *, rounds: int = 2000, seed: int = 0, groups: Sequence[int] | None = None
) -> Estimate:
    """Median of `a` over median of `b`, which were measured in the same rounds: pairs stay together."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def statistic(rows: Array) -> float:
        return float(np.median(x[rows]) / np.median(y[rows]))

    return estimate(statistic, len(x), rounds=rounds, seed=seed, centred=False, groups=groups)


def summary(values: Sequence[float], *, least: Mapping[int, int] = ALL_PERCENTILES) -> dict[str, float]:
    """Count, mean, extremes and percentiles of milliseconds, rounded to microseconds; ValueError for no values.

    Between two values a percentile is interpolated, as NumPy does it: of 100 calls p99 lies between the two slowest.
    least: how many values each percentile wants; one that has fewer is left out (see `LEAST`).
    """
    found = np.asarray(values, dtype=np.float64)
    if not found.size:
        raise ValueError("no calls were timed")
    figures = {f"p{q}": float(np.percentile(found, q)) for q, count in least.items() if found.size >= count}
    figures |= {"mean": float(found.mean()), "min": float(found.min()), "max": float(found.max())}
    return {"count": len(found), **{name: round(value, 3) for name, value in figures.items()}}

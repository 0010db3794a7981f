"""The statistics of the reports: known answers, coverage, and the very figures that older reports were written with."""

import numpy as np
import pytest

from benchmarks.metrics import frechet_distance
from benchmarks.stats import LEAST, Estimate, estimate, mean_of, ratio, resamples, summary

RNG = np.random.default_rng(0)


def mean(samples):
    return lambda rows: float(samples[rows].mean())


def test_reports_that_were_written_before_keep_every_bit():
    """The bootstraps as they stood in three places: one drew round by round, one all rounds at once."""
    samples, other = RNG.standard_normal(60), RNG.standard_normal(60) + 5
    rng = np.random.default_rng(0)
    values = np.array([samples[rng.integers(60, size=60)].mean() for _ in range(200)])
    found = estimate(mean(samples), 60, rounds=200)
    assert found.value == samples.mean()
    assert np.array_equal(found.replicates, values - values.mean() + samples.mean())
    plain = estimate(mean(samples), 60, rounds=200, centred=False)
    assert plain.interval == tuple(np.percentile(values, [2.5, 97.5]))
    a, b = samples + 3, other
    rows = np.random.default_rng(0).integers(60, size=(2000, 60))
    low, high = np.percentile(np.median(a[rows], axis=1) / np.median(b[rows], axis=1), [2.5, 97.5])
    assert ratio(a, b).to_json() == {"value": float(np.median(a) / np.median(b)), "low": low, "high": high}


def test_the_interval_covers_and_shrinks():
    small = estimate(mean(RNG.standard_normal(50)), 50, rounds=500)
    large = estimate(mean(RNG.standard_normal(5000)), 5000, rounds=500)
    wide, narrow = (high - low for low, high in (small.interval, large.interval))
    assert small.interval[0] < small.value < small.interval[1]
    assert narrow == pytest.approx(2 * 1.96 / np.sqrt(5000), rel=0.15)
    assert narrow < 0.2 * wide
    for centred in (True, False):
        draws = [RNG.standard_normal(100) for _ in range(200)]
        found = [estimate(mean(d), 100, rounds=200, seed=i, centred=centred) for i, d in enumerate(draws)]
        assert 0.88 <= np.mean([e.is_zero for e in found]) <= 0.99


def test_a_second_run_lies_inside_the_wider_interval():
    draws = RNG.standard_normal((300, 2, 80))
    pairs = [[estimate(mean(d), 80, rounds=200, seed=i) for d in pair] for i, pair in enumerate(draws)]
    inside = [first.again[0] <= second.value <= first.again[1] for first, second in pairs]
    plain = [first.interval[0] <= second.value <= first.interval[1] for first, second in pairs]
    assert 0.90 <= np.mean(inside) <= 0.99
    assert np.mean(plain) < 0.89  # the plain interval is about the true figure, not about another run's


def test_groups_widen_the_interval_by_what_varies_between_them():
    offsets = np.repeat([-1.0, 0.0, 1.0, 0.5, -0.5], 40)
    samples = offsets + 0.1 * RNG.standard_normal(200)
    flat = estimate(mean(samples), 200, rounds=400)
    grouped = estimate(mean(samples), 200, rounds=400, groups=[40] * 5)
    spread = np.std([-1.0, 0.0, 1.0, 0.5, -0.5])
    assert grouped.replicates.std() == pytest.approx(spread / np.sqrt(5), rel=0.15)
    assert flat.replicates.std() == pytest.approx(samples.std() / np.sqrt(200), rel=0.15)
    for rows in resamples(7, 50, 0, groups=[3, 4]):
        assert {len(rows)} <= {6, 7, 8}
        assert set(rows) <= set(range(7))
    with pytest.raises(ValueError, match="groups of 7 rows in all where there are 8"):
        next(resamples(8, 1, 0, groups=[3, 4]))


def test_the_interval_of_a_biased_figure_lies_around_it():
    """A resample repeats rows, so its FD lies above: by percentiles alone the figure would be outside its interval."""
    a, b = RNG.standard_normal((2, 80, 20))
    fd = estimate(lambda rows: frechet_distance(a[rows], b[rows]), 80, rounds=200)
    raw = estimate(lambda rows: frechet_distance(a[rows], b[rows]), 80, rounds=200, centred=False)
    assert raw.interval[0] > fd.value
    assert fd.value == frechet_distance(a, b)
    assert fd.interval[0] < fd.value < fd.interval[1]
    np.testing.assert_allclose(fd.replicates - fd.value, raw.replicates - raw.replicates.mean(), atol=1e-9)


def test_differences_are_paired():
    shared = RNG.standard_normal(100) * 5
    a = estimate(mean(shared), 100)
    b = estimate(mean(shared + 0.2 + 0.1 * RNG.standard_normal(100)), 100)
    assert a.interval[0] < b.value < a.interval[1]
    assert not (b - a).is_zero
    assert (a - a).is_zero
    assert abs(-(b - a)).value == pytest.approx(0.2, abs=0.05)
    assert mean_of([a, b]).value == pytest.approx((a.value + b.value) / 2)


def test_ratio_of_medians_with_its_interval():
    bare = np.random.default_rng(0).normal(1.0, 0.02, 60)
    exact = ratio(1.05 * bare, bare)
    assert exact.to_json() == pytest.approx({"value": 1.05, "low": 1.05, "high": 1.05})  # pairs stay together
    real = np.random.default_rng(1).normal(1.05, 0.02, 60)
    noisy = ratio(real, bare)
    assert noisy.value == pytest.approx(np.median(real) / np.median(bare))
    assert noisy.interval[0] < 1.05 < noisy.interval[1] < 1.08
    real[3] = 100.0  # one interruption of the machine
    assert ratio(real, bare).interval[1] < 1.08


def test_percentiles_have_known_answers_and_want_enough_values():
    assert summary(range(1, 101), least=LEAST) == {
        "count": 100, "p50": 50.5, "p90": 90.1, "p99": 99.01, "mean": 50.5, "min": 1.0, "max": 100.0,
    }  # fmt: skip
    assert summary([2.0])["p99"] == 2.0
    assert {"p50", "p90", "p99"} & set(summary(range(99), least=LEAST)) == {"p50", "p90"}
    assert {"p50", "p90", "p99"} & set(summary(range(9), least=LEAST)) == {"p50"}
    with pytest.raises(ValueError, match="no calls"):
        summary([])


def test_estimates_as_json():
    assert Estimate(1.0, np.array([0.0, 1.0, 2.0])).to_json() == {"value": 1.0, "low": 0.05, "high": 1.95}

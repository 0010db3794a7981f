import numpy as np
import pytest

from benchmarks.metrics import (
    clip_scores,
    cmmd,
    diversity,
    frechet_distance,
    kid,
    paired_cmmd,
    paired_kid,
    precision_recall,
    retrieved,
    unit,
)

RNG = np.random.default_rng(0)


def test_unit_rows():
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0]])), [[0.6, 0.8]])


def test_clip_score_known_answers():
    text = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    image = np.array([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    np.testing.assert_allclose(clip_scores(image, text), [100, 100 / np.sqrt(2), 0], atol=1e-12)


def test_retrieval_counts_the_nearest_and_a_tie_is_wrong():
    image = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    captions = np.array([[[1, 0.1], [0, 1]], [[1, 0], [1, 0]], [[1, 0], [0.2, 1]]])
    assert retrieved(image, captions).tolist() == [True, False, False]


def test_frechet_distance_of_gaussians_has_the_closed_form():
    base = RNG.standard_normal((400, 3))
    white = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    a, b = white * [1, 2, 3], white * [2, 2, 1] + [1, 0, -2]  # commuting covariances: Σ(σa − σb)² + ‖Δμ‖²
    assert frechet_distance(a, b) == pytest.approx((1 + 0 + 4) + (1 + 4), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_does_not_care_for_a_rotation_of_both():
    a, b = RNG.standard_normal((50, 4)), RNG.standard_normal((60, 4)) * 2
    rotation = np.linalg.qr(RNG.standard_normal((4, 4)))[0]
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_kid_by_hand():
    a, b = np.array([[1.0], [2.0]]), np.array([[0.0], [1.0], [3.0]])
    kernel = lambda x, y: (x * y + 1) ** 3  # noqa: E731
    within_a = kernel(1, 2)
    within_b = (kernel(0, 1) + kernel(0, 3) + kernel(1, 3)) / 3
    between = np.mean([kernel(x, y) for x in (1, 2) for y in (0, 1, 3)])
    assert kid(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_kid_and_cmmd_are_unbiased_around_zero_for_one_distribution():
    pairs = [RNG.standard_normal((2, 40, 8)) + 1 for _ in range(200)]
    for metric in (kid, cmmd):
        values = np.array([metric(a, b) for a, b in pairs])
        assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
        assert (values < 0).any()


def test_cmmd_by_hand_and_its_direction():
    a, b = np.array([[1.0, 0], [0, 1]]), np.array([[-1.0, 0], [0, -1]])
    near, far = np.exp(-2 / 200), np.exp(-4 / 200)
    assert cmmd(a, b) == pytest.approx(1000 * (near + near - 2 * (2 * near + 2 * far) / 4))
    x = RNG.standard_normal((100, 8)) + 2
    assert cmmd(x, RNG.standard_normal((100, 8)) - 2) > cmmd(x, RNG.standard_normal((100, 8)) + 2)


def test_diversity_known_answers():
    same = np.ones((1, 3, 2))
    apart = np.array([[[1.0, 0], [0, 1], [-1, 0]]])  # cosines 0, −1, 0
    np.testing.assert_allclose(diversity(np.concatenate([same, apart])), [0, 1 + 1 / 3], atol=1e-12)


def test_precision_and_recall_on_separate_overlapping_and_collapsed_sets():
    real = RNG.standard_normal((200, 2))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    collapsed = real[:1] + RNG.standard_normal((200, 2)) * 1e-3  # one mode: precise, not diverse
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.95
    assert recall < 0.05


def test_paired_kid_by_hand_and_on_a_resample():
    a, b = RNG.standard_normal((2, 9, 4))
    k = lambda x, y: (x @ y / 4 + 1) ** 3  # noqa: E731
    for rows in (np.arange(9), RNG.integers(9, size=9)):
        pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
        terms = [
            k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i])
            for i, j in ((rows[p], rows[q]) for p, q in pairs)
        ]
        assert paired_kid(a, b)(rows) == pytest.approx(np.mean(terms), rel=1e-9)


def test_paired_kid_is_unbiased_where_both_sets_have_the_same_prompts():
    """Each prompt moves both of its pictures: two sets of one distribution, which `kid` finds too alike."""
    values, plain = [], []
    for _ in range(300):
        prompts = RNG.standard_normal((20, 6))
        a, b = prompts + 0.1 * RNG.standard_normal((2, 20, 6))
        values.append(paired_kid(a, b)(np.arange(20)))
        plain.append(kid(a, b))
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    assert np.mean(plain) < -3 * np.std(plain) / np.sqrt(300)


def test_paired_cmmd_leaves_out_each_prompts_own_pair_and_agrees_with_cmmd_on_many():
    a, b = RNG.standard_normal((2, 7, 5))
    u, v = unit(a), unit(b)
    k = lambda x, y: np.exp(-np.square(x - y).sum() / 200)  # noqa: E731
    terms = [
        k(u[i], u[j]) + k(v[i], v[j]) - k(u[i], v[j]) - k(u[j], v[i]) for i in range(7) for j in range(7) if i != j
    ]
    assert paired_cmmd(a, b)(np.arange(7)) == pytest.approx(1000 * np.mean(terms), rel=1e-9)
    a, b = RNG.standard_normal((400, 5)) + 1, RNG.standard_normal((400, 5))
    assert paired_cmmd(a, b)(np.arange(400)) == pytest.approx(cmmd(a, b), rel=0.01)
    assert paired_cmmd(a, a)(np.arange(400)) == pytest.approx(0, abs=1e-9)

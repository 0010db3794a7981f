"""Metrics on feature vectors: pure NumPy functions, each with a known-answer test.

Features are float arrays [N, D] of one judge (named by whoever reports a figure: numbers of two judges do not compare).
Everything is computed in float64.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Statistic = Callable[[Array], float]
"""A figure of some rows, for `benchmarks.stats.estimate`."""
SIGMA = 10.0


def unit(features: Array) -> Array:
    """Rows scaled to length one, float64."""
    features = np.asarray(features, np.float64)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def clip_scores(image: Array, text: Array) -> Array:
    """100·max(cos, 0) of each picture with its own caption (Hessel et al. 2021, w = 1): [N]."""
    return 100 * np.clip((unit(image) * unit(text)).sum(1), 0, None)


def retrieved(image: Array, captions: Array, right: int = 0) -> Array:
    """Is caption `right` the nearest of each picture's own candidates? image [N, D], captions [N, K, D] → bool [N].

    A tie counts as wrong, so that a judge that cannot tell scores nothing.
    """
    cosines = np.einsum("nd,nkd->nk", unit(image), unit(captions))
    others = np.delete(cosines, right, axis=1)
    return cosines[:, right] > others.max(1)


def frechet_distance(a: Array, b: Array) -> float:
    """Fréchet distance of the Gaussians fitted to a and b (Dowson & Landau 1982; FID of Heusel et al. 2017, eq. 6).

    ‖μa − μb‖² + tr(Ca + Cb − 2(Ca Cb)^½), the trace of the root from the eigenvalues of Ca^½ Cb Ca^½, which is
    symmetric, so nothing complex appears. Biased for few samples: compare only at equal counts.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def kid(a: Array, b: Array) -> float:
    """Unbiased MMD² with the cubic kernel (x·y/D + 1)³ (Bińkowski et al. 2018, eq. 4); may be negative."""
    return _mmd2(a, b, _cubic)


def paired_kid(a: Array, b: Array) -> Statistic:
    """rows → KID of a[rows] and b[rows] [N, D], whose rows belong to the same prompts.

    `kid` wants independent sets. With common prompts it comes out too small by 2/N times the difference between the
    kernel of a prompt's own two pictures and that of any two, about as much as the floor scatters.
    """
    return _paired_mmd2(a, b, _cubic)


def cmmd(a: Array, b: Array, *, sigma: float = SIGMA) -> float:
    """Unbiased MMD² with a Gaussian kernel on unit features, ×1000 (Jayasumana et al. 2024, §4: σ = 10)."""
    return 1000 * _mmd2(unit(a), unit(b), _gaussian(sigma))


def paired_cmmd(a: Array, b: Array, *, sigma: float = SIGMA) -> Statistic:
    """rows → CMMD of a[rows] and b[rows], whose rows belong to the same prompts; see `paired_kid`."""
    statistic = _paired_mmd2(unit(a), unit(b), _gaussian(sigma))
    return lambda rows: 1000 * statistic(rows)


def _cubic(x: Array, y: Array) -> Array:
    kernel: Array = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def _gaussian(sigma: float) -> Callable[[Array, Array], Array]:
    def kernel(x: Array, y: Array) -> Array:
        squared = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T
        return np.exp(-squared / (2 * sigma**2))

    return kernel


def _mmd2(a: Array, b: Array, kernel: Callable[[Array, Array], Array]) -> float:
    """The unbiased estimator of MMD² (Gretton et al. 2012, eq. 3): the diagonals are left out."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    n, m = len(a), len(b)
    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    within_a = (aa.sum() - np.trace(aa)) / (n * (n - 1))
    within_b = (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within_a + within_b - 2 * ab.mean())


def _paired_mmd2(a: Array, b: Array, kernel: Callable[[Array, Array], Array]) -> Statistic:
    """rows → unbiased MMD² of two sets with common prompts: the pairs of one prompt are left out between the sets too
    (Gretton et al. 2012, eq. 4). The kernels are computed once."""
    n, between = len(a), kernel(a, b)
    joint = kernel(a, a) + kernel(b, b) - between - between.T
    diagonal = np.diag(joint).copy()

    def statistic(rows: Array) -> float:
        times = np.bincount(rows, minlength=n).astype(np.float64)
        return float(times @ joint @ times - times @ diagonal) / (len(rows) * (len(rows) - 1))

    return statistic


def diversity(features: Array) -> Array:
    """Mean pairwise cosine distance of the pictures of each prompt: features [P prompts, S seeds, D] → [P]."""
    rows = unit(features)
    seeds = rows.shape[1]
    cosines = np.einsum("psd,ptd->pst", rows, rows)
    off_diagonal = cosines.sum((1, 2)) - np.trace(cosines, axis1=1, axis2=2)
    return 1 - off_diagonal / (seeds * (seeds - 1))


def precision_recall(real: Array, fake: Array, *, k: int = 3) -> tuple[float, float]:
    """k-NN precision and recall (Kynkäänniemi et al. 2019, eq. 1): the share of fakes inside the union of the real
    points' k-NN balls, and the share of reals inside the fakes'."""
    return float(covered(fake, real, k).mean()), float(covered(real, fake, k).mean())


def covered(points: Array, manifold: Array, k: int) -> Array:
    """Which points [N, D] lie inside the union of the k-NN balls of `manifold` [M, D]: bool [N]."""
    points, manifold = np.asarray(points, np.float64), np.asarray(manifold, np.float64)
    radius = np.sort(_distances(manifold, manifold), axis=1)[:, k]  # column 0 is the point itself
    return np.asarray((_distances(points, manifold) <= radius[None]).any(1))


def _distances(x: Array, y: Array) -> Array:
    squared = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T
    return np.sqrt(np.clip(squared, 0, None))

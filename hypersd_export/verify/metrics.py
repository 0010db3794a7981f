"""How far two arrays are apart: peak signal-to-noise ratio and largest difference. numpy only."""

import math

import numpy as np
import numpy.typing as npt

PSNR_CAP_DB = 200.0
"""What a report says for equal arrays: infinity is not JSON, and float32 cannot reach 200 dB otherwise."""


def max_abs(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Largest absolute difference, in float64; NaN if either side has one. Raises `ValueError` for unequal shapes."""
    difference = _difference(a, b)
    return float(np.max(np.abs(difference))) if difference.size else 0.0


def psnr(result: npt.ArrayLike, reference: npt.ArrayLike, *, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(peak^2 / mean squared error); infinite if equal, NaN if one has NaN.

    `peak` is 255 where the reference is uint8, else its range (largest minus smallest; largest magnitude if constant).
    The difference is taken in float64, so unsigned bytes do not wrap. Raises `ValueError` for unequal shapes.
    """
    difference = _difference(result, reference)
    error = float(np.mean(np.square(difference))) if difference.size else 0.0
    if error == 0.0:
        return math.inf
    if not math.isfinite(error):
        return math.nan if math.isnan(error) else -math.inf
    top = _peak(np.asarray(reference)) if peak is None else peak
    return 10.0 * math.log10(top * top / error) if top > 0.0 else -math.inf


def reported(db: float) -> float:
    """A PSNR as JSON can hold it: finite, between minus the cap and the cap; NaN counts as minus the cap."""
    if math.isnan(db):
        return -PSNR_CAP_DB
    return max(-PSNR_CAP_DB, min(PSNR_CAP_DB, db))


def _difference(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float64]:
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"arrays of shapes {left.shape} and {right.shape} cannot be compared")
    with np.errstate(invalid="ignore"):  # inf - inf is the NaN that the caller reports
        return left - right


def _peak(reference: npt.NDArray[np.generic]) -> float:
    if reference.dtype == np.uint8:
        return 255.0
    values = reference.astype(np.float64)
    span = float(values.max() - values.min())
    return span if span > 0.0 else float(np.abs(values).max())

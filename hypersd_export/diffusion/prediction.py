"""Conversions between what a network predicts (epsilon, v, x0) and the pair (x0, eps) that the solvers work on.

`a` is alphas_cumprod at the sample's timestep: a float, or an array that broadcasts to the sample. With
alpha = sqrt(a) and sigma = sqrt(1 - a):  x_t = alpha x0 + sigma eps  and  v = alpha eps - sigma x0
(arXiv 2202.00512, appendix D). No function divides by alpha for v and x0, so zero terminal SNR is exact there.
"""

from enum import StrEnum

from hypersd_export.diffusion.arrays import Array
from hypersd_export.errors import PlanError


class PredictionType(StrEnum):
    """What the network's output means; the first three names are diffusers', `flow` is noise - x0 (flow matching)."""

    EPSILON = "epsilon"
    V_PREDICTION = "v_prediction"
    SAMPLE = "sample"
    FLOW = "flow"


def x0_and_eps(out: Array, x: Array, a: Array, prediction_type: PredictionType) -> tuple[Array, Array]:
    """The clean sample and the noise that the output `out` for the noisy sample `x` implies.

    Divides by sqrt(a) for epsilon and by sqrt(1 - a) for sample, and by nothing for v.
    """
    alpha, sigma = a**0.5, (1 - a) ** 0.5
    if prediction_type is PredictionType.EPSILON:
        return (x - sigma * out) / alpha, out
    if prediction_type is PredictionType.SAMPLE:
        return out, (x - alpha * out) / sigma
    if prediction_type is PredictionType.V_PREDICTION:
        return alpha * x - sigma * out, alpha * out + sigma * x
    raise PlanError("prediction type flow has no alphas_cumprod: use the flow_euler solver")


def x0_of(out: Array, x: Array, a: Array, prediction_type: PredictionType) -> Array:
    """The clean sample that the output implies; divides by sqrt(a) for epsilon only."""
    if prediction_type is PredictionType.SAMPLE:
        return out
    if prediction_type is PredictionType.EPSILON:
        return (x - (1 - a) ** 0.5 * out) / a**0.5
    return x0_and_eps(out, x, a, prediction_type)[0]


def eps_of(out: Array, x: Array, a: Array, prediction_type: PredictionType) -> Array:
    """The noise that the output implies; divides by sqrt(1 - a) for sample only."""
    if prediction_type is PredictionType.EPSILON:
        return out
    return x0_and_eps(out, x, a, prediction_type)[1]


def v_of(x0: Array, eps: Array, a: Array) -> Array:
    """The velocity v = alpha eps - sigma x0 of a (clean sample, noise) pair."""
    return a**0.5 * eps - (1 - a) ** 0.5 * x0


def target_of(x0: Array, noise: Array, a: Array, prediction_type: PredictionType) -> Array:
    """What a network of this prediction type is trained to output for x_t = alpha x0 + sigma noise."""
    if prediction_type is PredictionType.EPSILON:
        return noise
    if prediction_type is PredictionType.SAMPLE:
        return x0
    if prediction_type is PredictionType.FLOW:
        return noise - x0
    return v_of(x0, noise, a)

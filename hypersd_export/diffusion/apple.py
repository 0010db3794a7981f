"""What Apple's stock runtime for Stable Diffusion plays, and the plans that it plays exactly.

The Swift package ml-stable-diffusion has a PNDM and a DPM-Solver++ scheduler. With `dpmSolverMultistepScheduler`,
linspace spacing and few steps the latter calls the network at T/N, 2 T/N, … rounded half up, is of first order (DDIM)
in its first and its last two steps and of second order between, and its picture is the last predicted x0, not the last
sample. So up to 3 steps it is DDIM on its own timesteps with a final alphas_cumprod of 1, which is a plan; from 4 steps
on it is none. Noise schedule and prediction type are fixed in its source.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from hypersd_export.diffusion.arrays import Array
from hypersd_export.diffusion.plan import FewStepPlan, Solver
from hypersd_export.diffusion.prediction import PredictionType
from hypersd_export.diffusion.schedule import NoiseSchedule
from hypersd_export.errors import PlanError

APPLE_DPMPP = "apple-dpmpp"
"""The name of that plan on the command line."""
MAX_EXACT_STEPS = 3
NEAR = 20
"""Timesteps that differ by no more than this, of 1000, are near ones."""
TOLERANCE = 1e-6
_SCHEDULE = NoiseSchedule()
_FIRST_ORDER_BELOW = 15
"""Step counts below this end with two steps of first order."""
_WAY_OUT = f"use --scheduler {APPLE_DPMPP} with 1 to {MAX_EXACT_STEPS} steps"


def apple_timesteps(num_steps: int) -> tuple[int, ...]:
    """The timesteps that Apple's scheduler calls, falling, such as 999, 500 (where diffusers has 999, 499).

    Computed in float32 and rounded half up, as in Swift.
    """
    stride = np.float32(_SCHEDULE.num_train_timesteps - 1) / np.float32(num_steps)
    return tuple(int(np.floor(np.float32(i) * stride + np.float32(0.5))) for i in range(num_steps, 0, -1))


def as_apple(plan: FewStepPlan) -> FewStepPlan:
    """The plan's steps, guidance and noise schedule, as Apple's scheduler takes them; `PlanError` beyond 3 steps."""
    if plan.num_steps > MAX_EXACT_STEPS:
        raise PlanError(
            f"steps {plan.num_steps}: {APPLE_DPMPP} has 1 to {MAX_EXACT_STEPS}, beyond which Apple's scheduler is of "
            "second order and no plan"
        )
    return replace(
        plan, solver=Solver.DDIM, timesteps=apple_timesteps(plan.num_steps), eta=0.0, set_alpha_to_one=True
    )  # fmt: skip


def plays_exactly(plan: FewStepPlan) -> bool:
    """Whether Apple's scheduler plays this plan's very table; False if it plays one that is near.

    Raises `PlanError`, with what can be played, for a plan that it cannot come near.
    """
    if plan.is_flow or plan.prediction_type is not PredictionType.EPSILON:
        raise PlanError(f"Apple's scheduler takes epsilon prediction, and the plan's is {plan.prediction_type}")
    if plan.schedule != _SCHEDULE:
        raise PlanError("Apple's scheduler has the betas of Stable Diffusion (0.00085 to 0.012), and the plan others")
    table = plan.table()
    if table.noise_streams:
        raise PlanError(f"Apple's scheduler adds no noise between the steps, and the plan does: {_WAY_OUT}")
    theirs = apple_timesteps(plan.num_steps)
    if any(abs(row.t - t) > NEAR for row, t in zip(table.rows, theirs, strict=True)):
        listed = ", ".join(f"{row.t:g}" for row in table.rows)
        raise PlanError(
            f"Apple's scheduler is called at {', '.join(map(str, theirs))}, the plan at {listed}: {_WAY_OUT}"
        )
    if plan.num_steps > MAX_EXACT_STEPS or table.init_noise_sigma != 1.0:
        return False
    names = ("t", "k", "a", "b")
    pairs = zip(table.rows, as_apple(plan).table().rows, strict=True)
    return all(abs(getattr(row, n) - getattr(other, n)) <= TOLERANCE for row, other in pairs for n in names)


def play(net: Callable[[Array, int], Array], x: Array, num_steps: int, *, dtype: Any = np.float32) -> Array:
    """Apple's scheduler, step by step: from noise `x` to the latents that it has decoded, which are the last x0.

    `net(sample, t)` is the prediction, guidance included. dtype: of the tables; float32 as in Swift, where each step's
    weights are computed in float64 from them.
    """
    alpha, sigma = _tables(dtype)
    log_snr = (np.log(alpha) - np.log(sigma)).astype(np.float64)
    times = [*apple_timesteps(num_steps), 0]
    history: list[Array] = []
    for index, (t, following) in enumerate(pairwise(times)):
        history.append((x - net(x, t) * sigma[t]) / alpha[t])
        h = log_snr[following] - log_snr[t]
        shrink = float(sigma[following]) / float(sigma[t])
        gain = -float(alpha[following]) * (np.exp(-h) - 1.0)
        x = shrink * x + gain * history[-1]
        ends = num_steps < _FIRST_ORDER_BELOW and index >= num_steps - 2
        if index > 0 and not ends:
            ratio = (log_snr[t] - log_snr[times[index - 1]]) / h
            x = x + 0.5 * gain / ratio * (history[-1] - history[-2])
    return history[-1]


def _tables(dtype: Any) -> tuple[Array, Array]:
    """Square roots of alphas_cumprod and of 1 - alphas_cumprod by timestep, all of it in `dtype`."""
    count = _SCHEDULE.num_train_timesteps
    start, end = (np.sqrt(np.array(beta, dtype)) for beta in (_SCHEDULE.beta_start, _SCHEDULE.beta_end))
    betas = (np.arange(count, dtype=dtype) * ((end - start) / np.array(count - 1, dtype)) + start) ** 2
    cumulative = np.cumprod(1 - betas, dtype=dtype)
    return np.sqrt(cumulative), np.sqrt(1 - cumulative)

"""From a plan to the rows of its table, in float64.

Each step is linear in (x, out, z), so its coefficients are its values on (1, 0, 0), (0, 1, 0) and (0, 0, 1): the rows
are read off the functions of `solver` and `prediction`, the same that the trainer calls; no formula is written twice.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hypersd_export.diffusion import solver as steps
from hypersd_export.diffusion.prediction import x0_and_eps, x0_of
from hypersd_export.diffusion.schedule import FloatArray, FlowSchedule, NoiseSchedule, TimestepSpacing
from hypersd_export.diffusion.table import PAST_THE_GRID, Row, StepTable

if TYPE_CHECKING:
    from hypersd_export.diffusion.plan import FewStepPlan

Step = Callable[[float, float, float], float]


def _row(step: Step, *, t: float, t_to: float, p: float, q: float, k: float = 1.0, noisy: bool = False) -> Row:
    """Evaluate a linear step on its basis. `noisy=False` pins c to exactly 0."""
    c = float(step(0.0, 0.0, 1.0)) if noisy else 0.0
    a, b = float(step(1.0, 0.0, 0.0)), float(step(0.0, 1.0, 0.0))
    return Row(t=float(t), t_to=float(t_to), k=float(k), a=a, b=b, c=c, p=float(p), q=float(q))


def tcd_intermediate(t_to: int, eta: float) -> int:
    """TCD's s = floor((1 - eta) t), in float32 as diffusers computes it (float64 differs at some eta and t)."""
    return int(np.floor(np.float32(1.0 - eta) * np.float32(t_to)))


def ddim_rows(plan: "FewStepPlan", schedule: NoiseSchedule, timesteps: FloatArray) -> StepTable:
    """diffusers' DDIMScheduler: lands on t - T // N, which is not always the next listed timestep.

    With explicit timesteps, which that class does not take, a row lands on the next listed one and the last row on the
    plan's final alpha.
    """
    a = schedule.alphas_cumprod()
    final = 1.0 if plan.set_alpha_to_one else float(a[0])
    stride = schedule.num_train_timesteps // plan.num_steps
    following = [*timesteps[1:], PAST_THE_GRID] if plan.timesteps is not None else list(timesteps - stride)

    def row(t: int, t_to: int) -> Row:
        a_from, a_to = float(a[t]), float(a[t_to]) if t_to >= 0 else final

        def step(x: float, out: float, z: float) -> float:
            x0, eps = x0_and_eps(out, x, a_from, plan.prediction_type)
            return float(steps.ddim_step(x0, eps, z, a_from, a_to, eta=plan.eta))

        p, q = a_from**0.5, (1 - a_from) ** 0.5
        return _row(step, t=t, t_to=max(t_to, PAST_THE_GRID), p=p, q=q, noisy=plan.eta > 0)

    return StepTable(rows=tuple(row(int(t), int(s)) for t, s in zip(timesteps, following, strict=True)))


def tcd_rows(plan: "FewStepPlan", schedule: NoiseSchedule, timesteps: FloatArray) -> StepTable:
    """diffusers' TCDScheduler: to s, then back to the next timestep; the last row lands on alphas_cumprod[0], not 1."""
    a = schedule.alphas_cumprod()
    last = len(timesteps) - 1

    def row(index: int) -> Row:
        t, t_to = int(timesteps[index]), int(timesteps[index + 1]) if index < last else 0
        noisy = plan.eta > 0 and index < last
        a_from, a_s = float(a[t]), float(a[tcd_intermediate(t_to, plan.eta)])
        a_to = float(a[t_to]) if noisy else a_s

        def step(x: float, out: float, z: float) -> float:
            x0, eps = x0_and_eps(out, x, a_from, plan.prediction_type)
            return float(steps.tcd_step(x0, eps, z, a_s, a_to))

        return _row(step, t=t, t_to=t_to, p=a_from**0.5, q=(1 - a_from) ** 0.5, noisy=noisy)

    return StepTable(rows=tuple(row(index) for index in range(len(timesteps))))


def lcm_rows(plan: "FewStepPlan", schedule: NoiseSchedule, timesteps: FloatArray) -> StepTable:
    """diffusers' LCMScheduler: the consistency function, then fresh noise at the next timestep, none after the last."""
    a = schedule.alphas_cumprod()
    last = len(timesteps) - 1

    def row(index: int) -> Row:
        t = int(timesteps[index])
        t_to = int(timesteps[index + 1]) if index < last else PAST_THE_GRID
        a_from, a_to = float(a[t]), float(a[t_to]) if index < last else 1.0

        def step(x: float, out: float, z: float) -> float:
            x0 = x0_of(out, x, a_from, plan.prediction_type)
            return float(steps.add_noise(steps.lcm_denoise(x, x0, t, plan.timestep_scaling), z, a_to))

        return _row(step, t=t, t_to=t_to, p=a_from**0.5, q=(1 - a_from) ** 0.5, noisy=index < last)

    return StepTable(rows=tuple(row(index) for index in range(len(timesteps))))


def euler_rows(plan: "FewStepPlan", schedule: NoiseSchedule, timesteps: FloatArray, *, ancestral: bool) -> StepTable:
    """diffusers' EulerDiscreteScheduler and EulerAncestralDiscreteScheduler, in VE scale: k = 1/sqrt(sigma^2 + 1).

    `k x` is the VP sample at alphas_cumprod = 1/(sigma^2 + 1), so the prediction conversions are those of VP.
    `init_noise_sigma` is sigma_max for trailing and linspace, sqrt(sigma_max^2 + 1) for leading.
    """
    grid = schedule.euler_sigmas()
    sigmas = [*np.interp(timesteps, np.arange(len(grid)), grid), 0.0]
    landings = [*timesteps[1:], float(PAST_THE_GRID)]

    def row(index: int) -> Row:
        sigma, sigma_to = float(sigmas[index]), float(sigmas[index + 1])
        k = 1.0 / (sigma * sigma + 1.0) ** 0.5
        sigma_down, sigma_up = steps.ancestral_sigmas(sigma, sigma_to) if ancestral else (sigma_to, 0.0)

        def step(x: float, out: float, z: float) -> float:
            x0 = x0_of(out, k * x, k * k, plan.prediction_type)
            return float(steps.euler_step(x, x0, sigma, sigma_down) + sigma_up * z)

        return _row(step, t=timesteps[index], t_to=landings[index], k=k, p=1.0, q=sigma, noisy=ancestral)

    top = max(sigmas)
    scale = (top * top + 1.0) ** 0.5 if plan.timestep_spacing is TimestepSpacing.LEADING else top
    return StepTable(rows=tuple(row(index) for index in range(len(timesteps))), init_noise_sigma=float(scale))


def flow_rows(num_steps: int, schedule: FlowSchedule, *, height: int | None, width: int | None) -> StepTable:
    """diffusers' FlowMatchEulerDiscreteScheduler: t is sigma * T; `t_to` of the last row is 0, the clean sample."""
    sigmas = schedule.sigmas(num_steps, height=height, width=width)
    total = schedule.num_train_timesteps

    def row(sigma: float, sigma_to: float) -> Row:
        def step(x: float, out: float, z: float) -> float:
            del z  # deterministic
            return float(steps.flow_step(x, out, sigma, sigma_to))

        return _row(step, t=sigma * total, t_to=sigma_to * total, p=1.0 - sigma, q=sigma)

    return StepTable(rows=tuple(row(float(s), float(e)) for s, e in pairwise(sigmas)))

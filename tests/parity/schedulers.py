"""A diffusers scheduler over a whole trajectory, as a pipeline runs it: given noises and a deterministic network."""

from dataclasses import dataclass
from importlib import import_module
from unittest.mock import patch

import numpy as np

from hypersd_export.diffusion import FewStepPlan, diffusers_scheduler, steps

SHAPE = (1, 4, 8, 8)


def dummy_net(x, t):
    """A smooth, bounded, non-linear network that depends on position and on the timestep; NumPy or torch."""
    cos = np.cos if isinstance(x, np.ndarray) else x.__class__.cos
    return 0.9 * cos(1.3 * x + 0.002 * t) - 0.2 * x


def noises(count, seed=0):
    """Initial noise and one noise per step, float32."""
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(SHAPE).astype(np.float32) for _ in range(count + 1)]


@dataclass
class Trajectory:
    """Samples before the first step and after each, the timesteps, and how often noise was drawn."""

    samples: list[np.ndarray]
    timesteps: list[float]
    draws: int


def build(plan: FewStepPlan):
    """The scheduler object of a plan, made from the config that we write, and its call."""
    call = diffusers_scheduler(plan)
    module = import_module("diffusers")
    config = {key: value for key, value in call.config.items() if key != "_class_name"}
    return getattr(module, call.class_name)(**config), call


def set_timesteps(scheduler, call, **extra):
    """What `retrieve_timesteps` of a pipeline does."""
    chosen = {key: call.call[key] for key in ("timesteps", "num_inference_steps") if key in call.call}
    scheduler.set_timesteps(**chosen, **extra)


class _Float64Torch:
    """Stands in for the name `torch` in a scheduler's module while it steps: its float32 is float64."""

    def __getattr__(self, name):
        import torch

        return torch.float64 if name == "float32" else getattr(torch, name)


def to_double(scheduler):
    """Turn the scheduler's own float32 tables into float64, value for value."""
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


def run_diffusers(scheduler, call, zs, *, double=False, start=0, x=None) -> Trajectory:
    """The denoising loop of StableDiffusionPipeline, with zs[0] as initial and zs[i] as step i's noise.

    In float32, as users run it; with `double`, the same code on the same tables in float64, which shows what is
    rounding in diffusers and what would be a mistake of ours. `start` and `x` are those of image-to-image.
    """
    import torch

    module = import_module(type(scheduler).__module__)
    dtype = torch.float64 if double else torch.float32
    zs = [torch.from_numpy(z).to(dtype) for z in zs]
    if double:
        to_double(scheduler)
    step, draws = start, 0

    def given_noise(shape, generator=None, device=None, dtype=None, layout=None):
        nonlocal draws
        draws += 1
        return zs[step]

    x = zs[0] * getattr(scheduler, "init_noise_sigma", 1.0) if x is None else torch.from_numpy(x).to(dtype)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    samples, timesteps = [x.numpy().copy()], []
    extra = {"eta": call.call["eta"]} if "eta" in call.call else {}
    stand_ins = {"randn_tensor": given_noise, **({"torch": _Float64Torch()} if double else {})}
    with patch.multiple(module, **{name: value for name, value in stand_ins.items() if hasattr(module, name)}):
        for t in scheduler.timesteps[start:]:
            step += 1
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(dummy_net(scaled, float(t)), t, x, return_dict=False, **extra)[0]
            assert x.dtype == dtype
            samples.append(x.numpy().copy())
            timesteps.append(float(t))
    return Trajectory(samples=samples, timesteps=timesteps, draws=draws)


def run_table(table, zs, *, double=False, start=0, x=None) -> Trajectory:
    """The same with our table, in NumPy."""
    zs = [z.astype(np.float64 if double else np.float32) for z in zs]
    x = zs[0] * table.init_noise_sigma if x is None else x
    drawn = []

    def step_noise(number):
        drawn.append(number)
        return zs[number]

    samples, timesteps = [x], []
    for _, row, sample in steps(table, dummy_net, x, step_noise=step_noise, start=start):
        samples.append(sample)
        timesteps.append(row.t)
    return Trajectory(samples=samples, timesteps=timesteps, draws=len(drawn))


def distance(ours: Trajectory, theirs: Trajectory) -> float:
    """The worst sample of the trajectory: max |difference| over max(1, max |diffusers' sample|)."""
    assert len(ours.samples) == len(theirs.samples)
    worst = 0.0
    for a, b in zip(ours.samples, theirs.samples, strict=True):
        assert a.dtype == b.dtype
        gap = np.abs(a.astype(np.float64) - b).max() / max(1.0, float(np.abs(b).max()))
        worst = float("nan") if np.isnan(gap) else max(worst, float(gap))
    return worst

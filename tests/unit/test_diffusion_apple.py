"""Apple's scheduler: its timesteps as Swift rounds them, the plans that are it, and those that come near."""

from dataclasses import replace

import numpy as np
import pytest

from hypersd_export.diffusion import (
    BetaSchedule,
    FewStepPlan,
    FlowSchedule,
    Guidance,
    NoiseSchedule,
    PredictionType,
    Solver,
    TimestepSpacing,
    run,
)
from hypersd_export.diffusion.apple import apple_timesteps, as_apple, play, plays_exactly
from hypersd_export.errors import PlanError

DDIM = FewStepPlan(solver=Solver.DDIM, num_steps=2)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, [999]), (2, [999, 500]), (3, [999, 666, 333]), (4, [999, 749, 500, 250]),
     (8, [999, 874, 749, 624, 500, 375, 250, 125])],
)  # fmt: skip
def test_timesteps(steps, expected):
    assert list(apple_timesteps(steps)) == expected


def record(seed, count):
    """A network that gives seeded noise, and what it was shown."""
    outputs = np.random.default_rng(seed).standard_normal((count, 64))
    seen: list[tuple[float, np.ndarray]] = []

    def net(x, t):
        seen.append((float(t), np.array(x)))
        return outputs[len(seen) - 1] + 0.3 * x

    return net, seen


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_plan_is_the_scheduler(steps):
    x = np.random.default_rng(9).standard_normal(64)
    plan = as_apple(replace(DDIM, num_steps=steps, eta=0.3, guidance=Guidance.of(3.0)))
    assert plan.guidance == Guidance.of(3.0)
    assert plays_exactly(plan)
    (ours, shown), (theirs, shown_there) = record(1, steps), record(1, steps)
    table = run(plan.table(), ours, x)
    exact = play(theirs, x, steps, dtype=np.float64)
    assert np.abs(table - exact).max() <= 1e-6
    assert [t for t, _ in shown] == [t for t, _ in shown_there]
    for (_, mine), (_, other) in zip(shown, shown_there, strict=True):
        assert np.abs(mine - other).max() <= 1e-6
    swift = play(record(1, steps)[0], x.astype(np.float32), steps)  # with the tables of Swift, in float32
    assert np.abs(table - swift).max() <= 2e-5 * np.abs(table).max()


def test_the_scheduler_is_diffusers_own_but_for_its_last_two_steps():
    """DPM-Solver++(2M) of diffusers on Apple's timesteps. Below 15 steps that is of first order in the last step, and
    Swift's in the last two."""
    torch = pytest.importorskip("torch")
    from diffusers import DPMSolverMultistepScheduler

    for steps in (2, 5, 20):
        scheduler = DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", solver_order=2,
            algorithm_type="dpmsolver++", lower_order_final=True, timestep_spacing="linspace",
            final_sigmas_type="sigma_min",
        )  # fmt: skip
        scheduler.set_timesteps(timesteps=list(apple_timesteps(steps)))
        x = np.random.default_rng(2).standard_normal(64)
        net, seen = record(3, steps)
        play(net, x, steps, dtype=np.float64)
        other, _ = record(3, steps)
        sample = torch.from_numpy(x)
        for index, t in enumerate(scheduler.timesteps):
            if index < steps - 1 or steps >= 15:
                assert np.abs(seen[index][1] - sample.numpy()).max() < 1e-4 * np.abs(x).max()
            sample = scheduler.step(torch.from_numpy(other(sample.numpy(), int(t))), t, sample).prev_sample


@pytest.mark.parametrize(
    "plan",
    [
        DDIM,
        replace(DDIM, num_steps=1, timesteps=(999,)),
        replace(DDIM, num_steps=4),
        replace(DDIM, num_steps=3, set_alpha_to_one=True),
        FewStepPlan(solver=Solver.TCD, num_steps=1, eta=1.0),
        FewStepPlan(solver=Solver.EULER, num_steps=2),
    ],
)
def test_near_plans(plan):
    assert not plays_exactly(plan)


def test_one_step_to_a_clean_sample_is_exact_without_being_asked_for():
    assert plays_exactly(replace(DDIM, num_steps=1, set_alpha_to_one=True))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (replace(DDIM, prediction_type=PredictionType.V_PREDICTION),
         "takes epsilon prediction, and the plan's is v_prediction"),
        (FewStepPlan(solver=Solver.FLOW_EULER, num_steps=2, prediction_type=PredictionType.FLOW,
                     schedule=FlowSchedule()), "takes epsilon prediction, and the plan's is flow"),
        (replace(DDIM, schedule=NoiseSchedule(beta_schedule=BetaSchedule.LINEAR)), "has the betas of Stable Diffusion"),
        (FewStepPlan(solver=Solver.LCM, num_steps=2), "adds no noise .* use --scheduler apple-dpmpp with 1 to 3 steps"),
        (FewStepPlan(solver=Solver.TCD, num_steps=2, eta=0.3), "adds no noise"),
        (replace(DDIM, num_steps=1, timesteps=(800,)), "is called at 999, the plan at 800: use --scheduler"),
        (replace(DDIM, timestep_spacing=TimestepSpacing.LEADING), "is called at 999, 500, the plan at 500, 0"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be_played(plan, said):
    with pytest.raises(PlanError, match=said):
        plays_exactly(plan)


def test_more_than_three_steps_are_no_plan():
    with pytest.raises(PlanError, match=r"steps 4: apple-dpmpp has 1 to 3, beyond which .* second order"):
        as_apple(replace(DDIM, num_steps=4))

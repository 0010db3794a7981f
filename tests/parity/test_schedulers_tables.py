"""Step tables against diffusers' schedulers: whole trajectories, the same network and the same injected noises.

The norm is `schedulers.distance`: over all samples of a trajectory, max |difference| / max(1, max |sample|). Each runs
twice: in float32 as users run diffusers, and with the same diffusers code and tables in float64 arithmetic.
"""

from itertools import product

import numpy as np
import pytest

from hypersd_export.diffusion import (
    FewStepPlan,
    FlowConvention,
    FlowSchedule,
    NoiseSchedule,
    PredictionType,
    Solver,
    TimestepSpacing,
    start_sample,
)
from hypersd_export.diffusion.rows import tcd_intermediate
from hypersd_export.errors import PlanError
from tests.parity.schedulers import build, distance, noises, run_diffusers, run_table, set_timesteps

# diffusers 0.42 itself, with NumPy 2: not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-4
STEP_COUNTS = (*range(1, 17), 50)
VP_PREDICTIONS = (PredictionType.EPSILON, PredictionType.V_PREDICTION, PredictionType.SAMPLE)
VP_SOLVERS = (Solver.DDIM, Solver.TCD, Solver.LCM)
# EulerAncestralDiscreteScheduler has no prediction_type sample: test_diffusers_has_no_ancestral_sample_prediction.
EULER_PAIRS = [
    *product((Solver.EULER,), VP_PREDICTIONS),
    *product((Solver.EULER_ANCESTRAL,), VP_PREDICTIONS[:2]),
]
ZERO_SNR = NoiseSchedule(rescale_betas_zero_snr=True)


@pytest.fixture(autouse=True)
def quiet_diffusers():
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def plans(solver, prediction, schedule):
    """All combinations of what the solver reads, for all step counts; those with no plan are tested by name below."""
    spacings = tuple(TimestepSpacing) if solver not in (Solver.TCD, Solver.LCM) else (TimestepSpacing.TRAILING,)
    etas = (0.0, 0.3, 1.0) if solver in (Solver.DDIM, Solver.TCD) else (0.0,)
    finals = (False, True) if solver is Solver.DDIM else (False,)
    for num_steps, spacing, eta, final in product(STEP_COUNTS, spacings, etas, finals):
        yield {
            "solver": solver, "num_steps": num_steps, "prediction_type": prediction, "schedule": schedule,
            "timestep_spacing": spacing, "steps_offset": 1, "set_alpha_to_one": final, "eta": eta,
        }  # fmt: skip


def compare(plan, *, double=False):
    """(distance, our trajectory, diffusers' trajectory) after checking the timesteps."""
    scheduler, call = build(plan)
    set_timesteps(scheduler, call)
    zs = noises(plan.num_steps)
    theirs = run_diffusers(scheduler, call, zs, double=double)
    ours = run_table(plan.table(), zs, double=double)
    assert ours.timesteps == theirs.timesteps, plan
    return distance(ours, theirs), ours, theirs


@pytest.mark.parametrize(("solver", "prediction"), [*product(VP_SOLVERS, VP_PREDICTIONS), *EULER_PAIRS])
def test_whole_trajectories(solver, prediction):
    for arguments in plans(solver, prediction, NoiseSchedule()):
        plan = FewStepPlan(**arguments)
        assert compare(plan)[0] < TOLERANCE, plan
        assert compare(plan, double=True)[0] < TOLERANCE, plan


@pytest.mark.parametrize(("solver", "prediction"), list(product(VP_SOLVERS, VP_PREDICTIONS)))
def test_zero_terminal_snr_vp(solver, prediction):
    for arguments in plans(solver, prediction, ZERO_SNR):
        at_the_end = solver in (Solver.TCD, Solver.LCM) or (
            arguments["timestep_spacing"] is TimestepSpacing.TRAILING
            or (arguments["timestep_spacing"] is TimestepSpacing.LINSPACE and arguments["num_steps"] > 1)
        )
        if at_the_end and prediction is PredictionType.EPSILON:
            with pytest.raises(PlanError, match="no signal is left"):
                FewStepPlan(**arguments)
            continue
        plan = FewStepPlan(**arguments)
        if at_the_end and solver is Solver.DDIM and plan.eta == 1.0:
            check_ddim_full_noise_from_zero_snr(plan)
            continue
        assert compare(plan)[0] < TOLERANCE, plan
        assert compare(plan, double=True)[0] < TOLERANCE, plan


def check_ddim_full_noise_from_zero_snr(plan):
    """Ours is finite always; diffusers' is off by the root of a rounding error, or NaN where that is negative: at which
    numbers of steps depends on the processor.

    With eta 1 it takes the root of 1 - a_to - std^2, which is 0.
    """
    for double, tolerance in ((False, 3e-4), (True, TOLERANCE)):
        gap, ours, theirs = compare(plan, double=double)
        assert all(np.isfinite(sample).all() for sample in ours.samples)
        assert gap < tolerance or np.isnan(theirs.samples[-1]).all(), plan
    from dataclasses import replace

    assert compare(replace(plan, eta=0.9999))[0] < TOLERANCE, plan


@pytest.mark.parametrize(("solver", "prediction"), EULER_PAIRS)
def test_zero_terminal_snr_euler(solver, prediction):
    """sigma starts at 4096 (alphas_cumprod 2^-24), so float32 leaves 4096 * 2^-24 of absolute error in diffusers."""
    for arguments in plans(solver, prediction, ZERO_SNR):
        plan = FewStepPlan(**arguments)
        assert compare(plan, double=True)[0] < TOLERANCE, plan
        gap = compare(plan)[0]
        from_4096 = plan.table().rows[0].t == 999 and prediction is not PredictionType.EPSILON
        assert gap < (2e-3 if from_4096 else TOLERANCE), plan


def test_diffusers_has_no_ancestral_sample_prediction():
    plan = FewStepPlan(solver=Solver.EULER_ANCESTRAL, num_steps=4, prediction_type=PredictionType.SAMPLE)
    scheduler, call = build(plan)
    assert not call.exact
    set_timesteps(scheduler, call)
    with pytest.raises(NotImplementedError):
        run_diffusers(scheduler, call, noises(4))
    # Ours equals Euler's x0 step to sigma_down; one step is plain Euler.
    one = FewStepPlan(solver=Solver.EULER_ANCESTRAL, num_steps=1, prediction_type=PredictionType.SAMPLE)
    euler = FewStepPlan(solver=Solver.EULER, num_steps=1, prediction_type=PredictionType.SAMPLE)
    assert one.table() == euler.table()


@pytest.mark.parametrize("solver", [Solver.TCD, Solver.LCM])
def test_both_refuse_more_steps_than_the_distillation_grid(solver):
    with pytest.raises(PlanError, match=r"^steps 51: .* at most original_inference_steps = 50"):
        FewStepPlan(solver=solver, num_steps=51)
    scheduler, _ = build(FewStepPlan(solver=solver, num_steps=50))
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps(51)


def test_both_refuse_a_leading_offset_beyond_the_schedule():
    arguments = {"solver": Solver.DDIM, "num_steps": 1000, "timestep_spacing": TimestepSpacing.LEADING}
    with pytest.raises(PlanError, match=r"^timestep 1000: the schedule ends at 999"):
        FewStepPlan(**arguments, steps_offset=1)
    scheduler, call = build(FewStepPlan(**arguments))
    scheduler.register_to_config(steps_offset=1)
    scheduler.set_timesteps(1000)
    with pytest.raises(IndexError):
        run_diffusers(scheduler, call, noises(1000))


@pytest.mark.parametrize("spacing", list(TimestepSpacing))
def test_timesteps_of_every_step_count(spacing):
    """DDIM's and Euler's timesteps for N = 1 … 1000; trailing overshoots in diffusers for 62 of them."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    ddim, euler = DDIMScheduler(timestep_spacing=spacing.value), EulerDiscreteScheduler(timestep_spacing=spacing.value)
    overshoots = []
    for num_steps in range(1, 1001):
        ours = FewStepPlan(solver=Solver.DDIM, num_steps=num_steps, timestep_spacing=spacing)
        ddim.set_timesteps(num_steps)
        theirs = ddim.timesteps.tolist()
        if len(theirs) != num_steps:
            overshoots.append(num_steps)
            assert theirs.pop() == -1
        assert ours.net_timesteps().tolist() == theirs
        if num_steps % 37 == 1:
            euler.set_timesteps(num_steps)
            ours = FewStepPlan(solver=Solver.EULER, num_steps=num_steps, timestep_spacing=spacing)
            assert ours.net_timesteps().tolist() == euler.timesteps.tolist()[:num_steps]
    assert len(overshoots) == (62 if spacing is TimestepSpacing.TRAILING else 0)
    assert overshoots[:4] == ([61, 103, 121, 122] if overshoots else [])


@pytest.mark.parametrize("solver", [Solver.TCD, Solver.LCM])
@pytest.mark.parametrize("original", [20, 25, 40, 50, 100, 999])
def test_consistency_timesteps_of_every_step_count(solver, original):
    scheduler, _ = build(FewStepPlan(solver=solver, num_steps=1, original_inference_steps=original))
    for num_steps in range(1, original + 1):
        scheduler.set_timesteps(num_steps)
        plan = FewStepPlan(solver=solver, num_steps=num_steps, original_inference_steps=original)
        assert plan.net_timesteps().tolist() == scheduler.timesteps.tolist()


def test_tcd_intermediate_timestep_for_all_t_and_eta():
    """s = floor((1 - eta) t) is float32 in diffusers, and float64 differs from that."""
    import torch

    differs = 0
    for eta in [0.0, *(tenth / 10 for tenth in range(1, 10)), 1.0]:
        # One at a time: diffusers multiplies 0-dimensional tensors.
        theirs = [int(torch.floor((1 - eta) * torch.tensor(t)).to(dtype=torch.long)) for t in range(1000)]
        assert [tcd_intermediate(t, eta) for t in range(1000)] == theirs
        differs += sum(int(np.floor((1 - eta) * t)) != s for t, s in enumerate(theirs))
    assert differs > 0


EXPLICIT = [
    ({"solver": Solver.LCM}, (800,), "LCMScheduler"),
    ({"solver": Solver.LCM}, (999, 700, 401, 99), "LCMScheduler"),
    ({"solver": Solver.TCD, "eta": 0.3}, (999, 800, 500, 0), "TCDScheduler"),
    ({"solver": Solver.TCD, "eta": 1.0}, (800, 11), "TCDScheduler"),
    ({"solver": Solver.EULER}, (999, 700, 400, 100), "EulerDiscreteScheduler"),
    ({"solver": Solver.EULER, "timestep_spacing": TimestepSpacing.LEADING}, (900, 50), "EulerDiscreteScheduler"),
    ({"solver": Solver.EULER_ANCESTRAL}, (800,), "EulerDiscreteScheduler"),
    ({"solver": Solver.DDIM}, (999, 640, 320, 100), "TCDScheduler"),
    ({"solver": Solver.DDIM, "prediction_type": PredictionType.V_PREDICTION}, (800,), "TCDScheduler"),
]


@pytest.mark.parametrize(("arguments", "timesteps", "class_name"), EXPLICIT)
def test_explicit_timesteps(arguments, timesteps, class_name):
    plan = FewStepPlan(num_steps=len(timesteps), timesteps=timesteps, **arguments)
    _, call = build(plan)
    assert (call.class_name, call.exact) == (class_name, True)
    assert compare(plan)[0] < TOLERANCE


def test_custom_noise_schedules():
    for schedule in (
        NoiseSchedule(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        NoiseSchedule(beta_schedule="squaredcos_cap_v2"),
        NoiseSchedule(num_train_timesteps=400),
    ):
        for solver in (Solver.DDIM, Solver.TCD, Solver.LCM, Solver.EULER, Solver.EULER_ANCESTRAL):
            for num_steps in (1, 4, 7):
                # From the cosine schedule's end (alphas_cumprod 2e-9) epsilon-prediction amplifies by 2e4.
                plan = FewStepPlan(
                    solver=solver, num_steps=num_steps, schedule=schedule, prediction_type=PredictionType.V_PREDICTION
                )
                assert compare(plan, double=True)[0] < TOLERANCE, plan


FLOWS = {
    "sd3": (FlowSchedule(shift=3.0), None),
    "unshifted": (FlowSchedule(shift=1.0), None),
    "sd3 dynamic": (FlowSchedule(use_dynamic_shifting=True), (768, 1024)),
    "flux": (FlowSchedule(convention=FlowConvention.FLUX, use_dynamic_shifting=True), (1024, 768)),
    "schnell": (FlowSchedule(convention=FlowConvention.FLUX, shift=1.0), None),
}


def flow_scheduler(plan, size):
    """Scheduler and call as the SD3 and FLUX pipelines set them up; mu by FLUX's own function."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler, call = build(plan)
    extra = {}
    if plan.schedule.use_dynamic_shifting:
        height, width = size
        config = scheduler.config
        extra["mu"] = calculate_shift(
            (height // 16) * (width // 16), config["base_image_seq_len"], config["max_image_seq_len"],
            config["base_shift"], config["max_shift"],
        )  # fmt: skip
    if plan.schedule.convention is FlowConvention.FLUX:
        count = plan.num_steps
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), **extra)
    else:
        set_timesteps(scheduler, call, **extra)
    return scheduler, call


@pytest.mark.parametrize("name", list(FLOWS))
def test_flow_match_euler(name):
    schedule, size = FLOWS[name]
    for num_steps in STEP_COUNTS:
        plan = FewStepPlan(
            solver=Solver.FLOW_EULER, num_steps=num_steps, prediction_type=PredictionType.FLOW, schedule=schedule
        )
        zs = noises(num_steps)
        height, width = size or (None, None)
        table = plan.table(height=height, width=width)
        for double in (False, True):
            scheduler, call = flow_scheduler(plan, size)
            theirs = run_diffusers(scheduler, call, zs, double=double)
            ours = run_table(table, zs, double=double)
            np.testing.assert_allclose(ours.timesteps, theirs.timesteps, rtol=1e-6)
            assert distance(ours, theirs) < TOLERANCE, plan
            assert theirs.draws == ours.draws == 0


def test_sd3_shifts_twice_and_flux_once():
    """The two conventions at 2 steps, by hand: shift(s) = 3s/(1 + 2s)."""

    def shift(sigma):
        return 3 * sigma / (1 + 2 * sigma)

    np.testing.assert_allclose(FlowSchedule().sigmas(2), [1.0, shift(shift(0.001)), 0.0], rtol=1e-12)
    flux = FlowSchedule(convention=FlowConvention.FLUX, shift=3.0)
    np.testing.assert_allclose(flux.sigmas(2), [1.0, shift(0.5), 0.0], rtol=1e-12)


@pytest.mark.parametrize("solver", [Solver.DDIM, Solver.TCD, Solver.LCM, Solver.EULER, Solver.EULER_ANCESTRAL])
def test_image_to_image_start(solver):
    """p and q against the scheduler's add_noise, then the rest of the trajectory."""
    import torch

    eta = 0.3 if solver in (Solver.DDIM, Solver.TCD) else 0.0
    plan = FewStepPlan(solver=solver, num_steps=5, eta=eta)
    table, zs = plan.table(), noises(5)
    latents = noises(0, seed=7)[0]
    for start in range(5):
        scheduler, call = build(plan)
        set_timesteps(scheduler, call)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        t = scheduler.timesteps[start : start + 1]
        theirs = scheduler.add_noise(torch.from_numpy(latents), torch.from_numpy(zs[0]), t).numpy()
        ours = start_sample(table, start=start, latents=latents, noise=zs[0])
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        rest = run_diffusers(scheduler, call, zs, start=start, x=theirs)
        assert distance(run_table(table, zs, start=start, x=ours), rest) < TOLERANCE


@pytest.mark.parametrize("name", list(FLOWS))
def test_image_to_image_start_of_flow(name):
    import torch

    schedule, size = FLOWS[name]
    plan = FewStepPlan(solver=Solver.FLOW_EULER, num_steps=5, prediction_type=PredictionType.FLOW, schedule=schedule)
    height, width = size or (None, None)
    table, (z,) = plan.table(height=height, width=width), noises(0)
    latents = noises(0, seed=7)[0]
    for start in range(5):
        scheduler, _ = flow_scheduler(plan, size)
        t = scheduler.timesteps[start : start + 1]
        theirs = scheduler.scale_noise(torch.from_numpy(latents), t, torch.from_numpy(z)).numpy()
        np.testing.assert_allclose(start_sample(table, start=start, latents=latents, noise=z), theirs, atol=1e-5)


def test_noise_is_drawn_only_where_it_is_used():
    """The table never draws noise that it multiplies by zero; diffusers does, which matters to nothing but its RNG."""
    expected = {
        (Solver.DDIM, 0.3, False): (5, 5),
        (Solver.DDIM, 0.3, True): (4, 5),
        (Solver.DDIM, 0.0, False): (0, 0),
        (Solver.TCD, 0.3, False): (4, 4),
        (Solver.LCM, 0.0, False): (4, 4),
        (Solver.EULER, 0.0, False): (0, 0),
        (Solver.EULER_ANCESTRAL, 0.0, False): (4, 5),
    }
    for (solver, eta, final), counts in expected.items():
        plan = FewStepPlan(solver=solver, num_steps=5, eta=eta, set_alpha_to_one=final)
        _, ours, theirs = compare(plan)
        assert (ours.draws, theirs.draws) == counts, plan
        assert len(plan.table().noise_streams) == counts[0]

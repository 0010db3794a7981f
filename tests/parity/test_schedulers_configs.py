"""Configs both ways: what we write loads in diffusers with nothing left to defaults and reads back as the same plan."""

import inspect
from dataclasses import replace

import numpy as np
import pytest

from hypersd_export.diffusion import (
    PRESETS,
    BetaSchedule,
    FewStepPlan,
    FlowSchedule,
    Guidance,
    NoiseSchedule,
    PredictionType,
    Solver,
    diffusers_scheduler,
    plan_from_scheduler_config,
)
from hypersd_export.diffusion.scheduler_config import CLASS_DEFAULTS, NEAREST, SOLVER_CLASSES
from tests.parity.schedulers import build, distance, noises, run_diffusers, run_table, set_timesteps
from tests.parity.test_schedulers_tables import flow_scheduler

# diffusers 0.42 itself, with NumPy 2: not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("solver", list(Solver))
def test_class_defaults_are_those_of_diffusers(solver):
    import diffusers

    parameters = inspect.signature(getattr(diffusers, SOLVER_CLASSES[solver]).__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    assert CLASS_DEFAULTS[solver] == defaults


def test_refused_classes_exist_in_diffusers():
    import diffusers

    for name in NEAREST:
        assert hasattr(diffusers, name), name


@pytest.mark.parametrize("beta_schedule", list(BetaSchedule))
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_cumprod(beta_schedule, zero_snr):
    from diffusers import DDIMScheduler

    schedule = NoiseSchedule(beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule=beta_schedule.value, rescale_betas_zero_snr=zero_snr
    )
    ours = schedule.alphas_cumprod()
    np.testing.assert_allclose(ours, scheduler.alphas_cumprod.double().numpy(), rtol=0, atol=1e-6)
    assert (ours[-1] == 0.0) == zero_snr


@pytest.mark.parametrize("zero_snr", [False, True])
def test_euler_sigmas(zero_snr):
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr
    )
    ours = NoiseSchedule(rescale_betas_zero_snr=zero_snr).euler_sigmas()[::-1]
    theirs = scheduler.sigmas[:-1].double().numpy()
    # With zero SNR the float32 cumprod loses half its digits just below the end (alphas_cumprod 5e-9 at t = 998).
    np.testing.assert_allclose(ours[2:], theirs[2:], rtol=3e-4 if zero_snr else 3e-5)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)


VP_PLANS = [
    FewStepPlan(solver=Solver.DDIM, num_steps=4, eta=0.3, set_alpha_to_one=True, steps_offset=1),
    FewStepPlan(
        solver=Solver.DDIM, num_steps=8, prediction_type=PredictionType.V_PREDICTION,
        schedule=NoiseSchedule(rescale_betas_zero_snr=True), guidance=Guidance.of(7.5),
    ),
    FewStepPlan(solver=Solver.TCD, num_steps=4, eta=0.3, original_inference_steps=40),
    FewStepPlan(solver=Solver.LCM, num_steps=1, timesteps=(800,), timestep_scaling=5.0),
    FewStepPlan(solver=Solver.EULER, num_steps=2, prediction_type=PredictionType.SAMPLE, timestep_spacing="linspace"),
    FewStepPlan(solver=Solver.EULER_ANCESTRAL, num_steps=3, schedule=NoiseSchedule(beta_schedule="squaredcos_cap_v2")),
]  # fmt: skip


@pytest.mark.parametrize("plan", VP_PLANS, ids=lambda plan: plan.solver.value)
def test_config_round_trip_through_a_diffusers_object(plan, tmp_path):
    """Our config → scheduler → save_config → plan: the same table, and every constructor argument was explicit."""
    import json

    import diffusers

    call = diffusers_scheduler(plan)
    assert set(call.config) - {"_class_name"} == set(CLASS_DEFAULTS[plan.solver])
    (tmp_path / "scheduler_config.json").write_text(json.dumps(call.config))
    scheduler = getattr(diffusers, call.class_name).from_pretrained(tmp_path)
    assert scheduler.config.get("_use_default_values", []) == []
    scheduler.save_config(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "scheduler_config.json").read_text())
    again = plan_from_scheduler_config(
        saved, num_steps=plan.num_steps, guidance=plan.guidance, eta=plan.eta, timesteps=plan.timesteps
    )
    assert again.table() == plan.table()
    assert again.guidance == plan.guidance


def test_flow_config_round_trip():
    schedule = FlowSchedule(shift=2.5, max_shift=1.3)
    plan = FewStepPlan(solver=Solver.FLOW_EULER, num_steps=4, prediction_type=PredictionType.FLOW, schedule=schedule)
    scheduler, call = build(plan)
    again = plan_from_scheduler_config(
        {**scheduler.config, "_class_name": call.class_name}, num_steps=4, flow_convention=schedule.convention
    )
    assert again == plan


@pytest.mark.parametrize("entry", PRESETS, ids=lambda entry: entry.name)
def test_every_preset_is_exact_in_diffusers(entry):
    size = (1024, 1024)
    zs = noises(entry.plan.num_steps)
    if entry.plan.is_flow:
        scheduler, call = flow_scheduler(entry.plan, size)
        table = entry.plan.table(height=size[0], width=size[1])
    else:
        scheduler, call = build(entry.plan)
        set_timesteps(scheduler, call)
        table = entry.plan.table()
    assert call.exact
    theirs = run_diffusers(scheduler, call, zs)
    assert distance(run_table(table, zs), theirs) < 1e-4


def test_preset_schedules_come_from_the_base_models_config():
    """`Scheduler.from_config(pipe.scheduler.config, …)` of the model cards, on the SD 1.5 and SDXL configs."""
    sd15 = {
        "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None, "clip_sample": False,
    }  # fmt: skip
    sdxl = {
        "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear", "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
    }  # fmt: skip
    for entry in PRESETS:
        if entry.plan.is_flow:
            continue
        base = dict(sd15 if entry.family == "sd15" else sdxl)
        base["timestep_spacing"] = "trailing"
        base["prediction_type"] = entry.plan.prediction_type.value
        ours = plan_from_scheduler_config(
            base, num_steps=entry.plan.num_steps, guidance=entry.plan.guidance, eta=entry.plan.eta,
            timesteps=entry.plan.timesteps, solver=entry.plan.solver,
        )  # fmt: skip
        assert replace(ours, steps_offset=0).table() == entry.plan.table(), entry.name

"""scheduler_config.json to plan, plan to diffusers call: what needs no diffusers to be checked."""

import subprocess
import sys

import pytest

import hypersd_export.diffusion as diffusion
from hypersd_export.diffusion import (
    FewStepPlan,
    FlowConvention,
    FlowSchedule,
    Guidance,
    PredictionType,
    Solver,
    TimestepSpacing,
    diffusers_scheduler,
    plan_from_scheduler_config,
)
from hypersd_export.diffusion.scheduler_config import NEAREST
from hypersd_export.errors import PlanError

SD15_PNDM = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
DDIM = {**SD15_PNDM, "_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
EULER = {**SD15_PNDM, "_class_name": "EulerDiscreteScheduler"}
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}


def test_ddim_config():
    plan = plan_from_scheduler_config(DDIM, num_steps=4, guidance=Guidance.of(7.5), eta=0.3)
    assert plan == FewStepPlan(
        solver=Solver.DDIM, num_steps=4, guidance=Guidance.of(7.5), eta=0.3, steps_offset=1, set_alpha_to_one=False
    )


def test_absent_keys_mean_the_class_defaults():
    plan = plan_from_scheduler_config(EULER, num_steps=2)
    assert plan.timestep_spacing is TimestepSpacing.LINSPACE
    with pytest.raises(
        PlanError, match=r"^clip_sample is on in the scheduler config and is not linear; set it to false$"
    ):
        plan_from_scheduler_config({"_class_name": "DDIMScheduler"}, num_steps=2)
    bare = plan_from_scheduler_config({"_class_name": "DDIMScheduler", "clip_sample": False}, num_steps=2)
    assert (bare.schedule.beta_start, bare.schedule.beta_schedule) == (0.0001, "linear")
    assert (bare.set_alpha_to_one, bare.timestep_spacing) == (True, TimestepSpacing.LEADING)


@pytest.mark.parametrize(
    ("class_name", "nearest"),
    [
        ("PNDMScheduler", r"multistep\); the nearest plan: --scheduler ddim$"),
        ("DPMSolverMultistepScheduler", r"multistep\); the nearest plan: --scheduler ddim, which is its first order$"),
        ("UniPCMultistepScheduler", r"multistep\); the nearest plan: --scheduler ddim$"),
        ("DEISMultistepScheduler", r"multistep\); the nearest plan: --scheduler ddim"),
        ("LMSDiscreteScheduler", r"multistep\); the nearest plan: --scheduler euler"),
        (
            "HeunDiscreteScheduler",
            r"two evaluations a step\); the nearest plan: --scheduler euler with twice the steps$",
        ),
        ("DDPMScheduler", r"--scheduler ddim --eta 1"),
        ("FlowMatchHeunDiscreteScheduler", r"--scheduler flow_euler"),
    ],
)
def test_multistep_solvers_are_refused_by_name(class_name, nearest):
    with pytest.raises(PlanError, match=f"^{class_name} cannot be a step table .*{nearest}"):
        plan_from_scheduler_config({**SD15_PNDM, "_class_name": class_name}, num_steps=4)


def test_every_nearest_plan_names_a_solver_that_exists():
    for _, nearest in NEAREST.values():
        words = nearest.replace(",", "").split()
        assert words[0] == "--scheduler"
        assert Solver(words[1])


def test_the_nearest_plan_can_be_taken():
    """`--scheduler` on SD 1.5's PNDM config, as DDIMScheduler.from_config would."""
    plan = plan_from_scheduler_config(SD15_PNDM, num_steps=4, solver=Solver.DDIM)
    assert (plan.solver, plan.timestep_spacing, plan.steps_offset) == (Solver.DDIM, TimestepSpacing.LEADING, 1)
    assert plan.net_timesteps().tolist() == [751, 501, 251, 1]
    without_clip = {key: value for key, value in SD15_PNDM.items() if key != "clip_sample"}
    assert plan_from_scheduler_config(without_clip, num_steps=4, solver=Solver.DDIM) == plan
    assert plan_from_scheduler_config(SD15_PNDM, num_steps=4, solver=Solver.LCM).net_timesteps()[1] == 759


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**DDIM, "thresholding": True}, r"^thresholding is on in the scheduler config and is not linear"),
        ({**DDIM, "clip_sample": True}, r"^clip_sample is on in the scheduler config"),
        ({**DDIM, "guidance_rescale": 0.7}, r"^guidance_rescale 0.7 is not linear; set it to 0$"),
        ({**DDIM, "trained_betas": [0.1]}, r"^trained_betas \[0.1\] in the scheduler config is not supported"),
        ({**DDIM, "beta_schedule": "sigmoid"}, r"^beta_schedule 'sigmoid': must be one of"),
        ({**DDIM, "prediction_type": "flow"}, r"go together"),
        ({**DDIM, "num_train_timesteps": "1000"}, r"^num_train_timesteps '1000': must be a whole number$"),
        ({**DDIM, "rescale_betas_zero_snr": True}, r"no signal is left"),
        ({**EULER, "use_karras_sigmas": True}, r"^use_karras_sigmas True in the scheduler config is not supported"),
        ({**EULER, "interpolation_type": "log_linear"}, r"^interpolation_type 'log_linear'"),
        ({**EULER, "timestep_type": "continuous"}, r"^timestep_type 'continuous'"),
        ({**EULER, "final_sigmas_type": "sigma_min"}, r"^final_sigmas_type 'sigma_min'"),
        ({**SD3, "invert_sigmas": True}, r"^invert_sigmas True"),
        ({**SD3, "stochastic_sampling": True}, r"^stochastic_sampling True"),
        ({**SD3, "shift_terminal": 0.1}, r"^shift_terminal 0.1"),
        ({**SD3, "time_shift_type": "linear"}, r"^time_shift_type 'linear'"),
        (SD3, r"^a flow-match config fits two pipelines: say flow convention sd3 or flux$"),
        ({}, r"^scheduler class None is not known; choose one with --scheduler ddim\|tcd"),
        ({"_class_name": "MagicScheduler"}, r"^scheduler class 'MagicScheduler' is not known"),
        ([], r"^scheduler config: expected a JSON object, found list$"),
    ],
)
def test_refusals_are_one_line(config, message):
    with pytest.raises(PlanError, match=message) as caught:
        plan_from_scheduler_config(config, num_steps=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_step_counts(num_steps):
    with pytest.raises(PlanError, match=f"^steps {num_steps}: must be a whole number from 1 to 1000$"):
        plan_from_scheduler_config(DDIM, num_steps=num_steps)


def test_euler_ignores_clipping_keys_as_diffusers_does():
    """SDXL's and SD 1.5's configs carry clip_sample through classes that have none."""
    plan = plan_from_scheduler_config({**EULER, "clip_sample": True}, num_steps=4, timesteps=(999, 500, 300, 100))
    assert plan.timesteps == (999, 500, 300, 100)


def test_flow_config():
    plan = plan_from_scheduler_config(SD3, num_steps=4, flow_convention=FlowConvention.SD3)
    assert plan.schedule == FlowSchedule(shift=3.0)
    assert plan.prediction_type is PredictionType.FLOW


def test_call_of_a_plain_plan():
    call = diffusers_scheduler(FewStepPlan(solver=Solver.DDIM, num_steps=4, guidance=Guidance.of(5.0)))
    assert call.class_name == call.config["_class_name"] == "DDIMScheduler"
    assert call.call == {"num_inference_steps": 4, "guidance_scale": 5.0, "eta": 0.0}
    assert (call.config["clip_sample"], call.config["timestep_spacing"]) == (False, "trailing")
    assert call.config["set_alpha_to_one"] is False
    assert (call.exact, call.note) == (True, "")


def test_call_of_explicit_timesteps():
    call = diffusers_scheduler(FewStepPlan(solver=Solver.LCM, num_steps=1, timesteps=(800,)))
    assert (call.class_name, call.exact) == ("LCMScheduler", True)
    assert call.call == {"timesteps": [800], "guidance_scale": 1.0}


@pytest.mark.parametrize(
    ("arguments", "class_name", "exact", "note"),
    [
        ({"solver": "ddim"}, "TCDScheduler", True, "TCDScheduler with eta=0 is the same step"),
        (
            {"solver": "ddim", "set_alpha_to_one": True},
            "TCDScheduler",
            False,
            "lands on alphas_cumprod[0] in diffusers",
        ),
        ({"solver": "ddim", "eta": 0.3}, "DDIMScheduler", False, "cannot be called at [900, 300] with eta > 0"),
        ({"solver": "euler_ancestral"}, "EulerAncestralDiscreteScheduler", False, "not callable at [900, 300]"),
        ({"solver": "euler"}, "EulerDiscreteScheduler", True, ""),
        ({"solver": "tcd", "eta": 0.3}, "TCDScheduler", True, ""),
    ],
)
def test_exactness_of_explicit_timesteps(arguments, class_name, exact, note):
    call = diffusers_scheduler(FewStepPlan(num_steps=2, timesteps=(900, 300), **arguments))
    assert (call.class_name, call.exact) == (class_name, exact)
    assert note in call.note
    assert ("timesteps" in call.call) == (class_name not in ("DDIMScheduler", "EulerAncestralDiscreteScheduler"))


def test_what_diffusers_cannot_do():
    overshoot = diffusers_scheduler(FewStepPlan(solver=Solver.DDIM, num_steps=61))
    assert not overshoot.exact
    assert "stray timestep -1 at 61 steps" in overshoot.note
    sample = diffusers_scheduler(FewStepPlan(solver="euler_ancestral", num_steps=2, prediction_type="sample"))
    assert not sample.exact
    assert "no prediction_type sample" in sample.note


def test_flow_calls_say_which_pipeline():
    for convention, pipeline in (("sd3", "StableDiffusion3Pipeline"), ("flux", "FluxPipeline")):
        schedule = FlowSchedule(convention=convention)
        call = diffusers_scheduler(
            FewStepPlan(solver="flow_euler", num_steps=4, prediction_type="flow", schedule=schedule)
        )
        assert call.exact
        assert pipeline in call.note
        assert call.call == {"num_inference_steps": 4, "guidance_scale": 1.0}


def test_public_names():
    assert sorted(diffusion.__all__) == sorted(set(diffusion.__all__))
    for name in diffusion.__all__:
        assert hasattr(diffusion, name), name


def test_import_needs_numpy_alone():
    """The leaf imports nothing of this project but errors, and no package beside NumPy."""
    code = (
        "import sys; before = set(sys.modules); import hypersd_export.diffusion; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names; "
        "ours = {name for name in sys.modules if name.startswith('hypersd_export.')}; "
        "print(sorted(n for n in new if not n.startswith('_')), sorted({n.split('.')[1] for n in ours}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['hypersd_export', 'numpy'] ['diffusion', 'errors']"

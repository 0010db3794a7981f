"""From a diffusers scheduler_config.json to a plan, or to the reason why there is none.

Absent keys mean what they mean in diffusers 0.42: the defaults of the class that the config names.
"""

from collections.abc import Mapping
from typing import Any

from hypersd_export.diffusion.plan import FewStepPlan, Guidance, Solver
from hypersd_export.diffusion.schedule import FlowConvention
from hypersd_export.errors import PlanError

SOLVER_CLASSES: dict[Solver, str] = {
    Solver.DDIM: "DDIMScheduler",
    Solver.TCD: "TCDScheduler",
    Solver.LCM: "LCMScheduler",
    Solver.EULER: "EulerDiscreteScheduler",
    Solver.EULER_ANCESTRAL: "EulerAncestralDiscreteScheduler",
    Solver.FLOW_EULER: "FlowMatchEulerDiscreteScheduler",
}
"""The diffusers class of each solver."""

_PIXEL_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_LATENT_BETAS = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
}  # fmt: skip
_COMMON = {
    "trained_betas": None, "prediction_type": "epsilon", "steps_offset": 0, "rescale_betas_zero_snr": False,
}  # fmt: skip
_CLIP = {
    "clip_sample": False, "clip_sample_range": 1.0, "thresholding": False, "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0, "set_alpha_to_one": True,
}  # fmt: skip
_CONSISTENCY = {
    **_LATENT_BETAS, **_COMMON, **_CLIP, "timestep_spacing": "leading", "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}  # fmt: skip
CLASS_DEFAULTS: dict[Solver, dict[str, Any]] = {
    Solver.DDIM: {**_PIXEL_BETAS, **_COMMON, **_CLIP, "clip_sample": True, "timestep_spacing": "leading"},
    Solver.TCD: _CONSISTENCY,
    Solver.LCM: _CONSISTENCY,
    Solver.EULER: {
        **_PIXEL_BETAS, **_COMMON, "timestep_spacing": "linspace", "interpolation_type": "linear",
        "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "sigma_min": None,
        "sigma_max": None, "timestep_type": "discrete", "final_sigmas_type": "zero",
    },
    Solver.EULER_ANCESTRAL: {**_PIXEL_BETAS, **_COMMON, "timestep_spacing": "linspace"},
    Solver.FLOW_EULER: {
        "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5,
        "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False,
        "shift_terminal": None, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
        "time_shift_type": "exponential", "stochastic_sampling": False,
    },
}  # fmt: skip
"""Every constructor argument of each class with its default; a config that this project writes names them all."""

NEAREST: dict[str, tuple[str, str]] = {
    "PNDMScheduler": ("multistep", "--scheduler ddim"),
    "DPMSolverMultistepScheduler": ("multistep", "--scheduler ddim, which is its first order"),
    "UniPCMultistepScheduler": ("multistep", "--scheduler ddim"),
    "DEISMultistepScheduler": ("multistep", "--scheduler ddim, which is its first order"),
    "LMSDiscreteScheduler": ("multistep", "--scheduler euler, which is its first order"),
    "SASolverScheduler": ("multistep", "--scheduler ddim"),
    "IPNDMScheduler": ("multistep", "--scheduler ddim"),
    "EDMDPMSolverMultistepScheduler": ("multistep", "--scheduler euler"),
    "HeunDiscreteScheduler": ("two evaluations a step", "--scheduler euler with twice the steps"),
    "KDPM2DiscreteScheduler": ("two evaluations a step", "--scheduler euler with twice the steps"),
    "KDPM2AncestralDiscreteScheduler": ("two evaluations a step", "--scheduler euler_ancestral with twice the steps"),
    "DPMSolverSinglestepScheduler": ("several evaluations a step", "--scheduler ddim"),
    "DPMSolverSDEScheduler": ("two evaluations a step", "--scheduler euler_ancestral with twice the steps"),
    "FlowMatchHeunDiscreteScheduler": ("two evaluations a step", "--scheduler flow_euler with twice the steps"),
    "FlowMatchLCMScheduler": ("not one of the solvers here", "--scheduler flow_euler"),
    "DDPMScheduler": (
        "not one of the solvers here",
        "--scheduler ddim --eta 1, which is the same for clip_sample=False",
    ),
    "EDMEulerScheduler": ("not one of the solvers here", "--scheduler euler"),
}
"""Scheduler classes that are not a table, why, and the nearest plan that is."""

_REFUSED_FOR: dict[str, object] = {
    "interpolation_type": "linear", "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "timestep_type": "discrete", "final_sigmas_type": "zero", "invert_sigmas": False,
    "shift_terminal": None, "stochastic_sampling": False, "time_shift_type": "exponential", "trained_betas": None,
}  # fmt: skip
_CLIP_KEYS = ("clip_sample", "thresholding")
_VP_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
_FLOW_KEYS = (
    "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len",
)  # fmt: skip
_PLAN_KEYS = (
    "prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "original_inference_steps",
    "timestep_scaling",
)  # fmt: skip


def plan_from_scheduler_config(
    config: Mapping[str, Any],
    *,
    num_steps: int,
    guidance: Guidance | None = None,
    eta: float = 0.0,
    timesteps: tuple[int, ...] | None = None,
    solver: Solver | None = None,
    flow_convention: FlowConvention | None = None,
) -> FewStepPlan:
    """The plan that a diffusers scheduler_config.json, already parsed, means with `num_steps`.

    With `solver`, the config's noise schedule and settings are taken for that solver instead, as
    `TCDScheduler.from_config(...)` would; clip_sample is then off unless the config itself turns it on. A flow config
    does not say how its pipeline chooses sigmas: `flow_convention` must (sd3 or flux). `PlanError` for multistep
    solvers (with the nearest plan), for settings that are not linear (clip_sample, thresholding, guidance_rescale) and
    for sigma schedules that are not supported.
    """
    if not isinstance(config, Mapping):
        raise PlanError(f"scheduler config: expected a JSON object, found {type(config).__name__}")
    chosen = solver if solver is not None else _solver_of(config)
    values = dict(CLASS_DEFAULTS[chosen])
    if solver is not None and "clip_sample" in values:
        values["clip_sample"] = False
    values |= {key: value for key, value in config.items() if not key.startswith("_") and value is not None}
    _refuse_nonlinear(values, chosen)
    data: dict[str, Any] = {"solver": chosen.value, "num_steps": num_steps, "eta": eta}
    data["guidance"] = (guidance if guidance is not None else Guidance()).to_json()
    data["timesteps"] = timesteps
    if chosen is Solver.FLOW_EULER:
        if flow_convention is None:
            raise PlanError("a flow-match config fits two pipelines: say flow convention sd3 or flux")
        schedule = {"kind": "flow", "convention": flow_convention.value, **{key: values[key] for key in _FLOW_KEYS}}
        return FewStepPlan.from_json({**data, "prediction_type": "flow", "schedule": schedule})
    settings = {key: values[key] for key in _PLAN_KEYS if key in values}
    return FewStepPlan.from_json({**data, **settings, "schedule": {"kind": "vp", **{k: values[k] for k in _VP_KEYS}}})


def _solver_of(config: Mapping[str, Any]) -> Solver:
    name = config.get("_class_name")
    for solver, class_name in SOLVER_CLASSES.items():
        if name == class_name:
            return solver
    if name in NEAREST:
        why, nearest = NEAREST[str(name)]
        raise PlanError(f"{name} cannot be a step table ({why}); the nearest plan: {nearest}")
    raise PlanError(f"scheduler class {name!r} is not known; choose one with --scheduler {'|'.join(Solver)}")


def _refuse_nonlinear(values: Mapping[str, Any], solver: Solver) -> None:
    if "clip_sample" in CLASS_DEFAULTS[solver]:
        for key in _CLIP_KEYS:
            if values[key]:
                raise PlanError(f"{key} is on in the scheduler config and is not linear; set it to false")
    if values.get("guidance_rescale"):
        raise PlanError(f"guidance_rescale {values['guidance_rescale']} is not linear; set it to 0")
    for key, allowed in _REFUSED_FOR.items():
        if key in CLASS_DEFAULTS[solver] and values[key] not in (allowed, None):
            raise PlanError(f"{key} {values[key]!r} in the scheduler config is not supported; only {allowed!r} is")

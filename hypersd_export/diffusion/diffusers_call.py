"""From a plan to the diffusers call that reproduces it: class, scheduler_config.json and pipeline arguments."""

from dataclasses import dataclass
from typing import Any

from hypersd_export.diffusion.plan import FewStepPlan, PredictionType, Solver
from hypersd_export.diffusion.schedule import FlowConvention, FlowSchedule, TimestepSpacing, trailing_overshoots
from hypersd_export.diffusion.scheduler_config import CLASS_DEFAULTS, SOLVER_CLASSES


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusersCall:
    """How to run a plan with diffusers.

    class_name: the scheduler class. config: the content of scheduler_config.json, `_class_name` and every constructor
    argument explicit. call: keyword arguments of the pipeline (num_inference_steps or timesteps, guidance_scale, eta).
    exact: whether diffusers then computes this plan's table, to float32 rounding; if not, `note` says what differs
    (`note` may also explain an exact call). The argument eta is there where the class's step takes it.
    """

    class_name: str
    config: dict[str, Any]
    call: dict[str, Any]
    exact: bool
    note: str = ""


def diffusers_scheduler(plan: FewStepPlan) -> DiffusersCall:
    """The diffusers class, config and call for a plan; `exact` is False where diffusers cannot express it."""
    solver, exact, note = _solver_for(plan)
    explicit = plan.timesteps is not None and solver in (Solver.TCD, Solver.LCM, Solver.EULER)
    call: dict[str, Any] = {"timesteps": list(plan.timesteps or ())} if explicit else {}
    if not explicit:
        call["num_inference_steps"] = plan.num_steps
    call["guidance_scale"] = float(plan.guidance.scale)
    if solver in (Solver.DDIM, Solver.TCD):
        call["eta"] = float(plan.eta)
    config = {"_class_name": SOLVER_CLASSES[solver], **_config(plan, solver)}
    return DiffusersCall(class_name=SOLVER_CLASSES[solver], config=config, call=call, exact=exact, note=note)


def _solver_for(plan: FewStepPlan) -> tuple[Solver, bool, str]:
    """The solver whose class expresses the plan best, whether exactly, and a word on it."""
    if plan.timesteps is None:
        return _spaced(plan)
    listed = list(plan.timesteps)
    if plan.solver is Solver.DDIM and plan.eta == 0:
        # TCD with eta 0 jumps to the next listed timestep, and last to alphas_cumprod[0]: DDIM's rows here.
        if plan.set_alpha_to_one:
            return Solver.TCD, False, "the last step lands on alphas_cumprod[0] in diffusers, on 1 in the table"
        return Solver.TCD, True, "DDIMScheduler takes no timesteps; TCDScheduler with eta=0 is the same step"
    if plan.solver is Solver.DDIM:
        return Solver.DDIM, False, f"DDIMScheduler takes no timesteps: it cannot be called at {listed} with eta > 0"
    if plan.solver is Solver.EULER_ANCESTRAL:
        if plan.num_steps == 1:
            return (
                Solver.EULER,
                True,
                "one ancestral step is one Euler step, whose class takes timesteps",
            )
        return plan.solver, False, f"EulerAncestralDiscreteScheduler takes no timesteps: not callable at {listed}"
    return plan.solver, _has_prediction(plan), _prediction_note(plan)


def _spaced(plan: FewStepPlan) -> tuple[Solver, bool, str]:
    if isinstance(plan.schedule, FlowSchedule):
        flux = plan.schedule.convention is FlowConvention.FLUX
        which = "FluxPipeline passes its own sigmas" if flux else "StableDiffusion3Pipeline calls set_timesteps(N)"
        return plan.solver, True, f"exact within its own pipeline: {which}"
    total = plan.schedule.num_train_timesteps
    by_spacing = plan.solver in (Solver.DDIM, Solver.EULER, Solver.EULER_ANCESTRAL)
    if by_spacing and plan.timestep_spacing is TimestepSpacing.TRAILING and trailing_overshoots(plan.num_steps, total):
        return plan.solver, False, f"diffusers' trailing spacing adds a stray timestep -1 at {plan.num_steps} steps"
    return plan.solver, _has_prediction(plan), _prediction_note(plan)


def _has_prediction(plan: FewStepPlan) -> bool:
    return not (plan.solver is Solver.EULER_ANCESTRAL and plan.prediction_type is PredictionType.SAMPLE)


def _prediction_note(plan: FewStepPlan) -> str:
    return "" if _has_prediction(plan) else "EulerAncestralDiscreteScheduler has no prediction_type sample"


def _config(plan: FewStepPlan, solver: Solver) -> dict[str, Any]:
    """Every argument of the class: its default, overlaid with what the plan says."""
    config = dict(CLASS_DEFAULTS[solver])
    schedule = plan.schedule
    if isinstance(schedule, FlowSchedule):
        known: dict[str, Any] = {
            "shift": float(schedule.shift), "use_dynamic_shifting": schedule.use_dynamic_shifting,
            "base_shift": schedule.base_shift, "max_shift": schedule.max_shift,
            "base_image_seq_len": schedule.base_image_seq_len, "max_image_seq_len": schedule.max_image_seq_len,
        }  # fmt: skip
    else:
        known = {
            "beta_start": schedule.beta_start, "beta_end": schedule.beta_end,
            "beta_schedule": schedule.beta_schedule.value, "rescale_betas_zero_snr": schedule.rescale_betas_zero_snr,
            "prediction_type": plan.prediction_type.value, "timestep_spacing": plan.timestep_spacing.value,
            "steps_offset": plan.steps_offset, "clip_sample": False, "set_alpha_to_one": plan.set_alpha_to_one,
            "original_inference_steps": plan.original_inference_steps, "timestep_scaling": plan.timestep_scaling,
        }  # fmt: skip
    known["num_train_timesteps"] = schedule.num_train_timesteps
    return {key: known.get(key, default) for key, default in config.items()}

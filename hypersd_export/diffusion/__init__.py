"""Diffusion arithmetic: schedules, solvers, plans as tables, presets, noise. Needs NumPy and nothing else.

A few-step plan of any one-step solver is a table of constants (`FewStepPlan.table()`), and sampling is a loop over it
(`run`). The functions that act on samples work on NumPy arrays and torch tensors alike.
"""

from hypersd_export.diffusion.diffusers_call import DiffusersCall, diffusers_scheduler
from hypersd_export.diffusion.noise import initial_noise, noise_vectors, philox4x32, philox_normal, step_noise
from hypersd_export.diffusion.plan import FewStepPlan, Guidance, GuidanceKind, Solver
from hypersd_export.diffusion.planfile import (
    LORA_METADATA_KEY,
    PLAN_FORMAT,
    PlanEntry,
    PlanFile,
    plan_schema,
    plans_from_metadata,
    plans_to_metadata,
)
from hypersd_export.diffusion.prediction import PredictionType, eps_of, target_of, v_of, x0_and_eps, x0_of
from hypersd_export.diffusion.presets import PRESETS, Preset, match_file_name, preset
from hypersd_export.diffusion.sampling import run, start_sample, steps
from hypersd_export.diffusion.schedule import (
    BetaSchedule,
    FlowConvention,
    FlowSchedule,
    NoiseSchedule,
    TimestepSpacing,
)
from hypersd_export.diffusion.scheduler_config import plan_from_scheduler_config
from hypersd_export.diffusion.segments import (
    edge_timesteps,
    grid_timesteps,
    lower_edge,
    segment_length,
    segment_of,
    target_range,
)
from hypersd_export.diffusion.solver import (
    add_noise,
    ancestral_sigmas,
    ddim_jump,
    ddim_step,
    euler_step,
    flow_step,
    jump,
    lcm_denoise,
    lcm_scalings,
    tcd_step,
)
from hypersd_export.diffusion.table import Row, StepTable, start_row

__all__ = [
    "LORA_METADATA_KEY",
    "PLAN_FORMAT",
    "PRESETS",
    "BetaSchedule",
    "DiffusersCall",
    "FewStepPlan",
    "FlowConvention",
    "FlowSchedule",
    "Guidance",
    "GuidanceKind",
    "NoiseSchedule",
    "PlanEntry",
    "PlanFile",
    "PredictionType",
    "Preset",
    "Row",
    "Solver",
    "StepTable",
    "TimestepSpacing",
    "add_noise",
    "ancestral_sigmas",
    "ddim_jump",
    "ddim_step",
    "diffusers_scheduler",
    "edge_timesteps",
    "eps_of",
    "euler_step",
    "flow_step",
    "grid_timesteps",
    "initial_noise",
    "jump",
    "lcm_denoise",
    "lcm_scalings",
    "lower_edge",
    "match_file_name",
    "noise_vectors",
    "philox4x32",
    "philox_normal",
    "plan_from_scheduler_config",
    "plan_schema",
    "plans_from_metadata",
    "plans_to_metadata",
    "preset",
    "run",
    "segment_length",
    "segment_of",
    "start_row",
    "start_sample",
    "step_noise",
    "steps",
    "target_of",
    "target_range",
    "tcd_step",
    "v_of",
    "x0_and_eps",
    "x0_of",
]

"""Which plans a stage's LoRA carries: how it is meant to be sampled, the default first."""

from typing import Any

from hypersd_export.diffusion import FewStepPlan, Guidance, NoiseSchedule, PredictionType, Solver, grid_timesteps
from trainer.distill.config import SCORE, DistillConfig, StageConfig

UNIFIED_TSCD = (1, 2, 4, 8)
"""Step counts of the last TSCD stage: the released unified LoRA does 1 to 8 with TCD, eta 1."""
UNIFIED = (4, 1, 2, 8)
"""Step counts of LCM and TCD, whose authors recommend 4."""
TCD_ETA = 0.3
"""The TCD authors' eta (their gamma) for their own LoRA."""


def plans_for(
    config: DistillConfig, stage: StageConfig, *, schedule: NoiseSchedule, prediction_type: PredictionType
) -> list[FewStepPlan]:
    """The plans of the LoRA that `stage` ends with.

    TSCD with k > 1, and PCM: DDIM trailing with k steps, whose timesteps are the segments' edges; TSCD with k = 1, and
    score distillation: TCD with eta 1; TCD: TCD with eta 0.3; LCM: LCM. No guidance, because the teacher's step has it
    baked in; the middle of the configured range where the student keeps guidance (`cfg_preserved`).
    """
    low, high = config.guidance
    guidance = Guidance.of((low + high) / 2) if config.cfg_preserved else Guidance()
    common: dict[str, Any] = {"prediction_type": prediction_type, "schedule": schedule, "guidance": guidance}
    if config.method == "pcm" or (config.method == "tscd" and stage.segments > 1):
        return [FewStepPlan(solver=Solver.DDIM, num_steps=stage.segments, **common)]
    solver = Solver.LCM if config.method == "lcm" else Solver.TCD
    eta = {"lcm": 0.0, "tcd": TCD_ETA}.get(config.method, 1.0)
    counts = UNIFIED_TSCD if config.method in ("tscd", SCORE) else UNIFIED
    return [
        FewStepPlan(
            solver=solver, num_steps=count, eta=eta, original_inference_steps=stage.points,
            timesteps=_timesteps(count, stage.points, schedule.num_train_timesteps), **common,
        )
        for count in counts if count <= stage.points
    ]  # fmt: skip


def _timesteps(count: int, points: int, total: int) -> tuple[int, ...] | None:
    """None where diffusers' own choice lies on the stage's grid, which it does if N divides T; else the same picks of
    the grid (diffusers' would top out below T − 1 then, where the student was never trained)."""
    if total % points == 0:
        return None
    grid = grid_timesteps(points, total)
    return tuple(int(grid[points - points * step // count]) for step in range(count))

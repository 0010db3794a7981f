"""A few-step path played by the student itself, each sample as far as it was drawn to go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hypersd_export.diffusion import FewStepPlan, GuidanceKind, StepTable
from hypersd_export.errors import OptionError
from trainer.losses.tscd import level

Move = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(step, rows int64 [b], the rows' samples) → their samples one step further."""


def play(x: torch.Tensor, upto: torch.Tensor, move: Move, *, begin: torch.Tensor | None = None) -> torch.Tensor:
    """Samples x [B, …] at their steps `upto` int64 [B], by moves from step 0, or from the samples' own steps `begin`.

    A move is asked only for the samples that are on their way at its step.
    """
    for step in range(int(upto.max())):
        moving = upto > step if begin is None else (upto > step) & (begin <= step)
        rows = torch.nonzero(moving).flatten()
        if len(rows):
            x = x.index_copy(0, rows, move(step, rows, x[rows]))
    return x


@dataclass(frozen=True, slots=True)
class Tables:
    """The step tables of several plans as tensors [plans, most steps], float32, filled up with 0; timesteps int64.

    counts int64 and sigma float32 [plans]: how many steps each has, and the scale of its initial noise.
    """

    t: torch.Tensor
    k: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor
    counts: torch.Tensor
    sigma: torch.Tensor

    @classmethod
    def of(cls, plans: Sequence[FewStepPlan], device: torch.device | str = "cpu") -> "Tables":
        """OptionError for a plan with guidance, or whose timesteps are not whole numbers (Euler with linspace)."""
        tables = [_table(plan) for plan in plans]
        counts = torch.tensor([len(table.rows) for table in tables])
        made = {}
        for name in ("t", "k", "a", "b", "c", "p", "q"):
            filled = torch.zeros(len(tables), int(counts.max()), dtype=torch.float64)
            for line, table in zip(filled, tables, strict=True):
                line[: len(table.rows)] = torch.tensor([getattr(row, name) for row in table.rows])
            made[name] = (filled.long() if name == "t" else filled.float()).to(device)
        sigma = torch.tensor([table.init_noise_sigma for table in tables])
        return cls(**made, counts=counts.to(device), sigma=sigma.to(device))

    def at(self, name: str, course: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """One column's values for samples' plans and steps (int64 [B]), of a shape that broadcasts to latents."""
        column: torch.Tensor = getattr(self, name)
        return level(column[course, step])


def _table(plan: FewStepPlan) -> StepTable:
    if plan.guidance.kind is not GuidanceKind.NONE:
        raise OptionError(
            f"plan of {plan.num_steps} steps with guidance {plan.guidance.scale:g}: the student is played without "
            "guidance; take a LoRA that has it baked in"
        )
    table = plan.table()
    if any(row.t != int(row.t) for row in table.rows):
        raise OptionError(f"plan of {plan.num_steps} steps ({plan.solver}): its timesteps are not whole numbers")
    return table

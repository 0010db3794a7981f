"""Early stopping of a feedback run: what the rewards do not see is watched, and ends the run when it gets worse.

All of it is drawn from fixed prompts and noises, so the figures of two looks are paired. The beginning is the frozen
LoRA alone, which a resumed run asks again; so the guard has no state but the weights of its last good look.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hypersd_export.diffusion import FewStepPlan, Guidance, NoiseSchedule, Solver
from trainer.batch import Source
from trainer.distill.config import DistillConfig
from trainer.distill.feedback_config import Watch
from trainer.distill.networks import Networks, Role
from trainer.distill.validate import draw_pictures
from trainer.rewards import Reward

SEED = 500_000
"""First noise seed of the guard's pictures: neither validation's nor an evaluation's."""


class Guard:
    """Construct it at a run's beginning or resumption, under the run's autocast; then `look`, as often as wanted."""

    def __init__(
        self, networks: Networks, source: Source, config: DistillConfig, *, plans: Sequence[FewStepPlan], vae: Any,
        schedule: NoiseSchedule, clip: Reward | None = None, batch: int = 16,
    ) -> None:  # fmt: skip
        self._networks, self._plans, self._vae, self._batch = networks, plans, vae, batch
        self._clip, self.config = clip, config.feedback.guard
        device = networks.unet.device
        first = source.batch(range(self.config.prompts)).to(device)
        self._captions, self._text = first.captions, first.conditioning
        self._empty, self._shape = source.empty.to(device), source.latent_shape
        self._teacher: torch.Tensor | None = None
        if self.config.watch is Watch.DISTANCE:
            plan = FewStepPlan(
                solver=Solver.DDIM, num_steps=self.config.teacher_steps, guidance=Guidance.of(sum(config.guidance) / 2),
                schedule=schedule, prediction_type=networks.prediction_type,
            )  # fmt: skip
            self._teacher = self._draw(plan, Role.BASE)
        self.begin = self.look(Role.TEACHER)

    def look(self, role: Role = Role.STUDENT) -> dict[str, float]:
        """The figures now, means over the plans: what is watched; saturation and texture, in which exploited rewards
        show; `reward` figures are the training's own."""
        sums: dict[str, float] = {}
        for plan in self._plans:
            for name, value in self._figures(self._draw(plan, role)).items():
                sums[name] = sums.get(name, 0.0) + value / len(self._plans)
        return sums

    def worse(self, figures: Mapping[str, float]) -> float:
        """By which share of its beginning what is watched is worse; negative where it is better."""
        name = self.config.watch.value
        change = (figures[name] - self.begin[name]) / abs(self.begin[name])
        return change if self.config.watch is Watch.DISTANCE else -change

    def _draw(self, plan: FewStepPlan, role: Role) -> torch.Tensor:
        return draw_pictures(
            self._networks, self._vae, plan, self._text, self._shape, first_seed=SEED, empty=self._empty, role=role,
            batch=self._batch,
        )  # fmt: skip

    def _figures(self, pictures: torch.Tensor) -> dict[str, float]:
        figures = {"saturation": saturation(pictures), "texture": texture(pictures)}
        if self._teacher is not None:
            figures["distance"] = float((pictures - self._teacher).square().flatten(1).mean(1).sqrt().mean())
        if self._clip is not None:
            with torch.no_grad():
                scores = [self._clip(pictures[rows], self._captions[rows]) for rows in self._slices(len(pictures))]
            figures["clip"] = float(torch.cat(scores).mean())
        return figures

    def _slices(self, count: int) -> list[slice]:
        return [slice(start, start + self._batch) for start in range(0, count, self._batch)]


def saturation(pictures: torch.Tensor) -> float:
    """Mean over pixels of the largest less the smallest channel, of pictures [N, 3, H, W] in [-1, 1]: 0 is grey."""
    return float((pictures.amax(1) - pictures.amin(1)).mean())


def texture(pictures: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, of pictures [N, 3, H, W] in [-1, 1]: 0 is flat."""
    return float((pictures.diff(dim=2).abs().mean() + pictures.diff(dim=3).abs().mean()) / 2)

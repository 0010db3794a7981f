"""One step of human feedback (ReFL, arXiv 2304.05977, on the few-step sampler; paper: arXiv 2404.13686, sec. 3.2).

The student plays its own plan from noise without gradient, makes one step with gradient at a drawn place, and says what
the picture will be; that is decoded, and the rewards say how good it is. The LoRA that it started from stays as it is:
the student is a LoRA on top, which `hypersd-train merge` joins with it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hypersd_export.diffusion import FewStepPlan, x0_and_eps
from trainer.batch import Batch, Conditioning, Map, PerSample, keyed_generator
from trainer.distill.config import DistillConfig, StageConfig
from trainer.distill.networks import Networks, Role
from trainer.distill.rollout import Tables, play
from trainer.distill.step import StepOutput
from trainer.distill.validate import decode
from trainer.losses.feedback import hinge
from trainer.losses.tscd import level
from trainer.rewards import Reward


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackDraws(PerSample):
    """What one step draws, a row per sample: initial noise [B, C, h, w] and that of the steps [B, n, C, h, w]; which
    plan, and which of its steps has the gradient, int64 [B]."""

    noise: torch.Tensor
    path_noise: torch.Tensor
    course: torch.Tensor
    index: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name, for the file of a bad step."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def student(self) -> bool:
        """Whether the student learns in this step: always."""
        return True

    def _map(self, function: Map) -> "FeedbackDraws":
        return FeedbackDraws(**{name: function(value) for name, value in self.tensors().items()})


class FeedbackStep:
    """The loss of the stage. rewards: by name, in the order of the configuration; plans: the student's own; vae: in
    float32, frozen. number: of the stage, which is the run's only one."""

    def __init__(
        self, networks: Networks, config: DistillConfig, stage: StageConfig, *, rewards: Mapping[str, Reward],
        plans: Sequence[FewStepPlan], vae: Any, number: int = 1,
    ) -> None:  # fmt: skip
        self.networks, self.config, self.stage, self.number = networks, config, stage, number
        self.rewards, self._vae = rewards, vae
        device = networks.unet.device
        self.alphas = networks.alphas_cumprod.to(device, torch.float32)
        self.tables = Tables.of(plans, device)

    def draw(self, step: int, shape: tuple[int, int, int]) -> FeedbackDraws:
        """The draws of the global batch of `step` for latents of `shape`, on the CPU."""
        count, counts = self.config.batch, self.tables.counts.cpu()
        generator = keyed_generator(f"{self.config.seed}/feedback/{self.number}/{step}")
        noise = torch.randn(count, *shape, generator=generator)
        path_noise = torch.randn(count, int(counts.max()) - 1, *shape, generator=generator)
        course = torch.randint(len(counts), (count,), generator=generator)
        share = torch.rand(count, generator=generator, dtype=torch.float64)
        bounds = torch.tensor([span_of(int(n), *self.config.feedback.span) for n in counts])[course]
        index = bounds[:, 0] + torch.floor(share * (bounds[:, 1] - bounds[:, 0])).long()
        return FeedbackDraws(noise=noise, path_noise=path_noise, course=course, index=index)

    def __call__(self, batch: Batch, draws: FeedbackDraws) -> StepOutput:
        """Σ w · ReLU(α − r) of what the student says the pictures will be, with gradient to its one drawn step."""
        scores = self.scores(self.pictures(batch.conditioning, draws), batch.captions)
        terms = self.config.feedback.rewards
        loss = hinge(scores, [term.weight for term in terms], [term.target for term in terms]).mean()
        means = zip(self.rewards, scores, strict=True)
        return StepOutput(loss=loss, logs={f"reward_{n}": score.detach().mean() for n, score in means}, look=None)

    def updated(self) -> None:
        """After an update: nothing. The target keeps the weights of the guard's last good look."""

    def scores(self, pictures: torch.Tensor, captions: Sequence[str]) -> list[torch.Tensor]:
        """Each reward's scores [B] of pictures in [-1, 1]."""
        return [reward(pictures, captions) for reward in self.rewards.values()]

    def pictures(self, conditioning: Conditioning, draws: FeedbackDraws) -> torch.Tensor:
        """float32 [B, 3, H, W] in [-1, 1]: x̂0 of the drawn step, decoded."""
        tables, course, index = self.tables, draws.course, draws.index
        x = self.play(draws, conditioning) * tables.at("k", course, index)
        t = tables.t[course, index]
        out = self.networks.student(x, t, conditioning)
        clean, _ = x0_and_eps(out, x, level(self.alphas[t]), self.networks.prediction_type)
        return decode(self._vae, clean)

    def play(self, draws: FeedbackDraws, conditioning: Conditioning) -> torch.Tensor:
        """The student's own path down to the drawn step, without gradient."""
        tables, course = self.tables, draws.course

        def move(step: int, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            here, plan = torch.full_like(rows, step), course[rows]
            k, a, b, c = (tables.at(name, plan, here) for name in "kabc")
            out = self.networks.frozen(Role.STUDENT, k * x, tables.t[plan, step], conditioning.rows(rows))
            return a * x + b * out + c * draws.path_noise[rows, step]

        return play(draws.noise * level(tables.sigma[course]), draws.index, move)


def span_of(count: int, low: float, high: float) -> tuple[int, int]:
    """First and last + 1 of a plan's steps that lie in the span: at least one of them."""
    first = min(math.floor(low * count), count - 1)
    return first, max(first + 1, math.ceil(high * count))

"""One step of human feedback (ReFL, arXiv 2304.05977, on the few-step sampler; paper: arXiv 2404.13686, sec. 3.2).

The student plays its own plan from noise without gradient, makes one step with gradient at a drawn place, and says what
the picture will be; that is decoded, and the rewards say how good it is. With structure feedback (PeFL, arXiv
2404.05595) a part of the batch begins from a noised picture instead, whose instances a segmenter has to find again. The
LoRA that it started from stays as it is: the student is a LoRA on top, which `hypersd-train merge` joins with it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hypersd_export.diffusion import FewStepPlan, x0_and_eps
from trainer.batch import Batch, Map, PerSample, keyed_generator
from trainer.distill.config import DistillConfig, StageConfig
from trainer.distill.networks import Networks, Role
from trainer.distill.rollout import Tables, play
from trainer.distill.step import StepOutput
from trainer.distill.validate import decode
from trainer.losses.feedback import hinge
from trainer.losses.tscd import level
from trainer.rewards import Reward
from trainer.rewards.structure import Annotations, StructureLoss


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackDraws(PerSample):
    """What one step draws, a row per sample: initial noise [B, C, h, w] and that of the steps [B, n, C, h, w]; which
    plan, and which of its steps has the gradient, int64 [B]. structured bool [B]: whether the sample begins from a
    noised picture, at step `begin` int64 [B] of the plan, and is asked for its instances; seed int64 [B]: for that."""

    noise: torch.Tensor
    path_noise: torch.Tensor
    course: torch.Tensor
    index: torch.Tensor
    structured: torch.Tensor
    begin: torch.Tensor
    seed: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name, for the file of a bad step."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def student(self) -> bool:
        """Whether the student learns in this step: always."""
        return True

    def _map(self, function: Map) -> "FeedbackDraws":
        return FeedbackDraws(**{name: function(value) for name, value in self.tensors().items()})


@dataclass(frozen=True, slots=True)
class Structure:
    """Structure feedback's two halves: the loss, and what is known of the pictures."""

    loss: StructureLoss
    annotations: Annotations


class FeedbackStep:
    """The loss of the stage. rewards: by name, in the order of the configuration; plans: the student's own; vae: in
    float32, frozen. number: of the stage, which is the run's only one."""

    def __init__(
        self, networks: Networks, config: DistillConfig, stage: StageConfig, *, rewards: Mapping[str, Reward],
        plans: Sequence[FewStepPlan], vae: Any, structure: Structure | None = None, number: int = 1,
    ) -> None:  # fmt: skip
        self.networks, self.config, self.stage, self.number = networks, config, stage, number
        self.rewards, self.structure, self._vae = rewards, structure, vae
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
        share = torch.rand(3, count, generator=generator, dtype=torch.float64)
        bounds = torch.tensor([span_of(int(n), *self.config.feedback.span) for n in counts])[course]
        index = bounds[:, 0] + torch.floor(share[0] * (bounds[:, 1] - bounds[:, 0])).long()
        structured = (share[1] < self._structure_share).to(torch.bool)
        return FeedbackDraws(
            noise=noise, path_noise=path_noise, course=course, index=index, structured=structured,
            begin=torch.where(structured, torch.floor(share[2] * (index + 1)).long(), 0),
            seed=torch.randint(2**62, (count,), generator=generator),
        )  # fmt: skip

    @property
    def _structure_share(self) -> float:
        return 0.0 if self.structure is None else self.config.feedback.structure.share

    def __call__(self, batch: Batch, draws: FeedbackDraws) -> StepOutput:
        """Σ w · ReLU(α − r) of what the student says the pictures will be, and the instance loss of those that began
        from one, with gradient to the one drawn step. Each is a mean over the samples that are asked for it: their
        share of the batch is divided out as it is expected, so that micro-batches add up to the batch."""
        pictures, share = self.pictures(batch, draws), self._structure_share
        loss, logs = self._rewarded(pictures, batch, draws, 1 / (len(batch) * (1 - share)))
        if self.structure is not None:
            lost = self._structured(self.structure, pictures, batch, draws) / (len(batch) * share)
            loss = loss + self.config.feedback.structure.weight * lost
            logs["structure"] = lost.detach()
        return StepOutput(loss=loss, logs=logs, look=None)

    def _rewarded(
        self, pictures: torch.Tensor, batch: Batch, draws: FeedbackDraws, scale: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The hinge over the samples that began from noise, and each reward's mean."""
        rows = torch.nonzero(~draws.structured).flatten()
        terms, captions = self.config.feedback.rewards, [batch.captions[row] for row in rows.tolist()]
        scores = [pictures.new_zeros(0) for _ in terms]
        if captions:
            scores = [reward(pictures[rows], captions) for reward in self.rewards.values()]
        each = hinge(scores, [term.weight for term in terms], [term.target for term in terms])
        named = zip(self.rewards, scores, strict=True)
        # a sum of nothing has no gradient: the pictures, times nothing, keep the graph whole
        whole = scale * each.sum() + 0 * pictures.sum()
        return whole, {f"reward_{name}": scale * score.detach().sum() for name, score in named}

    def _structured(
        self, structure: Structure, pictures: torch.Tensor, batch: Batch, draws: FeedbackDraws
    ) -> torch.Tensor:
        rows = torch.nonzero(draws.structured).flatten()
        if not len(rows):
            return 0 * pictures.sum()
        truth = structure.annotations([batch.names[row] for row in rows.tolist()])
        return structure.loss(pictures[rows], truth, draws.seed[rows].tolist()).sum()

    def updated(self) -> None:
        """After an update: nothing. The target keeps the weights of the guard's last good look."""

    def pictures(self, batch: Batch, draws: FeedbackDraws) -> torch.Tensor:
        """float32 [B, 3, H, W] in [-1, 1]: x̂0 of the drawn step, decoded."""
        tables, course, index = self.tables, draws.course, draws.index
        x = self.play(batch, draws) * tables.at("k", course, index)
        t = tables.t[course, index]
        out = self.networks.student(x, t, batch.conditioning)
        clean, _ = x0_and_eps(out, x, level(self.alphas[t]), self.networks.prediction_type)
        return decode(self._vae, clean)

    def play(self, batch: Batch, draws: FeedbackDraws) -> torch.Tensor:
        """The student's own path down to the drawn step, without gradient: from noise, or from a noised picture."""
        tables, course = self.tables, draws.course
        x = draws.noise * level(tables.sigma[course])
        if self.structure is not None:
            p, q = (tables.at(name, course, draws.begin) for name in "pq")
            x = torch.where(level(draws.structured), p * batch.latents + q * draws.noise, x)

        def move(step: int, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            here, plan = torch.full_like(rows, step), course[rows]
            k, a, b, c = (tables.at(name, plan, here) for name in "kabc")
            out = self.networks.frozen(Role.STUDENT, k * x, tables.t[plan, step], batch.conditioning.rows(rows))
            return a * x + b * out + c * draws.path_noise[rows, step]

        return play(x, draws.index, move, begin=draws.begin)


def span_of(count: int, low: float, high: float) -> tuple[int, int]:
    """First and last + 1 of a plan's steps that lie in the span: at least one of them."""
    first = min(math.floor(low * count), count - 1)
    return first, max(first + 1, math.ceil(high * count))

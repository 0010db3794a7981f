"""One distillation step: what is drawn at random, the student's loss, and the discriminator's.

All randomness of a step is a function of (seed, stage, step) and is drawn for the whole global batch, of which every
process and micro-batch takes its rows: a resumed run, and a run on other hardware, sees the same numbers.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from hypersd_export.diffusion.solver import add_noise
from trainer.batch import Batch, Conditioning, Map, PerSample, keyed_generator
from trainer.discriminator import Discriminator
from trainer.distill.config import DistillConfig, Real, StageConfig, Teacher
from trainer.distill.look import Look, critic_loss, judge
from trainer.distill.networks import Networks, Role
from trainer.losses import adversarial
from trainer.losses.tscd import Grid, Indices, Pair, consistency_distance, consistency_pair, draw_indices, level, psi


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws(PerSample):
    """What one step draws, a row per sample: noise [B, C, h, w] (offset noise included), guidance w [B], `drop` bool
    [B] (the caption becomes empty); for the critic the timestep [B] that it looks at, and two noises."""

    indices: Indices
    noise: torch.Tensor
    guidance: torch.Tensor
    drop: torch.Tensor
    critic_t: torch.Tensor
    critic_noise: torch.Tensor
    data_noise: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name, for the file of a bad step."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "indices"}
        return {"indices.start": self.indices.start, "indices.end": self.indices.end, **plain}

    @property
    def student(self) -> bool:
        """Whether the student learns in this step: always."""
        return True

    def _map(self, function: Map) -> "Draws":
        tensors = {f.name: function(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "indices"}
        return Draws(indices=Indices(function(self.indices.start), function(self.indices.end)), **tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """`loss`: scalar, the mean over the micro-batch, with gradient to the student alone, None where it does not learn;
    `logs`: detached scalars; `look`: what `critic_loss` wants, None without a critic."""

    loss: torch.Tensor | None
    logs: dict[str, torch.Tensor]
    look: Any


class DistillStep:
    """The losses of one stage, the `number`-th of its run (from 1)."""

    def __init__(
        self, networks: Networks, config: DistillConfig, stage: StageConfig, empty: Conditioning,
        discriminator: Discriminator | None = None, *, number: int = 1,
    ) -> None:  # fmt: skip
        self.networks, self.config, self.stage, self.empty = networks, config, stage, empty
        self.discriminator, self.number = discriminator, number
        self.alphas = networks.alphas_cumprod.to(networks.unet.device, torch.float32)
        self.grid = Grid.of(self.alphas, points=stage.points, segments=stage.segments, device=self.alphas.device)
        if (discriminator is None) != (stage.w_adv == 0):
            raise ValueError("a discriminator is needed exactly where w_adv > 0")

    def draw(self, step: int, shape: tuple[int, int, int]) -> Draws:
        """The draws of the global batch of `step` (counted within the stage) for latents of `shape`, on the CPU."""
        config, count = self.config, self.config.batch
        generator = keyed_generator(f"{config.seed}/{self.number}/{step}")
        grid = Grid.of(self.alphas.cpu(), points=self.stage.points, segments=self.stage.segments)
        indices = draw_indices(count, grid, config.end, generator, config.edge_share)
        noise, critic_noise, data_noise = torch.randn(3, count, *shape, generator=generator)
        offset, data_offset = config.offset_noise * torch.randn(2, count, shape[0], 1, 1, generator=generator)
        low, high = config.guidance
        uniform = torch.rand(2, count, generator=generator)
        return Draws(
            indices=indices, noise=noise + offset, guidance=low + (high - low) * uniform[0],
            drop=uniform[1] < config.empty_prompts, critic_noise=critic_noise, data_noise=data_noise + data_offset,
            critic_t=adversarial.draw_critic_timesteps(indices, grid, generator, config.adversarial.reach),
        )  # fmt: skip

    def __call__(self, batch: Batch, draws: Draws) -> StepOutput:
        """The student's loss on a micro-batch; the student's pass is the last one and the only one with gradient."""
        conditioning = batch.conditioning.where(draws.drop, self.empty.expand(len(batch)))
        pair = self._pair(batch.latents, draws, conditioning)
        distance = consistency_distance(pair, self.config.distance, self.config.huber_c).mean()
        loss, logs, look = self.stage.w_mse * distance, {"consistency": distance.detach()}, None
        if self.discriminator is not None:
            look, logits = self._look(self.discriminator, batch, draws, conditioning, pair)
            deceit = adversarial.generator_loss(self.config.adversarial.backend, logits).mean()
            loss, logs["adversarial"] = loss + self.stage.w_adv * deceit, deceit.detach()
        return StepOutput(loss=loss, logs=logs, look=look)

    def updated(self) -> None:
        """After an update of the student: the target follows."""
        self.networks.update_target(self.config.ema_decay)

    def critic_loss(self, look: Look) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The discriminator's, after the student's backward pass: `trainer.distill.look`."""
        assert self.discriminator is not None
        return critic_loss(self.discriminator, look)

    def _pair(self, x0: torch.Tensor, draws: Draws, conditioning: Conditioning) -> Pair:
        networks = self.networks
        target = Role.STUDENT if self.config.ema_decay == 0 else Role.TARGET
        return consistency_pair(
            x0, draws.noise, draws.indices, self.grid,
            student=lambda x, t, _: networks.student(x, t, conditioning),
            target=lambda x, t, rows: networks.frozen(target, x, t, conditioning.rows(rows)),
            teacher=lambda x, t, _: self._teach(x, t, draws, conditioning),
            prediction_type=networks.prediction_type, boundary=self.config.boundary,
        )  # fmt: skip

    def _teach(self, x: torch.Tensor, t: torch.Tensor, draws: Draws, conditioning: Conditioning) -> torch.Tensor:
        """The teacher's output: guidance is applied to the original model alone, and not where the student keeps it."""
        if self.stage.teacher is Teacher.PREVIOUS:
            return self.networks.frozen(Role.TEACHER, x, t, conditioning)
        if self.config.cfg_preserved or self.config.guidance == (1.0, 1.0):
            return self.networks.frozen(Role.BASE, x, t, conditioning)
        return self.networks.frozen(Role.BASE, x, t, conditioning, guidance=draws.guidance, empty=self.empty)

    def _look(
        self, critic: Discriminator, batch: Batch, draws: Draws, conditioning: Conditioning, pair: Pair
    ) -> tuple[Look, tuple[torch.Tensor, ...]]:
        """What critic and student look at, diffused from t_end to `critic_t`; and the logits of the fake, with gradient
        to the student: the critic's weights take none until `critic_loss`."""
        end, seen_at = level(self.grid.alphas[pair.indices.end]), level(self.alphas[draws.critic_t])
        fake = adversarial.renoise(pair.student, end, seen_at, draws.critic_noise)
        settings, t = self.config.adversarial, draws.critic_t
        with torch.no_grad():
            if settings.real is Real.DATA:
                real = add_noise(batch.latents, draws.data_noise, seen_at)
            else:
                clean = pair.target if settings.real is Real.TARGET else self._solve(draws, conditioning, pair)
                real = adversarial.renoise(clean, end, seen_at, draws.critic_noise)
        origin = (pair.x_start, self.grid.timesteps[pair.indices.start]) if settings.conditional else None
        return judge(critic, Look(fake=fake, real=real, t=t, conditioning=conditioning, origin=origin))

    def _solve(self, draws: Draws, conditioning: Conditioning, pair: Pair) -> torch.Tensor:
        """The teacher's solution from t_n to t_end in `teacher_steps` DDIM steps: sharp, and on its path."""
        count = self.config.adversarial.teacher_steps
        start, end = self.grid.timesteps[pair.indices.start], self.grid.timesteps[pair.indices.end]
        x, out = pair.x_start, pair.taught  # the first step's output is the consistency target's too
        for step in range(count):
            t, to = (start + (end - start) * i // count for i in (step, step + 1))
            if step > 0:
                out = self._teach(x, t, draws, conditioning)
            x = psi(x, out, level(self.alphas[t]), level(self.alphas[to]), self.networks.prediction_type)
        return x

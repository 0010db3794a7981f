"""One step of score distillation: the student is moved by the difference of two scores, the fake score learns after it.

The student draws a picture in one of `score.steps` steps with the TCD sampler at eta 1, as its LoRA will be played: the
steps before a drawn one are played without gradient (DMD2's backward simulation). Real score: the original model with
guidance. Fake score: another LoRA on it, that begins as the original model. Both see the picture at a drawn noise.
With a stage's w_adv a discriminator sees it too, beside drawings or the teacher's solutions (DMD2's GAN loss; there it
is a head on the fake score, here the one of `trainer.discriminator`, at the noises of `adversarial.reach`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hypersd_export.diffusion import FewStepPlan, x0_and_eps
from hypersd_export.diffusion.solver import add_noise
from hypersd_export.errors import OptionError
from trainer.batch import Batch, Conditioning, Map, PerSample, keyed_generator
from trainer.discriminator import Discriminator
from trainer.distill.config import DistillConfig, Real, StageConfig
from trainer.distill.look import Look, critic_loss, judge
from trainer.distill.networks import Networks, Role
from trainer.distill.pairs import Pairs
from trainer.distill.rollout import play
from trainer.distill.step import StepOutput
from trainer.losses.adversarial import generator_loss, renoise
from trainer.losses.score import denoising_loss, matching_direction, matching_loss
from trainer.losses.tscd import elementwise_distance, level, psi


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreDraws(PerSample):
    """What one step draws, a row per sample: initial noise [B, C, h, w] and that of the later steps [B, n, C, h, w];
    which of `score.steps` and which step of it, int64 [B]; both timesteps [B] with their noises; guidance w [B]; `drop`
    bool [B]; `pair` int64 [B], the anchor's number, or -1; for the discriminator its timesteps [B], two
    noises, and the number of the pair that is real. student: whether the student learns in this step."""

    student: bool
    noise: torch.Tensor
    path_noise: torch.Tensor
    course: torch.Tensor
    index: torch.Tensor
    pair: torch.Tensor
    match_t: torch.Tensor
    match_noise: torch.Tensor
    fake_t: torch.Tensor
    fake_noise: torch.Tensor
    guidance: torch.Tensor
    drop: torch.Tensor
    critic_t: torch.Tensor
    critic_noise: torch.Tensor
    real_noise: torch.Tensor
    real_pair: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name, for the file of a bad step."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "student"}

    def _map(self, function: Map) -> "ScoreDraws":
        return ScoreDraws(student=self.student, **{name: function(value) for name, value in self.tensors().items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What the fake score learns from: the student's pictures [B, C, h, w], and where they are looked at. `look` is
    what the discriminator does, None without one."""

    x0: torch.Tensor
    conditioning: Conditioning
    t: torch.Tensor
    noise: torch.Tensor
    look: Look | None = None


class FakeScore:
    """The fake score as the critic of a stage, with the discriminator if the run has one. Its weights are the teacher's
    adapter of `networks`, and are saved as such, so that it has no state of its own."""

    def __init__(self, networks: Networks, discriminator: Discriminator | None = None) -> None:
        self._weights, self.discriminator = networks.fake_parameters(), discriminator

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's weights, float32."""
        return self._weights

    def groups(self, config: DistillConfig) -> list[dict[str, Any]]:
        """Both's weights for an optimiser, each with its own rate and betas."""
        mine = {"params": self._weights, "lr": config.score.lr, "betas": config.score.betas}
        return [mine, *([] if self.discriminator is None else self.discriminator.groups(config))]

    def learn(self, on: bool) -> None:
        """Whether they take gradients."""
        for weight in self._weights:
            weight.requires_grad_(on)

    def state(self) -> dict[str, torch.Tensor]:
        """The discriminator's."""
        return {} if self.discriminator is None else self.discriminator.state()

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The discriminator's back."""
        if self.discriminator is not None:
            self.discriminator.load_state(tensors)


class ScoreStep:
    """The losses of one stage, the `number`-th of its run. plans: the sampler's for every count of `score.steps`."""

    def __init__(
        self, networks: Networks, config: DistillConfig, stage: StageConfig, empty: Conditioning, fake: FakeScore, *,
        plans: Sequence[FewStepPlan], pairs: Pairs | None = None, number: int = 1,
    ) -> None:  # fmt: skip
        self.networks, self.config, self.stage, self.empty, self.fake = networks, config, stage, empty, fake
        self.pairs, self.number = pairs, number
        self.discriminator = fake.discriminator if stage.w_adv else None
        self.alphas = networks.alphas_cumprod.to(networks.unet.device, torch.float32)
        self.courses = courses(plans, config, len(self.alphas)).to(self.alphas.device)

    def draw(self, step: int, shape: tuple[int, int, int]) -> ScoreDraws:
        """The draws of the global batch of `step` for latents of `shape`, on the CPU."""
        config, score, count, total = self.config, self.config.score, self.config.batch, len(self.alphas)
        generator = keyed_generator(f"{config.seed}/score/{self.number}/{step}")
        noise, match_noise, fake_noise = torch.randn(3, count, *shape, generator=generator)
        path_noise = torch.randn(count, max(score.steps) - 1, *shape, generator=generator)
        course = torch.randint(len(score.steps), (count,), generator=generator)
        share = torch.rand(4, count, generator=generator, dtype=torch.float64)
        index = torch.floor(share[0] * torch.tensor(score.steps)[course]).long()
        low, high = (round(bound * total) for bound in score.t_range)
        pair = torch.randint(max(1, score.pairs), (count,), generator=generator)
        anchored = (share[1] < score.pair_share) & (score.pairs > 0)
        critic_noise, real_noise = torch.randn(2, count, *shape, generator=generator)
        reach, weakest, strongest = max(1, round(config.adversarial.reach * total)), *config.guidance
        return ScoreDraws(
            student=step % score.student_every == 0, noise=noise, path_noise=path_noise,
            course=torch.where(anchored, score.steps.index(1) if score.pairs else 0, course),
            index=torch.where(anchored, 0, index), pair=torch.where(anchored, pair, -1),
            match_t=torch.randint(low, high, (count,), generator=generator), match_noise=match_noise,
            fake_t=torch.randint(0, total, (count,), generator=generator), fake_noise=fake_noise,
            guidance=(weakest + (strongest - weakest) * share[2]).float(), drop=share[3] < config.empty_prompts,
            critic_noise=critic_noise, real_noise=real_noise,
            critic_t=torch.randint(0, reach, (count,), generator=generator),
            real_pair=torch.randint(max(1, score.pairs), (count,), generator=generator),
        )  # fmt: skip

    def __call__(self, batch: Batch, draws: ScoreDraws) -> StepOutput:
        """The student's loss on a micro-batch, None where it does not learn now; and what the fake score sees."""
        conditioning = batch.conditioning.where(draws.drop, self.empty.expand(len(batch)))
        noise, solution, anchored = draws.noise, None, draws.pair >= 0
        if self.pairs is not None and anchored.any():
            theirs, solution, conditioning = self.pairs.put(draws.pair, conditioning)
            noise = torch.where(level(anchored), theirs, noise)
        x, t = self.play(noise, draws, conditioning)
        with torch.set_grad_enabled(draws.student):
            picture = self._land(self.networks.student(x, t, conditioning), x, t)
            look, logits = self._look(picture, batch, draws, conditioning)
        sample = Sample(
            x0=picture.detach(), conditioning=conditioning, t=draws.fake_t, noise=draws.fake_noise, look=look
        )  # fmt: skip
        if not draws.student:
            return StepOutput(loss=None, logs={}, look=sample)
        loss, logs = self._match(picture, draws, conditioning)
        if logits:
            deceit = generator_loss(self.config.adversarial.backend, logits).mean()
            loss, logs["adversarial"] = loss + self.stage.w_adv * deceit, deceit.detach()
        if solution is not None:
            far = elementwise_distance(picture, solution, self.config.distance, self.config.huber_c) * anchored
            loss = loss + self.config.score.w_anchor * far.mean()
            logs["anchor"] = far.mean().detach()
        return StepOutput(loss=loss, logs=logs, look=sample)

    def updated(self) -> None:
        """After an update of the student: the target follows, though nothing asks it."""
        self.networks.update_target(self.config.ema_decay)

    def critic_loss(self, look: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The fake score's denoising loss on the student's pictures, and the discriminator's: scalar, with gradient to
        them alone."""
        self.fake.learn(True)
        a = level(self.alphas[look.t])
        out = self.networks.fake(add_noise(look.x0, look.noise, a), look.t, look.conditioning)
        loss = denoising_loss(out, look.x0, look.noise, a, self.networks.prediction_type).mean()
        logs = {"fake": loss.detach()}
        if look.look is not None:
            assert self.discriminator is not None
            judged, figures = critic_loss(self.discriminator, look.look)
            loss, logs = loss + judged, logs | figures
        return loss, logs

    def play(
        self, noise: torch.Tensor, draws: ScoreDraws, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's own path down to the drawn step, without gradient: the sample there, and its timesteps [B]."""
        times = self.courses[draws.course]

        def move(step: int, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            t, to = times[rows, step], times[rows, step + 1]
            landed = self._land(self.networks.frozen(Role.STUDENT, x, t, conditioning.rows(rows)), x, t)
            return renoise(landed, level(self.alphas[:1]), level(self.alphas[to]), draws.path_noise[rows, step])

        x = play(noise, draws.index, move)
        return x, times.gather(1, draws.index[:, None])[:, 0]

    def _land(self, out: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Where the sampler's last step lands: on the path's first level, as TCD does, and not on x̂0."""
        return psi(x, out, level(self.alphas[t]), level(self.alphas[:1]), self.networks.prediction_type)

    def _look(
        self, picture: torch.Tensor, batch: Batch, draws: ScoreDraws, conditioning: Conditioning
    ) -> tuple[Look | None, tuple[torch.Tensor, ...]]:
        """What the discriminator and the student look at, and the logits of the pictures; nothing without one."""
        if self.discriminator is None:
            return None, ()
        first, seen_at = level(self.alphas[:1]), level(self.alphas[draws.critic_t])
        if self.config.adversarial.real is Real.DATA:
            real, theirs = add_noise(batch.latents, draws.real_noise, seen_at), batch.conditioning
        else:
            assert self.pairs is not None
            _, solution, theirs = self.pairs.put(draws.real_pair, conditioning)
            real = renoise(solution, first, seen_at, draws.real_noise)
        fake = renoise(picture, first, seen_at, draws.critic_noise)
        return judge(
            self.discriminator,
            Look(fake=fake, real=real, t=draws.critic_t, conditioning=conditioning, real_conditioning=theirs),
        )

    def _match(
        self, picture: torch.Tensor, draws: ScoreDraws, conditioning: Conditioning
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        t, a = draws.match_t, level(self.alphas[draws.match_t])
        noisy = add_noise(picture.detach(), draws.match_noise, a)
        guidance = None if self.config.guidance == (1.0, 1.0) else draws.guidance
        outs = (
            self.networks.frozen(Role.BASE, noisy, t, conditioning, guidance=guidance, empty=self.empty),
            self.networks.frozen(Role.TEACHER, noisy, t, conditioning),
        )
        real, fake = (x0_and_eps(out, noisy, a, self.networks.prediction_type)[0] for out in outs)
        matching = matching_loss(picture, matching_direction(picture, real, fake)).mean()
        return self.config.score.w_match * matching, {"matching": matching.detach()}


def courses(plans: Sequence[FewStepPlan], config: DistillConfig, total: int) -> torch.Tensor:
    """The timesteps of every count of `score.steps`, int64 [counts, most], rows filled up with 0.

    `score.start_t` replaces the first. OptionError for a count without a plan or a start that is not the highest.
    """
    score = config.score
    known = {plan.num_steps: [int(t) for t in plan.net_timesteps()] for plan in plans}
    missing = [count for count in score.steps if count not in known]
    if missing:
        listed = ", ".join(map(str, known))
        raise OptionError(f"score.steps {missing[0]}: the stage's grid has plans for {listed} steps")
    table = torch.zeros(len(score.steps), max(score.steps), dtype=torch.long)
    for row, count in enumerate(score.steps):
        times = known[count] if score.start_t < 0 else [score.start_t, *known[count][1:]]
        if not 0 < times[0] < total or sorted(set(times), reverse=True) != times:
            raise OptionError(
                f"score.start_t {score.start_t}: must lie below {total} and above the later steps {times[1:]}"
            )
        table[row, :count] = torch.tensor(times)
    return table

"""The recipes of the methods that go on from a few-step LoRA: a distillation's, with their one stage.

Human feedback, paper (arXiv 2404.13686): the rewards, their equal weights, batch and learning rate, a LoRA of its own.
It discloses neither the targets nor the number of updates; every other figure is ours, or named.
"""

from dataclasses import replace

from hypersd_export.errors import OptionError
from trainer.distill.config import (
    FEEDBACK,
    SCORE,
    DistillConfig,
    Real,
    StageConfig,
    builtin,
    recipe,
    sd15,
    sdxl,
    with_method,
)
from trainer.distill.feedback_config import FeedbackConfig, GuardConfig
from trainer.rewards.registry import Kind, RewardConfig


def feedback_builtin() -> DistillConfig:
    """All ours (docs/log.md). Targets are about what the teacher's own pictures score at 25 steps: 80.3 with the CLIP,
    -0.45 with the preference. A higher rate, or a target of 0, is exploited at once: texture and saturation rise."""
    rewards = (
        RewardConfig(kind=Kind.CLIP, weight=0.25, target=80.0),
        RewardConfig(kind=Kind.PREFERENCE, target=-0.5),
    )  # fmt: skip
    return _with_feedback(builtin(), steps=100, lr=5e-5, rewards=rewards, guard=GuardConfig(every=25))


def feedback_sd15() -> DistillConfig:
    """Targets: ImageReward's is ReFL's (arXiv 2304.05977, its code), the aesthetic predictor's ours. The files of both
    have to be named: `feedback.rewards.0.model` (a CLIP ViT-L/14), `feedback.rewards.1.model` and `.tokenizer`."""
    return _with_feedback(sd15(), steps=1000, lr=1e-6, rewards=_PAPERS, guard=GuardConfig())


def feedback_sdxl() -> DistillConfig:
    """As for SD 1.5."""
    return _with_feedback(sdxl(), steps=1000, lr=1e-6, rewards=_PAPERS, guard=GuardConfig())


_PAPERS = (
    RewardConfig(kind=Kind.AESTHETIC, target=6.5),
    RewardConfig(kind=Kind.IMAGE_REWARD, target=2.0),
)  # fmt: skip
FEEDBACK_RECIPES = {"builtin": feedback_builtin, "sd15": feedback_sd15, "sdxl": feedback_sdxl}


def feedback_recipe(name: str) -> DistillConfig:
    """The configuration named `name`; OptionError names those there are."""
    if name not in FEEDBACK_RECIPES:
        raise OptionError(f"--recipe {name!r} is not a feedback recipe; there are: {', '.join(FEEDBACK_RECIPES)}")
    return FEEDBACK_RECIPES[name]()


def recipe_by(name: str, method: str) -> DistillConfig:
    """The recipe `name` by any method, this one too; OptionError for a name or a method that there is not."""
    if method == FEEDBACK:
        return feedback_recipe(name)
    return score_builtin() if (name, method) == ("builtin", SCORE) else with_method(recipe(name), method)


def score_builtin() -> DistillConfig:
    """All ours (docs/log.md): the student learns in every step, at a rate near that of the stages before; first by the
    scores alone, then with a discriminator too, whose weight rises."""
    config = with_method(builtin(), SCORE)
    critic = replace(config.adversarial, real=Real.TEACHER_MULTISTEP, reach=0.3)
    stage, parts = replace(config.stages[0], lr=3e-4), ((500, 0.0), (600, 0.03), (600, 0.06))
    return replace(
        config, stages=tuple(replace(stage, steps=steps, w_adv=weight) for steps, weight in parts), adversarial=critic,
        score=replace(config.score, pairs=2048), ema_decay=0.98, warmup=60,
    )  # fmt: skip


def _with_feedback(
    config: DistillConfig, *, steps: int, lr: float, rewards: tuple[RewardConfig, ...], guard: GuardConfig
) -> DistillConfig:
    """A quarter of the micro-batch: the decoder's gradient takes most of the memory."""
    stage = StageConfig(segments=1, points=config.stages[-1].points, steps=steps, lr=lr)
    few = max(1, config.micro_batch // 4) if config.micro_batch else 0
    feedback = FeedbackConfig(rewards=rewards, guard=guard)
    return replace(config, method=FEEDBACK, stages=(stage,), micro_batch=few, feedback=feedback)

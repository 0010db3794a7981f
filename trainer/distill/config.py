"""How a distillation is configured: methods are rows of the same table, recipes are methods on a base model.

What the Hyper-SD paper (arXiv 2404.13686) discloses is marked "paper"; every other figure is ours, or named.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from hypersd_export.diffusion import segment_length
from hypersd_export.errors import OptionError
from trainer.distill.feedback_config import FeedbackConfig
from trainer.losses.tscd import Boundary, Distance, End


class Teacher(StrEnum):
    """Whose step leads from t_n to t_{n-1}: the original model with guidance, or the previous stage's student."""

    ORIGINAL = "original"
    PREVIOUS = "previous"


class Real(StrEnum):
    """What the discriminator sees as real: the consistency target, a multi-step solution of the teacher, or data."""

    TARGET = "target"
    TEACHER_MULTISTEP = "teacher_multistep"
    DATA = "data"


class Backend(StrEnum):
    """frozen: the teacher's features with small heads, hinge loss (PCM, arXiv 2405.18407); trainable: a copy of the
    teacher's encoder, non-saturating loss (SDXL-Lightning, arXiv 2402.13929, which the paper cites)."""

    FROZEN = "frozen"
    TRAINABLE = "trainable"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage: k segments on a grid of N points, `steps` student updates, and the weights of the two losses."""

    segments: int
    points: int
    steps: int
    lr: float
    w_mse: float = 1.0
    w_adv: float = 0.0
    teacher: Teacher = Teacher.ORIGINAL

    def __post_init__(self) -> None:
        segment_length(self.points, self.segments)
        if self.steps < 0 or self.lr <= 0:
            raise OptionError(f"stage k={self.segments}: steps {self.steps} and lr {self.lr} must be >= 0 and > 0")
        if min(self.w_mse, self.w_adv) < 0 or self.w_mse + self.w_adv == 0:
            raise OptionError(f"stage k={self.segments}: weights {self.w_mse}, {self.w_adv} must be >= 0, not both 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Rank and alpha of the LoRA; `modules` are endings of module names. The released files have rank 64."""

    rank: int = 64
    alpha: float = 64.0
    modules: tuple[str, ...] = (
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
        "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversarialConfig:
    """The discriminator. Lightning's Adam betas; learning rates ours (PCM 1e-5 for heads, Lightning 1e-6 for copies).

    conditional: Lightning's D(x_t, x_s): also sees where the jump began. teacher_steps: of TEACHER_MULTISTEP.
    reach: how far above t_end the critic looks, in segments; PCM's is 1, but little can be told under much noise.
    """

    backend: Backend = Backend.FROZEN
    real: Real = Real.TEACHER_MULTISTEP
    conditional: bool = False
    teacher_steps: int = 4
    reach: float = 1.0
    lr: float = 1e-5
    betas: tuple[float, float] = (0.0, 0.99)
    head_channels: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.reach <= 1 or self.teacher_steps < 1:
            raise OptionError(
                f"adversarial.reach {self.reach}, teacher_steps {self.teacher_steps}: in (0, 1], and >= 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """Score distillation (method "score"; `trainer.losses.score`). Ratio, t_range and betas are DMD2's, the rest ours.

    steps: the sampler's step counts that the student is trained at, a sample each; for more than one the steps before
    are played by the student itself (DMD2's backward simulation). start_t: the timestep of the first step, -1 for the
    schedule's last (paper: 999, and 800 for the one-step UNet). t_range: of the noise at which both scores are
    compared, as a share of all timesteps. student_every: the fake score learns in every step, the student in each
    such one (a stage's `steps` count the fake's). lr, betas: the fake score's. pairs: how many of the teacher's own
    solutions (noise → sample in `pair_steps` steps of DDIM) anchor the student, 0 for none; pair_share: of the batch.
    """

    steps: tuple[int, ...] = (1,)
    start_t: int = -1
    t_range: tuple[float, float] = (0.02, 0.98)
    student_every: int = 5
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    w_match: float = 1.0
    w_anchor: float = 0.25
    pairs: int = 0
    pair_steps: int = 8
    pair_share: float = 0.5

    def __post_init__(self) -> None:
        low, high = self.t_range
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) != len(self.steps):
            raise OptionError(f"score.steps {list(self.steps)}: must be different step counts of at least 1")
        if not 0 <= low < high <= 1 or not 0 <= self.pair_share <= 1:
            raise OptionError(f"score.t_range {low} to {high}, pair_share {self.pair_share}: shares in [0, 1], rising")
        if self.student_every < 1 or self.pairs < 0 or self.pair_steps < 1 or self.lr <= 0:
            raise OptionError(
                f"score.student_every {self.student_every}, pairs {self.pairs}, pair_steps {self.pair_steps}, lr "
                f"{self.lr}: must be >= 1, >= 0, >= 1 and > 0"
            )
        if min(self.w_match, self.w_anchor) < 0 or self.w_match + self.w_anchor == 0:
            raise OptionError(f"score.w_match {self.w_match}, w_anchor {self.w_anchor}: must be >= 0, not both 0")
        if self.pairs and 1 not in self.steps:
            raise OptionError(
                f"score.pairs {self.pairs}: they anchor one step; add 1 to score.steps {list(self.steps)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where samples come from: "builtin" scenes, or a folder, dataset or shard pattern (`trainer.data`), and the cache.

    on_error: "skip" counts and names what cannot be read, "stop" refuses at the first. size_px: 0 takes the base's.
    """

    source: str = "builtin"
    cache: str = ""
    size_px: int = 0
    caption_column: str = "text"
    image_column: str = "image"
    on_error: str = "skip"
    max_samples: int = 0


SCORE = "score"
"""The method that matches distributions and not trajectories; it has a command of its own."""
FEEDBACK = "feedback"
"""The method that follows rewards, with a LoRA on top of the one that it starts from; it has a command too."""
CHOICES = {
    "optimizer": ("adamw", "adamw8bit"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "base_precision": ("fp32", "fp16", "bf16"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Everything that decides a distillation.

    init_lora: a LoRA file that the student starts from, as an earlier stage's; its updates count as this run's. For
    method "feedback" it stays as it is, and the student is a LoRA of its own on top of it.
    edge_share: probability that a jump with a random end goes to its segment's edge instead (ours; paper: 0).
    guidance: range that w is drawn from, in the convention u + w(c − u); baked in by the teacher's step (paper: yes,
    range not disclosed). cfg_preserved: the teacher's step is conditional only and `empty_prompts` of the captions are
    empty, so that the student keeps guidance for inference (PCM). ema_decay: of the target (paper: yes, rate not
    disclosed); 0 makes the student its own target. batch: over all processes and accumulated micro-batches.
    warmup, cooldown: the first steps of a stage and the last share of them, in which its learning rate rises and falls.
    mixed_precision: of the passes; base_precision: of the frozen weights at rest (the LoRA is always float32).
    """

    method: str
    stages: tuple[StageConfig, ...]
    base: str = "builtin"
    data: DataConfig = field(default_factory=DataConfig)
    init_lora: str = ""
    end: End = End.RANDOM
    edge_share: float = 0.0
    boundary: Boundary = Boundary.DDIM
    distance: Distance = Distance.MSE
    huber_c: float = 1e-3
    guidance: tuple[float, float] = (3.0, 3.0)
    cfg_preserved: bool = False
    empty_prompts: float = 0.0
    ema_decay: float = 0.95
    offset_noise: float = 0.0
    lora: LoraConfig = field(default_factory=LoraConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    batch: int = 64
    micro_batch: int = 0
    mixed_precision: str = "bf16"
    base_precision: str = "fp32"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-3
    clip: float = 1.0
    warmup: int = 0
    cooldown: float = 0.0
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    validate_every: int = 0
    validation_prompts: tuple[str, ...] = ()
    log_with: str = "tensorboard"

    def __post_init__(self) -> None:
        low, high = self.guidance
        if not 1 <= low <= high:
            raise OptionError(f"guidance {low} to {high}: must be at least 1 (u + w(c - u)), and rising")
        if not 0 <= self.edge_share <= 1:
            raise OptionError(f"edge_share {self.edge_share}: must be a probability in [0, 1]")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.empty_prompts <= 1 or self.offset_noise < 0:
            raise OptionError(
                f"ema_decay {self.ema_decay}, empty_prompts {self.empty_prompts}, offset_noise {self.offset_noise}: "
                "must be in [0, 1), [0, 1] and >= 0"
            )
        if self.warmup < 0 or not 0 <= self.cooldown <= 1:
            raise OptionError(f"warmup {self.warmup}, cooldown {self.cooldown}: must be >= 0, and a share in [0, 1]")
        if self.batch < 1 or (self.micro_batch and self.batch % self.micro_batch):
            raise OptionError(f"batch {self.batch}: must be a multiple of micro_batch {self.micro_batch}, at least 1")
        if self.boundary is Boundary.LCM and (self.end is not End.EDGE or any(s.segments > 1 for s in self.stages)):
            raise OptionError("boundary lcm ends at the end of the trajectory: it needs end=edge and segments=1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"{name} {getattr(self, name)!r}: must be one of {', '.join(choices)}")
        self._check_stages()

    @property
    def needs_pictures(self) -> bool:
        """Whether it learns from pictures and not from prompts alone."""
        critic = any(stage.w_adv for stage in self.stages) and self.adversarial.real is Real.DATA
        return self.method in METHODS or critic or bool(self.feedback.structure.model)

    def _check_stages(self) -> None:
        if not self.stages:
            raise OptionError("stages: a distillation needs at least one")
        if self.method in (SCORE, FEEDBACK) and any(
            s.segments > 1 or s.teacher is not Teacher.ORIGINAL or (s.w_adv and self.method == FEEDBACK)
            for s in self.stages
        ):
            no_critic = ", w_adv 0" if self.method == FEEDBACK else ""
            raise OptionError(f"method {self.method}: its stages have segments 1{no_critic} and the original teacher")
        if self.method == SCORE and any(stage.w_adv for stage in self.stages):
            self._check_score_critic()
        if self.method == FEEDBACK and (len(self.stages) > 1 or not self.feedback.rewards):
            raise OptionError(
                f"method {FEEDBACK}: {len(self.stages)} stages, {len(self.feedback.rewards)} rewards: it has one stage "
                "and needs a reward"
            )
        if self.stages[0].teacher is not Teacher.ORIGINAL and not self.init_lora:
            raise OptionError("stages.0.teacher previous: there is none; set it to original, or set init_lora")

    def _check_score_critic(self) -> None:
        real, conditional = self.adversarial.real, self.adversarial.conditional
        if conditional or real is Real.TARGET:
            raise OptionError(
                f"adversarial.real {real}, conditional {conditional}: score distillation has no target and no jump; "
                "set real to data or teacher_multistep, conditional to false"
            )
        if real is Real.TEACHER_MULTISTEP and not self.score.pairs:
            raise OptionError(f"adversarial.real {real}: in score distillation these are the pairs; set score.pairs")


def tscd_stages(
    steps: tuple[int, ...], lr: float, *, points: tuple[int, ...] = (40, 40, 50, 50),
    mse: tuple[float, ...] = (1.0, 1.0, 0.5, 0.25), adv: tuple[float, ...] = (0.0, 0.05, 0.1, 0.3),
) -> tuple[StageConfig, ...]:  # fmt: skip
    """k = 8, 4, 2, 1 (paper). N = 40, 40, 50, 50 (ours): stages 8 and 4 lie on DDIM-trailing's timesteps, 2 and 1 on
    TCD's grid. The shift of weight from MSE to adversarial is the paper's, its figures ours."""
    rows = zip((8, 4, 2, 1), points, steps, mse, adv, strict=True)
    return tuple(StageConfig(segments=k, points=n, steps=s, lr=lr, w_mse=m, w_adv=a) for k, n, s, m, a in rows)


METHODS = ("tscd", "tcd", "lcm", "pcm")


def with_method(config: DistillConfig, method: str) -> DistillConfig:
    """The same recipe by another method, with the same total of student updates, the first stage's learning rate, and
    the grid of the recipe's stage with as many segments.

    lcm: arXiv 2310.04378 (LoRA script of diffusers: no EMA target, pseudo-Huber); tcd: arXiv 2402.19159;
    pcm: arXiv 2405.18407, 4 phases; set stages.0.segments for another count.
    """
    total, lr = sum(stage.steps for stage in config.stages), config.stages[0].lr
    points = {stage.segments: stage.points for stage in config.stages}
    one = StageConfig(segments=1, points=points.get(1, 50), steps=total, lr=lr)
    if method == "tscd":
        return replace(config, method=method)
    if method == SCORE:  # ours: a fifth of the rate, as the student has been trained; every step trains the fake score
        return replace(config, method=method, stages=(replace(one, lr=lr / 5),))
    config = replace(config, edge_share=0.0)  # ours, and TSCD's alone
    if method == "tcd":
        return replace(config, method=method, stages=(one,), distance=Distance.HUBER)
    if method == "lcm":
        return replace(
            config, method=method, stages=(one,), distance=Distance.HUBER, end=End.EDGE, boundary=Boundary.LCM,
            ema_decay=0.0,
        )  # fmt: skip
    if method == "pcm":
        four = replace(one, segments=4, points=points.get(4, 40))
        return replace(config, method=method, stages=(four,), distance=Distance.HUBER, end=End.EDGE)
    raise OptionError(f"--method {method!r} is not a method; there are: {', '.join((*METHODS, SCORE))}")


def builtin() -> DistillConfig:
    """The built-in model on two CPU cores, all ours (docs/log.md). Its teacher draws as well in 8 steps as in 25, so a
    coarse grid costs nothing, and what the student learns at the low end reaches the high end in fewer updates. Every
    jump goes to its segment's edge, where the few-step samplers land: with so few updates each random end is one too
    many (FD to the teacher at one step, seen prompts: 0.65, and 0.75 with 0.3 of the ends at random). Pseudo-Huber is
    far better than the squared error. No adversarial loss: `adversarial` are the critic's settings in its trials."""
    stages = tscd_stages((100, 100, 200, 600), 5e-4, points=(16, 16, 8, 8), mse=(1.0,) * 4, adv=(0.0,) * 4)
    critic = AdversarialConfig(backend=Backend.FROZEN, real=Real.DATA, reach=0.1, lr=2e-3)
    return DistillConfig(
        method="tscd", stages=stages, distance=Distance.HUBER, edge_share=1.0, lora=LoraConfig(rank=32, alpha=32.0),
        adversarial=critic, score=ScoreConfig(student_every=1, lr=4e-4, pairs=1024, w_anchor=0.5), batch=32,
        weight_decay=0.0, warmup=20, cooldown=0.5, validate_every=200,
    )  # fmt: skip


def sd15() -> DistillConfig:
    """Stable Diffusion 1.5 at 512 px: batch 512 and lr 1e-6 are the paper's; guidance near PCM's 4-5, plus one."""
    return DistillConfig(
        method="tscd", base="stable-diffusion-v1-5/stable-diffusion-v1-5", stages=tscd_stages((5000,) * 4, 1e-6),
        data=DataConfig(source=""), guidance=(5.0, 9.0), batch=512, micro_batch=16, mixed_precision="fp16",
        base_precision="fp16", gradient_checkpointing=True, offset_noise=0.05,
    )  # fmt: skip


def sdxl() -> DistillConfig:
    """SDXL base at 1024 px: batch 512 and lr 1e-6 are the paper's; guidance near PCM's 6-7, plus one."""
    return replace(
        sd15(), base="stabilityai/stable-diffusion-xl-base-1.0", guidance=(7.0, 9.0), micro_batch=4,
        mixed_precision="bf16", base_precision="bf16",
    )  # fmt: skip


RECIPES = {"builtin": builtin, "sd15": sd15, "sdxl": sdxl}


def recipe(name: str) -> DistillConfig:
    """The configuration named `name`; OptionError names those there are."""
    if name not in RECIPES:
        raise OptionError(f"--recipe {name!r} is not a distillation recipe; there are: {', '.join(RECIPES)}")
    return RECIPES[name]()

"""How human feedback is configured (method "feedback"; `trainer.distill.feedback`)."""

from dataclasses import dataclass, field
from enum import StrEnum

from hypersd_export.errors import OptionError
from trainer.rewards.registry import RewardConfig


class Watch(StrEnum):
    """What the guard looks at: nothing, the CLIP score of the pictures, or how far they lie from the teacher's."""

    NONE = "none"
    CLIP = "clip"
    DISTANCE = "distance"


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """When to stop early, all ours. Every `every` steps and at the end the student draws the first `prompts` captions
    of the data from fixed noises. If what is watched is worse than at the beginning by more than the share `bound`, the
    run ends there, with the weights of the last look that was good.

    clip: a CLIP folder for `clip`, empty for the built-in one; best one that no reward looks with. teacher_steps: of
    the teacher's pictures for `distance` (DDIM, middle of the guidance range).
    """

    watch: Watch = Watch.DISTANCE
    bound: float = 0.05
    every: int = 50
    prompts: int = 64
    clip: str = ""
    teacher_steps: int = 25

    def __post_init__(self) -> None:
        if self.bound < 0 or self.every < 1 or self.prompts < 1 or self.teacher_steps < 1:
            raise OptionError(
                f"feedback.guard: bound {self.bound}, every {self.every}, prompts {self.prompts}, teacher_steps "
                f"{self.teacher_steps}: must be >= 0, and >= 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StructureConfig:
    """Structure feedback beside the rewards (PeFL; `trainer.rewards.structure`), off without a model.

    model: folder of a MaskFormer or Mask2Former of transformers (paper: SOLO), or builtin, the built-in model's.
    annotations: a JSON file in COCO's form (paper: instances_train2017.json) whose pictures are the data's, by file
    name, or builtin, where the data are: scenes know what they show. share: of the batch, which begins
    from a noised picture and not from noise, and is asked for its instances and not for its rewards. weight: of that
    loss (paper: equal weights).
    """

    model: str = ""
    annotations: str = ""
    weight: float = 1.0
    share: float = 0.5

    def __post_init__(self) -> None:
        if bool(self.model) != bool(self.annotations):
            raise OptionError(
                f"feedback.structure: model {self.model!r}, annotations {self.annotations!r}: takes both or neither"
            )
        if not 0 < self.share < 1 or self.weight <= 0:
            raise OptionError(f"feedback.structure: share {self.share}, weight {self.weight}: in (0, 1), and above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackConfig:
    """Rewards, and where on the student's path they are asked.

    rewards: the terms of Σ w · ReLU(α − r). steps: the step counts that the student is trained at, of those that the
    LoRA has a plan for; empty: all of them, a sample each. span: the share of a plan's steps from which the one with
    gradient is drawn (ReFL takes the last ten of forty: [0.75, 1]; few steps are all late enough, so ours is all).
    """

    rewards: tuple[RewardConfig, ...] = ()
    steps: tuple[int, ...] = ()
    span: tuple[float, float] = (0.0, 1.0)
    structure: StructureConfig = field(default_factory=StructureConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        low, high = self.span
        if not 0 <= low < high <= 1:
            raise OptionError(f"feedback.span {low} to {high}: shares of a plan's steps in [0, 1], rising")
        if len(set(self.steps)) != len(self.steps) or (self.steps and min(self.steps) < 1):
            raise OptionError(f"feedback.steps {list(self.steps)}: must be different step counts of at least 1")

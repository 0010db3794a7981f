"""What a feedback run has beside a distillation: the LoRA that it stands on, the rewards, a VAE that is decoded through
with gradient, and the guard that ends it early."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hypersd_export.errors import DataError, LoraError, OptionError
from hypersd_export.model.base import BUILTIN
from hypersd_export.model.files import user_path
from hypersd_export.model.lora import Delta, LoraFile, read_lora
from trainer.base import TrainingBase, schedule_of
from trainer.batch import Source
from trainer.distill.config import DistillConfig, StageConfig
from trainer.distill.engine import Engine
from trainer.distill.feedback import FeedbackStep, Structure
from trainer.distill.feedback_config import Watch
from trainer.distill.guard import Guard
from trainer.distill.lora_file import plans_of
from trainer.distill.networks import Networks
from trainer.rewards.registry import Kind, RewardConfig, check_rewards, open_rewards


class Feedback:
    """Construct it before the networks, which stand on `deltas`; `open` when they are there."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.lora: LoraFile = read_lora(Path(config.init_lora))
        odd = sorted(set(self.lora.components) - {"unet"})
        if odd or not self.lora.components:
            raise LoraError(f"{self.lora.path}: has a part for the {odd[0]}; feedback stands on a UNet's LoRA alone")
        self.deltas: Mapping[str, Delta] = self.lora.components["unet"]
        self.plans = plans_of(self.lora, config.feedback.steps)
        self.kept = -1
        """After how many updates the weights are that an early stop went back to; -1 without one."""
        self.begin: Mapping[str, float] = {}
        """The guard's figures of the frozen LoRA alone."""

    def open(self, base: TrainingBase, networks: Networks, source: Source, engine: Engine) -> None:
        """Load rewards and VAE; the main process's guard looks at the frozen LoRA."""
        config, terms, device = self.config, self.config.feedback.rewards, engine.device
        self.rewards = dict(zip(names(terms), open_rewards(terms, device), strict=True))
        self._vae = base.load_vae(torch.float32).to(device)
        if config.gradient_checkpointing:
            self._vae.enable_gradient_checkpointing()
        self._structure = self._open_structure(base, source, device)
        watch = config.feedback.guard.watch
        self._guard: Guard | None = None
        if watch is Watch.NONE or not engine.is_main:
            return
        clip = None
        if watch is Watch.CLIP:
            clip = open_rewards([RewardConfig(kind=Kind.CLIP, model=config.feedback.guard.clip)], device)[0]
        with engine.autocast():
            self._guard = Guard(
                networks, source, config, plans=self.plans, vae=self._vae, clip=clip,
                schedule=schedule_of(base.model.scheduler_config),
            )  # fmt: skip
        self.begin = self._guard.begin

    def step(self, networks: Networks, stage: StageConfig, *, number: int) -> FeedbackStep:
        """The losses of the stage."""
        return FeedbackStep(
            networks, self.config, stage, rewards=self.rewards, plans=self.plans, vae=self._vae,
            structure=self._structure, number=number,
        )  # fmt: skip

    def _open_structure(self, base: TrainingBase, source: Source, device: torch.device) -> Structure | None:
        """The segmenter, and the annotations of the pictures as the data crop them."""
        settings = self.config.feedback.structure
        if not settings.model:
            return None
        from trainer.data.builtin import BuiltinInstances, BuiltinScenes
        from trainer.data.coco import CocoInstances
        from trainer.rewards.structure import BUILTIN_SEGMENTER, InstanceLoss

        loss = InstanceLoss(BUILTIN_SEGMENTER if settings.model == BUILTIN else settings.model, device=device)
        if settings.annotations != BUILTIN:
            size_px = source.latent_shape[1] * base.model.vae_scale_factor
            return Structure(loss, CocoInstances(user_path(settings.annotations), loss.classes, size_px))
        if not isinstance(source, BuiltinScenes):
            raise OptionError(
                f"feedback.structure.annotations=builtin: only the built-in scenes have them, and data.source is "
                f"{self.config.data.source}; name a file in COCO's form"
            )
        return Structure(loss, BuiltinInstances(source, loss.classes))

    def look(self, done: int, of: int, networks: Networks, engine: Engine) -> tuple[dict[str, float], bool]:
        """After `done` of `of` updates: the guard's figures, if it is time for a look, and whether the run ends here,
        in which case the student has the weights of the last good look again. Every process has to ask.

        DataError if there was no good look: then there is nothing to keep.
        """
        guard = self.config.feedback.guard
        if guard.watch is Watch.NONE or (done % guard.every and done != of):
            return {}, False
        figures, worse = {}, 0.0
        if self._guard is not None:
            with engine.autocast():
                looked = self._guard.look()
            worse = self._guard.worse(looked)
            figures = {f"guard_{name}": value for name, value in looked.items()} | {"guard_worse": worse}
        tripped = torch.tensor(float(worse > guard.bound), device=engine.device)
        if not float(engine.accelerator.reduce(tripped, reduction="sum")):
            networks.update_target(0)
            return figures, False
        self.kept = (done - 1) // guard.every * guard.every
        if self.kept == 0:
            raise DataError(
                f"the guard ({guard.watch}) is worse by {worse:.1%} at its first look, after {done} updates, where "
                f"{guard.bound:.1%} is allowed: nothing is kept; lower the learning rate or feedback.guard.every"
            )
        networks.back_to_target()
        return figures, True


def check_feedback(config: DistillConfig) -> None:
    """OptionError for what a feedback run needs and is not named; nothing is opened."""
    if not config.init_lora:
        raise OptionError(f"method {config.method} stands on a few-step LoRA: name one with --init-lora FILE")
    check_rewards(config.feedback.rewards)


def names(terms: Sequence[RewardConfig]) -> list[str]:
    """The rewards' names for logs: their kinds, numbered where one occurs twice."""
    kinds = [term.kind.value for term in terms]
    return [k if kinds.count(k) == 1 else f"{k}_{kinds[: i + 1].count(k)}" for i, k in enumerate(kinds)]

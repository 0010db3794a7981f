"""The built-in model's preference: a small network that learns which of two pictures is better drawn, without a human.

Two kinds of pairs. The teacher at 25 steps over the teacher at 2 from the same seed: that is what a few-step student
lacks. And a clean drawing over the same one degraded: blurred, noisy, warped, and so on. No judge has a say in it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hypersd_export.diffusion import FewStepPlan, Guidance, Solver
from hypersd_export.errors import DataError
from hypersd_export.model.files import read_header, read_tensors, write_tensors
from trainer.base import TrainingBase, encode_pictures, schedule_of
from trainer.checkpoint import saved_step
from trainer.distill.config import LoraConfig
from trainer.distill.networks import Networks, Role
from trainer.distill.snapshot import writing
from trainer.distill.validate import draw_pictures
from trainer.ema import Ema
from trainer.losses.feedback import bradley_terry
from trainer.pretrain.degrade import DEGRADATIONS, degrade
from trainer.pretrain.loop import Schedule, StepResult, train
from trainer.pretrain.measured import Measured
from trainer.pretrain.scenes import draw_specs, held_out_mask
from trainer.pretrain.vae import to_uint8
from trainer.rewards.preference import PreferenceNet, save_preference

ROWS = 64
"""How many pictures are sampled at once."""
HELD_OUT_SEED = 1_000_000
"""First noise seed of the held-out pairs; training's begin at 0."""
NAME, RECORD = "preference.safetensors", "preference.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceConfig:
    """All ours. pairs, held_out: pairs of the teacher's pictures to learn from and to measure with; steps, few_steps:
    of the better and the worse picture; width: of the network."""

    base: str = "builtin"
    seed: int = 0
    pairs: int = 2048
    held_out: int = 512
    steps: int = 25
    few_steps: int = 2
    guidance: float = 3.0
    width: int = 32
    batch: int = 64
    schedule: Schedule = field(
        default_factory=lambda: Schedule(steps=2000, lr=1e-3, cooldown=1000, ema_decay=0.995, weight_decay=0.05)
    )


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pictures in [-1, 1], float32 [N, 3, H, W]: row i of `better` is preferred to row i of `worse`."""

    better: torch.Tensor
    worse: torch.Tensor


class PreferenceTraining(Measured):
    """The run in `out`: construct, iterate `run()`; then the preference is out/preference.safetensors, with its
    configuration and the held-out accuracies beside it as JSON, and in `figures`."""

    config: PreferenceConfig
    key = "held_out_accuracy"

    def run(self) -> Iterator[StepResult]:
        """Draw the pairs, or read those of an earlier start; train, or go on; measure; write. Nothing if that was done.

        DataError if the pairs that are there are another configuration's.
        """
        config, allowed, record = self.config, ~held_out_mask(), self.out / RECORD
        if self._finished(record):
            return
        torch.manual_seed(config.seed)
        net = PreferenceNet(config.width)
        ema = Ema(net, config.schedule.ema_decay)
        seen = self._teacher_pairs("seen", config.pairs, allowed, first_seed=0)
        state = self.out / "state" / NAME
        generator = torch.Generator().manual_seed(config.seed + saved_step(state))

        def losses(step: int) -> dict[str, torch.Tensor]:
            del step
            rows = torch.randint(len(seen.better), (config.batch // 2,), generator=generator)
            drawn = self._drawn_pairs(config.batch - len(rows), allowed, generator)
            better, worse = seen.better[rows], seen.worse[rows]
            if torch.rand((), generator=generator) < 0.5:  # a drawing may be mirrored too
                better, worse = better.flip(3), worse.flip(3)
            better, worse = torch.cat([better, drawn.better]), torch.cat([worse, drawn.worse])
            first, second = net(torch.cat([better, worse])).float().chunk(2)
            right = (first > second).float().mean()
            return {"loss": bradley_terry(first, second).mean(), "right": right}

        yield from train(net, losses, config.schedule, state=state, ema=ema)
        self._finish(ema.module, seen, allowed)

    def _finish(self, net: Any, seen: Pairs, allowed: np.ndarray) -> None:
        config = self.config
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        kinds = {
            "teacher": self._teacher_pairs("held-out", config.held_out, ~allowed, first_seed=HELD_OUT_SEED),
            **{
                f"degraded by {name}": self._drawn_pairs(config.held_out, ~allowed, generator, kind)
                for kind, name in enumerate(DEGRADATIONS)
            },
        }
        self.figures = {name: round(accuracy(net, pairs), 4) for name, pairs in kinds.items()}
        drawn = self._drawn_pairs(config.pairs, allowed, generator)
        preferred = torch.cat([scores(net, seen.better), scores(net, drawn.better)])
        size_px = self._base.native_size
        with writing(self.out / NAME) as partial:
            save_preference(partial, net, width=config.width, size_px=size_px, preferred=preferred)
        self._write_record(self.out / RECORD)

    def _drawn_pairs(
        self, count: int, allowed: np.ndarray, generator: torch.Generator, kind: int | None = None
    ) -> Pairs:
        with torch.autocast("cpu", enabled=False):
            clean = self._renderer(draw_specs(count, allowed, generator), generator)
            return Pairs(clean, degrade(clean, generator, kind))

    def _teacher_pairs(self, name: str, count: int, allowed: np.ndarray, *, first_seed: int) -> Pairs:
        """From out/pairs-<name>.safetensors, or drawn now and kept there; 8 bits each, as a viewer sees them."""
        config, path = self.config, self.out / f"pairs-{name}.safetensors"
        key = json.dumps([self._base.digest, count, config.steps, config.few_steps, config.guidance, first_seed])
        if path.exists():
            if read_header(path, DataError).metadata.get("key") != key:
                raise DataError(f"{path}: the pairs of another configuration; delete it, or take another --out")
            kept = read_tensors(path, DataError)
        else:
            generator = torch.Generator().manual_seed(first_seed)
            captions = draw_specs(count, allowed, generator).captions()
            teacher = Teacher(self._base, config.guidance)
            kept = {}
            for part, steps in (("better", config.steps), ("worse", config.few_steps)):
                self._say(f"pairs: {count} pictures in {steps} steps ({name} combinations)")
                kept[part] = to_uint8(teacher(captions, steps, first_seed)).contiguous()
            with writing(path) as partial:
                write_tensors(partial, kept, {"key": key})
        return Pairs(kept["better"].float() / 127.5 - 1, kept["worse"].float() / 127.5 - 1)


class Teacher:
    """The base model with guidance, sampled by DDIM trailing: call it with captions, a step count and a first seed."""

    def __init__(self, base: TrainingBase, guidance: float) -> None:
        self._base, self._guidance = base, guidance
        size = (base.native_size, base.native_size)
        self._vae, self._encoder = base.load_vae(torch.float32), base.prompt_encoder(torch.float32)
        self._empty = self._encoder.empty(size=size)
        smallest = LoraConfig(rank=1, alpha=1.0, modules=("to_q",))  # the base alone is asked, and never an adapter
        self._networks = Networks.build(
            base.load_unet(torch.float32), smallest, alphas_cumprod=base.alphas_cumprod,
            prediction_type=base.prediction_type,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self, captions: list[str], steps: int, first_seed: int, *, pictures: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pictures float32 [N, 3, H, W] in [-1, 1]; caption i starts from the noise of seed `first_seed` + i, or from
        picture i [N, 3, H, W] noised half way, at row `steps` // 2, where there are pictures."""
        base, latents = self._base, None if pictures is None else encode_pictures(self._vae, pictures)
        plan = FewStepPlan(
            solver=Solver.DDIM, num_steps=steps, guidance=Guidance.of(self._guidance),
            schedule=schedule_of(base.model.scheduler_config), prediction_type=base.prediction_type,
        )  # fmt: skip
        size = (base.native_size, base.native_size)
        with torch.autocast("cpu", torch.bfloat16):  # `decode` turns it off for the VAE
            return draw_pictures(
                self._networks, self._vae, plan, self._encoder(captions, size=size), base.latent_shape(size[0]),
                first_seed=first_seed, empty=self._empty, role=Role.BASE, batch=ROWS, latents=latents,
                start=0 if latents is None else steps // 2,
            )  # fmt: skip


@torch.no_grad()
def scores(net: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Raw scores float32 [N] of pictures [N, 3, H, W]."""
    return torch.cat([net(part) for part in torch.split(pictures, 256)])


def accuracy(net: Any, pairs: Pairs) -> float:
    """The share of the pairs whose better half has the higher score."""
    return float((scores(net, pairs.better) > scores(net, pairs.worse)).double().mean())

"""The built-in model's instance segmenter: a small Mask2Former that learns from canvases of one to three drawings.

Their masks are the drawings' own alpha. Structure feedback asks it (`trainer.rewards.structure`); no judge has a say.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hypersd_export.errors import OptionError
from trainer.checkpoint import saved_step
from trainer.distill.snapshot import disk, writing
from trainer.ema import Ema
from trainer.pretrain.canvases import PLACEMENTS, Canvases, draw_canvases, joined, scene_canvases
from trainer.pretrain.concepts import CONCEPTS
from trainer.pretrain.degrade import DEGRADATIONS, degrade
from trainer.pretrain.loop import Schedule, StepResult, train
from trainer.pretrain.measured import Measured
from trainer.pretrain.preference import Teacher
from trainer.pretrain.scenes import draw_specs, held_out_mask
from trainer.pretrain.segmented import found_figures, mean_loss
from trainer.rewards.preprocess import PREPROCESSOR, normalise
from trainer.rewards.structure import IMAGENET_MEAN, IMAGENET_STD, InstanceLoss

HELD_OUT_SEED = 1_000_000
"""Of the held-out canvases; training's begin at 0."""
FOLDER, RECORD = "segmenter", "segmenter.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterConfig:
    """All ours. batch: canvases a step, a third each with one, two and three drawings; held_out: canvases of each
    number to measure with, and pictures whose loss is compared: drawn, degraded, and made of them by the teacher in
    `steps` and in `few_steps`. width, hidden, layers, queries: of the network; points: at which masks are compared."""

    base: str = "builtin"
    seed: int = 0
    batch: int = 24
    held_out: int = 256
    steps: int = 25
    few_steps: int = 2
    guidance: float = 3.0
    width: int = 28
    hidden: int = 96
    layers: int = 3
    queries: int = 8
    points: int = 256
    schedule: Schedule = field(
        default_factory=lambda: Schedule(
            steps=3710, lr=1.5e-3, cooldown=1200, warmup=200, ema_decay=0.995, weight_decay=0.05, bf16=False
        )
    )

    def __post_init__(self) -> None:
        if self.batch < 1 or self.batch % len(PLACEMENTS):
            raise OptionError(f"batch {self.batch}: must be a multiple of {len(PLACEMENTS)}, a third for each number")


class SegmenterTraining(Measured):
    """The run in `out`: construct, iterate `run()`; then out/segmenter is a folder of transformers (float16), with its
    configuration and the held-out figures beside the weights as JSON, and in `figures`."""

    config: SegmenterConfig
    key = "held_out"

    def run(self) -> Iterator[StepResult]:
        """Train, or go on; write; measure what was written. Nothing if that was done."""
        config, folder = self.config, self.out / FOLDER
        record = folder / RECORD
        if self._finished(record):
            return
        torch.manual_seed(config.seed)
        net = segmenter(config, self._base.native_size)
        ema, state = Ema(net, config.schedule.ema_decay), self.out / "state" / "segmenter.safetensors"
        generator = torch.Generator().manual_seed(config.seed + saved_step(state))
        allowed = ~held_out_mask()

        def losses(step: int) -> dict[str, torch.Tensor]:
            del step
            canvases = self._canvases(config.batch // len(PLACEMENTS), allowed, generator)
            pixels = normalise(canvases.pictures, IMAGENET_MEAN, IMAGENET_STD)
            out = net(
                pixel_values=pixels, mask_labels=[known.masks.float() for known in canvases.truth],
                class_labels=[known.classes for known in canvases.truth],
            )  # fmt: skip
            return {"loss": out.loss.reshape(())}

        yield from train(net, losses, config.schedule, state=state, ema=ema)
        save_segmenter(ema.module, folder)
        self._say("measuring on held-out combinations")
        self.figures = self._measure(InstanceLoss(folder))
        self._write_record(record)

    def _canvases(self, each: int, allowed: Any, generator: torch.Generator) -> Canvases:
        """So many with one drawing, with two and with three."""
        parts = [draw_canvases(self._renderer, 1 + more, each, allowed, generator) for more in range(len(PLACEMENTS))]
        return joined(parts)

    def _measure(self, loss: InstanceLoss) -> dict[str, float]:
        """By number of drawings, what it finds; and the losses of pictures that should be ever harder to read."""
        config, held_out = self.config, held_out_mask()
        generator, figures = torch.Generator().manual_seed(HELD_OUT_SEED), dict[str, float]()
        for drawings in range(1, len(PLACEMENTS) + 1):
            canvases = draw_canvases(self._renderer, drawings, config.held_out, held_out, generator)
            found = found_figures(loss.find(canvases.pictures), canvases.truth)
            figures |= {f"{drawings} drawings, {name}": value for name, value in found.items()}
        spec = draw_specs(config.held_out, held_out, generator)
        scenes, teacher = scene_canvases(self._renderer, spec, generator), Teacher(self._base, config.guidance)
        kinds = {"drawings": scenes.pictures}
        for steps in (config.steps, config.few_steps):
            kinds[f"the teacher in {steps} steps"] = teacher(
                spec.captions(), steps, HELD_OUT_SEED, pictures=scenes.pictures
            )
        for kind, name in enumerate(DEGRADATIONS):
            kinds[f"degraded by {name}"] = degrade(scenes.pictures, generator, kind)
        figures |= {f"loss, {name}": mean_loss(loss, Canvases(p, scenes.truth)) for name, p in kinds.items()}
        return {name: round(value, 4) for name, value in figures.items()}


def segmenter(config: SegmenterConfig, size_px: int) -> Any:
    """A Mask2Former on a Swin of four stages, a class for each concept; its weights are random, by torch's generator.

    Its masks are half the picture's size. A MaskFormer of the same size learned masks, but in 400 steps no class: it
    looks at the last of the four maps alone, which has four places in a picture of 32 px.
    """
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        image_size=size_px, patch_size=2, embed_dim=config.width, depths=[1, 1, 2, 1], num_heads=[2, 4, 4, 4],
        window_size=4, mlp_ratio=2.0, drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    named = {"id2label": dict(enumerate(CONCEPTS)), "label2id": {name: n for n, name in enumerate(CONCEPTS)}}
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=swin, feature_strides=[2, 4, 8, 16], common_stride=2, feature_size=64, mask_feature_size=64,
            hidden_dim=config.hidden, encoder_layers=1, decoder_layers=1 + config.layers, num_attention_heads=4,
            encoder_feedforward_dim=2 * config.hidden, dim_feedforward=2 * config.hidden, num_queries=config.queries,
            train_num_points=config.points, **named,
        )
    )  # fmt: skip


def save_segmenter(net: Any, folder: Path) -> None:
    """Write `net` in float16 as a folder of transformers, with the mean and deviation of its pixels beside it; `net`
    is rounded on the way. DestinationError for what the disk refuses."""
    pixels = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "do_normalize": True, "do_resize": False}
    with disk(folder):
        net.half().save_pretrained(folder)
    with writing(folder / PREPROCESSOR) as partial:
        partial.write_text(json.dumps(pixels, indent=1), encoding="utf-8")

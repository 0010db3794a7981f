"""A distillation that takes a fraction of a second: the tiny pipeline, random latents, two stages of a few steps."""

from dataclasses import replace
from functools import cache

import torch
from safetensors import safe_open

from trainer.base import open_training_base
from trainer.batch import Batch
from trainer.distill.config import AdversarialConfig, DistillConfig, LoraConfig, StageConfig
from trainer.distill.logs import read_log
from trainer.distill.run import Distillation

SHAPE = (4, 4, 4)
STEPS = 3


class RandomSource:
    """Latents that are a function of their position; `bad` positions hold a NaN."""

    latent_shape = SHAPE

    def __init__(self, base, bad=()):
        encoder = base.prompt_encoder(torch.float32)
        self.captions, self.bad = ("cat", "dog", "a cat on a dog"), bad
        self.empty, self.conditioning = encoder.empty(), encoder(self.captions, size=(16, 16))

    def batch(self, positions):
        latents = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(p)) for p in positions])
        for row, position in enumerate(positions):
            if position in self.bad:
                latents[row, 0, 0, 0] = torch.nan
        kinds = torch.tensor([p % len(self.captions) for p in positions])
        return Batch(
            latents=latents, conditioning=self.conditioning.rows(kinds), names=tuple(f"sample {p}" for p in positions),
            captions=tuple(self.captions[kind] for kind in kinds),
        )  # fmt: skip


@cache
def opened(folder):
    """(base, source) of a pipeline folder, once a test process."""
    base = open_training_base(str(folder))
    return base, RandomSource(base)


def small_config(folder, *, w_adv=0.0, steps=STEPS, **changes):
    """Two stages, k = 2 and 1, float32; with w_adv the second has a discriminator."""
    stages = tuple(
        StageConfig(segments=k, points=4, steps=steps, lr=1e-3, w_adv=w_adv if k == 1 else 0.0) for k in (2, 1)
    )
    config = DistillConfig(
        method="tscd", stages=stages, base=str(folder), lora=LoraConfig(rank=2, alpha=2.0, modules=("to_q", "conv1")),
        adversarial=AdversarialConfig(head_channels=16, lr=1e-2, teacher_steps=1), batch=4,
        mixed_precision="no", save_every=2, keep=2, log_with="none", guidance=(2.0, 4.0), offset_noise=0.05,
    )  # fmt: skip
    return replace(config, **changes)


def start(config, out, *, source=None, **settings):
    """The distillation, not yet begun."""
    base, usual = opened(config.base)
    return Distillation(config, out, base=base, source=source or usual, **settings)


def finish(config, out, **settings):
    """Run it to its end and give its log without the times."""
    for _ in start(config, out, **settings).run():
        pass
    return log(out)


def log(out):
    """log.jsonl without the times."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read_log(out)]


def loras(out):
    """{path: (metadata, {name: bytes})} of every LoRA that a run wrote."""
    return {str(path.relative_to(out)): _content(path) for path in sorted(out.rglob("*-lora.safetensors"))}


def _content(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118

"""How the built-in model is made: the configuration, and the stages in the order in which they are trained."""

from dataclasses import dataclass, field, replace

from hypersd_export.errors import OptionError
from trainer.pretrain.loop import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Sizes and schedules of all stages, all ours: as many steps as the shipped model has (docs/log.md says in which
    order they were made: its UNet's first half saw an earlier text tower, which costs quality, if anything).

    To go on from a finished run, give the stage more steps: `--stage unet --set unet.steps=20000`.
    """

    size_px: int = 32
    seed: int = 0
    vae_batch: int = 32
    vae: Schedule = field(
        default_factory=lambda: Schedule(steps=2400, lr=2e-3, cooldown=1000, weight_decay=0.0, ema_decay=0.998)
    )
    clip_batch: int = 128
    clip_concepts: int = 24
    clip: Schedule = field(
        default_factory=lambda: Schedule(steps=1580, lr=1e-3, cooldown=300, weight_decay=0.1, ema_decay=0.995)
    )
    unet_batch: int = 64
    unet: Schedule = field(
        default_factory=lambda: Schedule(steps=9150, lr=8e-4, cooldown=1500, warmup=300, ema_decay=0.999)
    )
    pool: int = 32768
    test_scenes: int = 512
    steps: int = 25
    guidance: float = 3.0


def builtin() -> PretrainConfig:
    """The recipe of the shipped model."""
    return PretrainConfig()


def smoke() -> PretrainConfig:
    """Two steps of everything: for tests, and to see that an installation works."""
    short = Schedule(steps=2, lr=1e-4, cooldown=1, warmup=1)
    return replace(
        builtin(), vae=short, clip=short, unet=short, vae_batch=4, clip_batch=4, unet_batch=4, pool=256, test_scenes=8
    )


RECIPES = {"builtin": builtin, "smoke": smoke}


def recipe(name: str) -> PretrainConfig:
    """The configuration named `name`; OptionError names those there are."""
    if name not in RECIPES:
        raise OptionError(f"--recipe {name!r} is not a pretraining recipe; there are: {', '.join(RECIPES)}")
    return RECIPES[name]()

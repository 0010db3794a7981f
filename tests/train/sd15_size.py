"""Two steps of the sd15 recipe at the real size, on random weights: run as a module, prints its peak memory as JSON.

The first step is of stage k = 8, the second of stage k = 4 with the discriminator; a batch of 2 in micro-batches of 1.
"""

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from hypersd_export.diffusion import NoiseSchedule, PredictionType
from trainer.batch import Batch, Conditioning
from trainer.config import override
from trainer.distill.config import sd15
from trainer.distill.memory import unet_of
from trainer.distill.run import Distillation

SMALLER = (
    "batch=2", "micro_batch=1", "log_with=none", "validate_every=0", "mixed_precision=bf16", "base_precision=bf16",
    "stages.0.steps=1", "stages.1.steps=1", "stages.2.steps=0", "stages.3.steps=0",
)  # fmt: skip


class RandomBase(SimpleNamespace):
    """A base of SD 1.5's size, every weight random."""

    def load_unet(self, dtype):
        from diffusers import UNet2DConditionModel

        unet, _, _ = unet_of(sd15())
        torch.set_default_dtype(dtype)
        try:
            return UNet2DConditionModel(**{n: tuple(v) if isinstance(v, list) else v for n, v in unet.items()})
        finally:
            torch.set_default_dtype(torch.float32)


class RandomLatents:
    """Latents of 512 px pictures and text states, all noise."""

    latent_shape = (4, 64, 64)
    empty = Conditioning(states=torch.zeros(1, 77, 768))

    def batch(self, positions):
        generator = torch.Generator().manual_seed(positions[0])
        count, names = len(positions), tuple(map(str, positions))
        return Batch(
            latents=torch.randn(count, *self.latent_shape, generator=generator), captions=names, names=names,
            conditioning=Conditioning(states=torch.randn(count, 77, 768, generator=generator)),
        )  # fmt: skip


def main(out: Path, *changes: str) -> None:
    """Train, then print the losses and the peak."""
    base = RandomBase(
        name="random-sd15", digest="0" * 64, prediction_type=PredictionType.EPSILON,
        alphas_cumprod=torch.tensor(NoiseSchedule().alphas_cumprod()),
        model=SimpleNamespace(scheduler_config={"_class_name": "TCDScheduler"}),
    )  # fmt: skip
    config = override(sd15(), [*SMALLER, *changes])
    begin = time.monotonic()
    steps = [
        {"stage": progress.number, **progress.result.logs}
        for progress in Distillation(config, out, base=base, source=RandomLatents()).run()
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"peak_gib": round(peak, 2), "seconds": round(time.monotonic() - begin), "steps": steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

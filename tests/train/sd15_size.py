"""Steps of the sd15 recipe at the real size, on random weights: run as a module, prints its peak memory as JSON.

`python -m tests.train.sd15_size OUT [METHOD [key=value …]]`, a batch of 2 in micro-batches of 1. tscd: a step of stage
k = 8, and one of stage k = 4 with the discriminator. score: one step of student and fake score, with an anchor pair.
feedback: one step of the student, decoded at 512 px and seen by the aesthetic predictor on a CLIP of ViT-L/14's size.
"""

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from hypersd_export.diffusion import FewStepPlan, NoiseSchedule, PredictionType, Solver
from trainer.batch import Batch, Conditioning
from trainer.config import override
from trainer.distill import feedback_run
from trainer.distill.config import sd15
from trainer.distill.memory import unet_of
from trainer.distill.networks import Networks, Role
from trainer.distill.recipes import recipe_by
from trainer.distill.run import Distillation

SMALLER = (
    "batch=2", "micro_batch=1", "log_with=none", "validate_every=0", "mixed_precision=bf16", "base_precision=bf16",
)  # fmt: skip
ALPHAS = torch.tensor(NoiseSchedule().alphas_cumprod())
METHODS = {
    "tscd": ("stages.0.steps=1", "stages.1.steps=1", "stages.2.steps=0", "stages.3.steps=0"),
    "score": ("stages.0.steps=1", "score.pairs=2", "score.pair_steps=2"),
    "feedback": (
        "stages.0.steps=1",
        "feedback.guard.watch=none",
        'feedback.rewards=[{"kind": "aesthetic", "target": 6.5}]',
    ),
}


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

    def load_vae(self, dtype):
        from diffusers import AutoencoderKL

        from benchmarks.full_size import SD_VAE

        return AutoencoderKL(**SD_VAE).to(dtype).eval().requires_grad_(False)


def random_rewards(terms, device):
    """The aesthetic predictor's own head on a random CLIP of ViT-L/14's size."""
    from transformers import CLIPConfig, CLIPModel

    from trainer.rewards.aesthetic import AestheticReward
    from trainer.rewards.clip import ClipTowers
    from trainer.rewards.preprocess import identity

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "patch_size": 14, "image_size": 224}  # fmt: skip
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    return [AestheticReward(ClipTowers(model, None, identity(224), scale=1.0, device=device), device=device)]


def few_step_lora(path):
    """A random LoRA of the recipe's rank with a plan of one step, for what starts from one."""
    from hypersd_export.model.lora import Delta, save_kohya
    from trainer.distill.lora_file import Origin

    plan, generator = FewStepPlan(solver=Solver.TCD, num_steps=1, eta=1.0), torch.Generator().manual_seed(0)
    networks = Networks.build(
        RandomBase().load_unet(torch.bfloat16), sd15().lora, alphas_cumprod=ALPHAS,
        prediction_type=PredictionType.EPSILON,
    )  # fmt: skip
    deltas = {
        name: Delta(down=down, up=0.01 * torch.randn(up.shape, generator=generator), alpha=None)
        for name, (down, up) in networks.adapter(Role.STUDENT).items()
    }
    origin = Origin(plans=[plan], base_name="random-sd15", base_digest="0" * 64, steps=0)
    save_kohya(path, {"unet": deltas}, origin.metadata())
    return path


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


def main(out: Path, method: str = "tscd", *changes: str) -> None:
    """Train, then print the losses and the peak."""
    base = RandomBase(
        name="random-sd15", digest="0" * 64, prediction_type=PredictionType.EPSILON, alphas_cumprod=ALPHAS,
        model=SimpleNamespace(scheduler_config={"_class_name": "TCDScheduler"}),
    )  # fmt: skip
    if method != "tscd":
        out.mkdir(parents=True, exist_ok=True)
        changes = (f"init_lora={few_step_lora(out / 'few-step.safetensors')}", *changes)
    if method == "feedback":  # a place that is there; what is opened are `random_rewards`
        changes = (f"feedback.rewards.0.model={out}", *changes)
    feedback_run.open_rewards = random_rewards
    config = override(recipe_by("sd15", method), [*SMALLER, *METHODS[method], *changes])
    begin = time.monotonic()
    steps = [
        {"stage": progress.number, **progress.result.logs}
        for progress in Distillation(config, out / "run", base=base, source=RandomLatents()).run()
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"peak_gib": round(peak, 2), "seconds": round(time.monotonic() - begin), "steps": steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

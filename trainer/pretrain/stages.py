"""`hypersd-train pretrain`: tokenizer → VAE → CLIP → UNet → a diffusers folder, each stage resumable.

A finished stage leaves `<stage>.json` (its configuration and its figures) beside its weights. It is used again only
if the configuration is still the same; a changed `steps` goes on from the saved state instead, with fresh noise
(the seed moves with the step).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import saved_step
from trainer.config import as_json
from trainer.ema import Ema
from trainer.pretrain import clip, unet, vae
from trainer.pretrain.drawings import read_drawings
from trainer.pretrain.loop import Schedule, StepResult
from trainer.pretrain.recipe import PretrainConfig
from trainer.pretrain.scenes import SceneRenderer, draw_specs, held_out_mask
from trainer.pretrain.vocabulary import all_captions, train_tokenizer

STAGES = ("vae", "clip", "unet")


@dataclass(frozen=True, slots=True)
class Progress:
    """One training step of one stage."""

    stage: str
    result: StepResult
    of_steps: int


class Pretraining:
    """The run in `out`: construct, then iterate `run()`; the finished model is in `out`/model."""

    def __init__(self, config: PretrainConfig, out: Path) -> None:
        self.config, self.out = config, out

    def run(self, stages: tuple[str, ...] = STAGES) -> Iterator[Progress]:
        """Train the named stages that are not finished, then assemble the model folder."""
        from trainer.pretrain.assemble import assemble

        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.config.seed)
        self.allowed = ~held_out_mask()
        self.renderer = SceneRenderer(read_drawings(), self.config.size_px)
        if not (self.out / "tokenizer" / "merges.txt").exists():
            train_tokenizer(self.out / "tokenizer")
        for stage in stages:
            yield from {"vae": self._vae, "clip": self._clip, "unet": self._unet}[stage]()
        if all((self.out / f"{stage}.json").exists() for stage in STAGES):
            assemble(self.out)

    def tokenizer(self) -> Any:
        """The trained CLIPTokenizer."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.out / "tokenizer")

    def load_vae(self) -> Any:
        """The finished VAE, in eval mode."""
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(self.out / "vae").requires_grad_(False).eval()

    def _vae(self) -> Iterator[Progress]:
        test = self._test_scenes()

        def finish(average: Any) -> dict[str, float]:
            vae.set_scaling_factor(average, test)
            return {"psnr_held_out_db": round(vae.psnr(average, test), 3)}

        def steps(model: Any, state: Path, ema: Ema) -> Iterator[StepResult]:
            return vae.train_vae(
                model, self.renderer, self.allowed, self.config.vae, batch=self.config.vae_batch,
                seed=self.config.seed + 1 + saved_step(state), state=state, ema=ema,
            )  # fmt: skip

        new = vae.new_vae().to(memory_format=torch.channels_last)
        return self._stage("vae", new, self.config.vae, steps, finish)

    def _clip(self) -> Iterator[Progress]:
        tokenizer = self.tokenizer()

        def steps(model: Any, state: Path, ema: Ema) -> Iterator[StepResult]:
            return clip.train_clip(
                model, tokenizer, self.renderer, self.allowed, self.config.clip, batch=self.config.clip_batch,
                seed=self.config.seed + 2 + saved_step(state), state=state, ema=ema,
                concepts=self.config.clip_concepts,
            )  # fmt: skip

        return self._stage("clip", clip.new_clip(tokenizer), self.config.clip, steps, lambda _: {})

    def _unet(self) -> Iterator[Progress]:
        from trainer.pretrain.assemble import text_encoder

        def steps(model: Any, state: Path, ema: Ema) -> Iterator[StepResult]:
            encoder, tokenizer = text_encoder(self.out / "clip"), self.tokenizer()
            done = saved_step(state)
            states = clip.embed_captions(encoder, tokenizer, [*all_captions(), ""])
            pool = unet.LatentPool(
                self.load_vae().to(memory_format=torch.channels_last), self.renderer, self.allowed,
                size=self.config.pool, seed=self.config.seed + 3 + done,
            )  # fmt: skip
            return unet.train_unet(
                model, pool, states[:-1], states[-1], self.config.unet, batch=self.config.unet_batch,
                seed=self.config.seed + 4 + done, state=state, ema=ema,
            )  # fmt: skip

        new = unet.new_unet().to(memory_format=torch.channels_last)
        return self._stage("unet", new, self.config.unet, steps, lambda _: {})

    def _stage(
        self, name: str, model: Any, schedule: Schedule, steps: Callable[[Any, Path, Ema], Iterator[StepResult]],
        finish: Callable[[Any], dict[str, float]],
    ) -> Iterator[Progress]:  # fmt: skip
        done = self.out / f"{name}.json"
        settings = as_json(schedule)
        if done.exists() and json.loads(done.read_text())["schedule"] == settings:
            return
        ema, last, log = Ema(model, schedule.ema_decay), None, []
        for result in steps(model, self.out / "state" / f"{name}.safetensors", ema):
            yield Progress(name, result, schedule.steps)
            last = result
            if result.step % 100 == 0:
                log.append({"step": result.step, "seconds": round(result.seconds, 1), **result.losses})
        figures = finish(ema.module)
        trained: Any = ema.module
        trained.save_pretrained(self.out / name)
        record = {"schedule": settings, "figures": figures, "steps": last.step + 1 if last else 0, "log": log}
        done.write_text(json.dumps(record, indent=1))

    def _test_scenes(self) -> torch.Tensor:
        """Pictures of held-out combinations, the same at every call."""
        generator = torch.Generator().manual_seed(99)
        return self.renderer(draw_specs(self.config.test_scenes, ~self.allowed, generator), generator)

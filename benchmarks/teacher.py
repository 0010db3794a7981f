"""How good is the built-in teacher, and how much is left to distil? `python -m benchmarks.teacher`

Draws the same prompts and seeds at 25, 8, 4, 2 and 1 DDIM steps, for combinations that training saw and for those that
were held out, and measures all with the judge beside real drawings of the same combinations. Writes
docs/results/teacher.json, teacher.md and grids.
"""

import argparse
import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.judge import Judge, candidates
from benchmarks.metrics import bootstrap, clip_scores, diversity, frechet_distance, kid, precision_recall, retrieved
from hypersd_export.builtin import card, model_dir
from hypersd_export.diffusion import FewStepPlan, Guidance, Solver, initial_noise, run
from trainer.pretrain.clip import embed_captions
from trainer.pretrain.concepts import BACKGROUNDS, CONCEPTS, STYLES, caption
from trainer.pretrain.drawings import read_drawings
from trainer.pretrain.scenes import UNSAID, SceneRenderer, SceneSpec, draw_specs, held_out_mask
from trainer.pretrain.vae import to_uint8

RESULTS = Path(__file__).parents[1] / "docs" / "results"
STEPS = (25, 8, 4, 2, 1)
BATCH = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Teacher:
    """The parts of the pipeline in float32, and how it is sampled: DDIM trailing with guidance."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    guidance: float

    @classmethod
    def load(cls, folder: Path, guidance: float) -> "Teacher":
        """From a diffusers folder."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        kind = {"dtype": torch.float32}
        return cls(
            UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **kind).eval(),
            AutoencoderKL.from_pretrained(folder, subfolder="vae", **kind).eval(),
            CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", **kind).eval(),
            CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
            guidance,
        )

    @torch.no_grad()
    def draw(self, captions: list[str], steps: int, *, first_seed: int = 0) -> torch.Tensor:
        """Pictures in [-1, 1], float32 [N, 3, H, W]; picture i has seed first_seed + i."""
        plan = FewStepPlan(solver=Solver.DDIM, num_steps=steps, guidance=Guidance.of(self.guidance))
        table, size = plan.table(), self.unet.config.sample_size
        shape = (self.unet.config.in_channels, size, size)
        empty = embed_captions(self.text_encoder, self.tokenizer, [""])
        pictures = []
        for start in range(0, len(captions), BATCH):
            part = captions[start : start + BATCH]
            states = embed_captions(self.text_encoder, self.tokenizer, part)
            context = torch.cat([empty.expand_as(states), states])
            seeds = range(first_seed + start, first_seed + start + len(part))
            noise = np.stack([initial_noise(seed=s, index=0, shape=shape) for s in seeds])

            def net(x: Any, t: float, context: torch.Tensor = context) -> Any:
                uncond, cond = self.unet(torch.cat([x, x]), torch.tensor(t), context).sample.chunk(2)
                return uncond + self.guidance * (cond - uncond)

            latents: Any = run(table, net, torch.from_numpy(noise))
            pictures.append(self.vae.decode(latents / self.vae.config.scaling_factor).sample.clamp(-1, 1))
        return torch.cat(pictures)


def fully_named(spec: SceneSpec) -> SceneSpec:
    """The same scenes with style and background said."""
    return dataclasses.replace(spec, named_style=spec.style, named_background=spec.background)


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A set of prompts, the judge's features of their captions and candidates, and of real drawings."""

    spec: SceneSpec
    captions: np.ndarray
    choices: np.ndarray
    real: np.ndarray
    more_real: np.ndarray

    @classmethod
    def ask(cls, judge: Judge, renderer: SceneRenderer, allowed: np.ndarray, count: int, seed: int) -> "Question":
        """`count` prompts drawn from the combinations that `allowed` has."""
        generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        spec = fully_named(draw_specs(count, allowed, generator))
        rows = zip(spec.concept.tolist(), spec.style.tolist(), spec.background.tolist(), strict=True)
        texts = [candidates(c, s, b, rng) for c, s, b in rows]
        choices = judge.captions([text for row in texts for text in row]).reshape(count, 100, -1)
        real, more = (judge.pictures(renderer(spec, generator)) for _ in range(2))
        return cls(spec, choices[:, 0], choices, real, more)

    def measure(self, features: np.ndarray) -> dict[str, Any]:
        """All figures of one set of pictures of these prompts."""
        score = bootstrap(lambda rows: float(rows.mean()), clip_scores(features, self.captions))
        hits = bootstrap(lambda rows: float(rows.mean()), retrieved(features, self.choices).astype(float))
        precision, recall = precision_recall(self.real, features)
        return {
            "clip_score": dataclasses.asdict(score),
            "retrieval_top1": dataclasses.asdict(hits),
            "fd": frechet_distance(self.real, features),
            "kid": kid(self.real, features),
            "precision": precision,
            "recall": recall,
        }


def variety(judge: Judge, draw: Callable[[SceneSpec, int], torch.Tensor], seeds: int = 8) -> dict[str, Any]:
    """Mean pairwise cosine distance over `seeds` pictures of one prompt that names the concept alone."""
    concepts = torch.arange(0, len(CONCEPTS), 3)
    silent = torch.full_like(concepts, UNSAID)
    generator = torch.Generator().manual_seed(5)
    rows = []
    for seed in range(seeds):
        style = torch.randint(len(STYLES), concepts.shape, generator=generator)
        background = torch.randint(len(BACKGROUNDS), concepts.shape, generator=generator)
        rows.append(judge.pictures(draw(SceneSpec(concepts, style, background, silent, silent), seed)))
    return dataclasses.asdict(bootstrap(lambda r: float(r.mean()), diversity(np.stack(rows, 1))))


def report(teacher: Teacher, judge: Judge, count: int) -> dict[str, Any]:
    """Everything, as JSON data."""
    renderer, held_out = SceneRenderer(read_drawings(), 32), held_out_mask()
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
        "guidance": teacher.guidance, "prompts_per_set": count, "seeds": f"0 to {count - 1}",
    }  # fmt: skip
    for name, allowed in (("seen", ~held_out), ("held_out", held_out)):
        question = Question.ask(judge, renderer, allowed, count, seed=31)
        result[name] = {"real": question.measure(question.more_real)}
        for steps in STEPS:
            pictures = teacher.draw(question.spec.captions(), steps)
            result[name][str(steps)] = question.measure(judge.pictures(pictures))
            print(name, steps, json.dumps(result[name][str(steps)]["retrieval_top1"]), flush=True)
    generator = torch.Generator().manual_seed(6)
    result["diversity"] = {"real": variety(judge, lambda spec, _: renderer(spec, generator))}
    for steps in STEPS:

        def drawn(spec: SceneSpec, seed: int, steps: int = steps) -> torch.Tensor:
            return teacher.draw(spec.captions(), steps, first_seed=10_000 * (seed + 1))

        result["diversity"][str(steps)] = variety(judge, drawn)
    return result


def grid(pictures: torch.Tensor, columns: int, scale: int = 3) -> Image.Image:
    """Pictures side by side, enlarged without smoothing."""
    pixels = to_uint8(pictures).permute(0, 2, 3, 1).numpy()
    rows = -(-len(pixels) // columns)
    edge = pixels.shape[1]
    sheet = np.full((rows * edge, columns * edge, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        y, x = i // columns * edge, i % columns * edge
        sheet[y : y + edge, x : x + edge] = picture
    return Image.fromarray(sheet).resize((columns * edge * scale, rows * edge * scale), Image.Resampling.NEAREST)


def grids(teacher: Teacher, out: Path) -> None:
    """teacher-steps.png: a row a step count, the same prompts and seeds; teacher-seeds.png: a row a prompt."""
    names = ["fox", "strawberry", "penguin", "tulip", "pizza", "frog", "doughnut", "owl", "red-apple", "whale",
             "cactus", "lion"]  # fmt: skip
    colours = list(BACKGROUNDS)
    prompts = [caption(n, STYLES[i % 3], colours[i % 8]) for i, n in enumerate(names)]
    rows = [teacher.draw(prompts, steps, first_seed=1) for steps in STEPS]
    grid(torch.cat(rows), len(prompts)).save(out / "teacher-steps.png")
    seeds = [teacher.draw([caption(n, None, None)] * 12, 25, first_seed=100) for n in names[:5]]
    grid(torch.cat(seeds), 12).save(out / "teacher-seeds.png")


def main() -> None:
    """Measure, and write docs/results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_dir())
    parser.add_argument("--count", type=int, default=512, help="prompts in each of the two sets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--grids-only", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    teacher = Teacher.load(options.model, float(card()["guidance"]))
    grids(teacher, options.out)
    if not options.grids_only:
        figures = report(teacher, Judge(), options.count)
        (options.out / "teacher.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

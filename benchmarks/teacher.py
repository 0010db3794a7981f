"""How good is the built-in teacher, and how much is left to distil? `python -m benchmarks.teacher`

Draws the same prompts and seeds at 25, 8, 4, 2 and 1 DDIM steps, for combinations that training saw and for those that
were held out, and measures all with the judge beside real drawings of the same combinations. Writes
docs/results/teacher.json, teacher.md and grids. Intervals are 95 %, by a bootstrap over the prompts.
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

from benchmarks.bench.tables import interval as interval_text
from benchmarks.judge import Judge, candidates
from benchmarks.metrics import (
    clip_scores,
    diversity,
    frechet_distance,
    paired_kid,
    precision_recall,
    retrieved,
    unit,
)
from benchmarks.sampling import Parts, grid
from benchmarks.stats import estimate
from hypersd_export.builtin import card, model_dir
from hypersd_export.diffusion import FewStepPlan, Guidance, Solver
from trainer.pretrain.concepts import BACKGROUNDS, CONCEPTS, STYLES, caption
from trainer.pretrain.drawings import read_drawings
from trainer.pretrain.scenes import UNSAID, SceneRenderer, SceneSpec, draw_specs, held_out_mask

RESULTS = Path(__file__).parents[1] / "docs" / "results"
STEPS = (25, 8, 4, 2, 1)
SAME_CONCEPT = 33
"""So many of the candidates, the first among them, have the right concept."""
ROUNDS = 300


@dataclasses.dataclass(frozen=True, slots=True)
class Teacher:
    """The parts of the pipeline in float32, and how it is sampled: DDIM trailing with guidance."""

    parts: Parts
    guidance: float

    @classmethod
    def load(cls, folder: Path, guidance: float) -> "Teacher":
        """From a diffusers folder."""
        return cls(Parts.load(folder), guidance)

    def draw(self, captions: list[str], steps: int, *, first_seed: int = 0) -> torch.Tensor:
        """Pictures in [-1, 1], float32 [N, 3, H, W]; picture i has seed first_seed + i."""
        plan = FewStepPlan(solver=Solver.DDIM, num_steps=steps, guidance=Guidance.of(self.guidance))
        return self.parts.draw(captions, plan, first_seed=first_seed)


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
        """All figures of one set of pictures of these prompts. `concept_top1` asks for the concept alone."""
        count = len(features)
        nearest = np.einsum("nd,nkd->nk", features, unit(self.choices)).argmax(1)
        precision, recall = precision_recall(self.real, features)

        def mean(values: np.ndarray) -> dict[str, Any]:
            return interval(lambda rows: float(values[rows].mean()), count)

        return {
            "clip_score": mean(clip_scores(features, self.captions)),
            "retrieval_top1": mean(retrieved(features, self.choices).astype(float)),
            "concept_top1": mean((nearest < SAME_CONCEPT).astype(float)),
            "fd": interval(lambda rows: frechet_distance(self.real[rows], features[rows]), count),
            "kid": interval(paired_kid(self.real, features), count),
            "precision": precision,
            "recall": recall,
        }


def interval(statistic: Callable[[np.ndarray], float], count: int) -> dict[str, Any]:
    """value, low, high and count of `statistic(rows)`."""
    return {**estimate(statistic, count, rounds=ROUNDS).to_json(), "count": count}


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
    spread = diversity(np.stack(rows, 1))
    return interval(lambda picked: float(spread[picked].mean()), len(spread))


def report(teacher: Teacher, judge: Judge, count: int) -> dict[str, Any]:
    """Everything, as JSON data."""
    renderer, held_out = SceneRenderer(read_drawings(), 32), held_out_mask()
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
        "guidance": teacher.guidance, "prompts_per_set": count, "seeds": f"0 to {count - 1}",
        "bootstrap_rounds": ROUNDS,
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


SETS = {"seen": "combinations of concept, style and background that training saw", "held_out": "held-out combinations"}


HEAD = """# The teacher, measured by the judge

Written by `python -m benchmarks.teacher --count {prompts_per_set}`. DDIM trailing, guidance {guidance:g},
{prompts_per_set} prompts a set, seeds {seeds}; {machine}, torch {torch}.
95 % intervals by a bootstrap over the prompts ({bootstrap_rounds} rounds).

Retrieval: the own caption is the nearest of 100, of which 32 name the same concept with another style or background.
FD and KID (× 1000): to real drawings of the same prompts; the row *real* is another draw of them.
"""
TABLE = """
|  | retrieval, % | of real, % | concept right, % | CLIP score | FD | KID | precision | recall |
|---|---|---|---|---|---|---|---|---|"""
VARIETY = """
## Diversity

Mean pairwise cosine distance over 8 pictures of a prompt that names the concept alone, × 100.

|  | diversity |
|---|---|"""


def markdown(result: dict[str, Any]) -> str:
    """teacher.md: a table a set of prompts, and diversity."""
    lines = [HEAD.format(**result)]
    for name, title in SETS.items():
        real = result[name]["real"]["retrieval_top1"]["value"]
        lines += [f"## {title[0].upper()}{title[1:]}", TABLE]
        for row, figures in result[name].items():
            label = row if row == "real" else f"{row} step{'s' if row != '1' else ''}"
            retrieval, concept, score, fd, kid = (
                interval_text(figures[name], digits, factor)
                for name, digits, factor in (("retrieval_top1", 1, 100), ("concept_top1", 1, 100), ("clip_score", 1, 1),
                                             ("fd", 2, 1), ("kid", 1, 1000))
            )  # fmt: skip
            share = f"{100 * figures['retrieval_top1']['value'] / real:.1f}"
            covered = (f"{figures[name]:.3f}" for name in ("precision", "recall"))
            cells = [retrieval, share, concept, score, fd, kid, *covered]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    lines.append(VARIETY.lstrip())
    lines += [f"| {row} | {interval_text(figure, 1, 100)} |" for row, figure in result["diversity"].items()]
    return "\n".join(lines) + "\n"


def grid_prompts() -> list[str]:
    """Twelve prompts, chosen before any training, for sheets of pictures."""
    names = ["fox", "strawberry", "penguin", "tulip", "pizza", "frog", "doughnut", "owl", "red-apple", "whale",
             "cactus", "lion"]  # fmt: skip
    colours = list(BACKGROUNDS)
    return [caption(n, STYLES[i % 3], colours[i % 8]) for i, n in enumerate(names)]


def grids(teacher: Teacher, out: Path) -> None:
    """teacher-steps.png: a row a step count, the same prompts and seeds; teacher-seeds.png: a row a prompt."""
    prompts = grid_prompts()
    rows = [teacher.draw(prompts, steps, first_seed=1) for steps in STEPS]
    grid(torch.cat(rows), len(prompts)).save(out / "teacher-steps.png")
    names = ["fox", "strawberry", "penguin", "tulip", "pizza"]
    seeds = [teacher.draw([caption(n, None, None)] * 12, 25, first_seed=100) for n in names]
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
        (options.out / "teacher.md").write_text(markdown(figures), encoding="utf-8")


if __name__ == "__main__":
    main()

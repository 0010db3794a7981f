"""How good are distilled students? `python -m benchmarks.distilled --contestants FILE`

Tables on held-out prompts, by the judge: a LoRA per stage, one LoRA at every step count, and the critic's real samples,
beside the teacher at the same step counts. FD-T and KID-T compare with the teacher's 25-step pictures of the same
prompts from another set of seeds; the teacher's own 25-step row is therefore the floor. Writes distilled.json,
distilled.md and a sheet of pictures for each table. The file of contestants is described in `benchmarks.contestants`.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Before NumPy is imported: the bootstrap solves eigenvalue problems of 96 rows by the thousand, for which its threads
# only wait for each other, a hundred times as long on a busy machine.

import argparse
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ablation, distilled_tables, metrics, stats
from benchmarks.bench.scorers import Scorer, open_scorers
from benchmarks.contestants import Contestant, Table, read_contestants
from benchmarks.distilled_tables import Cell, Row, markdown, measure, unequal_columns
from benchmarks.feature_cache import Arrays, FeatureCache
from benchmarks.judge import WEIGHTS, Judge
from benchmarks.results import one_line_error, write_result
from benchmarks.sampling import SAMPLER, Parts, labelled_grid
from benchmarks.stats import ROUNDS, Estimate
from benchmarks.teacher import RESULTS, Question, fully_named, grid_prompts
from hypersd_export.builtin import card, model_dir
from hypersd_export.bundle.cache import default_cache_dir
from hypersd_export.bundle.digest import digest_json, digest_tree, sha256_file
from hypersd_export.diffusion import FewStepPlan
from hypersd_export.errors import ModelError, OptionError
from hypersd_export.model.base import open_base
from hypersd_export.model.lora import LoraFile
from trainer.pretrain.concepts import CONCEPTS, caption
from trainer.pretrain.drawings import read_drawings
from trainer.pretrain.scenes import SceneRenderer, draw_specs, held_out_mask

PICTURES_SEED, REFERENCE_SEED, VARIETY_SEED = 0, 1_000_000, 2_000_000
"""First Philox seeds of what is measured, of the teacher's pictures that it is compared with, and for diversity."""
PROMPT_SEED, VARIETY, TEACHER_STEPS = 31, 10, 25
TITLES = {
    Table.STAGES: "Per stage: a LoRA of its own at every step count",
    Table.ONE_LORA: "One LoRA at every step count",
    Table.REAL: "What the critic sees as real, in the last stage",
    Table.ABLATION: "The parts of the whole method",
}
RIVALS, BASE = ("TCD", "LCM"), "TSCD"
"""Rows of an ablation: whose FD-T the whole is to halve, and which one its further parts are compared with."""


class Bench:
    """Model, judge and prompts, and the judge's features of whatever is sampled, through the cache.

    captions: what is measured; varied: captions that name a concept alone, for diversity, in VARIETY pictures each.
    """

    def __init__(
        self, model: Path, judge: Judge, judge_digest: str, cache: FeatureCache, count: int, *, bf16: bool = False
    ) -> None:
        if count < 2:
            raise OptionError(f"--count {count}: must be at least 2")
        self.parts, self.base = Parts.load(model, bf16=bf16), open_base(model).digest
        self.judge, self.judge_digest, self.cache, self.count = judge, judge_digest, cache, count
        self.captions = held_out_prompts(count)
        key = {"question": digest_json(self.captions), "seed": PROMPT_SEED, "judge": judge_digest}
        question = self.cache.get(key, self._ask)
        self.caption_features, self.choices = question["captions"], question["choices"]
        concepts = np.linspace(0, len(CONCEPTS) - 1, min(len(CONCEPTS), max(2, -(-count // VARIETY)))).round()
        self.varied = [caption(CONCEPTS[int(c)], None, None) for c in concepts]
        self._student: tuple[str, Parts] | None = None
        self._drawn: tuple[str, torch.Tensor] | None = None
        self._scorers: list[Scorer] = []

    def cell(self, lora: LoraFile | None, plan: FewStepPlan, *, rounds: int = ROUNDS) -> dict[str, Estimate]:
        """The figures of one LoRA by one plan; they are cached too, as the bootstrap takes seconds."""
        teacher = teacher_at([]).plan(TEACHER_STEPS)
        mine, reference = self._key(lora, plan, PICTURES_SEED), self._key(None, teacher, REFERENCE_SEED)

        def compute() -> Arrays:
            features = self._features(mine, lora, plan, self.captions, PICTURES_SEED)
            truth = self._features(reference, None, teacher, self.captions, REFERENCE_SEED)
            spread = self._variety(lora, plan)
            figures = measure(features, truth, self.caption_features, self.choices, spread, rounds=rounds)
            return {name: np.array([e.value, *e.replicates]) for name, e in figures.items()}

        varied = self._key(lora, plan, VARIETY_SEED, self.varied)
        key = {"figures": mine, "reference": reference, "varied": varied, "rounds": rounds, "code": _figures_code()}
        stored = self.cache.get(key, compute)
        return {name: Estimate(float(values[0]), values[1:]) for name, values in stored.items()}

    def full_cell(self, lora: LoraFile | None, plan: FewStepPlan) -> dict[str, Estimate]:
        """`cell`'s figures and those of `benchmarks.ablation`."""
        figures, teacher = self.cell(lora, plan), teacher_at([]).plan(TEACHER_STEPS)
        self._scorers = self._scorers or open_scorers(ablation.TRAINED_ON)
        mine, reference = self._key(lora, plan, PICTURES_SEED), self._key(None, teacher, REFERENCE_SEED)
        code = sha256_file(Path(ablation.__file__))
        looked = self.cache.get(
            {"looks": mine, "rewards": [scorer.digest for scorer in self._scorers], "code": code},
            lambda: ablation.looks(self._measured(mine, lora, plan), self.captions, self._scorers),
        )
        features = self._features(mine, lora, plan, self.captions, PICTURES_SEED)
        return figures | ablation.further(
            looked, features, self._features(reference, None, teacher, self.captions, REFERENCE_SEED)
        )

    def _measured(self, key: dict[str, Any], lora: LoraFile | None, plan: FewStepPlan) -> torch.Tensor:
        """The pictures that are measured; the last ones are kept, as features and looks ask for them in turn."""
        name = digest_json(key)
        if self._drawn is None or self._drawn[0] != name:
            self._drawn = (name, self.pictures(lora, plan, self.captions, PICTURES_SEED))
        return self._drawn[1]

    def pictures(self, lora: LoraFile | None, plan: FewStepPlan, captions: Sequence[str], first_seed: int) -> Any:
        """Pictures in [-1, 1], float32 [N, 3, H, W]."""
        return self._parts_of(lora).draw(captions, plan, first_seed=first_seed)

    def _key(self, lora: LoraFile | None, plan: FewStepPlan, first_seed: int, captions: Any = None) -> dict[str, Any]:
        return {
            "base": self.base, "lora": None if lora is None else lora.digest, "plan": plan.to_json(),
            "captions": digest_json(self.captions if captions is None else captions), "first_seed": first_seed,
            "judge": self.judge_digest, "sampler": [SAMPLER, "bf16"] if self.parts.bf16 else SAMPLER,
        }  # fmt: skip

    def _features(
        self, key: dict[str, Any], lora: LoraFile | None, plan: FewStepPlan, captions: Sequence[str], first_seed: int
    ) -> np.ndarray:
        def compute() -> Arrays:
            measured = first_seed == PICTURES_SEED
            drawn = self._measured(key, lora, plan) if measured else self.pictures(lora, plan, captions, first_seed)
            return {"features": self.judge.pictures(drawn)}

        return self.cache.get(key, compute)["features"]

    def _variety(self, lora: LoraFile | None, plan: FewStepPlan) -> np.ndarray:
        """[prompts, VARIETY, D]."""
        captions = self.varied * VARIETY
        key = self._key(lora, plan, VARIETY_SEED, captions)
        features = self._features(key, lora, plan, captions, VARIETY_SEED)
        return features.reshape(VARIETY, len(self.varied), -1).swapaxes(0, 1)

    def _parts_of(self, lora: LoraFile | None) -> Parts:
        if lora is None:
            return self.parts
        if self._student is None or self._student[0] != lora.digest:
            self._student = (lora.digest, self.parts.with_lora(lora))
        return self._student[1]

    def _ask(self) -> Arrays:
        renderer = SceneRenderer(read_drawings(), self.judge.model.config.vision_config.image_size)
        question = Question.ask(self.judge, renderer, held_out_mask(), self.count, PROMPT_SEED)
        if question.spec.captions() != self.captions:
            raise AssertionError("Question.ask draws other prompts than held_out_prompts")
        return {"captions": question.captions, "choices": question.choices}


def _figures_code() -> str:
    """Digest of the modules that figures come from: they are computed again when these change."""
    return digest_json([sha256_file(Path(str(module.__file__))) for module in (metrics, stats, distilled_tables)])


def held_out_prompts(count: int) -> list[str]:
    """The captions of `Question.ask` for the held-out combinations, fully named."""
    spec = draw_specs(count, held_out_mask(), torch.Generator().manual_seed(PROMPT_SEED))
    return fully_named(spec).captions()


def guidance_of_base() -> float:
    """The built-in model's own guidance."""
    return float(card()["guidance"])


def teacher_at(steps: Sequence[int]) -> Contestant:
    """The base with its guidance by DDIM trailing."""
    return Contestant(
        table=Table.STAGES, label="teacher", lora=None, sampler="ddim_trailing", steps=tuple(steps),
        guidance=guidance_of_base(),
    )  # fmt: skip


def rows_of(
    contestants: Iterable[Contestant], cell: Callable[[LoraFile | None, FewStepPlan], dict[str, Estimate]]
) -> list[Row]:
    """A row per label in the order of the file, several training seeds of one step count in one cell.

    OptionError if those differ in their student updates.
    """
    members: dict[str, dict[int, list[Contestant]]] = {}
    for contestant in contestants:
        for steps in contestant.steps:
            members.setdefault(contestant.label, {}).setdefault(steps, []).append(contestant)
    rows = []
    for label, columns in members.items():
        cells = {}
        for steps, group in columns.items():
            updates = sorted({c.updates for c in group})
            if len(updates) > 1:
                raise OptionError(f"{label!r} at {steps} steps: its seeds have {updates} updates; they must be equal")
            cells[steps] = Cell(
                updates=updates[0], seeds=tuple(c.seed for c in group),
                figures=tuple(cell(c.lora, c.plan(steps)) for c in group),
            )  # fmt: skip
        rows.append(Row(label=label, cells=cells, trained=any(c.lora for g in columns.values() for c in g)))
    return rows


def report(bench: Bench, contestants: Sequence[Contestant]) -> tuple[dict[str, Any], str]:
    """The tables as JSON data and as Markdown."""

    def cell(lora: LoraFile | None, plan: FewStepPlan, *, full: bool = False) -> dict[str, Estimate]:
        figures = bench.full_cell(lora, plan) if full else bench.cell(lora, plan)
        name = "the base" if lora is None else lora.path.name
        print(f"{name}, {plan.solver}, {plan.num_steps} steps: {figures['clip_score'].value:.2f}", flush=True)
        return figures

    best = _teachers(cell)
    data = {**_circumstances(bench), "teacher_25": best.to_json(), "tables": {}}
    text = [_preface(data)]
    for table in Table:
        entries = [c for c in contestants if c.table is table]
        if not entries:
            continue
        columns = sorted({steps for c in entries for steps in c.steps}, reverse=True)
        full = table is Table.ABLATION
        rows = rows_of([teacher_at(columns), *entries], partial(cell, full=full))
        unequal = unequal_columns(rows)
        data["tables"][table.value] = {
            "columns": columns,
            "unequal_updates": unequal,
            "rows": [
                {"label": r.label, "trained": r.trained, "cells": {str(s): c.to_json() for s, c in r.cells.items()}}
                for r in rows
            ],
        }
        warning = f"The student updates differ at {', '.join(map(str, unequal))} steps.\n\n" if unequal else ""
        top = _teachers(partial(cell, full=True)) if full else best
        text.append(f"## {TITLES[table]}\n\n{warning}{markdown(rows, top)}")
        if full:
            data["aims"] = ablation.aims(rows, top, RIVALS)
            data["signs"] = ablation.signs(rows, top, BASE)
            text.append(ablation.markdown(data["aims"], data["signs"], BASE))
    return data, "\n\n".join(text)


def _teachers(cell: Callable[[LoraFile | None, FewStepPlan], dict[str, Estimate]]) -> Cell:
    """The cell of the teacher's 25 steps."""
    return Cell(updates=0, seeds=(0,), figures=(cell(None, teacher_at([]).plan(TEACHER_STEPS)),))


def sheet(bench: Bench, contestants: Sequence[Contestant], table: Table) -> Any:
    """Teacher 25, 8, 4, 2, 1, then every contestant's step counts, the same prompts and seeds in every row."""
    prompts = grid_prompts()
    rows = [
        (f"{c.label} {steps}", bench.pictures(c.lora, c.plan(steps), prompts, 1))
        for c in (teacher_at([TEACHER_STEPS, 8, 4, 2, 1]), *_first_seeds(contestants, table))
        for steps in (c.steps if c.lora is None else sorted(c.steps, reverse=True))
    ]
    return labelled_grid(rows)


def _first_seeds(contestants: Sequence[Contestant], table: Table) -> list[Contestant]:
    """The contestants of a table without the further training seeds of a label and step count."""
    taken: set[tuple[str, int]] = set()
    kept = []
    for contestant in contestants:
        cells = {(contestant.label, steps) for steps in contestant.steps}
        if contestant.table is table and not cells & taken:
            taken |= cells
            kept.append(contestant)
    return kept


def _circumstances(bench: Bench) -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        "unet": "bfloat16 autocast" if bench.parts.bf16 else "float32", "base": bench.base,
        "judge": bench.judge_digest, "teacher_guidance": guidance_of_base(),
        "prompts": bench.count, "prompt_seed": PROMPT_SEED, "bootstrap_rounds": ROUNDS,
        "diversity": {"prompts": len(bench.varied), "pictures_each": VARIETY, "first_seed": VARIETY_SEED},
        "first_seed": PICTURES_SEED, "reference_first_seed": REFERENCE_SEED,
    }  # fmt: skip


def _preface(data: dict[str, Any]) -> str:
    diversity, versions = data["diversity"], ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    return (
        "# Distilled students\n\n"
        "Written by `python -m benchmarks.distilled`; the figures with all digits are in the JSON file beside this.\n\n"
        f"{data['prompts']:,} held-out prompts (prompt seed {data['prompt_seed']}), a picture each from the noise of "
        f"seeds {data['first_seed']:,} and up. FD-T and KID-T: to the teacher's {TEACHER_STEPS}-step pictures of the "
        f"same prompts from seeds {data['reference_first_seed']:,} and up, so that the teacher's {TEACHER_STEPS}-step "
        "row is the floor that two sets of seeds give. Diversity: mean pairwise cosine distance of "
        f"{diversity['pictures_each']} pictures for each of {diversity['prompts']} prompts that name a concept alone. "
        f"Teacher: guidance {data['teacher_guidance']}, two passes a step; students without guidance unless their plan "
        "says so.\n\n"
        f"In brackets: 95 % bootstrap intervals over prompts ({data['bootstrap_rounds']:,} rounds). Bold: the best "
        "trained row of a column; †: its paired difference to the best has 0 in the 95 % interval. ±: standard "
        "deviation over training seeds (their number). Updates: student updates, earlier stages included, by column "
        "where they differ.\n\n"
        f"Judge {data['judge'][:12]}, base {data['base'][:12]}; UNet in {data['unet']}; {versions}; {data['machine']}."
    )


def judge_digest(folder: Path) -> str:
    """Of the judge's configuration and weights; ModelError if it has not been trained."""
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"{folder}: the judge has no weights; train it with python -m benchmarks.judge")
    return digest_json([digest_tree(folder, "*.json"), digest_tree(folder, "model*.safetensors")])


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, sample, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", type=Path, required=True, help="JSON file, see benchmarks/contestants.py")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="folders where relative LoRA paths are found")
    parser.add_argument("--count", type=int, default=1024, help="held-out prompts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="distilled", help="of the files that are written")
    parser.add_argument("--cache", type=Path, default=default_cache_dir() / "distilled")
    parser.add_argument("--model", type=Path, default=model_dir())
    parser.add_argument("--judge", type=Path, default=WEIGHTS)
    parser.add_argument("--bf16", action="store_true", help="the UNet under bfloat16 autocast, for speed")
    parser.add_argument("--grids-only", action="store_true", help="the sheets of pictures and no figures")
    options = parser.parse_args(arguments)
    with one_line_error() as ended:
        contestants = read_contestants(options.contestants, options.runs)
        digest, cache = judge_digest(options.judge), FeatureCache(options.cache)
        bench = Bench(options.model, Judge(options.judge), digest, cache, options.count, bf16=options.bf16)
        options.out.mkdir(parents=True, exist_ok=True)
        for table in Table:
            if any(c.table is table for c in contestants):
                sheet(bench, contestants, table).save(options.out / f"{options.name}-{table.replace('_', '-')}.png")
        if not options.grids_only:
            data, text = report(bench, contestants)
            write_result(options.out, options.name, data, text)
    return ended.code


if __name__ == "__main__":
    sys.exit(main())

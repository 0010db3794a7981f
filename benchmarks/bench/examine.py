"""`hypersd-bench quality`: who is measured, with which prompts, eye and reference; the report, format
`hypersd-quality/1`, and a few pictures of everybody beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from benchmarks.bench import layout, machine, tables
from benchmarks.bench.commands import Selection
from benchmarks.bench.drawers import BundleDrawer, Drawer, TorchDrawer
from benchmarks.bench.entrants import TEACHER, TEACHER_STEPS, TORCH, OpenBundle, plan_facts
from benchmarks.bench.eyes import open_eye
from benchmarks.bench.gallery import Gallery, Series, Share
from benchmarks.bench.parts import QUALITY_FILE, QUALITY_FORMAT, now, write_part
from benchmarks.bench.prompts import Prompt, builtin_prompts, chosen, read_prompts
from benchmarks.bench.quality import VARIED, Candidate, Exam, Question, rows_of
from benchmarks.bench.scorers import open_scorers
from benchmarks.bench.weights import Places, source_of, teacher_plan
from benchmarks.feature_cache import FeatureCache
from hypersd_export.bundle.digest import digest_json
from hypersd_export.diffusion import FewStepPlan
from hypersd_export.errors import HypersdError, OptionError
from hypersd_export.spec import BUILTIN

BUILTIN_COUNT = 256
PICTURES = "pictures"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The options of one examination. prompts: a file, None for the built-in ones. reference: teacher, none or the
    folder of a bundle. shown: pictures of everybody for the report."""

    prompts: Path | None = None
    count: int | None = None
    clip: str = "builtin"
    clip_prefix: str = ""
    reference: str = TEACHER
    teacher_steps: int = TEACHER_STEPS
    teacher_guidance: float | None = None
    psnr: bool = True
    rewards: tuple[str, ...] = ()
    varied: int = VARIED
    shown: int = 8


def run_quality(
    selection: Selection, asked: Asked, *, out: Path | None, command: Sequence[str]
) -> dict[str, Any] | None:
    """The quality report, written to `out`/quality.json and printed as a table; None in a process that only helped."""
    bundles = selection.open()
    prompts = prompts_of(asked, bundles[0])
    maker = Maker(bundles, selection.places, asked)
    candidates = [*map(maker.bundle, bundles), *(maker.versus(kind) for kind in selection.versus)]
    candidates += [Candidate(name=name, kind="bundle", facts={}, missing=why) for name, why in selection.absent]
    reference, reference_why = maker.reference(asked.reference)
    logging.disable_progress_bar()
    eye = open_eye(asked.clip, prefix=asked.clip_prefix)
    scorers = open_scorers(asked.rewards)
    share = Share.of_launch()
    question = Question(prompts=tuple(prompts), varied=asked.varied, reference=reference)
    with tables.Progress(quiet=share.rank > 0) as progress:
        cache = FeatureCache(selection.cache / "bench")
        gallery = Gallery(cache=cache, eye=eye, scorers=scorers, share=share, tell=progress.tell)
        exam = Exam(gallery=gallery, question=question)
        exam.draw(candidates)
        if share.rank > 0:
            return None
        rows = rows_of(exam, candidates)
        report = {
            "format": QUALITY_FORMAT, "created": now(), "command": list(command),
            "machine": machine.describe(machine.available_cores()), "processes": share.world, "eye": dict(eye.protocol),
            "rewards": {scorer.metric: scorer.digest for scorer in scorers},
            "prompts": described(asked, prompts, question), "reference": reference_name(asked, reference_why),
            "first": next((row["name"] for row in rows if row["status"] == "measured"), None), "candidates": rows,
        }  # fmt: skip
        if out is not None:
            report["shown"] = show(gallery, question, candidates, rows, out, asked.shown)
        progress.table(layout.quality_table({"quality": report}))
        progress.left_out({"quality": report})
    write_part(out, QUALITY_FILE, report)
    return report


def prompts_of(asked: Asked, first: OpenBundle) -> list[Prompt]:
    """From the file, or the built-in model's own held-out ones."""
    if asked.prompts is not None:
        return read_prompts(asked.prompts, asked.count)
    if first.manifest.base.get("name") != BUILTIN:
        raise OptionError(f"--prompts: {first.name} is not of the built-in model; name a file of prompts")
    return chosen(builtin_prompts(asked.count or BUILTIN_COUNT), None)


class Maker:
    """Candidates from the bundles; what the weights are made of is looked up once for each bundle."""

    def __init__(self, bundles: Sequence[OpenBundle], places: Places, asked: Asked) -> None:
        self._bundles, self._places, self._asked = bundles, places, asked

    def bundle(self, bundle: OpenBundle) -> Candidate:
        """A bundle, with torch's twin of it."""
        twin, why = None, ""
        if self._asked.psnr:
            try:
                twin = TorchDrawer(bundle, source_of(bundle.path, self._places), bundle.plan)
            except HypersdError as error:
                why = str(error)
        return Candidate(
            name=bundle.name, kind="bundle", facts=bundle.facts(), drawer=BundleDrawer(bundle), twin=twin,
            twin_missing=why,
        )  # fmt: skip

    def versus(self, kind: str) -> Candidate:
        """torch or teacher, of the first bundle."""
        if kind not in (TORCH, TEACHER):
            raise OptionError(f"--vs {kind}: choose {TORCH} or {TEACHER}")
        try:
            drawer, plan = self._torch(loras=kind == TORCH)
        except HypersdError as error:
            return Candidate(name=kind, kind=kind, facts={}, missing=str(error))
        facts = {"target": kind, "precision": "fp32", **plan_facts(plan)}
        return Candidate(name=kind, kind=kind, facts=facts, drawer=drawer)

    def reference(self, name: str) -> tuple[Drawer | None, str]:
        """The reference's drawer, or why there is none."""
        if name == "none":
            return None, ""
        if name != TEACHER:
            (bundle,) = Selection(bundles=(Path(name),)).open()
            return BundleDrawer(bundle), ""
        try:
            return self._torch(loras=False)[0], ""
        except HypersdError as error:
            return None, str(error)

    def _torch(self, *, loras: bool) -> tuple[TorchDrawer, FewStepPlan]:
        first, asked = self._bundles[0], self._asked
        source = source_of(first.path, self._places, loras=loras)
        plan = first.plan
        if not loras:
            plan = teacher_plan(source, steps=asked.teacher_steps, guidance=asked.teacher_guidance)
        return TorchDrawer(first, source, plan), plan


def described(asked: Asked, prompts: Sequence[Prompt], question: Question) -> dict[str, Any]:
    """The prompts for the report."""
    texts = [prompt.text for prompt in prompts]
    return {
        "file": "built-in, held out" if asked.prompts is None else asked.prompts.name, "count": len(prompts),
        "digest": digest_json(texts), "first_seed": question.measured.first_seed,
        "diversity": {"prompts": len(question.spread.prompts) // question.each, "pictures_each": question.each},
    }  # fmt: skip


def reference_name(asked: Asked, why: str) -> dict[str, Any]:
    """The reference for the report."""
    name = Path(asked.reference).name
    if why:
        return {"name": None, "why": why}
    if name == "none":
        return {"name": None}
    return {"name": f"teacher at {asked.teacher_steps} steps" if name == TEACHER else name}


def show(
    gallery: Gallery, question: Question, candidates: Sequence[Candidate], rows: Sequence[dict[str, Any]], out: Path,
    count: int,
) -> dict[str, Any]:  # fmt: skip
    """The first pictures of everybody as PNG files under `out`/pictures; what they are, by candidate."""
    from PIL import Image

    measured = {row["name"] for row in rows if row["status"] == "measured"}
    texts = question.measured.prompts[:count]
    files: dict[str, list[str]] = {}
    for number, candidate in enumerate(candidates):
        if candidate.name not in measured or candidate.drawer is None:
            continue
        pixels = gallery.pictures(candidate.drawer, first_pictures(question.measured, count))[:count]
        files[candidate.name] = []
        for i, picture in enumerate(pixels):
            name = f"{PICTURES}/{number:02d}-{i:02d}.png"
            (out / PICTURES).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(picture)).save(out / name)
            files[candidate.name].append(name)
    return {"prompts": list(texts), "files": files}


def first_pictures(series: Series, count: int) -> Series:
    """The whole chunks that hold the first pictures: those that are in the cache already."""
    found: list[str] = []
    for chunk in series.chunks():
        if len(found) >= count:
            break
        found += chunk.prompts
    return Series(prompts=tuple(found), first_seed=series.first_seed)

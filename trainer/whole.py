"""`hypersd-train all`: the whole method, unattended: TSCD, feedback on top of its last stage, both merged, score
distillation from there. Each part is a run of its own in a folder of its own, so a killed whole goes on where it was.

out/tscd, feedback, score/        the runs (see `trainer.distill.run`)
out/merged-lora.safetensors       TSCD's last stage with the feedback in it
out/loras/                        what is released: a LoRA for each of TSCD's earlier stages, and the unified one
out/loras.json                    the same as contestants of `python -m benchmarks.distilled`
out/report.json, report.md        what was run, with its last figures
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypersd_export.diffusion import FewStepPlan
from hypersd_export.errors import OptionError
from hypersd_export.model.files import sha256_file
from hypersd_export.model.lora import read_lora
from trainer.config import override
from trainer.distill.config import FEEDBACK, SCORE, DistillConfig
from trainer.distill.lora_file import plans_of, updates_of
from trainer.distill.recipes import recipe_by
from trainer.distill.run import lora_name
from trainer.distill.snapshot import writing
from trainer.merge import Merged, merge

TSCD = "tscd"
PARTS = (TSCD, FEEDBACK, SCORE)
MERGED, UNIFIED = "merged-lora.safetensors", "unified-lora.safetensors"
UNIFIED_STEPS = (1, 2, 4, 8)
"""The step counts that the score distillation trains at once, so that one LoRA serves them."""

Distil = Callable[[DistillConfig, Path], None]
"""Trains what is not finished of a configuration's run in a folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """A LoRA that the whole run gives: its file, the step counts that it is for, its student updates and its sha256."""

    file: str
    steps: tuple[int, ...]
    updates: int
    sha256: str


def configurations(
    name: str, assignments: Sequence[str] = (), *, base: str = "", data: str = ""
) -> dict[str, DistillConfig]:
    """The configuration of each part: the recipe's, then `--set`.

    An assignment is for one part if it begins with the part's name (`tscd.stages.0.steps=50`, `score.stages.0.lr=1e-4`;
    the recipe's own `score.` and `feedback.` keys are then `score.score.pairs=512`), and for all of them otherwise.
    OptionError as `trainer.config.override`.
    """
    common = [each for each in assignments if each.partition(".")[0] not in PARTS]
    found = {}
    for part in PARTS:
        own = [each.removeprefix(f"{part}.") for each in assignments if each.startswith(f"{part}.")]
        config = recipe_by(name, part)
        if part == SCORE:
            config = replace(config, score=replace(config.score, steps=UNIFIED_STEPS))
        config = override(config, [*common, *own])
        config = replace(config, base=base or config.base)
        found[part] = replace(config, data=replace(config.data, source=data or config.data.source))
    different = {config.base for config in found.values()}
    if len(different) > 1:
        raise OptionError(f"--set …base: the parts have {' and '.join(sorted(different))}: they need the same base")
    return found


def run_all(configs: Mapping[str, DistillConfig], out: Path, distil: Distil, *, say: Callable[[str], object]) -> None:
    """Every part in turn, then the released LoRAs and the report; raises whatever a part raises."""
    tscd = configs[TSCD]
    say(f"1/3 {TSCD}")
    distil(tscd, out / TSCD)
    last = out / TSCD / lora_name(tscd, len(tscd.stages))

    say(f"2/3 {FEEDBACK}, on {last.name}")
    feedback = replace(configs[FEEDBACK], init_lora=str(last))
    distil(feedback, out / FEEDBACK)
    merged = merge([last, out / FEEDBACK / lora_name(feedback, 1)], out / MERGED, rank=tscd.lora.rank)

    say(f"3/3 {SCORE}, from {MERGED}")
    score = replace(configs[SCORE], init_lora=str(out / MERGED))
    distil(score, out / SCORE)

    finished = [out / TSCD / lora_name(tscd, number) for number in range(1, len(tscd.stages))]
    final = out / SCORE / lora_name(score, len(score.stages))
    released = release(finished, final, out / "loras")
    write_report(out, released, merged, {part: out / part / "log.jsonl" for part in PARTS})
    say(f"done: {', '.join(lora.file for lora in released)} in {out / 'loras'}")


def release(stages: Sequence[Path], unified: Path, folder: Path) -> list[Released]:
    """Copy the LoRAs into `folder`; a stage's is for the step count of its default plan, the unified one for all."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for source, target in [*((path, folder / path.name) for path in stages), (unified, folder / UNIFIED)]:
        shutil.copyfile(source, target)
        plans: Sequence[FewStepPlan] = plans_of(read_lora(target))
        counts = [plan.num_steps for plan in plans]
        steps = tuple(sorted(counts)) if source is unified else (counts[0],)
        found.append(
            Released(file=target.name, steps=steps, updates=updates_of(target), sha256=sha256_file(target))
        )  # fmt: skip
    return found


def write_report(out: Path, released: Sequence[Released], merged: Merged, logs: Mapping[str, Path]) -> None:
    """loras.json, report.json and report.md."""
    contestants = [
        {"table": "one_lora" if len(lora.steps) > 1 else "stages", "label": Path(lora.file).stem,
         "lora": f"loras/{lora.file}", "sampler": "own", "steps": list(lora.steps)}
        for lora in released
    ]  # fmt: skip
    parts = {part: last_figures(log) for part, log in logs.items()}
    data = {
        "parts": parts,
        "merged": {"modules": merged.modules, "ranks": list(merged.ranks), "error": merged.error},
        "loras": [
            {"file": lora.file, "steps": list(lora.steps), "updates": lora.updates, "sha256": lora.sha256}
            for lora in released
        ],
    }
    texts = {
        "loras.json": json.dumps(contestants, indent=1) + "\n",
        "report.json": json.dumps(data, indent=1) + "\n",
        "report.md": _markdown(data),
    }
    for name, text in texts.items():
        with writing(out / name) as partial:
            partial.write_text(text, encoding="utf-8")


def last_figures(log: Path) -> list[dict[str, Any]]:
    """The last step of each stage in a run's log.jsonl, with a guard's figures where it has them; [] without a log."""
    if not log.is_file():
        return []
    stages: dict[int, dict[str, Any]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        before = stages.get(row["stage"], {})
        stages[row["stage"]] = before | row if before.get("step") == row["step"] else row
    return list(stages.values())


def _markdown(data: Mapping[str, Any]) -> str:
    lines = ["# The whole method", "", "| part | stage | updates | last figures |", "|---|---|---|---|"]
    for part, rows in data["parts"].items():
        for row in rows:
            skipped = ("stage", "step", "lr", "seconds", "guard")
            figures = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in skipped)
            lines.append(f"| {part} | {row['stage']} | {row['step'] + 1} | {figures} |")
    merged = data["merged"]
    ranks = ", ".join(map(str, merged["ranks"]))
    lines += ["", f"Merged: {merged['modules']} modules, rank {ranks}, relative error {merged['error']:.2%}.", ""]
    lines += ["| LoRA | steps | student updates | sha256 |", "|---|---|---|---|"]
    lines += [
        f"| {lora['file']} | {', '.join(map(str, lora['steps']))} | {lora['updates']:,} | `{lora['sha256'][:16]}…` |"
        for lora in data["loras"]
    ]
    lines += ["", "How good they are: `python -m benchmarks.distilled --contestants loras.json`."]
    return "\n".join(lines) + "\n"

"""Who stands in the tables: a small JSON file, read and checked before anything is drawn.

    [{"table": "stages", "label": "TSCD", "lora": "tscd/k4.safetensors", "sampler": "own", "steps": [4]},
     {"table": "one_lora", "label": "TCD", "lora": "tcd/final.safetensors", "sampler": "tcd:0.3", "steps": [1, 2, 4, 8],
      "updates": 2000, "seed": 1, "guidance": 1.0}]

Entries with one label in one table are one row; with one step count too, and different seeds, they are averaged.
"own" plays the plan for so many steps that the file's metadata carries, so on the grid that it was trained on; a
sampler by name is on Stable Diffusion's usual one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from hypersd_export.diffusion import LORA_METADATA_KEY, FewStepPlan, Guidance, Solver, plans_from_metadata
from hypersd_export.errors import HypersdError, LoraError, OptionError
from hypersd_export.model.lora import LoraFile, read_lora
from trainer.distill.lora_file import STEPS_KEY

KEYS = {"table", "label", "lora", "sampler", "steps", "updates", "seed", "guidance"}
REQUIRED = {"table", "label", "lora", "sampler", "steps"}
OWN = "own"


class Table(StrEnum):
    """STAGES: every step count has a LoRA of its own. ONE_LORA: one LoRA at every step count. REAL: stages that differ
    in the critic's real samples alone. ABLATION: the parts of the whole method, one LoRA each."""

    STAGES = "stages"
    ONE_LORA = "one_lora"
    REAL = "real"
    ABLATION = "ablation"


def sampler_plan(sampler: str, steps: int, guidance: float = 1.0) -> FewStepPlan:
    """`ddim_trailing`, `lcm` or `tcd:ETA` at so many steps, on Stable Diffusion's schedule; OptionError otherwise."""
    name, _, text = sampler.partition(":")
    solver = {"ddim_trailing": Solver.DDIM, "lcm": Solver.LCM, "tcd": Solver.TCD}.get(name)
    try:
        eta = float(text) if solver is Solver.TCD else 0.0
    except ValueError:
        solver = None
    if solver is None or (text and solver is not Solver.TCD):
        raise OptionError(f"sampler {sampler!r}: must be {OWN}, ddim_trailing, lcm or tcd:ETA such as tcd:0.3")
    return FewStepPlan(solver=solver, num_steps=steps, eta=eta, guidance=Guidance.of(guidance))


def own_plan(lora: LoraFile | None, steps: int) -> FewStepPlan:
    """The plan for so many steps in a LoRA's metadata; OptionError if it has none."""
    text = None if lora is None else lora.metadata.get(LORA_METADATA_KEY)
    plans = {plan.num_steps: plan for plan in (plans_from_metadata(text) if text else ())}
    if steps not in plans:
        has = ", ".join(map(str, plans)) or "none"
        raise OptionError(f"sampler {OWN!r} at {steps} steps: the file has plans for {has}; name a sampler")
    return plans[steps]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """A LoRA (None: the base alone), how it is sampled, at which step counts, and what it has cost.

    updates: student updates behind it, earlier stages included. seed: of its training.
    """

    table: Table
    label: str
    lora: LoraFile | None
    sampler: str
    steps: tuple[int, ...]
    updates: int = 0
    seed: int = 0
    guidance: float = 1.0

    def plan(self, steps: int) -> FewStepPlan:
        """The plan of one of its step counts."""
        if self.sampler == OWN:
            return own_plan(self.lora, steps)
        return sampler_plan(self.sampler, steps, self.guidance)


def read_contestants(file: Path, folders: Sequence[Path] = ()) -> list[Contestant]:
    """The entries of a contestants file; relative LoRA paths are looked for in `folders`, then beside the file.

    OptionError or LoraError in one line that names the entry, at the first that cannot stand in a table.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"--contestants {file}: cannot be read as JSON ({str(error)[:80]})") from None
    if not isinstance(entries, list) or not entries:
        raise OptionError(f"--contestants {file}: must be a list of at least one object")
    found, taken = [], set()
    for number, entry in enumerate(entries, start=1):
        what = f"--contestants {file}: entry {number}"
        contestant = _contestant(entry, what, (*folders, file.parent))
        for steps in contestant.steps:
            cell = (contestant.table, contestant.label, steps, contestant.seed)
            if cell in taken:
                raise OptionError(
                    f"{what}: {contestant.label!r} at {steps} steps, seed {contestant.seed}, is there already; "
                    "give another seed or label"
                )
            taken.add(cell)
        found.append(contestant)
    return found


def _contestant(entry: Any, what: str, folders: Sequence[Path]) -> Contestant:
    if not isinstance(entry, dict) or not REQUIRED <= set(entry) <= KEYS:
        keys = sorted(set(entry) ^ REQUIRED) if isinstance(entry, dict) else entry
        raise OptionError(f"{what}: {keys} is unknown or missing; an object has {', '.join(sorted(KEYS))}")
    steps, seed = entry["steps"], entry.get("seed", 0)
    if not isinstance(steps, list) or not steps or not all(_is_count(s, 1) for s in steps):
        raise OptionError(f"{what}: steps {steps!r} must be a list of whole numbers above 0")
    if len(set(steps)) != len(steps) or not _is_count(seed, 0):
        raise OptionError(f"{what}: steps {steps} must not repeat, and seed {seed!r} must be a whole number")
    if entry["table"] not in list(Table) or not isinstance(entry["label"], str) or not entry["label"]:
        raise OptionError(f"{what}: table {entry['table']!r}: must be one of {', '.join(Table)}; and label a text")
    if entry["sampler"] == OWN and "guidance" in entry:
        raise OptionError(f"{what}: guidance {entry['guidance']!r}: sampler {OWN!r} has its plan's; leave it out")
    try:
        lora = None if entry["lora"] is None else read_lora(_find(str(entry["lora"]), folders))
        contestant = Contestant(
            table=Table(entry["table"]), label=entry["label"], lora=lora, sampler=str(entry["sampler"]),
            steps=tuple(steps), updates=_updates(lora, entry.get("updates")), seed=seed,
            guidance=entry.get("guidance", 1.0),
        )  # fmt: skip
        for count in steps:
            contestant.plan(count)
    except HypersdError as error:
        raise type(error)(f"{what}: {error}") from None
    return contestant


def _find(text: str, folders: Sequence[Path]) -> Path:
    """The file itself if the path is absolute, else the first of the folders' that exists."""
    candidates = [folder / text for folder in folders]  # an absolute path replaces the folder
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        places = ", ".join(str(folder) for folder in folders)
        raise LoraError(f"lora {text}: no such file in {places}; pass --runs FOLDER")
    return found


def _updates(lora: LoraFile | None, stated: Any) -> int:
    """The updates that the LoRA's metadata has, which an entry may state only where the file does not."""
    if stated is not None and not _is_count(stated, 0):
        raise OptionError(f"updates {stated!r}: must be a whole number")
    if lora is None:
        return int(stated or 0)
    text = lora.metadata.get(STEPS_KEY)
    if text is None and stated is None:
        raise OptionError(f"{lora.path.name} does not say its student updates ({STEPS_KEY}); add updates")
    if text is None:
        return int(stated)
    if not text.isdecimal():
        raise LoraError(f"{lora.path.name}: its metadata {STEPS_KEY} is {text[:40]!r}, not a number")
    if stated is not None and int(stated) != int(text):
        raise OptionError(f"updates {stated}: {lora.path.name} says {text}; leave updates out")
    return int(text)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

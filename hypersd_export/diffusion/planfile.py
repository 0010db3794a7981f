"""plan.json: the tables of a bundle and where they came from; and plans as LoRA metadata.

    {"format": "hypersd-plan/1",
     "entries": [{"steps": 4, "source": "preset Hyper-SD15-4steps-lora (file name)", "plan": {…}, "table": {…}}, …]}

The first entry is the default. A runtime reads `table` and `plan.guidance` alone. `plan.schema.json` beside this file
is its JSON Schema.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hypersd_export.diffusion.jsonio import checked_int, checked_list, checked_object
from hypersd_export.diffusion.plan import FewStepPlan
from hypersd_export.diffusion.table import StepTable
from hypersd_export.errors import PlanError

PLAN_FORMAT = "hypersd-plan/1"
LORA_METADATA_KEY = "hypersd.plan"
"""The safetensors metadata key under which a LoRA carries its plan: JSON of one plan, or a list of plans."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanEntry:
    """One plan with its table and, in `source`, the reason why it was chosen."""

    plan: FewStepPlan
    table: StepTable
    source: str

    def __post_init__(self) -> None:
        if len(self.table.rows) != self.plan.num_steps:
            raise PlanError(f"plan of {self.plan.num_steps} steps with a table of {len(self.table.rows)} rows")

    @property
    def steps(self) -> int:
        """The step count, by which an entry is chosen."""
        return self.plan.num_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFile:
    """The entries of a plan.json: at least one, each with another step count."""

    entries: tuple[PlanEntry, ...]

    def __post_init__(self) -> None:
        if not self.entries:
            raise PlanError("plan.json: no entries")
        counts = [entry.steps for entry in self.entries]
        if len(set(counts)) != len(counts):
            raise PlanError(f"plan.json: step counts {counts} repeat; each may occur once")

    @property
    def default(self) -> PlanEntry:
        """The first entry."""
        return self.entries[0]

    def for_steps(self, steps: int | None) -> PlanEntry:
        """The entry with that many steps, the default for None; `PlanError` names those that exist."""
        if steps is None:
            return self.default
        for entry in self.entries:
            if entry.steps == steps:
                return entry
        known = ", ".join(str(entry.steps) for entry in self.entries)
        raise PlanError(f"steps {steps}: this bundle has tables for {known}; export again with --steps {steps}")

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        entries = [
            {"steps": e.steps, "source": e.source, "plan": e.plan.to_json(), "table": e.table.to_json()}
            for e in self.entries
        ]
        return {"format": PLAN_FORMAT, "entries": entries}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PlanFile":
        """Read what `to_json` wrote; `PlanError` for another format or a contradiction."""
        found = data.get("format") if isinstance(data, Mapping) else None
        if found != PLAN_FORMAT:
            raise PlanError(f"plan.json: format {found!r}, expected {PLAN_FORMAT!r}")
        data = checked_object(data, what="plan.json", required={"format", "entries"}, optional=set())
        return cls(entries=tuple(_entry(item) for item in checked_list(data["entries"], what="plan.json entries")))


def _entry(item: object) -> PlanEntry:
    item = checked_object(item, what="plan.json entry", required={"steps", "source", "plan", "table"}, optional=set())
    entry = PlanEntry(
        plan=FewStepPlan.from_json(item["plan"]), table=StepTable.from_json(item["table"]), source=str(item["source"])
    )
    if checked_int(item["steps"], what="plan.json steps") != entry.steps:
        raise PlanError(f"plan.json: an entry of steps {item['steps']} holds a plan of {entry.steps}")
    return entry


def plans_to_metadata(plans: Sequence[FewStepPlan]) -> str:
    """The text for `LORA_METADATA_KEY`: one object for one plan, else a list."""
    data = [plan.to_json() for plan in plans]
    return json.dumps(data[0] if len(data) == 1 else data)


def plans_from_metadata(text: str) -> tuple[FewStepPlan, ...]:
    """The plans in a LoRA's metadata, the default first; `PlanError` if it is not a plan."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise PlanError(f"plan in the LoRA's metadata: not JSON ({error})") from None
    items = checked_list(data if isinstance(data, list) else [data], what="plan in the LoRA's metadata")
    if not items:
        raise PlanError("plan in the LoRA's metadata: an empty list")
    return tuple(FewStepPlan.from_json(item) for item in items)


def plan_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of plan.json, for readers in other languages."""
    text = resources.files(__package__).joinpath("plan.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema

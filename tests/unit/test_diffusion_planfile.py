"""plan.json and LoRA metadata."""

import json

import pytest
from jsonschema import Draft202012Validator

from hypersd_export.diffusion import (
    PRESETS,
    FewStepPlan,
    Guidance,
    PlanEntry,
    PlanFile,
    Solver,
    plan_schema,
    plans_from_metadata,
    plans_to_metadata,
)
from hypersd_export.errors import PlanError


def entry(steps, source="flags"):
    plan = FewStepPlan(solver=Solver.DDIM, num_steps=steps, guidance=Guidance.of(5.0))
    return PlanEntry(plan=plan, table=plan.table(), source=source)


FILE = PlanFile(entries=(entry(4), entry(1), entry(8, source="preset Hyper-SD15-8steps-lora (file name)")))


def test_round_trip():
    assert PlanFile.from_json(json.loads(json.dumps(FILE.to_json(), allow_nan=False))) == FILE


def test_layout():
    data = FILE.to_json()
    assert data["format"] == "hypersd-plan/1"
    assert [set(item) for item in data["entries"]] == [{"steps", "source", "plan", "table"}] * 3
    assert data["entries"][2]["source"] == "preset Hyper-SD15-8steps-lora (file name)"
    assert data["entries"][0]["plan"]["guidance"] == {"kind": "cfg", "scale": 5.0}


def test_choice_of_an_entry():
    assert FILE.default.steps == 4
    assert FILE.for_steps(None) is FILE.default
    assert FILE.for_steps(8).steps == 8
    with pytest.raises(PlanError, match=r"^steps 2: this bundle has tables for 4, 1, 8; export again with --steps 2$"):
        FILE.for_steps(2)


def test_schema_accepts_every_preset():
    schema = plan_schema()
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for preset in PRESETS:
        table = preset.plan.table(height=1024, width=1024)
        file = PlanFile(entries=(PlanEntry(plan=preset.plan, table=table, source=preset.name),))
        assert list(validator.iter_errors(file.to_json())) == []
        assert PlanFile.from_json(file.to_json()) == file


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "hypersd-plan/2"),
        (("entries",), []),
        (("entries", 0, "steps"), 0),
        (("entries", 0, "extra"), 1),
        (("entries", 0, "plan", "solver"), "pndm"),
        (("entries", 0, "plan", "schedule", "shift"), 3.0),
        (("entries", 0, "table", "rows", 0, "a"), "1"),
        (("entries", 0, "table", "init_noise_sigma"), 0),
    ],
)
def test_schema_and_reader_refuse_the_same(path, value):
    data = json.loads(json.dumps(FILE.to_json()))
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    assert not Draft202012Validator(plan_schema()).is_valid(data)
    with pytest.raises(PlanError):
        PlanFile.from_json(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"^plan.json: format None, expected 'hypersd-plan/1'$"),
        ({"format": "other"}, r"^plan.json: format 'other', expected 'hypersd-plan/1'$"),
        ({"format": "hypersd-plan/1"}, r"^plan.json: missing entries$"),
        ({"format": "hypersd-plan/1", "entries": []}, r"^plan.json: no entries$"),
        ({"format": "hypersd-plan/1", "entries": [1]}, r"^plan.json entry: expected a JSON object, found int$"),
    ],
)
def test_bad_files(data, message):
    with pytest.raises(PlanError, match=message):
        PlanFile.from_json(data)


def test_contradictions():
    with pytest.raises(PlanError, match=r"^plan.json: step counts \[4, 4\] repeat"):
        PlanFile(entries=(entry(4), entry(4)))
    with pytest.raises(PlanError, match=r"^plan of 4 steps with a table of 1 rows$"):
        PlanEntry(plan=entry(4).plan, table=entry(1).table, source="")
    data = FILE.to_json()
    data["entries"][0]["steps"] = 5
    with pytest.raises(PlanError, match=r"^plan.json: an entry of steps 5 holds a plan of 4$"):
        PlanFile.from_json(data)


def test_metadata():
    plans = tuple(item.plan for item in FILE.entries)
    assert plans_from_metadata(plans_to_metadata(plans)) == plans
    assert plans_from_metadata(plans_to_metadata(plans[:1])) == plans[:1]
    assert json.loads(plans_to_metadata(plans[:1]))["solver"] == "ddim"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"^plan in the LoRA's metadata: not JSON"),
        ("[]", r"^plan in the LoRA's metadata: an empty list$"),
        ("3", r"^plan: expected a JSON object, found int$"),
        ('{"solver": "ddim"}', r"^plan: missing num_steps$"),
    ],
)
def test_bad_metadata(text, message):
    with pytest.raises(PlanError, match=message):
        plans_from_metadata(text)

"""The shipped JSON Schemas: what we write fits them, and what is wrong does not."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hypersd_export.bundle import schemas
from hypersd_export.diffusion.plan import FewStepPlan, Guidance, GuidanceKind, PredictionType, Solver
from hypersd_export.diffusion.planfile import PlanEntry, PlanFile
from hypersd_export.diffusion.schedule import FlowSchedule
from tests.bundles import PLAIN_PLANS, make_bundle, seal

FLOW = FewStepPlan(
    solver=Solver.FLOW_EULER, num_steps=4, prediction_type=PredictionType.FLOW, schedule=FlowSchedule(),
    guidance=Guidance(kind=GuidanceKind.EMBEDDED, scale=3.5),
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("schemas") / "bundle")


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = schemas.load(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


FILES = {"plan": "plan.json", "manifest": "manifest.json", "golden": "golden/golden.json"}


@pytest.mark.parametrize("name", schemas.NAMES)
def test_what_we_write_fits(bundle: Path, name: str) -> None:
    validator(name).validate(read(bundle / FILES[name]))


def test_other_plans_fit() -> None:
    plans = [
        FLOW,
        FewStepPlan(solver=Solver.EULER_ANCESTRAL, num_steps=3),
        FewStepPlan(solver=Solver.LCM, num_steps=5, guidance=Guidance(kind=GuidanceKind.EMBEDDED, scale=8.0)),
        FewStepPlan(solver=Solver.DDIM, num_steps=2, timesteps=(800, 400)),
    ]
    for plan in plans:
        entries = (PlanEntry(plan=plan, table=plan.table(), source="a test"),)
        validator("plan").validate(PlanFile(entries=entries).to_json())


def test_parity_fits_as_numbers_and_as_words(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", PLAIN_PLANS)
    validator("golden").validate(read(bundle / "golden" / "golden.json"))
    seal(bundle, {"unet": {"psnr_db": 91.5, "max_abs": 1e-6, "per_step": [{"t": 999, "psnr_db": 91.5}]}})
    validator("manifest").validate(read(bundle / "manifest.json"))
    seal(bundle, "looks fine")
    assert not validator("manifest").is_valid(read(bundle / "manifest.json"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("plan", lambda data: data.update(format="hypersd-plan/2")),
        ("plan", lambda data: data.update(entries=[])),
        ("plan", lambda data: data["entries"][0]["table"]["rows"][0].pop("p")),
        ("plan", lambda data: data["entries"][0]["plan"].update(solver="dpm++")),
        ("manifest", lambda data: data["base"].update(digest="abc")),
        ("manifest", lambda data: data["files"]["plan.json"].update(bytes=-1)),
        ("manifest", lambda data: data["files"].update({"/etc/passwd": data["files"]["plan.json"]})),
        ("manifest", lambda data: data.update(surprise=1)),
        ("golden", lambda data: data.update(seed=-1)),
        ("golden", lambda data: data.update(expected="../x.png")),
        ("golden", lambda data: data.pop("prompt")),
    ],
)
def test_what_is_wrong_does_not_fit(bundle: Path, name: str, change: Any) -> None:
    data = read(bundle / FILES[name])
    change(data)
    assert not validator(name).is_valid(data)


def test_no_other_schema() -> None:
    with pytest.raises(KeyError):
        schemas.load("../manifest")

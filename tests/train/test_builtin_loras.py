"""The LoRAs that ship: of this base, on the grids they were trained on, and better in few steps than the teacher."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hypersd_export import builtin
from hypersd_export.cli import app
from hypersd_export.diffusion import FewStepPlan, Guidance, Solver, grid_timesteps, plans_from_metadata
from hypersd_export.model.base import open_base
from hypersd_export.model.files import read_header
from hypersd_export.model.lora import read_lora
from trainer.distill.config import RECIPES
from trainer.distill.recipes import feedback_builtin, score_builtin
from trainer.whole import UNIFIED_STEPS

CARD = builtin.card()
FILES = {int(steps): builtin.model_dir().parent / name for steps, name in CARD["lora"].items()}


@pytest.fixture(scope="module", params=sorted(FILES))
def shipped(request):
    return request.param, read_lora(FILES[request.param])


def test_there_is_one_for_every_step_count_and_four_steps_are_the_default():
    assert next(iter(FILES)) == 4
    assert sorted(FILES) == [1, 2, 4, 8]
    assert FILES[1] == builtin.model_dir().parent / CARD["unified"]
    assert sum(path.stat().st_size for path in FILES.values()) < 25_000_000


def test_it_is_this_bases_in_half_precision_with_alpha(shipped):
    _, lora = shipped
    assert lora.base_digest == open_base("builtin").digest
    assert str(lora.format) == "kohya"
    assert set(lora.components) == {"unet"}
    assert all(delta.alpha is not None for delta in lora.components["unet"].values())
    weights = {name: info.dtype for name, info in read_header(lora.path).tensors.items() if not name.endswith(".alpha")}
    assert set(weights.values()) == {"F16"}


def test_its_plans_lie_on_the_grid_of_its_last_stage(shipped):
    steps, lora = shipped
    recipe = json.loads(lora.metadata["hypersd.recipe"])
    stage = next(s for s in recipe["stages"] if s["segments"] == steps)
    plans = plans_from_metadata(lora.metadata["hypersd.plan"])
    assert plans[0].num_steps == steps
    grid = set(grid_timesteps(stage["points"], 1000).tolist())
    for plan in plans:
        assert {int(t) for t in plan.net_timesteps()} <= grid
    if steps == 1:
        assert [(p.solver, p.num_steps, p.eta) for p in plans] == [(Solver.TCD, n, 1.0) for n in (1, 2, 4, 8)]


def test_it_was_made_by_the_recipe_of_its_name(shipped):
    """The stages are those that `hypersd-train all --recipe builtin` runs today, and nothing names a machine.

    The unified LoRA's score distillation was a chain of runs of one stage each, of which it names the last.
    """
    steps, lora = shipped
    made, tscd = json.loads(lora.metadata["hypersd.recipe"]), RECIPES["builtin"]()
    now = score_builtin() if steps == 1 else tscd
    stages = now.stages[-1:] if steps == 1 else now.stages
    assert [(s["segments"], s["points"], s["steps"], s["lr"], s["w_mse"], s["w_adv"]) for s in made["stages"]] == [
        (s.segments, s.points, s.steps, s.lr, s.w_mse, s.w_adv) for s in stages
    ]
    settings = ("method", "distance", "edge_share", "ema_decay", "batch", "warmup", "cooldown")
    assert [made[name] for name in settings] == [getattr(now, name) for name in settings]
    done = sum(stage.steps for stage in tscd.stages if stage.segments >= steps)
    if steps == 1:
        assert tuple(made["score"]["steps"]) == UNIFIED_STEPS
        assert made["adversarial"]["real"] == now.adversarial.real
        done += sum(stage.steps for stage in (*feedback_builtin().stages, *now.stages))
    assert lora.metadata["hypersd.steps"] == str(done)
    assert "/" not in "".join(lora.metadata.values()).replace("</w>", "")


@pytest.mark.parametrize(("asked", "file", "counts"), [
    ([], 4, [4]), (["--steps", "2"], 2, [2]), (["--steps", "1"], 1, [1]), (["--steps", "8,1"], 1, [8, 1]),
])  # fmt: skip
def test_the_exporter_takes_it_with_no_other_word(asked, file, counts, tmp_path):
    result = CliRunner().invoke(app, ["--dry-run", *asked, "--out", str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert [record["file"] for record in done["loras"]] == [FILES[file].name]
    assert [entry["steps"] for entry in done["plans"]] == counts
    assert all(entry["plan"]["guidance"]["kind"] == "none" for entry in done["plans"])


PROMPTS = tuple(
    f"a {thing} on a {colour} background, {style} style"
    for thing, colour, style in [
        ("fox", "blue", "noto"), ("strawberry", "yellow", "twemoji"), ("penguin", "purple", "noto"),
        ("frog", "white", "fluent"), ("pizza", "green", "twemoji"), ("tulip", "black", "fluent"),
        ("hamburger", "blue", "noto"), ("lemon", "purple", "twemoji"),
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def studio():
    from benchmarks.sampling import Parts
    from trainer.rewards.clip import ClipReward

    return Parts.load(builtin.model_dir()), ClipReward()


@pytest.mark.parametrize("steps", [1, 2])
@torch.no_grad()
def test_its_pictures_fit_their_captions_better_than_the_teachers_in_as_many_steps(studio, steps):
    """By the pipeline's own CLIP; the teacher has guidance, and so twice the passes."""
    parts, score = studio
    lora = read_lora(FILES[steps])
    (plan,) = (p for p in plans_from_metadata(lora.metadata["hypersd.plan"]) if p.num_steps == steps)
    teacher = FewStepPlan(solver=Solver.DDIM, num_steps=steps, guidance=Guidance.of(CARD["guidance"]))
    mine = score(parts.with_lora(lora).draw(PROMPTS, plan), PROMPTS)
    theirs = score(parts.draw(PROMPTS, teacher), PROMPTS)
    assert mine.mean() > theirs.mean() + (10 if steps == 1 else 1)

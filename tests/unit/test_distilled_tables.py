"""The tables of distilled students: their arithmetic, who may stand in them, and that nothing is computed twice."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import distilled
from benchmarks.contestants import Contestant, Table, read_contestants, sampler_plan
from benchmarks.distilled_tables import (
    METRICS,
    Cell,
    Row,
    best_and_ties,
    markdown,
    measure,
    unequal_columns,
)
from benchmarks.feature_cache import FeatureCache
from benchmarks.metrics import clip_scores, diversity, unit
from benchmarks.sampling import Parts, labelled_grid
from benchmarks.stats import Estimate, mean_of
from hypersd_export.diffusion import LORA_METADATA_KEY, FewStepPlan, Guidance, Solver, plans_to_metadata
from hypersd_export.errors import DataError, LoraError, OptionError, PlanError
from hypersd_export.model.lora import Delta, read_lora, save_kohya
from hypersd_export.verify import reference

RNG = np.random.default_rng(0)


def test_measure_is_the_metrics_and_equal_pictures_are_at_no_distance():
    features, captions = unit(RNG.standard_normal((30, 8))), unit(RNG.standard_normal((30, 8)))
    choices = np.stack([captions, -captions], 1)
    varied = unit(RNG.standard_normal((5, 4, 8)))
    figures = measure(features, features, captions, choices, varied, rounds=20)
    assert list(figures) == list(METRICS)[:5]
    assert figures["clip_score"].value == pytest.approx(clip_scores(features, captions).mean())
    assert figures["diversity"].value == pytest.approx(diversity(varied).mean())
    assert figures["retrieval_top1"].value == pytest.approx(((features * captions).sum(1) > 0).mean())
    assert figures["fd_t"].value == pytest.approx(0, abs=1e-9)
    assert figures["kid_t"].value == pytest.approx(0, abs=1e-12)
    assert all(f.replicates.shape == (20,) for f in figures.values())


# rows


def cell(values, *, updates=100, seeds=None, noise=None):
    """A cell whose every metric has these values, one per training seed."""
    noise = np.array([-1.0, 0.0, 1.0]) if noise is None else noise
    figures = tuple(dict.fromkeys(METRICS, Estimate(v, v + noise)) for v in values)
    return Cell(updates=updates, seeds=seeds or tuple(range(len(values))), figures=figures)


def test_seeds_are_averaged_with_their_spread_and_replicates_round_by_round():
    mean = mean_of([Estimate(1.0, np.array([0.0, 2.0])), Estimate(3.0, np.array([3.0, 3.0]))])
    assert mean.value == 2.0
    np.testing.assert_array_equal(mean.replicates, [1.5, 2.5])
    three = cell([1.0, 2.0, 6.0])
    assert three.mean("fd_t").value == 3.0
    assert three.spread("fd_t") == pytest.approx(np.sqrt(7.0))
    assert cell([1.0]).spread("fd_t") is None
    data = three.to_json()
    assert (data["updates"], data["training_seeds"], data["fd_t"]["each"]) == (100, [0, 1, 2], [1.0, 2.0, 6.0])
    assert data["fd_t"]["low"] == pytest.approx(3 - 0.95)  # percentile 2.5 of 2, 3, 4
    assert "spread" not in cell([1.0]).to_json()["fd_t"]
    json.dumps(data)


def test_a_paired_comparison_tells_rows_apart_whose_intervals_overlap():
    shared = RNG.standard_normal(500) * 5
    rows = [
        Row(label="a", cells={4: cell([10.0], noise=shared)}),
        Row(label="b", cells={4: cell([11.0], noise=shared + 0.1 * RNG.standard_normal(500))}),
        Row(label="c", cells={4: cell([10.5], noise=RNG.standard_normal(500) * 5)}),
        Row(label="teacher", cells={4: cell([99.0], noise=shared)}, trained=False),
    ]
    teacher = Estimate(10.4, np.full(500, 10.4))
    assert best_and_ties(rows, 4, "clip_score", teacher) == ("b", {"c"})
    assert best_and_ties(rows, 4, "fd_t", teacher) == ("a", {"c"})
    assert best_and_ties(rows, 4, "diversity", teacher)[0] == "c"  # 0.1 from the teacher's
    assert best_and_ties(rows, 2, "fd_t", teacher) == ("", set())


def test_unequal_updates_are_named():
    rows = [
        Row(label="a", cells={4: cell([1.0]), 2: cell([1.0], updates=200)}),
        Row(label="b", cells={4: cell([1.0]), 2: cell([1.0], updates=150)}),
        Row(label="teacher", cells={4: cell([1.0], updates=0)}, trained=False),
    ]
    assert unequal_columns(rows) == [2]


def test_markdown():
    rows = [
        Row(label="teacher", cells={2: cell([50.0]), 1: cell([40.0])}, trained=False),
        Row(label="TSCD", cells={2: cell([60.0, 62.0], updates=1500), 1: cell([55.0], updates=2000)}),
        Row(label="LCM", cells={1: cell([54.0], updates=2000, noise=np.array([0.5, 0.0, -0.5]))}),
    ]
    first = markdown(rows, cell([70.0])).split("\n\n")
    assert first[0] == "**CLIP score of the judge, higher is better**"
    assert first[1].splitlines() == [
        "| | updates | 2 steps | 1 step |",
        "|---|---|---|---|",
        "| teacher, 25 steps |  | 70.0 [69.0, 71.0] | 70.0 [69.0, 71.0] |",
        "| teacher |  | 50.0 [49.0, 51.0] | 40.0 [39.0, 41.0] |",
        "| TSCD | 1,500 · 2,000 | **61.0** ± 1.4 (2) [60.0, 62.0] | **55.0** [54.0, 56.0] |",
        "| LCM | 2,000 |  | 54.0† [53.5, 54.5] |",
    ]
    assert len(first) == 2 * len(METRICS)


# contestants


MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def lora_file(path, steps="100", seed=0, modules=(MODULE,), plans=()):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator)
    deltas = {name: Delta(down=down, up=up, alpha=2.0) for name in modules}
    metadata = {} if steps is None else {"hypersd.steps": steps}
    if plans:
        metadata[LORA_METADATA_KEY] = plans_to_metadata(plans)
    save_kohya(path, {"unet": deltas}, metadata)
    return path


ENTRY = {"table": "stages", "label": "TSCD", "lora": "k4.safetensors", "sampler": "ddim_trailing", "steps": [4]}


def write(folder, *entries):
    (folder / "c.json").write_text(json.dumps(entries))
    return folder / "c.json"


def test_contestants_are_read(tmp_path):
    (tmp_path / "runs").mkdir()
    lora_file(tmp_path / "runs" / "k4.safetensors")
    lora_file(tmp_path / "lcm.safetensors", steps=None)
    file = write(
        tmp_path, ENTRY, {**ENTRY, "seed": 1, "updates": 100},
        {"table": "one_lora", "label": "LCM", "lora": "lcm.safetensors", "sampler": "lcm", "steps": [1, 8],
         "updates": 7, "guidance": 2.0},
        {"table": "one_lora", "label": "none", "lora": None, "sampler": "tcd:0.3", "steps": [2]},
    )  # fmt: skip
    one, again, lcm, none = read_contestants(file, [tmp_path / "runs"])
    assert (one.table, one.label, one.updates, one.seed, again.seed) == (Table.STAGES, "TSCD", 100, 0, 1)
    assert one.plan(4) == FewStepPlan(solver=Solver.DDIM, num_steps=4)
    assert lcm.plan(8) == FewStepPlan(solver=Solver.LCM, num_steps=8, guidance=Guidance.of(2.0))
    assert (lcm.updates, none.updates, none.lora) == (7, 0, None)
    assert none.plan(2) == FewStepPlan(solver=Solver.TCD, num_steps=2, eta=0.3)


def test_its_own_sampler_is_the_plan_of_the_file_for_so_many_steps(tmp_path):
    plans = [FewStepPlan(solver=Solver.TCD, num_steps=n, eta=1.0, original_inference_steps=8) for n in (1, 4)]
    lora_file(tmp_path / "k4.safetensors", plans=plans)
    (contestant,) = read_contestants(write(tmp_path, {**ENTRY, "sampler": "own", "steps": [4, 1]}))
    assert [contestant.plan(steps) for steps in (1, 4)] == plans
    with pytest.raises(OptionError, match="entry 1: sampler 'own' at 2 steps: the file has plans for 1, 4; name a"):
        read_contestants(write(tmp_path, {**ENTRY, "sampler": "own", "steps": [2]}))
    lora_file(tmp_path / "k4.safetensors")
    with pytest.raises(OptionError, match="at 4 steps: the file has plans for none"):
        read_contestants(write(tmp_path, {**ENTRY, "sampler": "own"}))
    with pytest.raises(OptionError, match=r"entry 1: guidance 2.0: sampler 'own' has its plan's; leave it out"):
        read_contestants(write(tmp_path, {**ENTRY, "sampler": "own", "steps": [4], "guidance": 2.0}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lora": "gone.safetensors"}, LoraError, r"lora gone\.safetensors: no such file in .*pass --runs"),
        ({"sampler": "euler"}, OptionError, "sampler 'euler': must be own, ddim_trailing, lcm or tcd:ETA"),
        ({"sampler": "tcd"}, OptionError, "sampler 'tcd'"),
        ({"sampler": "lcm:0.3"}, OptionError, "sampler 'lcm:0.3'"),
        ({"sampler": "tcd:2"}, PlanError, "eta 2.0: must be from 0"),
        ({"sampler": "lcm", "steps": [51]}, PlanError, "at most original_inference_steps"),
        ({"steps": 4}, OptionError, "steps 4 must be a list of whole numbers"),
        ({"steps": [0]}, OptionError, r"steps \[0\]"),
        ({"steps": [4, 4]}, OptionError, "must not repeat"),
        ({"seed": -1}, OptionError, "seed -1"),
        ({"table": "both"}, OptionError, "table 'both': must be one of stages, one_lora, real"),
        ({"label": ""}, OptionError, "label a text"),
        ({"updates": 99}, OptionError, r"updates 99: k4\.safetensors says 100; leave updates out"),
        ({"updates": "many"}, OptionError, "updates 'many': must be a whole number"),
        ({"lora": "silent.safetensors"}, OptionError, r"does not say its student updates \(hypersd\.steps\)"),
        ({"lora": "odd.safetensors"}, LoraError, "is 'soon', not a number"),
        ({"guidance": "much"}, PlanError, "guidance scale 'much'"),
        ({"lable": "x"}, OptionError, "'lable'.* is unknown or missing"),
    ],
)
def test_a_bad_contestant_is_one_line_that_names_it(tmp_path, change, error, message):
    lora_file(tmp_path / "k4.safetensors")
    lora_file(tmp_path / "silent.safetensors", steps=None)
    lora_file(tmp_path / "odd.safetensors", steps="soon")
    with pytest.raises(error, match=message) as raised:
        read_contestants(write(tmp_path, {**ENTRY, "label": "fine", "steps": [2]}, {**ENTRY, **change}))
    assert "entry 2: " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bad_file_of_contestants(tmp_path):
    lora_file(tmp_path / "k4.safetensors")
    with pytest.raises(OptionError, match="entry 2: 'TSCD' at 4 steps, seed 0, is there already"):
        read_contestants(write(tmp_path, ENTRY, ENTRY))
    with pytest.raises(OptionError, match="entry 1: 5 is unknown"):
        read_contestants(write(tmp_path, 5))
    with pytest.raises(OptionError, match="must be a list of at least one object"):
        read_contestants(write(tmp_path))
    (tmp_path / "c.json").write_text("[")
    with pytest.raises(OptionError, match="cannot be read as JSON"):
        read_contestants(tmp_path / "c.json")
    with pytest.raises(OptionError, match="cannot be read as JSON"):
        read_contestants(tmp_path / "none.json")


# the cache


def test_cache_hits_misses_and_damage(tmp_path):
    cache, calls = FeatureCache(tmp_path / "a" / "b"), []

    def compute():
        calls.append(1)
        return {"x": np.arange(3.0)}

    for _ in range(2):
        np.testing.assert_array_equal(cache.get({"lora": "d", "n": 1}, compute)["x"], np.arange(3.0))
    assert (len(calls), cache.hits, cache.misses) == (1, 1, 1)
    assert set(cache.get({"lora": "d", "n": 2}, compute)) == {"x"}
    assert len(calls) == 2
    first, second = sorted((tmp_path / "a" / "b").iterdir())
    first.write_bytes(second.read_bytes())
    damaged = {"lora": "d", "n": 1 if first.name.startswith(_name({"lora": "d", "n": 1})) else 2}
    with pytest.raises(DataError, match="made of something else than its name says"):
        cache.get(damaged, compute)
    first.write_bytes(b"PK")
    with pytest.raises(DataError, match="delete it, and it is made again"):
        cache.get(damaged, compute)


def _name(key):
    text = json.dumps(key, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# the whole, on a tiny base with a judge of random projections


class FakeJudge:
    """Unit features of eight dimensions: of pictures by a fixed projection, of captions by their hash."""

    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(image_size=16)))

    def __init__(self):
        self.seen = 0
        self.projection = np.random.default_rng(1).standard_normal((16 * 16 * 3, 8))

    def pictures(self, pictures):
        self.seen += len(pictures)
        return unit(pictures.double().numpy().reshape(len(pictures), -1) @ self.projection)

    def captions(self, captions):
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in captions]
        return unit(np.stack([np.random.default_rng(seed).standard_normal(8) for seed in seeds]))


@pytest.fixture(scope="module")
def parts(tiny_base):
    return Parts.load(tiny_base)


def bench_at(folder, tiny_base):
    return distilled.Bench(tiny_base, FakeJudge(), "judge", FeatureCache(folder), 6)


def contestant(lora, steps, label="TSCD", **changes):
    defaults = {"table": Table.ONE_LORA, "sampler": "ddim_trailing"}
    return Contestant(label=label, lora=lora, steps=steps, **{**defaults, **changes})


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [read_lora(lora_file(folder / f"{seed}.safetensors", seed=seed)) for seed in range(2)]


@pytest.fixture
def quick(monkeypatch):
    measured = distilled.measure
    monkeypatch.setattr(distilled, "measure", lambda *a, rounds: measured(*a, rounds=10))
    monkeypatch.setattr(distilled, "TEACHER_STEPS", 3)


def test_no_lora_with_the_teachers_guidance_is_the_teachers_row_exactly(tiny_base, tmp_path, quick):
    bench = bench_at(tmp_path, tiny_base)
    identity = contestant(None, (2, 1), "identity", guidance=distilled.guidance_of_base())
    data, text = distilled.report(bench, [identity])
    table = data["tables"]["one_lora"]
    teacher, mine = table["rows"]
    assert (teacher["label"], mine["label"], table["columns"]) == ("teacher", "identity", [2, 1])
    assert mine["cells"] == teacher["cells"]
    assert data["teacher_25"]["fd_t"]["value"] > 0  # two sets of seeds: the floor
    fresh = bench_at(tmp_path / "fresh", tiny_base)
    (row,) = distilled.rows_of([identity], fresh.cell)
    assert row.cells[2].to_json() == teacher["cells"]["2"]  # computed anew, not read from the cache
    assert "## One LoRA at every step count" in text
    assert "## Per stage" not in text


def test_one_more_contestant_costs_its_own_pictures_alone(tiny_base, tmp_path, quick, loras):
    bench = bench_at(tmp_path, tiny_base)
    distilled.report(bench, [contestant(loras[0], (2,))])
    varied = len(bench.varied) * distilled.VARIETY
    assert len(bench.varied) == 2
    # real drawings twice; the teacher at 25 steps in two sets of seeds and at 2 steps; the student: each with diversity
    assert bench.judge.seen == 2 * 6 + 6 + 3 * (6 + varied)
    again = bench_at(tmp_path, tiny_base)
    first, _ = distilled.report(again, [contestant(loras[0], (2,))])
    assert (again.judge.seen, again.cache.misses) == (0, 0)
    more, _ = distilled.report(again, [contestant(loras[0], (2,)), contestant(loras[1], (2,), "LCM", sampler="lcm")])
    assert again.judge.seen == 6 + varied
    before, after = (data["tables"]["one_lora"]["rows"] for data in (first, more))
    assert after[:2] == before
    assert after[2]["cells"]["2"] != after[1]["cells"]["2"]
    other = contestant(loras[1], (2,), "LCM", sampler="tcd:0.3")
    distilled.report(again, [other])
    assert again.judge.seen == 2 * (6 + varied)  # the same LoRA by another plan


def test_seeds_share_a_cell_and_must_have_equal_updates(loras):
    figures = dict.fromkeys(METRICS, Estimate(1.0, np.zeros(3)))
    seeds = [contestant(lora, (4,), seed=i, updates=5) for i, lora in enumerate(loras)]
    (row,) = distilled.rows_of(seeds, lambda lora, plan: figures)
    assert (row.cells[4].seeds, row.cells[4].updates, row.trained) == ((0, 1), 5, True)
    with pytest.raises(OptionError, match=r"at 4 steps: its seeds have \[5, 6\] updates"):
        distilled.rows_of([seeds[0], contestant(loras[1], (4,), seed=1, updates=6)], lambda lora, plan: figures)
    assert not distilled.rows_of([contestant(None, (4,))], lambda lora, plan: figures)[0].trained


def test_sheets_show_the_first_training_seed(tiny_base, tmp_path, loras, quick, monkeypatch):
    monkeypatch.setattr(distilled, "grid_prompts", lambda: ["a fox", "an owl"])
    entries = [contestant(loras[0], (1, 2)), contestant(loras[1], (1, 2), seed=1), contestant(None, (1,), "base")]
    seen = []
    monkeypatch.setattr(distilled, "labelled_grid", lambda rows: seen.extend(rows))
    distilled.sheet(bench_at(tmp_path, tiny_base), entries, Table.ONE_LORA)
    assert [label for label, _ in seen] == [
        "teacher 3", "teacher 8", "teacher 4", "teacher 2", "teacher 1", "TSCD 2", "TSCD 1", "base 1",
    ]  # fmt: skip
    assert all(len(pictures) == 2 for _, pictures in seen)


def test_prompts_are_held_out_fully_named_and_at_least_two():
    from trainer.pretrain.concepts import BACKGROUNDS, CONCEPTS, STYLES, caption
    from trainer.pretrain.scenes import held_out_mask

    allowed = {
        caption(CONCEPTS[c], STYLES[s], list(BACKGROUNDS)[b]) for c, s, b in np.argwhere(held_out_mask()).tolist()
    }
    prompts = distilled.held_out_prompts(200)
    assert len(prompts) == 200
    assert set(prompts) <= allowed
    with pytest.raises(OptionError, match="--count 1: must be at least 2"):
        distilled.Bench(None, None, "", None, 1)


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
    lora_file(tmp_path / "k4.safetensors")
    file = write(tmp_path, ENTRY)
    assert distilled.main(["--contestants", str(tmp_path / "none.json")]) == 1
    assert distilled.main(["--contestants", str(file), "--judge", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: --contestants ")
    assert "the judge has no weights; train it with python -m benchmarks.judge" in lines[1]


# sampling


@pytest.mark.parametrize(
    "plan",
    [
        FewStepPlan(solver=Solver.DDIM, num_steps=2, guidance=Guidance.of(3.0)),
        FewStepPlan(solver=Solver.TCD, num_steps=3, eta=0.3),
        FewStepPlan(solver=Solver.LCM, num_steps=2),
    ],
    ids=["guided", "tcd", "lcm"],
)
def test_pictures_are_those_that_exported_artifacts_are_held_to(parts, plan, monkeypatch):
    from trainer.pretrain.clip import embed_captions

    monkeypatch.setattr("benchmarks.sampling.ROWS", 4)  # batches of 4, or of 2 with guidance
    captions = ["cat", "dog", "", "a cat", "cat dog"]
    pictures = parts.draw(captions, plan, first_seed=3)

    def text(caption):
        return {"encoder_hidden_states": embed_captions(parts.text_encoder, parts.tokenizer, [caption]).numpy()}

    empty = text("") if plan.guidance.scale > 1 else None
    for i, caption in enumerate(captions):
        latents = reference.denoise(
            parts.unet, plan.table(), plan.guidance, cond=text(caption), uncond=empty, seed=3 + i, shape=(4, 4, 4)
        )
        want = reference.decode(parts.vae, reference.unscale(parts.vae, latents)).clip(-1, 1)
        np.testing.assert_allclose(pictures[i].numpy(), want[0], atol=2e-5)


def test_a_lora_is_fused_into_a_copy(parts, loras, tmp_path):
    plan = sampler_plan("ddim_trailing", 1)
    before = parts.draw(["cat"], plan)
    student = parts.with_lora(loras[0])
    assert (student.draw(["cat"], plan) - before).abs().max() > 1e-4
    assert torch.equal(parts.draw(["cat"], plan), before)
    with pytest.raises(LoraError, match="are not in this unet"):
        parts.with_lora(read_lora(lora_file(tmp_path / "x.safetensors", modules=("nowhere.to_q",))))


def test_labelled_grid():
    rows = [("teacher 25", torch.full((2, 3, 16, 16), 1.0)), ("x 1", torch.full((2, 3, 16, 16), -1.0))]
    sheet = np.asarray(labelled_grid(rows, scale=2))
    assert sheet.shape[0] == 64
    margin = sheet.shape[1] - 64
    assert margin > 0
    assert (sheet[:32, margin:] == 255).all()
    assert (sheet[32:, margin:] == 0).all()
    assert (sheet[:32, :margin] < 128).any()  # the label

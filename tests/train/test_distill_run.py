"""A distillation as a whole, on the tiny pipeline: what it writes, and that dividing the work changes nothing."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hypersd_export.diffusion import GuidanceKind, NoiseSchedule, PredictionType, Solver, grid_timesteps
from hypersd_export.errors import DataError, MissingBackend, OptionError
from hypersd_export.model.lora import read_lora
from tests.train.small_run import STEPS, RandomSource, finish, log, opened, small_config, start
from trainer.base import schedule_of
from trainer.distill.config import (
    METHODS,
    AdversarialConfig,
    Real,
    StageConfig,
    Teacher,
    builtin,
    recipe,
    sd15,
    with_method,
)
from trainer.distill.engine import Share, make_optimizer
from trainer.distill.loop import learning_rate
from trainer.distill.memory import dry_run, passes, target_share
from trainer.distill.plans import plans_for
from trainer.distill.run import lora_name
from trainer.distill.state import collect

EPS = {"schedule": NoiseSchedule(), "prediction_type": PredictionType.EPSILON}


def _plans(config, number=-1):
    return plans_for(config, config.stages[number], **EPS)


def _losses(lines, *names):
    return torch.tensor([[line[name] for name in names] for line in lines], dtype=torch.float64)


def test_each_stage_leaves_a_lora_with_all_that_the_exporter_asks(tiny_base, tmp_path):
    config = small_config(tiny_base)
    progress = list(start(config, tmp_path).run())
    assert [(p.number, p.segments, p.result.step) for p in progress] == [
        (n, 3 - n, s) for n in (1, 2) for s in range(3)
    ]
    assert [p.wrote for p in progress if p.wrote] == [tmp_path / lora_name(config, n) for n in (1, 2)]
    first = read_lora(tmp_path / "stage1-k2-lora.safetensors")
    base, _ = opened(tiny_base)
    assert first.base_digest == base.digest
    with safe_open(tmp_path / "diffusers" / "stage2-k1-lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["hypersd.steps"] == str(2 * STEPS)
    assert json.loads(metadata["hypersd.recipe"])["stages"][0]["segments"] == 2
    assert str(tmp_path.parent.parent) not in "".join(metadata.values())  # no path of this machine goes around
    assert json.loads(metadata["hypersd.plan"])
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["method"] == "tscd"
    assert run["base"]["digest"] == base.digest


def test_plans_of_every_method():
    base = builtin()
    assert [[(p.solver, p.num_steps) for p in _plans(base, n)] for n in range(3)] == [
        [(Solver.DDIM, k)] for k in (8, 4, 2)
    ]
    last = _plans(base)
    assert [(p.solver, p.num_steps, p.eta) for p in last] == [(Solver.TCD, n, 1.0) for n in (1, 2, 4, 8)]
    assert [(p.solver, p.num_steps, p.eta) for p in _plans(with_method(base, "tcd"))] == [
        (Solver.TCD, n, 0.3) for n in (4, 1, 2, 8)
    ]
    assert [(p.solver, p.num_steps, p.eta) for p in _plans(with_method(base, "lcm"))] == [
        (Solver.LCM, n, 0.0) for n in (4, 1, 2, 8)
    ]
    assert [(p.solver, p.num_steps) for p in _plans(with_method(base, "pcm"))] == [(Solver.DDIM, 4)]
    assert all(p.guidance.kind is GuidanceKind.NONE for method in METHODS for p in _plans(with_method(base, method)))
    preserved = replace(base, cfg_preserved=True, guidance=(4.0, 6.0))
    assert {(p.guidance.kind, p.guidance.scale) for p in _plans(preserved)} == {(GuidanceKind.CFG, 5.0)}


@pytest.mark.parametrize("points", [50, 40, 16, 12])
def test_plans_sample_where_the_stage_was_trained(points):
    for k in (k for k in (4, 2, 1) if points % k == 0):
        config = replace(builtin(), stages=(StageConfig(segments=k, points=points, steps=1, lr=1.0),))
        for plan in _plans(config):
            assert set(plan.net_timesteps()) <= set(grid_timesteps(points)[1:].tolist())
            assert plan.net_timesteps()[0] == 999
            plan.table()


def test_the_schedule_is_the_one_that_the_base_trains_with(tiny_base):
    base, _ = opened(tiny_base)
    table = torch.tensor(schedule_of(base.model.scheduler_config).alphas_cumprod())
    torch.testing.assert_close(table, base.alphas_cumprod, rtol=0, atol=0)


def test_names_of_the_files():
    config = builtin()
    assert [lora_name(config, n) for n in (1, 4)] == ["stage1-k8-lora.safetensors", "stage4-k1-lora.safetensors"]
    assert lora_name(with_method(config, "lcm"), 1) == "lcm-k1-lora.safetensors"
    assert lora_name(with_method(config, "pcm"), 1) == "pcm-k4-lora.safetensors"
    assert lora_name(replace(config, method="pcm"), 2) == "pcm-stage2-k4-lora.safetensors"


@pytest.mark.parametrize("real", list(Real))
def test_micro_batches_and_checkpointing_give_the_losses_of_the_whole_batch(tiny_base, tmp_path, real):
    config = small_config(tiny_base, w_adv=0.3)
    # Adam turns the rounding error of a gradient near 0 into a step of the learning rate, so that one is small
    config = replace(config, adversarial=replace(config.adversarial, real=real, teacher_steps=2, lr=1e-6))
    whole = finish(config, tmp_path / "whole")
    names = ("loss", "consistency", "grad_norm")
    for name, changes in {"micro": {"micro_batch": 1}, "checkpointed": {"gradient_checkpointing": True}}.items():
        divided = finish(replace(config, **changes), tmp_path / name)
        torch.testing.assert_close(_losses(divided, *names), _losses(whole, *names), rtol=1e-5, atol=1e-8)
        critic = ("critic", "critic_grad_norm", "adversarial")
        mine, theirs = _losses(divided[STEPS:], *critic), _losses(whole[STEPS:], *critic)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_the_students_loss_leaves_no_gradient_in_the_critic_nor_the_critics_in_the_student(tiny_base, tmp_path):
    config = small_config(tiny_base, w_adv=0.3)
    distillation = start(config, tmp_path)
    seen = []

    def watch(loss, original=distillation.engine.critic_backward):
        critic = distillation._critic.trainable_parameters()
        student = distillation.networks.student_parameters()
        before = [p.grad.clone() for p in student]
        seen.append(all(p.grad is None for p in critic))
        original(loss)
        seen.append(all(torch.equal(p.grad, b) for p, b in zip(student, before, strict=True)))
        seen.append(any(p.grad is not None and p.grad.abs().sum() > 0 for p in critic))

    distillation.engine.critic_backward = watch
    list(distillation.run())
    assert seen == [True] * 3 * STEPS


def test_a_new_stage_begins_with_fresh_moments_critic_and_target(tiny_base, tmp_path):
    one = StageConfig(segments=1, points=4, steps=2, lr=1e-3, w_adv=0.3)
    config = small_config(tiny_base, stages=(replace(one, segments=2), one), warmup=2)
    distillation = start(config, tmp_path)
    run = distillation.run()
    states = []
    for progress in run:
        if progress.number == 2 and progress.result.step == 0:
            tensors, _ = collect(distillation.engine, distillation.networks, distillation._critic)
            states.append({float(t) for n, t in tensors.items() if n.endswith(".step")})
        if progress.result.step == 0:
            assert progress.result.logs["critic"] == pytest.approx(2.0)  # hinge of a critic that says 0
            assert progress.result.lr == pytest.approx(5e-4)
    assert states == [{1.0}]


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_nan_stops_the_run_with_the_batch_saved_and_nothing_updated(tiny_base, tmp_path, micro_batch):
    config = small_config(tiny_base, save_every=1, micro_batch=micro_batch)
    base, good = opened(tiny_base)
    whole = finish(config, tmp_path / "good")
    bad = RandomSource(base, bad=(4 * (STEPS + 1) + 2,))  # stage 2, step 1, row 2
    distillation = start(config, tmp_path / "bad", source=bad)
    run = distillation.run()
    for _ in range(STEPS + 1):
        next(run)
    before = {n: t.clone() for n, t in collect(distillation.engine, distillation.networks, None)[0].items()}
    with pytest.raises(DataError, match=r"stage 2 \(k=1\), step 1: .*loss nan.*nothing was updated") as caught:
        next(run)
    assert "\n" not in str(caught.value)
    after = collect(distillation.engine, distillation.networks, None)[0]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in distillation.networks.student_parameters())
    path = tmp_path / "bad" / "bad" / "stage2-step000001.safetensors"
    assert str(path) in str(caught.value)
    with safe_open(path, "pt") as file:
        names = json.loads(file.metadata()["names"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert names == [f"sample {p}" for p in range(16, 20)]
    assert tensors["latents"].isnan().flatten(1).any(1).tolist() == [False, False, True, False]
    assert {"noise", "indices.start", "indices.end", "guidance"} <= set(tensors)
    assert finish(config, tmp_path / "bad", source=good) == whole  # mended data, and on it goes


def test_an_infinite_gradient_stops_too(tiny_base, tmp_path):
    config = small_config(tiny_base)
    distillation = start(config, tmp_path)
    run = distillation.run()
    next(run)
    name, weight = next(iter(distillation.networks.unet.named_parameters()))
    student = distillation.networks.student_parameters()[0]
    student.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DataError, match="grad_norm"):
        next(run)
    assert name
    assert weight.isfinite().all()


def test_float16_skips_a_step_that_overflows_and_goes_on(tiny_base, tmp_path):
    config = small_config(tiny_base, mixed_precision="fp16")
    distillation = start(config, tmp_path)
    run = distillation.run()
    next(run)
    scale = distillation.engine.scaler.get_scale()
    handle = distillation.networks.student_parameters()[0].register_hook(lambda gradient: gradient * math.inf)
    before = [p.detach().clone() for p in distillation.networks.student_parameters()]
    assert next(run).result.logs["overflow"] == 1.0
    assert distillation.engine.scaler.get_scale() == scale / 2
    assert all(torch.equal(p, b) for p, b in zip(distillation.networks.student_parameters(), before, strict=True))
    handle.remove()
    assert "overflow" not in next(run).result.logs


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_float32(tiny_base, tmp_path, precision):
    exact = finish(small_config(tiny_base), tmp_path / "exact")
    for name, changes in {"mixed": {}, "whole": {"base_precision": precision}}.items():
        low = finish(small_config(tiny_base, mixed_precision=precision, **changes), tmp_path / name)
        torch.testing.assert_close(_losses(low, "loss"), _losses(exact, "loss"), rtol=0.1, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(tiny_base, tmp_path, method):
    config = with_method(small_config(tiny_base, steps=1), method)
    config = replace(config, stages=tuple(replace(stage, points=stage.segments * 4) for stage in config.stages))
    finish(config, tmp_path)
    assert all((tmp_path / lora_name(config, n + 1)).exists() for n in range(len(config.stages)))


def test_a_stage_of_no_steps_is_a_lora_of_its_start(tiny_base, tmp_path):
    config = small_config(tiny_base)
    config = replace(config, stages=(config.stages[0], replace(config.stages[1], steps=0)))
    lines = finish(config, tmp_path)
    assert len(lines) == STEPS
    one, two = (read_lora(tmp_path / lora_name(config, n)).components["unet"] for n in (1, 2))
    assert all(torch.equal(one[name].up, two[name].up) for name in one)
    assert finish(config, tmp_path) == lines


@pytest.mark.parametrize("form", ["", "diffusers"])
def test_a_run_may_start_from_a_lora_and_counts_its_updates(tiny_base, tmp_path, form):
    config = small_config(tiny_base)
    finish(config, tmp_path / "first")
    given = tmp_path / "first" / form / "stage1-k2-lora.safetensors"
    stage = replace(config.stages[1], steps=0, teacher=Teacher.PREVIOUS)
    with pytest.raises(OptionError, match=r"stages\.0\.teacher previous: there is none; .* set init_lora"):
        replace(config, stages=(stage,))
    begun = replace(config, stages=(stage,), init_lora=str(given))
    finish(begun, tmp_path / "start")
    finish(replace(begun, stages=(replace(stage, steps=2),)), tmp_path / "more")
    path, more = (tmp_path / name / "stage1-k1-lora.safetensors" for name in ("start", "more"))
    one, two, three = (
        {name.replace(".", "_"): delta.up * delta.multiplier for name, delta in read_lora(p).components["unet"].items()}
        for p in (given, path, more)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)
    assert [read_lora(p).metadata["hypersd.steps"] for p in (path, more)] == [str(STEPS), str(STEPS + 2)]
    recipe = json.loads(read_lora(more).metadata["hypersd.recipe"])
    assert recipe["init_lora"] == given.name  # no path of this machine goes around


def test_validation_takes_no_part_in_the_training(tiny_base, tmp_path):
    config = small_config(tiny_base)
    plain = finish(config, tmp_path / "plain")
    progress = list(
        start(replace(config, validate_every=2, validation_prompts=("cat", "dog")), tmp_path / "seen").run()
    )
    lines = log(tmp_path / "seen")
    assert [line for line in lines if "validation" not in line] == plain
    assert [(line["stage"], line["step"]) for line in lines if "validation" in line] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    names = {path.name for path in (tmp_path / "seen" / "validation").iterdir()}
    assert names == {f"stage{n}-k{3 - n}-step00000{s}.png" for n in (1, 2) for s in (2, 3)}
    assert len(progress) == 2 * STEPS


def test_tensorboard_has_every_step(tiny_base, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small_config(tiny_base, log_with="tensorboard", validate_every=2, validation_prompts=("cat",))
    run = start(config, tmp_path).run()
    for _ in range(STEPS):
        next(run)
    run.close()
    finish(config, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("train/consistency")}
    assert [event.step for event in events.Images("validation")] == [1, 2, 4, 5]
    assert [found[step] for step in range(2 * STEPS)] == pytest.approx(
        [line["consistency"] for line in log(tmp_path) if "validation" not in line]
    )


def test_learning_rate_warms_up_and_holds():
    def rates(**settings: float) -> list[float]:
        return [learning_rate(1.0, step, **{"steps": 6, "warmup": 0, "cooldown": 0.0, **settings}) for step in range(6)]  # type: ignore[arg-type]

    assert rates() == [1.0] * 6
    assert rates(warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(cooldown=2 / 3) == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(warmup=2, cooldown=1.0) == [0.5, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]


def test_shares_of_the_batch():
    assert Share.of(12, 2, rank=1, processes=3).slices() == [slice(4, 6), slice(6, 8)]
    assert Share.of(12, 0, rank=0, processes=1).slices() == [slice(0, 12)]
    with pytest.raises(OptionError, match="multiple of the 5 processes"):
        Share.of(12, 0, rank=0, processes=5)
    with pytest.raises(OptionError, match="must divide the 4 samples"):
        Share.of(12, 3, rank=0, processes=3)


def test_what_cannot_be_is_refused_before_anything_is_loaded(tiny_base, tmp_path):
    config = small_config(tiny_base)
    for changed, message in (
        (replace(config, method="dmd"), "not a method"), (replace(config, validate_every=1), "needs prompts"),
        (replace(config, base_precision="fp16"), "set mixed_precision"),
        (replace(config, log_with="paper"), "must be one of"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            start(changed, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_packages_that_are_not_installed_are_named(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingBackend, match="wandb"):
        start(small_config(tiny_base, log_with="wandb"), tmp_path)
    with pytest.raises(MissingBackend, match="bitsandbytes"):
        make_optimizer("adamw8bit", [])


def test_target_share_is_the_mean_over_all_draws():
    from trainer.losses.tscd import Grid, draw_indices

    for method, share in (*((method, 0.0) for method in METHODS), ("tscd", 0.6)):
        config = replace(with_method(builtin(), method), edge_share=share)
        for stage in config.stages:
            grid = Grid.of(torch.linspace(1, 0, 1000), points=stage.points, segments=stage.segments)
            drawn = draw_indices(200_000, grid, config.end, torch.Generator().manual_seed(0), share)
            moved = drawn.start > 1 if method == "lcm" else drawn.end < drawn.start - 1
            assert target_share(config, stage) == pytest.approx(float(moved.double().mean()), abs=4e-3)


def test_passes_per_step():
    config = replace(builtin(), adversarial=AdversarialConfig(real=Real.TEACHER_MULTISTEP))
    config = replace(config, stages=(*config.stages[:3], replace(config.stages[3], w_adv=0.1)))
    first, last = passes(config, config.stages[0]), passes(config, config.stages[3])
    assert (first["teacher"], first["target"]) == (2, pytest.approx(target_share(config, config.stages[0]), abs=1e-4))
    assert "teacher_multistep" not in first
    assert last["teacher_multistep"] == 6
    assert passes(replace(config, cfg_preserved=True), config.stages[3])["teacher_multistep"] == 3


def test_the_dry_run_of_sd15_needs_no_weights():
    figures = dry_run(replace(sd15(), stages=sd15().stages[:1], micro_batch=2))
    assert figures["parameters"]["base"] == 859_520_964  # as published
    assert figures["parameters"]["lora"] * 4 == pytest.approx(269e6, rel=0.01)  # the released float32 file of rank 64
    one, many = figures["memory_gib"]["one_gpu"], figures["memory_gib"]["each_of_eight_gpus"]
    assert one["base_weights"] == pytest.approx(859_520_964 * 2 / 2**30, abs=1e-3)
    assert one["total"] == pytest.approx(sum(v for n, v in one.items() if n not in ("total", "micro_batch")), abs=0.01)
    assert many["fsdp"]["total"] < many["zero2"]["total"] < many["ddp"]["total"]
    json.dumps(figures)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stages", "bound"), [("tscd", [1, 2], 16e9), ("score", [1], 20e9), ("feedback", [1], 20e9)]
)
def test_steps_of_sd15_at_its_real_size_take_no_more_than_this(method, stages, bound, tmp_path):
    """Minutes on two cores; random weights, 64x64 latents, rank 64, gradient checkpointing; see `sd15_size`."""
    command = [sys.executable, "-m", "tests.train.sd15_size", str(tmp_path), method]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["peak_gib"] * 2**30 < bound
    assert [step["stage"] for step in figures["steps"]] == stages
    assert all(math.isfinite(value) for step in figures["steps"] for value in step.values())


def test_the_published_sdxl_config_has_the_published_size():
    from diffusers import UNet2DConditionModel

    from trainer.distill.memory import unet_of

    unet, shapes, source = unet_of(recipe("sdxl"))
    with torch.device("meta"):
        model = UNet2DConditionModel(**{n: tuple(v) if isinstance(v, list) else v for n, v in unet.items()})
    assert sum(p.numel() for p in model.parameters()) == 2_567_463_684
    assert (shapes.latents, shapes.pooled, shapes.width) == ((4, 128, 128), 1280, 2048)
    assert source.startswith("published")


def test_the_dry_run_reads_the_config_of_any_other_base(tiny_base):
    config = small_config(tiny_base, w_adv=0.3)
    figures = dry_run(config)
    base, _ = opened(tiny_base)
    unet = base.load_unet(torch.float32)
    assert figures["parameters"]["base"] == sum(p.numel() for p in unet.parameters())
    assert figures["parameters"]["discriminator_trained"] > 0
    more = dry_run(replace(config, batch=8))
    assert more["memory_gib"]["one_gpu"]["passes"] >= figures["memory_gib"]["one_gpu"]["passes"]

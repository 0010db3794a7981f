"""Human feedback: its formulas, the stacked LoRAs, the student's own path, the guard, and a run of it."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hypersd_export.diffusion import FewStepPlan, Guidance, NoiseSchedule, Solver, plans_from_metadata, steps
from hypersd_export.errors import DataError, LoraError, OptionError
from hypersd_export.model.fuse import fuse
from hypersd_export.model.lora import Delta, read_lora, save_kohya
from tests.train.small_run import finish, log, small_config, start
from tests.train.small_unet import SHAPE, batch, conditioning, small_unet
from tests.train.test_distill_ddp import _on_two as on_two
from trainer.cli import app
from trainer.distill import feedback_run
from trainer.distill.config import LoraConfig, StageConfig, sd15, sdxl
from trainer.distill.feedback import FeedbackStep, span_of
from trainer.distill.feedback_config import FeedbackConfig, GuardConfig, Watch
from trainer.distill.guard import saturation, texture
from trainer.distill.lora_file import Origin, plans_of
from trainer.distill.networks import Networks, Role
from trainer.distill.recipes import feedback_recipe
from trainer.distill.rollout import Tables, play
from trainer.distill.snapshot import newest
from trainer.losses.feedback import bradley_terry, hinge
from trainer.rewards.registry import Kind, RewardConfig

ALPHAS = torch.tensor(NoiseSchedule().alphas_cumprod())


def test_the_hinge_is_the_weighted_lack_of_each_reward_and_its_gradient_is_minus_the_weight_below_the_target():
    first = torch.tensor([0.5, 2.5], requires_grad=True)
    second = torch.tensor([5.0, 7.0], requires_grad=True)
    loss = hinge([first, second], [1.0, 0.25], [2.0, 6.0])
    torch.testing.assert_close(loss, torch.tensor([1.5 + 0.25, 0.0]))
    loss.sum().backward()
    assert first.grad.tolist() == [-1.0, 0.0]
    assert second.grad.tolist() == [-0.25, 0.0]


def test_bradley_terry_is_log_two_where_equal_and_pulls_the_two_apart():
    better, worse = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([1.0, 1.0], requires_grad=True)
    loss = bradley_terry(better, worse)
    torch.testing.assert_close(loss, torch.tensor([math.log(2), math.log(1 + math.exp(-2))]))
    loss.sum().backward()
    torch.testing.assert_close(better.grad, torch.tensor([-0.5, -1 / (1 + math.exp(2))]))
    torch.testing.assert_close(worse.grad, -better.grad)


def random_deltas(unet, *, rank=3, modules=("to_q", "conv1", "proj_in"), seed=5, alpha=1.5):
    """A LoRA on a few modules, with its own rank and scale."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(modules):
            out, *rest = module.weight.shape
            made[name] = Delta(
                down=0.3 * torch.randn(rank, *rest, generator=generator), alpha=alpha,
                up=0.3 * torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator),
            )  # fmt: skip
    return made


def stacked(*, trained=True, under=None):
    """Networks whose student stands on `random_deltas`; with `trained` it has weights of its own."""
    networks = Networks.build(
        small_unet(), LoraConfig(rank=2, alpha=4.0, modules=("to_q", "conv2")), alphas_cumprod=ALPHAS,
        prediction_type=FewStepPlan(solver=Solver.DDIM, num_steps=1).prediction_type,
        under=under or random_deltas(small_unet()),
    )  # fmt: skip
    if trained:
        generator = torch.Generator().manual_seed(3)
        state = networks.state()
        for name, tensor in state.items():
            if name.startswith("student."):
                state[name] = torch.randn(tensor.shape, generator=generator) * 0.2
        networks.load_state(state)
    return networks


X, T = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 200])


def output(unet):
    with torch.no_grad():
        return unet(X, T, conditioning(2).states, return_dict=False)[0]


def test_the_student_stands_on_the_lora_below_and_the_others_on_their_own():
    networks, plain, below, both = stacked(), small_unet(), small_unet(), small_unet()
    fuse(below, random_deltas(below), scale=1.0, component="unet")
    fuse(both, random_deltas(both), scale=1.0, component="unet")
    mine = {n: Delta(down=d, up=u, alpha=4.0) for n, (d, u) in networks.adapter(Role.STUDENT).items()}
    fuse(both, mine, scale=1.0, component="unet")
    text = conditioning(2)
    for role, expected in ((Role.BASE, plain), (Role.TEACHER, below), (Role.STUDENT, both), (Role.TARGET, below)):
        torch.testing.assert_close(networks.frozen(role, X, T, text), output(expected), rtol=1e-4, atol=1e-5)
    assert float((output(both) - output(below)).abs().max()) > 0.01


def test_only_the_lora_on_top_takes_gradients():
    networks = stacked()
    networks.student(X, T, conditioning(2)).square().mean().backward()
    for role in (Role.STUDENT, Role.TARGET, Role.TEACHER):
        given = [weight.grad is not None for weight in networks._weights[role].values()]
        assert set(given) == {role is Role.STUDENT}


def test_what_was_kept_comes_back_and_the_lora_below_never_moves():
    networks = stacked()
    below = {n: t.clone() for n, t in networks.state().items() if n.startswith("teacher.")}
    networks.update_target(0)
    kept = networks.frozen(Role.STUDENT, X, T, conditioning(2))
    with torch.no_grad():
        for weight in networks.student_parameters():
            weight.add_(0.1)
    assert not torch.equal(networks.frozen(Role.STUDENT, X, T, conditioning(2)), kept)
    networks.back_to_target()
    assert torch.equal(networks.frozen(Role.STUDENT, X, T, conditioning(2)), kept)
    assert all(torch.equal(tensor, networks.state()[name]) for name, tensor in below.items())


def test_a_lora_of_another_architecture_is_refused():
    with pytest.raises(LoraError, match="1 of 1 modules are not in this unet"):
        stacked(under={"down_blocks.7.conv": Delta(down=torch.zeros(1, 4), up=torch.zeros(4, 1))})


def test_play_moves_each_sample_from_its_own_beginning_as_far_as_it_goes():
    asked = []

    def move(step, rows, x):
        asked.append((step, rows.tolist()))
        return x + 10**step

    x = play(torch.zeros(4, 1), torch.tensor([0, 3, 2, 3]), move, begin=torch.tensor([0, 0, 1, 2]))
    assert x[:, 0].tolist() == [0, 111, 10, 100]
    assert asked == [(0, [1]), (1, [1, 2]), (2, [1, 3])]


def test_of_a_span_there_is_always_a_step():
    assert span_of(8, 0.0, 1.0) == (0, 8)
    assert span_of(8, 0.75, 1.0) == (6, 8)
    assert span_of(1, 0.75, 1.0) == (0, 1)
    assert span_of(2, 0.5, 0.9) == (1, 2)


PLANS = [
    FewStepPlan(solver=Solver.TCD, num_steps=1, eta=1.0, original_inference_steps=8),
    FewStepPlan(solver=Solver.TCD, num_steps=4, eta=1.0, original_inference_steps=8),
    FewStepPlan(solver=Solver.DDIM, num_steps=3), FewStepPlan(solver=Solver.LCM, num_steps=2),
    FewStepPlan(solver=Solver.EULER, num_steps=2),
]  # fmt: skip


class Flat(nn.Module):
    """A VAE that is a reshape: the first three latents are the picture."""

    config = SimpleNamespace(scaling_factor=2.0)
    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, z):
        return type("Out", (), {"sample": z[:, :3]})


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def settings(**changes):
    terms = (RewardConfig(kind=Kind.CLIP, weight=2.0, target=0.5),)
    config = feedback_recipe("builtin")
    stage = StageConfig(segments=1, points=8, steps=4, lr=1e-3)
    return replace(config, stages=(stage,), batch=4, feedback=FeedbackConfig(rewards=terms, **changes))


def make(networks=None, plans=PLANS, config=None, reward=brightness):
    config = config or settings()
    return FeedbackStep(
        networks or stacked(), config, config.stages[0], rewards={"clip": reward}, plans=plans, vae=Flat()
    )


@pytest.mark.parametrize("course", range(len(PLANS)))
def test_it_plays_the_very_steps_of_the_plan_and_says_what_the_picture_will_be(course):
    step, given = make(), batch(4)
    count = PLANS[course].num_steps
    draws = replace(step.draw(0, SHAPE), course=torch.full((4,), course))
    table, text = PLANS[course].table(), given.conditioning
    seen = []

    def net(x, t):
        out = step.networks.frozen(Role.STUDENT, x, torch.full((4,), int(t)), text)
        a = float(ALPHAS[int(t)])
        seen.append((x - (1 - a) ** 0.5 * out) / a**0.5)
        return out

    x = table.init_noise_sigma * draws.noise
    played = [x] + [
        after for _, _, after in steps(table, net, x, step_noise=lambda stream: draws.path_noise[:, stream - 1])
    ]
    for index in range(count):
        here = replace(draws, index=torch.full((4,), index))
        torch.testing.assert_close(step.play(given, here), played[index], rtol=1e-4, atol=1e-4)
        expected = (seen[index][:, :3] / 2).clamp(-1, 1)
        torch.testing.assert_close(step.pictures(given, here).detach(), expected, rtol=1e-3, atol=1e-3)


def test_the_draws_are_a_function_of_the_step_and_cover_plans_and_steps():
    step = make(config=replace(settings(), batch=200))
    draws = step.draw(3, SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(draws.tensors().values(), step.draw(3, SHAPE).tensors().values(),
                                                 strict=True))  # fmt: skip
    places = set(zip(draws.course.tolist(), draws.index.tolist(), strict=True))
    assert places == {(c, i) for c, plan in enumerate(PLANS) for i in range(plan.num_steps)}
    late = make(config=replace(settings(span=(0.75, 1.0)), batch=200)).draw(3, SHAPE)
    assert set(zip(late.course.tolist(), late.index.tolist(), strict=True)) == {(0, 0), (1, 3), (2, 2), (3, 1), (4, 1)}


def test_the_loss_is_the_hinge_of_the_pictures_and_its_gradient_makes_them_better():
    step, given = make(plans=PLANS[:1]), batch(4)
    draws = step.draw(0, SHAPE)
    out = step(given, draws)
    before = step.pictures(given, draws).mean((1, 2, 3)).detach()
    torch.testing.assert_close(out.loss.detach(), 2 * (0.5 - before).clamp(min=0).mean())
    torch.testing.assert_close(out.logs["reward_clip"], before.mean())
    out.loss.backward()
    others = [p for n, p in step.networks.unet.named_parameters() if ".student." not in n]
    assert all(p.grad is None for p in others)
    with torch.no_grad():
        for weight in step.networks.student_parameters():
            weight -= 0.02 * weight.grad / weight.grad.norm()
    assert float(step(given, draws).loss.detach()) < float(out.loss.detach())


def test_a_picture_that_is_good_enough_moves_nothing():
    step = make(reward=lambda images, prompts: images.mean((1, 2, 3)) + 10)
    out = step(batch(4), step.draw(0, SHAPE))
    assert float(out.loss.detach()) == 0
    out.loss.backward()
    assert all(float(weight.grad.abs().max()) == 0 for weight in step.networks.student_parameters())


def test_plans_with_guidance_or_broken_timesteps_are_refused():
    with pytest.raises(OptionError, match=r"plan of 4 steps with guidance 3: the student is played without"):
        Tables.of([FewStepPlan(solver=Solver.DDIM, num_steps=4, guidance=Guidance.of(3.0))])
    with pytest.raises(OptionError, match=r"plan of 3 steps \(euler\): its timesteps are not whole numbers"):
        Tables.of([FewStepPlan(solver=Solver.EULER, num_steps=3, timestep_spacing="linspace")])


def test_the_plans_of_a_lora_are_its_metadatas_or_its_names(tmp_path):
    deltas = {"unet": random_deltas(small_unet())}
    stated = Origin(plans=PLANS[:2], base_name="x", base_digest="0", steps=7).metadata()
    save_kohya(tmp_path / "own.safetensors", deltas, stated)
    own = read_lora(tmp_path / "own.safetensors")
    assert plans_of(own) == PLANS[:2]
    assert plans_of(own, (4,)) == PLANS[1:2]
    with pytest.raises(LoraError, match=r"has plans for 1, 4 steps and none for 2; set feedback.steps"):
        plans_of(own, (2,))
    save_kohya(tmp_path / "Hyper-SD15-4steps-lora.safetensors", deltas, {})
    (four,) = plans_of(read_lora(tmp_path / "Hyper-SD15-4steps-lora.safetensors"))
    assert (four.solver, four.num_steps) == (Solver.DDIM, 4)
    save_kohya(tmp_path / "unknown.safetensors", deltas, {})
    with pytest.raises(LoraError, match="does not say how it is sampled"):
        plans_of(read_lora(tmp_path / "unknown.safetensors"))


def test_saturation_and_texture_of_known_pictures():
    grey, red = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1.0
    assert (saturation(grey), saturation(red)) == (0.0, 1.0)
    stripes = torch.zeros(1, 3, 4, 4)
    stripes[..., ::2] = 1.0
    assert (texture(grey), texture(stripes)) == (0.0, 0.5)


@pytest.fixture
def below(tiny_base, tmp_path):
    """A LoRA for the tiny pipeline, with two plans."""
    from trainer.base import open_training_base

    unet = open_training_base(str(tiny_base)).load_unet(torch.float32)
    deltas = {"unet": random_deltas(unet, modules=("to_q", "to_k"))}
    path = tmp_path / "stage.safetensors"
    save_kohya(path, deltas, Origin(plans=PLANS[:2], base_name="tiny", base_digest="0", steps=30).metadata())
    return path


@pytest.fixture
def bright(monkeypatch):
    """Every reward is the picture's brightness."""
    monkeypatch.setattr(feedback_run, "open_rewards", lambda terms, device: [brightness for _ in terms])


def small(folder, lora, *, count=5, lr=2e-2, guard=None, **changes):
    stage = StageConfig(segments=1, points=4, steps=count, lr=lr)
    terms = (RewardConfig(kind=Kind.CLIP, target=2.0), RewardConfig(kind=Kind.CLIP, weight=0.5, target=2.0))
    guard = guard or GuardConfig(bound=1e6, every=3, prompts=4, teacher_steps=2)
    chosen = FeedbackConfig(rewards=terms, guard=guard)
    base = small_config(folder)
    settled = {"stages": (stage,), "init_lora": str(lora), "feedback": chosen, **changes}
    return replace(base, method="feedback", **settled)


def lines(out):
    """The log's lines of steps, and those of the guard."""
    found = log(out)
    return [line for line in found if "guard" not in line], [line for line in found if "guard" in line]


def test_a_run_follows_its_reward_and_resumes_to_the_same_losses(tiny_base, below, tmp_path, bright):
    finish(small(tiny_base, below, count=12), tmp_path / "whole")
    made, looks = lines(tmp_path / "whole")
    first, last = (sum(line["reward_clip_1"] for line in part) for part in (made[:4], made[-4:]))
    assert last > first + 0.05
    assert all(line["loss"] == pytest.approx(1.5 * (2 - line["reward_clip_1"]), abs=1e-5) for line in made)
    assert [line["step"] for line in looks] == [2, 5, 8, 11]
    begin = json.loads((tmp_path / "whole" / "run.json").read_text())["guard_begin"]
    assert set(begin) == {"distance", "saturation", "texture"}
    for look in looks:
        assert look["guard_worse"] == pytest.approx(look["guard_distance"] / begin["distance"] - 1)
        assert look["guard_saturation"] > 0
    stopped = start(small(tiny_base, below, count=12), tmp_path / "stopped").run()
    for _ in range(7):
        next(stopped)
    stopped.close()
    finish(small(tiny_base, below, count=12), tmp_path / "stopped")
    assert lines(tmp_path / "stopped") == (made, looks)


def test_the_lora_on_top_says_what_it_stands_on_and_how_it_is_played(tiny_base, below, tmp_path, bright):
    finish(small(tiny_base, below), tmp_path / "out")
    lora = read_lora(tmp_path / "out" / "feedback-k1-lora.safetensors")
    assert lora.metadata["hypersd.over"] == read_lora(below).digest
    assert lora.metadata["hypersd.steps"] == "35"
    assert list(plans_from_metadata(lora.metadata["hypersd.plan"])) == PLANS[:2]
    assert json.loads(lora.metadata["hypersd.recipe"])["init_lora"] == "stage.safetensors"
    assert lora.ranks == (2,)


def test_two_micro_batches_are_the_whole_batch_and_mixed_precision_is_near(tiny_base, below, tmp_path, bright):
    finish(small(tiny_base, below), tmp_path / "one")
    finish(small(tiny_base, below, micro_batch=2), tmp_path / "two")
    finish(small(tiny_base, below, mixed_precision="bf16"), tmp_path / "mixed")
    one, two, mixed = (lines(tmp_path / name)[0] for name in ("one", "two", "mixed"))
    for a, b, c in zip(one, two, mixed, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)
        assert a["loss"] == pytest.approx(c["loss"], rel=0.05)


def test_two_processes_give_the_losses_of_one_and_stop_together(tiny_base, below, tmp_path, bright):
    guard = GuardConfig(bound=0.0, every=2, prompts=4, teacher_steps=2)
    config = small(tiny_base, below, count=4, guard=replace(guard, bound=1e6))
    finish(config, tmp_path / "one")
    on_two(tmp_path / "said", finish, config, tmp_path / "two")
    one, two = (lines(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one[0] + one[1], two[0] + two[1], strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    said = on_two(tmp_path / "again", _refused, replace(config, feedback=replace(config.feedback, guard=guard)),
                  tmp_path / "three")  # fmt: skip
    assert said[0] == said[1]


def _refused(config, out):
    config = replace(config, stages=(replace(config.stages[0], lr=0.5),))
    try:
        finish(config, out)
    except DataError as error:
        return str(error).partition(" is worse by")[0]
    return ""


def test_the_guard_ends_the_run_with_the_weights_of_its_last_good_look(tiny_base, below, tmp_path, bright):
    loose = GuardConfig(bound=1e6, every=2, prompts=4, teacher_steps=2)
    finish(small(tiny_base, below, count=12, guard=loose), tmp_path / "loose")
    worse = [line["guard_worse"] for line in lines(tmp_path / "loose")[1]]
    assert worse[-1] > worse[0]
    tight = replace(loose, bound=(max(worse[:3]) + max(worse)) / 2)
    tripped = next(place for place, value in enumerate(worse) if value > tight.bound)
    said = []
    out = tmp_path / "tight"
    for _ in start(small(tiny_base, below, count=12, guard=tight), out, say=said.append).run():
        pass
    made, looks = lines(out)
    assert len(made) == 2 * (tripped + 1)
    assert [line["stopped"] for line in looks] == [False] * tripped + [True]
    assert f"the guard stops after {2 * tripped + 2} updates; the LoRA is that of {2 * tripped}" in said
    lora = read_lora(out / "feedback-k1-lora.safetensors")
    assert lora.metadata["hypersd.steps"] == str(30 + 2 * tripped)
    # the same weights as those of an unguarded run at the last good look
    finish(small(tiny_base, below, count=2 * tripped, guard=loose, save_every=2 * tripped), tmp_path / "short")
    kept, short = (newest(folder).tensors for folder in (out, tmp_path / "short"))
    assert all(torch.equal(kept[n], short[n]) for n in kept if n.startswith("adapters.student."))
    # it is finished: another start has nothing to do, and writes a LoRA that was lost again
    (out / "feedback-k1-lora.safetensors").unlink()
    said.clear()
    for _ in start(small(tiny_base, below, count=12, guard=tight), out, say=said.append).run():
        pass
    assert "every stage is finished" in said
    assert read_lora(out / "feedback-k1-lora.safetensors").metadata["hypersd.steps"] == str(30 + 2 * tripped)


def test_with_nothing_to_keep_the_guard_is_an_error(tiny_base, below, tmp_path, bright):
    guard = GuardConfig(bound=0.0, every=2, prompts=4, teacher_steps=2)
    config = small(tiny_base, below, lr=0.5, guard=guard)
    with pytest.raises(DataError, match=r"the guard \(distance\) is worse by .* at its first look, after 2 updates"):
        finish(config, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*-lora.safetensors"))


def test_the_clip_guard_looks_with_a_clip(tiny_base, below, tmp_path, monkeypatch):
    """With the built-in CLIP as reward and guard, no stand-in."""
    guard = GuardConfig(watch=Watch.CLIP, bound=5.0, every=5, prompts=4)
    config = small(tiny_base, below, guard=guard)
    finish(replace(config, feedback=replace(config.feedback, rewards=config.feedback.rewards[:1])), tmp_path / "out")
    made, looks = lines(tmp_path / "out")
    assert all(-100 < line["reward_clip"] < 100 for line in made)
    assert -100 < looks[0]["guard_clip"] < 100
    assert "guard_distance" not in looks[0]


@pytest.mark.parametrize(("make_one", "words"), [
    (lambda: FeedbackConfig(span=(0.5, 0.5)), "feedback.span 0.5 to 0.5"),
    (lambda: FeedbackConfig(steps=(2, 2)), r"feedback.steps \[2, 2\]: must be different"),
    (lambda: GuardConfig(every=0), "feedback.guard: bound 0.05, every 0"),
    (lambda: replace(settings(), feedback=FeedbackConfig()), "1 stages, 0 rewards: it has one stage and needs a"),
    (lambda: replace(settings(), stages=settings().stages * 2), "2 stages, 1 rewards"),
    (lambda: replace(settings(), stages=(StageConfig(segments=2, points=4, steps=1, lr=1.0),)), "segments 1, w_adv 0"),
])  # fmt: skip
def test_settings_that_cannot_be(make_one, words):
    with pytest.raises(OptionError, match=words):
        make_one()


def test_a_lora_is_needed_and_one_for_the_unet_alone(tiny_base, tmp_path):
    with pytest.raises(OptionError, match="method feedback stands on a few-step LoRA: name one with --init-lora FILE"):
        start(replace(small(tiny_base, ""), init_lora=""), tmp_path / "a")
    unnamed = FeedbackConfig(rewards=feedback_recipe("sd15").feedback.rewards)
    with pytest.raises(OptionError, match="reward aesthetic: its model is missing: set it to the path of a CLIP"):
        start(small(tiny_base, "x", feedback=unnamed), tmp_path / "a")
    deltas = random_deltas(small_unet())
    save_kohya(tmp_path / "two.safetensors", {"unet": deltas, "text_encoder": deltas}, {})
    with pytest.raises(LoraError, match="has a part for the text_encoder; feedback stands on a UNet's LoRA alone"):
        finish(small(tiny_base, tmp_path / "two.safetensors"), tmp_path / "b")


def test_the_command_says_what_it_would_do(tmp_path, below):
    result = CliRunner().invoke(app, ["feedback", "--init-lora", str(below), "--dry-run"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["config"]["method"] == "feedback"
    assert [term["kind"] for term in said["config"]["feedback"]["rewards"]] == ["clip", "preference"]
    assert said["passes_per_step"] == [{
        "student_forward": 1, "student_backward": 1, "student_recomputed": 0, "student_played": 0.75,
        "decoder_forward": 1, "decoder_backward": 1, "decoder_recomputed": 0, "rewards_forward": 2,
        "rewards_backward": 2,
    }]  # fmt: skip
    assert said["memory_gib"]["one_gpu"]["vae"] == pytest.approx(0.010, abs=2e-3)


@pytest.mark.parametrize(("name", "recipe"), [("sd15", sd15), ("sdxl", sdxl)])
def test_the_recipes_of_published_models_have_the_papers_rewards(name, recipe):
    config = feedback_recipe(name)
    assert [(term.kind, term.weight) for term in config.feedback.rewards] == [("aesthetic", 1), ("image_reward", 1)]
    assert (config.batch, config.stages[0].lr) == (512, 1e-6)
    assert config.micro_batch == recipe().micro_batch // 4
    assert (config.base, config.lora) == (recipe().base, recipe().lora)


def test_a_recipe_that_is_none_is_refused():
    with pytest.raises(OptionError, match="--recipe 'sd9' is not a feedback recipe; there are: builtin, sd15, sdxl"):
        feedback_recipe("sd9")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sd15", "sdxl"])
def test_a_micro_batch_of_them_fits_on_a_card_of_24_gib(recipe):
    said = json.loads(CliRunner().invoke(app, ["feedback", "--recipe", recipe, "--dry-run"]).stdout)
    assert said["passes_per_step"][0]["student_played"] is None
    assert 10 < said["memory_gib"]["one_gpu"]["total"] < 22

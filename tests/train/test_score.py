"""Score distillation: its formulas on Gaussians in closed form, its gradients, its sampler, and a run of it."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from hypersd_export.diffusion import (
    FewStepPlan,
    NoiseSchedule,
    PredictionType,
    Solver,
    plans_from_metadata,
    run,
    x0_and_eps,
)  # fmt: skip
from hypersd_export.errors import OptionError
from hypersd_export.model.lora import read_lora
from tests.train.small_run import finish, small_config, start
from tests.train.small_unet import SHAPE, batch, conditioning, small_networks
from trainer.batch import keyed_generator
from trainer.cli import app
from trainer.discriminator import Discriminator
from trainer.distill.config import Backend, Real, ScoreConfig, StageConfig, builtin, with_method
from trainer.distill.networks import Role
from trainer.distill.pairs import Pairs, pair_noise, solve
from trainer.distill.score import FakeScore, ScoreStep, courses
from trainer.losses.score import denoising_loss, matching_direction, matching_loss

ALPHAS = torch.tensor(NoiseSchedule().alphas_cumprod())


def posterior_mean(x, a, mean, variance):
    """x̂0 of data N(mean, variance) at x = sqrt(a) x0 + sqrt(1 − a) noise."""
    return mean + a**0.5 * variance * (x - a**0.5 * mean) / (a * variance + 1 - a)


def score(x, a, mean, variance):
    """∇ log density of the noisy data."""
    return -(x - a**0.5 * mean) / (a * variance + 1 - a)


@pytest.mark.parametrize("t", [20, 400, 900])
def test_the_direction_is_the_difference_of_the_scores(t):
    """Times sqrt(a) / (1 − a), and over the mean distance to real's opinion (DMD eq. 7 and 8)."""
    a = ALPHAS[t]
    x0 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = a**0.5 * x0 + (1 - a) ** 0.5 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).double()
    real, fake = posterior_mean(x, a, 0.3, 0.5), posterior_mean(x, a, -1.0, 2.0)
    direction = matching_direction(x0, real, fake).double()
    size = (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    difference = score(x, a, -1.0, 2.0) - score(x, a, 0.3, 0.5)
    torch.testing.assert_close(direction * size * a**0.5 / (1 - a), difference, rtol=1e-4, atol=1e-5)


def test_its_loss_hands_the_direction_over_as_the_gradient():
    x0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    direction = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    loss = matching_loss(x0, direction)
    torch.testing.assert_close(loss, 0.5 * direction.square().mean((1, 2)))
    loss.sum().backward()
    torch.testing.assert_close(x0.grad, direction / 12)


def test_equal_scores_and_a_perfect_opinion_move_nothing():
    x0 = torch.randn(2, 3, 4)
    assert matching_direction(x0, x0 + 1, x0 + 1).abs().max() == 0
    assert matching_direction(x0, x0.clone(), x0 + 1).abs().max() == 0  # and no NaN


def test_descent_brings_a_gaussian_to_the_data():
    """The student is mean + deviation · z, both scores in closed form: it ends at the data's mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.tensor(-2.0, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    optimizer = torch.optim.Adam([mean, deviation], lr=0.02)
    for _ in range(600):
        x0 = mean + deviation * torch.randn(512, 1, generator=generator)
        a = ALPHAS[torch.randint(20, 980, (512, 1), generator=generator)].float()
        x = a**0.5 * x0.detach() + (1 - a) ** 0.5 * torch.randn(512, 1, generator=generator)
        real = posterior_mean(x, a, 1.0, 0.8**2)
        fake = posterior_mean(x, a, mean.detach(), deviation.detach() ** 2)
        loss = (0.5 * (x0 - (x0 - (fake - real)).detach()).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(mean.detach()) == pytest.approx(1.0, abs=0.05)
    assert abs(float(deviation.detach())) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("kind", [PredictionType.EPSILON, PredictionType.SAMPLE, PredictionType.V_PREDICTION])
def test_the_fake_score_learns_what_its_network_predicts(kind):
    """The loss is 0 at the output that x0_and_eps reads as just this x0 and noise."""
    x0, noise = torch.randn(2, 2, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = ALPHAS[[100, 700]].view(-1, 1, 1, 1)
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    out = torch.zeros_like(x0, requires_grad=True)
    (gradient,) = torch.autograd.grad(denoising_loss(out, x0, noise, a, kind).sum(), out)
    best = -gradient * 27 / 2  # a mean of 27 squares, so one Newton step from 0 is exact
    torch.testing.assert_close(x0_and_eps(best, x, a, kind)[0], x0)
    torch.testing.assert_close(denoising_loss(best, x0, noise, a, kind), torch.zeros(2, dtype=torch.float64))


def test_the_fake_score_of_a_gaussian_student_is_found_by_least_squares():
    """Among affine networks at one t the loss is least at the student's own posterior mean."""
    generator, a = torch.Generator().manual_seed(0), ALPHAS[500]
    x0 = 0.4 + 1.5 * torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    x = a**0.5 * x0 + (1 - a) ** 0.5 * noise
    design = torch.cat([x, torch.ones_like(x)], dim=1)
    fitted = torch.linalg.lstsq(design, noise).solution
    points = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
    eps = torch.cat([points, torch.ones_like(points)], dim=1) @ fitted
    expected = posterior_mean(points, a, 0.4, 1.5**2)
    torch.testing.assert_close((points - (1 - a) ** 0.5 * eps) / a**0.5, expected, rtol=0, atol=0.02)


def plans(*counts):
    return [FewStepPlan(solver=Solver.TCD, num_steps=n, eta=1.0, original_inference_steps=8) for n in counts]


def config(**changes):
    stage = StageConfig(segments=1, points=8, steps=4, lr=1e-3)
    settings = ScoreConfig(**{"student_every": 1, "lr": 1e-2, **changes})
    base = with_method(builtin(), "score")
    return replace(base, stages=(stage,), score=settings, batch=4, mixed_precision="no", guidance=(2.0, 4.0))


def make(settings, networks=None, **kept):
    networks = networks or small_networks()
    fake = FakeScore(networks)
    counts = plans(*settings.score.steps)
    return ScoreStep(networks, settings, settings.stages[0], conditioning(1, seed=9), fake, plans=counts, **kept)


def grads(networks, role):
    return [w.grad for w in networks._weights[role].values()]


def test_the_students_loss_reaches_the_student_and_the_fake_ones_the_fake():
    step = make(config())
    networks, draws = step.networks, step.draw(0, SHAPE)
    out = step(batch(4), draws)
    out.loss.backward()
    assert all(g is not None and g.abs().sum() > 0 for g in grads(networks, Role.STUDENT))
    assert all(g is None for role in (Role.TEACHER, Role.TARGET) for g in grads(networks, role))
    assert all(p.grad is None for name, p in networks.unet.named_parameters() if "lora" not in name)
    before = [g.clone() for g in grads(networks, Role.STUDENT)]
    loss, logs = step.critic_loss(out.look)
    loss.backward()
    assert all(g is not None for g in grads(networks, Role.TEACHER))
    assert all(torch.equal(a, b) for a, b in zip(before, grads(networks, Role.STUDENT), strict=True))
    assert not out.look.x0.requires_grad
    assert logs["fake"] == loss


def test_where_the_student_does_not_learn_there_is_no_loss_and_the_fake_score_still_sees_its_pictures():
    step = make(config(student_every=3))
    assert [step.draw(n, SHAPE).student for n in range(4)] == [True, False, False, True]
    out = step(batch(4), step.draw(1, SHAPE))
    assert out.loss is None
    assert out.logs == {}
    assert out.look.x0.shape == (4, *SHAPE)


def test_a_fake_score_that_is_the_real_one_moves_nothing():
    step = make(replace(config(), guidance=(1.0, 1.0)), small_networks(random=False))
    assert step(batch(4), step.draw(0, SHAPE)).loss == 0


@pytest.mark.parametrize("count", [1, 2, 4])
def test_it_plays_the_very_steps_of_the_sampler(count):
    """The picture of the last step is what the plan's own table gives with the same noises."""
    step = make(config(steps=(count,)))
    draws = replace(step.draw(0, SHAPE), index=torch.full((4,), count - 1))
    given, cond = batch(4), batch(4).conditioning
    draws = replace(draws, drop=torch.zeros(4, dtype=torch.bool))
    table = plans(count)[0].table()
    with torch.no_grad():
        expected = run(
            table, lambda x, t: step.networks.frozen(Role.STUDENT, x, torch.full((4,), int(t)), cond), draws.noise,
            step_noise=lambda stream: draws.path_noise[:, stream - 1],
        )  # fmt: skip
    torch.testing.assert_close(step(given, draws).look.x0, expected, rtol=1e-4, atol=1e-4)


def test_one_courses_first_step_may_be_another_and_steps_without_a_plan_are_refused():
    settings = config(steps=(1,), start_t=800)
    assert courses(plans(1, 2), settings, 1000).tolist() == [[800]]
    assert courses(plans(1, 2), config(steps=(2, 1)), 1000).tolist() == [[999, 499], [999, 0]]
    with pytest.raises(OptionError, match=r"score.steps 4: the stage's grid has plans for 1, 2 steps"):
        courses(plans(1, 2), config(steps=(1, 4)), 1000)
    with pytest.raises(OptionError, match=r"score.start_t 400: must lie below 1000 and above the later steps \[499\]"):
        courses(plans(2), config(steps=(2,), start_t=400), 1000)


class Stream:
    latent_shape = SHAPE
    empty = conditioning(1, seed=9)

    def batch(self, positions):
        return replace(batch(8), latents=batch(8).latents[:1].expand(len(positions), *SHAPE),
                       conditioning=batch(8).conditioning.rows(torch.tensor(list(positions))))  # fmt: skip


def test_pairs_are_the_teachers_own_path_and_anchor_the_student_alone():
    settings = config(pairs=6, pair_steps=4, pair_share=1.0, w_match=0.0, w_anchor=1.0)
    networks, source = small_networks(), Stream()
    found = solve(networks, source, settings, [5, 2], 3.0)
    plan = FewStepPlan(solver=Solver.DDIM, num_steps=4)
    cond, weights = source.batch([5, 2]).conditioning, torch.full((2,), 3.0)
    with torch.no_grad():
        expected = run(
            plan.table(),
            lambda x, t: networks.frozen(
                Role.BASE, x, torch.full((2,), int(t)), cond, guidance=weights, empty=source.empty
            ),
            pair_noise(0, [5, 2], SHAPE),
        )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    solutions = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(5))
    step = make(settings, networks, pairs=Pairs(source=source, solutions=solutions, seed=0))
    draws = step.draw(0, SHAPE)
    assert (draws.pair >= 0).all()
    assert (draws.index == 0).all()
    out = step(batch(4), draws)
    assert out.loss == out.logs["anchor"]
    perfect = Pairs(source=source, solutions=solutions.index_copy(0, draws.pair, out.look.x0), seed=0)
    again = make(settings, networks, pairs=perfect)(batch(4), draws)
    assert float(again.loss.detach()) < 1e-6 < float(out.loss.detach())


def test_rows_without_a_pair_keep_their_noise_and_caption():
    pairs = Pairs(source=Stream(), solutions=torch.ones(6, *SHAPE), seed=0)
    mine = conditioning(3, seed=4)
    noise, solution, mixed = pairs.put(torch.tensor([-1, 3, -1]), mine)
    assert torch.equal(mixed.states[[0, 2]], mine.states[[0, 2]])
    assert torch.equal(mixed.states[1], batch(8).conditioning.states[3])
    assert torch.equal(noise[1], pair_noise(0, [3], SHAPE)[0])
    assert solution.flatten(1).sum(1).tolist() == [0.0, float(solution[1].numel()), 0.0]


def small(folder, **changes):
    base = small_config(folder)
    stage = StageConfig(segments=1, points=4, steps=5, lr=1e-3)
    settings = ScoreConfig(steps=(1, 2), student_every=2, lr=1e-2, pairs=3, pair_steps=2)
    return replace(base, method="score", stages=(stage,), score=settings, **changes)


def test_a_run_resumes_to_the_same_losses_and_writes_a_lora_that_says_how_to_play_it(tiny_base, tmp_path):
    whole = finish(small(tiny_base), tmp_path / "whole")
    assert [("loss" in line, "fake" in line) for line in whole] == [(n % 2 == 0, True) for n in range(5)]
    stopped = start(small(tiny_base), tmp_path / "stopped").run()
    for _ in range(3):
        next(stopped)
    stopped.close()
    assert finish(small(tiny_base), tmp_path / "stopped") == whole
    lora = read_lora(tmp_path / "whole" / "score-k1-lora.safetensors")
    found = plans_from_metadata(lora.metadata["hypersd.plan"])
    assert [(plan.solver, plan.num_steps, plan.eta) for plan in found] == [(Solver.TCD, n, 1.0) for n in (1, 2, 4)]
    assert {p.name.split("-")[0] for p in (tmp_path / "whole" / "cache").iterdir()} == {"pairs"}


def test_it_runs_in_mixed_precision(tiny_base, tmp_path):
    """The pairs are solved and the student learns under autocast, as in the recipes; losses near those of float32."""
    plain = finish(small(tiny_base), tmp_path / "plain")
    mixed = finish(small(tiny_base, mixed_precision="bf16"), tmp_path / "mixed")
    for a, b in zip(plain, mixed, strict=True):
        assert a["fake"] == pytest.approx(b["fake"], rel=0.05)


def test_two_micro_batches_are_the_whole_batch(tiny_base, tmp_path):
    one = finish(small(tiny_base), tmp_path / "one")
    two = finish(small(tiny_base, micro_batch=2), tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize(("changes", "words"), [
    ({"steps": ()}, r"score.steps \[\]: must be different step counts"),
    ({"steps": (2, 2)}, r"score.steps \[2, 2\]: must be different"),
    ({"t_range": (0.5, 0.2)}, r"score.t_range 0.5 to 0.2"),
    ({"student_every": 0}, "score.student_every 0"),
    ({"w_match": 0.0, "w_anchor": 0.0}, "not both 0"),
    ({"steps": (2,), "pairs": 8}, "score.pairs 8: they anchor one step"),
])  # fmt: skip
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(OptionError, match=words):
        ScoreConfig(**changes)


def with_critic(settings, real=Real.TEACHER_MULTISTEP, **changes):
    critic = replace(settings.adversarial, real=real, reach=0.3, lr=2e-2, **changes)
    return replace(settings, stages=(replace(settings.stages[0], w_adv=0.5),), adversarial=critic)


def make_with_critic(settings, **kept):
    networks = small_networks()
    torch.manual_seed(3)
    critic = Discriminator(networks.unet, settings.adversarial)
    for head in critic.heads:
        torch.nn.init.normal_(head.out.weight)  # they begin at 0, where the student gets no gradient
    fake = FakeScore(networks, critic)
    return ScoreStep(networks, settings, settings.stages[0], conditioning(1, seed=9), fake, plans=plans(1), **kept)


PAIRS = Pairs(source=Stream(), solutions=torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(5)), seed=0)


@pytest.mark.parametrize("backend", list(Backend))
def test_the_discriminators_loss_reaches_the_student_through_the_picture_and_its_own_the_heads(backend):
    settings = with_critic(config(w_match=0.0, w_anchor=1e-9, pairs=6, pair_share=0.0), backend=backend)
    step = make_with_critic(settings, pairs=PAIRS)
    critic, networks = step.discriminator, step.networks
    out = step(batch(4), step.draw(0, SHAPE))
    assert float(out.loss.detach()) == pytest.approx(0.5 * float(out.logs["adversarial"]))
    out.loss.backward()
    assert all(g is not None and g.abs().sum() > 0 for g in grads(networks, Role.STUDENT))
    assert all(p.grad is None for p in [*critic.parameters(), *step.fake.trainable_parameters()])
    before = [g.clone() for g in grads(networks, Role.STUDENT)]
    loss, logs = step.critic_loss(out.look)
    assert float(loss.detach()) == pytest.approx(float(logs["fake"] + logs["critic"]))
    loss.backward()
    assert all(p.grad is not None for p in [*critic.trainable_parameters(), *step.fake.trainable_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(before, grads(networks, Role.STUDENT), strict=True))


def test_the_discriminator_sees_the_pairs_with_their_own_captions_or_the_drawings_with_theirs():
    """At timestep 0 nothing is added, so that what it sees is the clean thing, at the path's first level."""
    settings = with_critic(config(pairs=6, pair_share=0.0))
    step = make_with_critic(settings, pairs=PAIRS)
    draws = replace(step.draw(0, SHAPE), critic_t=torch.zeros(4, dtype=torch.long))
    look = step(batch(4), draws).look.look
    assert torch.equal(look.real, PAIRS.solutions[draws.real_pair])
    assert torch.equal(look.real_conditioning.states, batch(8).conditioning.states[draws.real_pair])
    assert torch.equal(look.fake, step(batch(4), draws).look.x0)
    data = make_with_critic(with_critic(config(), real=Real.DATA))
    look, a = data(batch(4), draws).look.look, ALPHAS[0].float()
    torch.testing.assert_close(look.real, a.sqrt() * batch(4).latents + (1 - a).sqrt() * draws.real_noise)
    assert torch.equal(look.real_conditioning.states, batch(4).conditioning.states)


def test_the_discriminators_draws_come_after_the_others_and_reach_as_far_as_they_should():
    """So that a run without one is what it was before there was one."""
    draws = make(config(pairs=6)).draw(7, SHAPE)
    generator = keyed_generator("0/score/1/7")
    assert torch.equal(draws.noise, torch.randn(3, 4, *SHAPE, generator=generator)[0])
    many = make(replace(with_critic(config(pairs=6)), batch=4000)).draw(0, SHAPE).critic_t
    assert 0 <= int(many.min()) < 3
    assert 297 <= int(many.max()) < 300


def test_each_part_of_the_critic_has_its_own_rate():
    settings = with_critic(config(pairs=6))
    step = make_with_critic(settings, pairs=PAIRS)
    mine, theirs = step.fake.groups(settings)
    assert (mine["lr"], mine["betas"], theirs["lr"], theirs["betas"]) == (1e-2, (0.9, 0.999), 2e-2, (0.0, 0.99))
    assert len(mine["params"]) == len(step.fake.trainable_parameters())
    assert [id(p) for p in theirs["params"]] == [id(p) for p in step.discriminator.trainable_parameters()]


def test_a_run_with_a_discriminator_resumes_to_the_same_losses(tiny_base, tmp_path):
    def settings():
        base = with_critic(small(tiny_base, save_every=2))
        return replace(base, stages=(replace(base.stages[0], w_adv=0.05),))

    whole = finish(settings(), tmp_path / "whole")
    assert all({"critic", "critic_right"} <= set(line) for line in whole)
    assert "adversarial" in whole[0]
    stopped = start(settings(), tmp_path / "stopped").run()
    for _ in range(3):
        next(stopped)
    stopped.close()
    assert finish(settings(), tmp_path / "stopped") == whole


def test_its_stages_are_of_one_segment_and_a_critic_has_something_real_to_see():
    with pytest.raises(OptionError, match="method score: its stages have segments 1 and the original teacher"):
        replace(config(), stages=(StageConfig(segments=2, points=4, steps=1, lr=1e-3),))
    with pytest.raises(OptionError, match=r"adversarial.real target, conditional False: .* set real to data or"):
        with_critic(config(pairs=6), real=Real.TARGET)
    with pytest.raises(OptionError, match=r"adversarial.real data, conditional True"):
        with_critic(config(), real=Real.DATA, conditional=True)
    with pytest.raises(OptionError, match=r"teacher_multistep: in score distillation these are the pairs; set score.p"):
        with_critic(config())
    assert with_critic(config(), real=Real.DATA).needs_pictures
    assert not with_critic(config(pairs=6)).needs_pictures


def test_the_command_says_what_it_would_do():
    result = CliRunner().invoke(
        app, ["score", "--set", "score.steps=[1,2]", "--set", "score.student_every=2", "--dry-run"]
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["config"]["method"] == "score"
    scores = {
        "student_forward": 1, "student_backward": 0.5, "student_played": 0.125, "student_recomputed": 0.0,
        "teacher": 1.0, "fake_forward": 1.5, "fake_backward": 1, "fake_recomputed": 0,
    }  # fmt: skip
    critic = {"discriminator_forward": 2, "discriminator_backward_to_student": 0.5, "discriminator_backward": 0}
    assert said["passes_per_step"] == [scores, scores | critic, scores | critic]
    one = said["memory_gib"]["one_gpu"]
    assert one["fake_gradients_and_moments"] == pytest.approx(3 * one["lora_student"], abs=2e-3)

"""One step: its draws are a function of (seed, stage, step), its losses add up over micro-batches, its gradients go to
the student alone (or the discriminator alone), and it makes the fewest passes that the method needs."""

import dataclasses

import pytest
import torch

from tests.train.small_unet import SHAPE, batch, conditioning, small_networks
from trainer.batch import Batch
from trainer.discriminator import Discriminator
from trainer.distill.config import (
    AdversarialConfig,
    Backend,
    DistillConfig,
    LoraConfig,
    Real,
    StageConfig,
    Teacher,
    builtin,
    sd15,
    with_method,
)  # fmt: skip
from trainer.distill.networks import Role
from trainer.distill.step import DistillStep

K4 = StageConfig(segments=4, points=40, steps=10, lr=1e-3)


def config(stage=K4, **changes):
    defaults = {"guidance": (2.0, 4.0), "batch": 6, "lora": LoraConfig(rank=4, alpha=4.0)}
    return DistillConfig(method="tscd", stages=(K4,), **{**defaults, **changes}), stage


def make(stage=K4, networks=None, **changes):
    settings, stage = config(stage, **changes)
    networks = networks or small_networks()
    critic = None
    if stage.w_adv:
        torch.manual_seed(5)
        critic = Discriminator(networks.unet, settings.adversarial)
        with torch.no_grad():
            for parameter in critic.trainable_parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return DistillStep(networks, settings, stage, conditioning(1, seed=9), critic)


def part(data, index):
    return Batch(
        latents=data.latents[index], conditioning=data.conditioning.rows(index), captions=data.captions[index],
        names=data.names[index],
    )  # fmt: skip


def gradients(parameters):
    found = [None if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def test_draws_are_a_function_of_seed_stage_and_step():
    step = make()
    one, again, other = step.draw(7, SHAPE), make().draw(7, SHAPE), step.draw(8, SHAPE)
    for field in ("noise", "guidance", "critic_t", "critic_noise", "data_noise"):
        assert torch.equal(getattr(one, field), getattr(again, field))
        assert not torch.equal(getattr(one, field), getattr(other, field)) or field == "critic_t"
    assert torch.equal(one.indices.start, again.indices.start)
    assert not torch.equal(one.noise, make(seed=1).draw(7, SHAPE).noise)
    step.number = 2  # another stage of the run
    assert not torch.equal(one.noise, step.draw(7, SHAPE).noise)
    assert torch.equal(one.rows(slice(2, 4)).noise, one.noise[2:4])
    assert torch.equal(one.rows(slice(2, 4)).indices.end, one.indices.end[2:4])


def test_what_is_drawn_has_the_configured_ranges():
    step = make(batch=4000, empty_prompts=0.2, offset_noise=0.5)
    draws = step.draw(0, SHAPE)
    assert 2.0 <= draws.guidance.min() < 2.01
    assert 3.99 < draws.guidance.max() <= 4.0
    assert draws.drop.float().mean() == pytest.approx(0.2, abs=0.03)
    means = draws.noise.mean((2, 3))  # the offset is common to a channel: variance 0.25 + 1/64
    assert means.var().item() == pytest.approx(0.25 + 1 / 64, rel=0.05)
    plain = make(batch=4000).draw(0, SHAPE)
    assert plain.noise.var().item() == pytest.approx(1.0, rel=0.02)
    assert not plain.drop.any()


@pytest.mark.parametrize("w_adv", [0.0, 0.3])
def test_micro_batches_add_up_to_the_whole_batch(w_adv):
    step = make(dataclasses.replace(K4, w_adv=w_adv))
    data, draws, weights = batch(6), step.draw(0, SHAPE), step.networks.student_parameters()
    whole = step(data, draws)
    whole.loss.backward()
    expected = gradients(weights)
    total = 0.0
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        output = step(part(data, rows), draws.rows(rows))
        (output.loss / 3).backward()
        total += output.loss.item() / 3
    assert total == pytest.approx(whole.loss.item(), rel=1e-5)
    for mine, theirs in zip(gradients(weights), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("real", list(Real))
def test_each_loss_has_gradients_for_its_own_network_alone(backend, real):
    settings = AdversarialConfig(backend=backend, real=real, conditional=backend is Backend.TRAINABLE, teacher_steps=2)
    step = make(dataclasses.replace(K4, w_mse=0.0, w_adv=1.0), adversarial=settings)
    student, critic = step.networks.student_parameters(), step.discriminator.trainable_parameters()
    output = step(batch(6), step.draw(0, SHAPE))
    output.loss.backward()
    assert any(g is not None and g.abs().sum() > 0 for g in gradients(student))
    assert all(g is None for g in gradients(critic))
    loss, logs = step.critic_loss(output.look)
    loss.backward()
    assert all(g is None for g in gradients(student))
    assert any(g is not None and g.abs().sum() > 0 for g in gradients(critic))
    assert 0 <= logs["critic_right"] <= 1
    assert not output.look.real.requires_grad
    assert not [n for n, p in step.networks.unet.named_parameters() if p.grad is not None]


def count_rows(step, monkeypatch):
    seen = dict.fromkeys(Role, 0)
    frozen, student = step.networks.frozen, step.networks.student

    def count(role, x, t, text, *, guidance=None, empty=None):
        seen[role] += len(x) * (1 if guidance is None else 2)
        return frozen(role, x, t, text, guidance=guidance, empty=empty)

    def count_student(x, t, text):
        seen[Role.STUDENT] += len(x)
        return student(x, t, text)

    monkeypatch.setattr(step.networks, "frozen", count)
    monkeypatch.setattr(step.networks, "student", count_student)
    draws = step.draw(0, SHAPE)
    step(batch(6), draws)
    unfinished = int((draws.indices.end < draws.indices.start - 1).sum())
    return seen, unfinished


def test_the_fewest_rows_are_passed(monkeypatch):
    networks = small_networks()
    seen, unfinished = count_rows(make(networks=networks), monkeypatch)
    assert seen == {Role.STUDENT: 6, Role.TARGET: unfinished, Role.TEACHER: 0, Role.BASE: 12}
    assert 0 < unfinished < 6
    seen, unfinished = count_rows(make(networks=networks, cfg_preserved=True, empty_prompts=0.5), monkeypatch)
    assert seen == {Role.STUDENT: 6, Role.TARGET: unfinished, Role.TEACHER: 0, Role.BASE: 6}
    previous = dataclasses.replace(K4, teacher=Teacher.PREVIOUS)
    seen, unfinished = count_rows(make(previous, networks=networks), monkeypatch)
    assert seen == {Role.STUDENT: 6, Role.TARGET: unfinished, Role.TEACHER: 6, Role.BASE: 0}
    seen, unfinished = count_rows(make(networks=networks, ema_decay=0.0), monkeypatch)
    assert seen == {Role.STUDENT: 6 + unfinished, Role.TARGET: 0, Role.TEACHER: 0, Role.BASE: 12}


def test_the_discriminators_encoder_is_asked_no_more_than_it_must(monkeypatch):
    """frozen: fake and real once each; the teacher's first pass serves the target and the multi-step solution."""
    networks = small_networks()
    settings = AdversarialConfig(real=Real.TEACHER_MULTISTEP, teacher_steps=3, conditional=True)
    step = make(dataclasses.replace(K4, w_adv=1.0), networks=networks, adversarial=settings)
    asked = []
    features = step.discriminator.features
    monkeypatch.setattr(
        step.discriminator, "features", lambda x, t, text: asked.append(x.detach().clone()) or features(x, t, text)
    )
    seen, _ = count_rows(step, monkeypatch)
    assert seen[Role.BASE] == 3 * 12
    output = step(batch(6), step.draw(0, SHAPE))
    asked.clear()
    step.critic_loss(output.look)
    assert len(asked) == 1
    assert torch.equal(asked[0], output.look.real)
    fresh = step.discriminator(
        torch.cat([output.look.real, output.look.fake]), output.look.t.repeat(2),
        output.look.conditioning.rows(torch.arange(6).repeat(2)), output.look.origin,
    )  # fmt: skip
    loss = step.critic_loss(output.look)[0]
    real, fake = zip(*(part.chunk(2) for part in fresh), strict=True)
    hinge = [torch.relu(1 - r).mean() + torch.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    torch.testing.assert_close(loss, torch.stack(hinge).mean(), rtol=1e-5, atol=1e-6)


def test_the_student_that_is_the_teacher_has_no_loss_when_every_point_is_an_edge():
    """k = N without guidance: the target is the teacher's own step, which an untrained LoRA makes too."""
    each = StageConfig(segments=40, points=40, steps=1, lr=1e-3)
    step = make(each, networks=small_networks(random=False), guidance=(1.0, 1.0))
    assert step(batch(6), step.draw(0, SHAPE)).loss.item() < 1e-10
    guided = make(each, networks=small_networks(random=False))
    assert guided(batch(6), guided.draw(0, SHAPE)).loss.item() > 1e-8


def test_dropped_captions_are_the_empty_prompt():
    step = make(empty_prompts=1.0, cfg_preserved=True)
    data, draws = batch(6), step.draw(0, SHAPE)
    silent = dataclasses.replace(data, conditioning=step.empty.expand(6))
    assert step(data, draws).loss.item() == step(silent, draws).loss.item()


def test_methods_are_rows_of_one_table():
    base = builtin()
    total = sum(stage.steps for stage in base.stages)
    for method, segments in (("tcd", 1), ("lcm", 1), ("pcm", 4)):
        other = with_method(base, method)
        assert [stage.segments for stage in other.stages] == [segments]
        assert sum(stage.steps for stage in other.stages) == total
        assert (other.batch, other.guidance, other.lora, other.data) == (
            base.batch,
            base.guidance,
            base.lora,
            base.data,
        )
        grids = {stage.segments: stage.points for stage in base.stages}
        assert [stage.points for stage in other.stages] == [grids[segments]]
    assert [(s.segments, s.points) for s in base.stages] == [(8, 16), (4, 16), (2, 8), (1, 8)]
    assert [(s.segments, s.points) for s in sd15().stages] == [(8, 40), (4, 40), (2, 50), (1, 50)]
    for stages in (base.stages, sd15().stages):
        mse, adv = zip(*((s.w_mse, s.w_adv) for s in stages), strict=True)
        assert sorted(mse, reverse=True) == list(mse)
        assert sorted(adv) == list(adv)

"""One UNet, four roles: each role's pass is what peft's public switches give, and gradients reach the student alone."""

import pytest
import torch

from hypersd_export.errors import ModelError
from tests.train.small_unet import SHAPE, conditioning, small_networks, small_unet
from trainer.batch import Conditioning
from trainer.distill.config import LoraConfig, Teacher
from trainer.distill.networks import ADAPTERS, Networks, Role

X = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
T = torch.tensor([999, 400, 0])


@pytest.fixture(scope="module")
def networks():
    return small_networks()


@pytest.fixture(scope="module")
def clean():
    return small_unet().to(memory_format=torch.channels_last)


def forward(unet, text):
    return unet(X.contiguous(memory_format=torch.channels_last), T, text.states, return_dict=False)[0]


@torch.no_grad()
def test_base_is_the_clean_unet_and_every_role_is_what_pefts_switches_give(networks, clean):
    text = conditioning(3)
    torch.testing.assert_close(networks.frozen(Role.BASE, X, T, text), forward(clean, text), rtol=0, atol=1e-6)
    ours = {role: networks.frozen(role, X, T, text) for role in ADAPTERS}
    for role in ADAPTERS:
        networks.unet.set_adapter(role.value)
        torch.testing.assert_close(ours[role], forward(networks.unet, text), rtol=0, atol=0)
    assert (ours[Role.STUDENT] - ours[Role.TARGET]).abs().max() > 1e-3
    networks.unet.set_adapter(Role.STUDENT.value)
    torch.testing.assert_close(networks.student(X, T, text), ours[Role.STUDENT], rtol=0, atol=0)


@torch.no_grad()
def test_guidance_is_u_plus_w_times_c_minus_u_in_one_pass(networks, monkeypatch):
    text, empty, w = conditioning(3), conditioning(1, seed=9), torch.tensor([1.0, 3.0, 7.5])
    c = networks.frozen(Role.BASE, X, T, text)
    u = networks.frozen(Role.BASE, X, T, empty.expand(3))
    calls = []
    run = networks.unet.forward
    monkeypatch.setattr(networks.unet, "forward", lambda x, *a, **k: calls.append(len(x)) or run(x, *a, **k))
    guided = networks.frozen(Role.BASE, X, T, text, guidance=w, empty=empty)
    assert calls == [6]
    torch.testing.assert_close(guided, u + w[:, None, None, None] * (c - u), rtol=0, atol=2e-5)


def test_a_fresh_adapter_changes_nothing(clean):
    networks, text = small_networks(random=False), conditioning(3)
    with torch.no_grad():
        for role in ADAPTERS:
            torch.testing.assert_close(networks.frozen(role, X, T, text), forward(clean, text), rtol=0, atol=1e-6)


def test_gradients_reach_the_student_alone(networks):
    assert {p for p in networks.unet.parameters() if p.requires_grad} == set(networks.student_parameters())
    networks.student(X, T, conditioning(3)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in networks.student_parameters())
    assert not [n for n, p in networks.unet.named_parameters() if p.grad is not None and ".student." not in n]
    assert not networks.frozen(Role.STUDENT, X, T, conditioning(3)).requires_grad
    for p in networks.student_parameters():
        p.grad = None


def test_gradient_checkpointing_gives_the_same_gradients(networks):
    def gradients():
        networks.student(X, T, conditioning(3)).square().sum().backward()
        found = [p.grad for p in networks.student_parameters()]
        for p in networks.student_parameters():
            p.grad = None
        return found

    plain = gradients()
    networks.unet.enable_gradient_checkpointing()
    networks.unet.train()
    try:
        again = gradients()
    finally:
        networks.unet.disable_gradient_checkpointing()
        networks.unet.eval()
    for mine, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_ema_and_stage_start():
    networks = small_networks()
    before = {k: v.clone() for k, v in networks.state().items()}
    networks.update_target(0.75)
    after = networks.state()
    for name in (n for n in before if n.startswith("target.")):
        student = before[name.replace("target.", "student.")]
        torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * student)
        torch.testing.assert_close(
            after[name.replace("target.", "teacher.")], before[name.replace("target.", "teacher.")]
        )
    networks.start_stage(Teacher.ORIGINAL)
    state = networks.state()
    key = next(iter(state)).removeprefix("student.")
    assert torch.equal(state[f"target.{key}"], state[f"student.{key}"])
    assert not torch.equal(state[f"teacher.{key}"], state[f"student.{key}"])
    networks.start_stage(Teacher.PREVIOUS)
    assert torch.equal(networks.state()[f"teacher.{key}"], state[f"student.{key}"])


def test_state_is_refused_when_it_does_not_fit(networks):
    state = networks.state()
    with pytest.raises(ModelError, match="do not fit"):
        networks.load_state(dict(list(state.items())[1:]))
    with pytest.raises(ModelError, match="do not fit"):
        small_networks(rank=2).load_state(state)
    with pytest.raises(ModelError, match=r"lora\.modules"):
        Networks.build(
            small_unet(), LoraConfig(modules=("nowhere",)), alphas_cumprod=networks.alphas_cumprod,
            prediction_type=networks.prediction_type,
        )  # fmt: skip


def test_half_base_keeps_the_lora_in_float32():
    networks = small_networks(dtype=torch.bfloat16)
    assert networks.unet.conv_in.weight.dtype == torch.bfloat16
    assert {p.dtype for p in networks.student_parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        out = networks.student(X, T, conditioning(3))
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()


def test_sdxl_time_ids_of_the_prompt_serve_the_empty_prompt_too():
    seen = []

    class Spy:
        dtype = torch.float32

        def __call__(self, x, t, **kwargs):
            seen.append(kwargs)
            return (x,)

    networks = small_networks(random=False)
    networks.unet, spied = Spy(), networks
    text = Conditioning(states=torch.zeros(2, 5, 12), pooled=torch.ones(2, 7), time_ids=torch.arange(12.0).view(2, 6))
    empty = Conditioning(states=torch.zeros(1, 5, 12), pooled=torch.zeros(1, 7), time_ids=torch.zeros(1, 6))
    spied.frozen(Role.BASE, X[:2], T[:2], text, guidance=torch.ones(2), empty=empty)
    added = seen[0]["added_cond_kwargs"]
    assert torch.equal(added["time_ids"], torch.cat([text.time_ids, text.time_ids]))
    assert torch.equal(added["text_embeds"], torch.cat([torch.zeros(2, 7), torch.ones(2, 7)]))

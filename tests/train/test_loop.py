import json

import pytest
import torch
from torch import nn

from hypersd_export.errors import DataError, OptionError
from trainer.checkpoint import load_state, save_state, saved_step
from trainer.config import as_json, override
from trainer.ema import Ema
from trainer.pretrain.loop import Schedule, learning_rate, train
from trainer.pretrain.recipe import builtin, recipe
from trainer.pretrain.vae import psnr, reconstruction_loss, to_uint8


def _schedule(**changes) -> Schedule:
    return Schedule(**{"steps": 12, "lr": 0.05, "warmup": 2, "cooldown": 3, "bf16": False, "save_every": 4, **changes})


def _problem():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def losses(step: int) -> dict[str, torch.Tensor]:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return {"loss": (module(x) - x.sum(1, keepdim=True)).square().mean()}

    return module, losses


def test_learning_rate_warms_up_holds_and_cools_to_nearly_zero():
    schedule = _schedule(lr=1.0, warmup=4, cooldown=3)
    rates = [learning_rate(schedule, step, 9) for step in range(12)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]))


def test_training_lowers_the_loss_and_yields_every_step(tmp_path):
    module, losses = _problem()
    ema = Ema(module, 0.9)
    results = list(train(module, losses, _schedule(steps=60), state=tmp_path / "s.safetensors", ema=ema))
    assert [r.step for r in results] == list(range(60))
    assert results[-1].losses["loss"] < 0.2 * results[0].losses["loss"]


def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(tmp_path):
    schedule = _schedule(steps=10, cooldown=2)
    whole, losses = _problem()
    whole_ema = Ema(whole, 0.9)
    list(train(whole, losses, schedule, state=tmp_path / "whole.safetensors", ema=whole_ema))

    broken, losses = _problem()
    run = train(broken, losses, schedule, state=tmp_path / "broken.safetensors", ema=Ema(broken, 0.9))
    while next(run).step < 6:  # a state was saved before step 4; steps 4 to 6 are lost
        pass
    assert saved_step(tmp_path / "broken.safetensors") == 4
    again, losses = _problem()
    again_ema = Ema(again, 0.9)
    steps = [r.step for r in train(again, losses, schedule, state=tmp_path / "broken.safetensors", ema=again_ema)]
    assert steps == list(range(4, 10))
    for mine, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(again_ema.module.parameters(), whole_ema.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_next_run_of_a_chain_starts_before_the_cool_down(tmp_path):
    module, losses = _problem()
    state = tmp_path / "s.safetensors"
    list(train(module, losses, _schedule(steps=10, cooldown=3), state=state, ema=Ema(module, 0.9)))
    assert saved_step(state) == 7
    longer = [r.step for r in train(module, losses, _schedule(steps=20, cooldown=3), state=state, ema=Ema(module, 0.9))]
    assert longer == list(range(7, 20))


def test_max_minutes_moves_the_cool_down_forward(tmp_path):
    module, losses = _problem()
    schedule = _schedule(steps=100_000, cooldown=3, max_minutes=1e-9)
    results = list(train(module, losses, schedule, state=tmp_path / "s.safetensors", ema=Ema(module, 0.9)))
    assert [r.step for r in results] == [0, 1, 2, 3, 4, 5]
    assert results[-1].lr < results[2].lr


def test_ema_known_answer_and_independence():
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    ema = Ema(module, 0.5)
    nn.init.constant_(module.weight, 3.0)
    ema.update(module)  # decay min(0.5, 2/11)
    torch.testing.assert_close(ema.module.weight, torch.tensor([[1 * 2 / 11 + 3 * 9 / 11]]))
    assert not ema.module.weight.requires_grad
    assert not ema.module.training
    assert module.weight.requires_grad


def test_damaged_or_foreign_states_are_one_line_errors(tmp_path):
    module, _ = _problem()
    optimizer = torch.optim.AdamW(module.parameters())
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"<html>")
    with pytest.raises(DataError, match="cannot resume"):
        load_state(bad, module=module, optimizer=optimizer, ema=None)
    save_state(
        bad,
        module=nn.Linear(2, 2),
        optimizer=torch.optim.AdamW([nn.Parameter(torch.zeros(1))]),
        ema=None,
        meta={"step": 1},
    )
    with pytest.raises(DataError, match="cannot resume") as caught:
        load_state(bad, module=module, optimizer=optimizer, ema=None)
    assert "\n" not in str(caught.value)


def test_override_reaches_nested_values_and_keeps_the_rest():
    config = override(builtin(), ["unet.steps=7", "guidance=4", "vae.betas=[0.5, 0.9]", "unet.bf16=false"])
    assert (config.unet.steps, config.guidance, config.vae.betas, config.unet.bf16) == (7, 4.0, (0.5, 0.9), False)
    assert config.unet.lr == builtin().unet.lr
    assert json.loads(json.dumps(as_json(config))) == as_json(config)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "no '='"), ("unet.stepz=1", "unknown key 'stepz'; there are: steps"), ("unet=3", "is a group"),
        ("seed.a=3", "has no parts"), ("seed=x", "not a int"), ("seed=true", "not a int"),
        ("unet.steps=1.5", "not a int"),
    ],
)  # fmt: skip
def test_override_refuses(assignment, message):
    with pytest.raises(OptionError, match=message):
        override(builtin(), [assignment])


def test_unknown_recipe():
    with pytest.raises(OptionError, match="there are: builtin, smoke"):
        recipe("sdxl9")


def test_rounding_to_8_bits_and_psnr_known_answers():
    assert to_uint8(torch.tensor([-1.5, -1.0, 0.0, 0.004, 1.0, 9.0])).tolist() == [0, 0, 128, 128, 255, 255]
    pictures = torch.zeros(3, 3, 4, 4)

    class Off:
        def encode(self, p):
            return type("E", (), {"latent_dist": type("D", (), {"mode": lambda self: p})()})()

        def decode(self, z):
            return type("O", (), {"sample": z + 32 / 255 * 2})()

    # 16 grey levels apart would wrap in uint8 arithmetic; 32 apart is 20·log10(255/32)
    assert psnr(Off(), pictures) == pytest.approx(18.027, abs=2e-3)


def test_reconstruction_loss_known_answer():
    loss = reconstruction_loss(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5))
    assert float(loss) == pytest.approx(0.5 + 2 * 0.25)

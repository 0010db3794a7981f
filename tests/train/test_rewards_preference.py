"""The preference: degradations that lower what they should, a network that learns from pairs, its file, its command."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from hypersd_export.diffusion import FewStepPlan, Guidance, Solver, initial_noise, run
from hypersd_export.errors import DataError, ModelError
from hypersd_export.model.base import open_base
from trainer.base import open_training_base
from trainer.cli import app
from trainer.config import override
from trainer.pretrain.degrade import DEGRADATIONS, degrade
from trainer.pretrain.drawings import read_drawings
from trainer.pretrain.preference import Pairs, PreferenceConfig, PreferenceTraining, Teacher, accuracy
from trainer.pretrain.scenes import SceneRenderer, draw_specs, held_out_mask
from trainer.rewards.preference import PreferenceNet, PreferenceReward, save_preference
from trainer.rewards.registry import Kind, RewardConfig, open_rewards

QUICK = (
    "pairs=12", "held_out=6", "steps=3", "few_steps=1", "width=8", "batch=8", "schedule.steps=6", "schedule.cooldown=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def drawings():
    generator = torch.Generator().manual_seed(3)
    return SceneRenderer(read_drawings(), 32)(draw_specs(24, ~held_out_mask(), generator), generator)


@pytest.mark.parametrize("kind", range(len(DEGRADATIONS)), ids=DEGRADATIONS)
def test_each_way_changes_every_picture_and_keeps_its_range(drawings, kind):
    worse = degrade(drawings, torch.Generator().manual_seed(0), kind)
    assert worse.shape == drawings.shape
    assert float(worse.abs().max()) <= 1
    changed = (worse - drawings).square().flatten(1).mean(1).sqrt()
    assert float(changed.min()) > 0.005
    assert float(changed.max()) < 0.8
    assert torch.equal(worse, degrade(drawings, torch.Generator().manual_seed(0), kind))


def test_blur_and_noise_do_what_they_say(drawings):
    def edges(pictures):
        return pictures.diff(dim=3).abs().mean((1, 2, 3))

    blurred, noisy = (degrade(drawings, torch.Generator().manual_seed(1), kind) for kind in (0, 1))
    assert (edges(blurred) < edges(drawings)).all()
    assert (edges(noisy) > edges(drawings)).all()
    # a blur moves no brightness about: the mean of a picture with wide flat margins stays
    flat = torch.zeros(1, 3, 32, 32)
    flat[..., 14:18, 14:18] = 1.0
    torch.testing.assert_close(degrade(flat, torch.Generator().manual_seed(0), 0).sum(), flat.sum(), rtol=1e-4, atol=0)


def test_the_teacher_is_the_base_sampled_by_ddim_with_guidance(tiny_base):
    base = open_training_base(str(tiny_base))
    teacher = Teacher(base, 2.0)
    plan = FewStepPlan(solver=Solver.DDIM, num_steps=2, guidance=Guidance.of(2.0))
    unet, vae, encoder = base.load_unet(torch.float32), base.load_vae(torch.float32), base.prompt_encoder(torch.float32)
    text, empty = encoder(["a cat"], size=(16, 16)).states, encoder.empty().states

    @torch.no_grad()
    def net(x, t):
        x = torch.as_tensor(x)
        u, c = (unet(x, int(t), states, return_dict=False)[0] for states in (empty, text))
        return u + 2.0 * (c - u)

    noise = torch.from_numpy(initial_noise(seed=6, index=0, shape=(4, 4, 4)))[None]
    with torch.no_grad():
        latents = run(plan.table(), net, noise)
        expected = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    made = teacher(["a dog", "a cat"], 2, 5)[1:]
    torch.testing.assert_close(made, expected, rtol=0, atol=0.05)  # the UNet runs in bfloat16


def test_it_learns_which_is_better_from_pairs(tiny_base, tmp_path):
    """From a coin's log 2; clean against blurred on drawings that it has not seen, after three seconds of training."""
    config = override(PreferenceConfig(base=str(tiny_base)), [
        *QUICK, "held_out=64", "schedule.steps=100", "schedule.cooldown=50", "schedule.lr=5e-3",
        "batch=32", "schedule.bf16=false", "schedule.warmup=5", "schedule.ema_decay=0.9",
    ])  # fmt: skip
    training = PreferenceTraining(config, tmp_path)
    losses = [result.losses["loss"] for result in training.run()]
    assert sum(losses[:3]) / 3 == pytest.approx(math.log(2), abs=0.05)
    assert sum(losses[-20:]) / 20 < 0.5
    assert training.figures["degraded by blur"] >= 0.75  # of 64, four deviations above a coin
    reward = PreferenceReward(tmp_path / "preference.safetensors")
    assert reward.size_px == 16
    record = json.loads((tmp_path / "preference.json").read_text())
    assert record["held_out_accuracy"] == training.figures


def test_a_finished_one_is_not_trained_again_and_other_pairs_are_refused(tiny_base, tmp_path):
    config = override(PreferenceConfig(base=str(tiny_base)), QUICK)
    assert len(list(PreferenceTraining(config, tmp_path).run())) == 6
    again = PreferenceTraining(config, tmp_path)
    assert list(again.run()) == []
    assert set(again.figures) == {"teacher", *(f"degraded by {name}" for name in DEGRADATIONS)}
    with pytest.raises(DataError, match=r"pairs-seen.safetensors: the pairs of another configuration; delete it"):
        list(PreferenceTraining(override(config, ["few_steps=2"]), tmp_path).run())


def test_accuracy_counts_the_pairs_in_their_order():
    def brightness(pictures):
        return pictures.mean((1, 2, 3))

    rising = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    assert accuracy(brightness, Pairs(rising, rising - 0.1)) == 1
    assert accuracy(brightness, Pairs(rising, rising.flip(0))) == 0.5
    assert accuracy(brightness, Pairs(rising, rising)) == 0


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    net = PreferenceNet(8)
    save_preference(tmp_path / "p.safetensors", net, width=8, size_px=32, preferred=torch.tensor([1.0, 3.0]))
    return tmp_path / "p.safetensors", net


def test_the_file_gives_the_same_scores_from_the_mean_of_the_preferred(saved, drawings):
    path, net = saved
    (reward,) = open_rewards([RewardConfig(kind=Kind.PREFERENCE, model=str(path))])
    with torch.no_grad():
        expected = (net(drawings) - 2.0) / 2**0.5
    torch.testing.assert_close(reward(drawings, [""] * 24), expected, rtol=0, atol=3e-3)  # float16 weights
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(drawings, [""] * 24), reward(drawings, [""] * 24).float())


def test_its_gradient_reaches_the_pictures_and_is_right(saved):
    reward = PreferenceReward(saved[0])
    reward._net.double()
    pixels = torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels.requires_grad_()
    (gradient,) = torch.autograd.grad(reward._net(pixels).sum(), pixels)
    direction = torch.randn(pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        numeric = (reward._net(pixels + 1e-5 * direction) - reward._net(pixels - 1e-5 * direction)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-5)
    assert not any(p.requires_grad for p in reward._net.parameters())


def test_what_is_no_preference_is_refused(tmp_path, saved):
    with pytest.raises(ModelError, match="no such preference; make one with `hypersd-train preference --out DIR`"):
        PreferenceReward(tmp_path / "none.safetensors")
    weights = next((open_base("builtin").source / "vae").glob("*.safetensors"))
    with pytest.raises(ModelError, match="not a preference"):
        PreferenceReward(weights)


def test_the_command_prints_what_it_would_do(tmp_path):
    result = CliRunner().invoke(app, ["preference", "--out", str(tmp_path / "x"), "--set", "pairs=5", "--dry-run"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["pairs"] == 5
    assert not (tmp_path / "x").exists()


def test_the_command_trains_and_says_how_well(tmp_path, tiny_base):
    given = [word for value in (*QUICK, f"base={tiny_base}") for word in ("--set", value)]
    result = CliRunner().invoke(app, ["preference", "--out", str(tmp_path), *given])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert sum(line.startswith("held-out pairs, ") for line in lines) == 1 + len(DEGRADATIONS)
    assert lines[-1] == f"wrote {tmp_path / 'preference.safetensors'}"

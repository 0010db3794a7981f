"""The shipped model: real weights, in the exact formats, and no special case anywhere."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from hypersd_export import builtin
from hypersd_export.cli import app
from hypersd_export.diffusion import FewStepPlan, Guidance, Solver, initial_noise, run
from hypersd_export.model.base import open_base
from trainer.pretrain.concepts import BACKGROUNDS


def test_it_is_small_and_names_no_machine():
    files = [path for path in builtin.model_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40_000_000
    for path in builtin.model_dir().rglob("*config.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8")


def test_its_format_is_stable_diffusion_s():
    base = open_base("builtin")
    assert str(base.family) == "sd15"
    assert base.vae_scale_factor == 4
    assert base.latent_channels == 8
    assert base.tokenizer.max_length == 32


def test_without_options_the_export_is_the_teacher_of_the_card(tmp_path):
    card = builtin.card()
    result = CliRunner().invoke(app, ["--dry-run", "--lora", "none", "--out", str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)["plans"]
    plan = FewStepPlan.from_json(entry["plan"])
    assert (plan.solver, plan.num_steps, plan.timestep_spacing) == (Solver.DDIM, card["steps"], "trailing")
    assert plan.guidance == Guidance.of(card["guidance"])
    assert plan.net_timesteps()[0] == 999


@pytest.fixture(scope="module")
def pictures():
    """Three prompts by the torch parts and the table: uint8 [3, 32, 32, 3]."""
    import torch
    from transformers import CLIPTokenizer

    base = open_base("builtin")
    text, unet, vae = (load(torch.float32) for load in (base.load_text_encoder, base.load_unet, base.load_vae))
    tokenizer = CLIPTokenizer.from_pretrained(builtin.model_dir() / "tokenizer")
    prompts = [f"a red apple on a {colour} background" for colour in ("blue", "yellow", "black")]
    ids = tokenizer(["", *prompts], padding="max_length", return_tensors="pt").input_ids
    noise = np.stack([initial_noise(seed=3, index=i, shape=(8, 8, 8)) for i in range(3)])
    plan = FewStepPlan(solver=Solver.DDIM, num_steps=10, guidance=Guidance.of(builtin.card()["guidance"]))
    with torch.no_grad():
        states = text(ids)[0]
        context = torch.cat([states[:1].expand(3, -1, -1), states[1:]])

        def net(x, t):
            uncond, cond = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            return uncond + plan.guidance.scale * (cond - uncond)

        latents = run(plan.table(), net, torch.from_numpy(noise))
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("index", "colour"), [(0, "blue"), (1, "yellow"), (2, "black")])
def test_it_draws_the_background_it_is_told(pictures, index, colour):
    border = np.concatenate([pictures[index][0], pictures[index][-1], pictures[index][:, 0], pictures[index][:, -1]])
    nearest = min(BACKGROUNDS, key=lambda name: np.abs(np.median(border, 0) - BACKGROUNDS[name]).sum())
    assert nearest == colour


def test_what_it_draws_there_is_red(pictures):
    centres = pictures[:, 10:24, 10:24].reshape(3, -1, 3).mean(1)
    assert (centres[:, 0] > 1.5 * centres[:, 2]).all()

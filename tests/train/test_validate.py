"""Validation shows the pictures that the exported LoRA gives, and leaves a run's randomness alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hypersd_export.diffusion import FewStepPlan, Guidance, GuidanceKind, PredictionType, Solver
from hypersd_export.errors import OptionError, PlanError
from hypersd_export.model.fuse import fuse
from hypersd_export.model.lora import read_lora
from hypersd_export.verify import reference
from trainer.base import open_training_base
from trainer.distill.config import LoraConfig
from trainer.distill.lora_file import Origin, save_student
from trainer.distill.networks import Networks, Role
from trainer.distill.validate import BUILTIN_PROMPTS, Validator, decode, picture_grid, plan_for, sample
from trainer.pretrain.concepts import BACKGROUNDS, CONCEPTS, STYLES, caption

PROMPTS = ("cat", "dog on a cat", "a", "", "dog")
SHAPE = (4, 4, 4)
LORA = LoraConfig(rank=2, alpha=4.0)
DDIM = FewStepPlan(solver=Solver.DDIM, num_steps=2)
TCD = FewStepPlan(solver=Solver.TCD, num_steps=3, eta=0.3)
LCM = FewStepPlan(solver=Solver.LCM, num_steps=4)
GUIDED = FewStepPlan(solver=Solver.DDIM, num_steps=2, guidance=Guidance.of(3.0))


@pytest.fixture(scope="module")
def base(tiny_base):
    return open_training_base(str(tiny_base))


@pytest.fixture(scope="module")
def networks(base):
    unet = base.load_unet(torch.float32)
    networks = Networks.build(
        unet, LORA, alphas_cumprod=base.alphas_cumprod, prediction_type=base.prediction_type
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    state = networks.state()
    networks.load_state({k: (torch.randn(v.shape, generator=generator) * 0.2).half().float() for k, v in state.items()})
    return networks


@pytest.fixture(scope="module")
def validator(base):
    return Validator(base, PROMPTS, steps=(1, 2, 4), first_seed=7, batch=2, columns=3)


@pytest.mark.parametrize("plan", [DDIM, TCD, LCM, GUIDED], ids=["ddim", "tcd", "lcm", "guided"])
def test_pictures_are_those_of_the_exported_lora(base, networks, validator, plan, tmp_path):
    """Against `hypersd_export.verify.reference`, which every exported artifact is held to, with the LoRA fused."""
    path = tmp_path / "student.safetensors"
    save_student(path, networks, LORA, Origin(plans=[plan], base_name="tiny", base_digest="0", steps=1))
    unet = base.load_unet(torch.float32)
    fuse(unet, read_lora(path).components["unet"], scale=1.0, component="unet")
    encoder, vae = base.prompt_encoder(torch.float32), base.load_vae(torch.float32)
    ours = validator.pictures(networks, plan)
    for i, prompt in enumerate(PROMPTS):
        cond, uncond = (
            {"encoder_hidden_states": encoder([text], size=(16, 16)).states.numpy()} for text in (prompt, "")
        )
        latents = reference.denoise(
            unet, plan.table(), plan.guidance, cond=cond, uncond=uncond if plan is GUIDED else None,
            seed=7 + i, shape=SHAPE,
        )  # fmt: skip
        want = reference.decode(vae, reference.unscale(vae, latents)).clip(-1, 1)
        np.testing.assert_allclose(ours[i].numpy(), want[0], atol=2e-5)


def test_grid_and_plans_and_order(networks, validator):
    shown = validator(networks, [DDIM, TCD])
    assert list(shown.pictures) == [1, 2, 4]
    assert shown.figures == {}  # no CLIP fits the tiny base
    assert shown.grid.size == (3 * 96, 3 * 96)  # 3 columns of the 5 prompts, 16 px enlarged six times
    pixels = reference.to_uint8(shown.pictures[2].numpy())
    tile = np.asarray(shown.grid)[96:192, 96:192]
    assert np.array_equal(tile[::6, ::6], pixels[1])
    assert np.array_equal(tile[5::6, 5::6], pixels[1])
    assert torch.equal(shown.pictures[2], validator.pictures(networks, DDIM))
    assert torch.equal(shown.pictures[4], validator.pictures(networks, DDIM.with_steps(4)))
    assert torch.equal(validator(networks, [DDIM, TCD]).pictures[4], shown.pictures[4])


def test_a_plan_is_found_by_its_steps_or_made_of_the_first():
    assert plan_for([DDIM, TCD], 3) is TCD
    assert plan_for([DDIM, TCD], 8) == FewStepPlan(solver=Solver.DDIM, num_steps=8)
    with pytest.raises(PlanError, match="at least one plan"):
        plan_for([], 1)


def test_no_random_number_is_used_up_and_no_gradient_left(networks, validator):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    validator(networks, [LCM])
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in networks.unet.parameters())
    out = networks.student(torch.zeros(1, *SHAPE), torch.tensor([5]), validator._empty)
    assert out.requires_grad  # the student is the active adapter again


def test_roles_differ_and_the_batch_does_not_matter(base, networks, validator):
    text, shape = validator._conditioning, SHAPE
    student = sample(networks, DDIM, text, range(5), shape)
    assert (student - sample(networks, DDIM, text, range(5), shape, role=Role.TARGET)).abs().max() > 1e-3
    one = sample(networks, DDIM, text.rows(slice(3, 4)), [3], shape)
    torch.testing.assert_close(one[0], student[3], rtol=0, atol=1e-5)


def test_clip_score_is_the_mean_of_the_reward(base, networks):
    seen = []

    def reward(images, prompts):
        seen.append((images.shape, tuple(prompts)))
        return images.mean((1, 2, 3))

    shown = Validator(base, PROMPTS, latent_shape=SHAPE, steps=(1, 2), reward=reward)(networks, [DDIM])
    assert set(shown.figures) == {"clip_score/1_steps", "clip_score/2_steps"}
    assert shown.figures["clip_score/2_steps"] == pytest.approx(float(shown.pictures[2].mean()), abs=1e-6)
    assert seen == [((5, 3, 16, 16), PROMPTS)] * 2


def test_the_builtin_base_is_looked_at_by_its_own_clip(base, networks):
    """The tiny pipeline under the built-in name: 16 px pictures are enlarged to the 32 that the CLIP takes."""
    from trainer.rewards.clip import ClipReward

    named = replace(base, model=replace(base.model, name="builtin"))
    validator = Validator(named, PROMPTS, latent_shape=SHAPE, steps=(1,))
    assert isinstance(validator.reward, ClipReward)
    shown = validator(networks, [DDIM])
    want = validator.reward(shown.pictures[1], PROMPTS).mean()
    assert shown.figures == {"clip_score/1_steps": pytest.approx(float(want))}


def test_latents_are_decoded_with_factor_and_shift():
    class Vae:
        config = type("C", (), {"scaling_factor": 0.5, "shift_factor": 0.1})
        device, dtype = torch.device("cpu"), torch.float32

        def decode(self, x):
            return type("D", (), {"sample": x[:, :3]})

    latents = torch.tensor([0.2, -3.0, 0.0, 9.0]).view(1, 4, 1, 1)
    torch.testing.assert_close(decode(Vae(), latents).flatten(), torch.tensor([0.5, -1.0, 0.1]))


def test_large_pictures_are_shown_as_they_are():
    pictures = torch.zeros(2, 3, 100, 50)
    assert picture_grid([pictures], columns=12).size == (100, 100)


def test_bad_input_is_one_line(base, networks, validator):
    with pytest.raises(OptionError, match="0 prompts and 4 step counts"):
        Validator(base, (), latent_shape=SHAPE)
    with pytest.raises(PlanError, match="cfg with the empty prompt"):
        sample(networks, GUIDED, validator._conditioning, range(5), SHAPE)
    embedded = FewStepPlan(solver=Solver.LCM, num_steps=1, guidance=Guidance(kind=GuidanceKind.EMBEDDED, scale=8.0))
    with pytest.raises(PlanError, match="embedded"):
        sample(networks, embedded, validator._conditioning, range(5), SHAPE)
    other = FewStepPlan(solver=Solver.DDIM, num_steps=1, prediction_type=PredictionType.V_PREDICTION)
    with pytest.raises(PlanError, match="the networks' prediction is epsilon"):
        sample(networks, other, validator._conditioning, range(5), SHAPE)


def test_builtin_prompts_are_captions_that_the_model_was_trained_on_the_words_of():
    known = {caption(c, s, b) for c in CONCEPTS for s in (*STYLES, None) for b in (*BACKGROUNDS, None)}
    assert set(BUILTIN_PROMPTS) <= known

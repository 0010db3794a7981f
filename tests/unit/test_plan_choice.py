"""Flags > LoRA metadata > file name > card > an error that asks; and the reason is told."""

from dataclasses import replace

import pytest

from hypersd_export.diffusion import FewStepPlan, Guidance, GuidanceKind, PredictionType, Solver, plans_to_metadata
from hypersd_export.errors import OptionError, PlanError
from hypersd_export.plan_choice import BaseClue, LoraClue, choose_plans, describe, lora_origin
from hypersd_export.spec import PlanFlags

DDIM_CONFIG = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    "prediction_type": "epsilon", "timestep_spacing": "leading",
}  # fmt: skip
SD15 = BaseClue(family="sd15", names=("my-model",), scheduler_config=DDIM_CONFIG)
CARD = {"steps": 25, "guidance": 3.0}


def lora(name: str, *plans: FewStepPlan) -> LoraClue:
    return LoraClue(name=name, path=f"/loras/{name}", plan_json=plans_to_metadata(plans) if plans else None)


def default(flags: PlanFlags | None = None, base: BaseClue = SD15, loras=()):
    return choose_plans(flags or PlanFlags(), base=base, loras=loras).default


def test_nothing_known_is_an_error_that_asks():
    with pytest.raises(OptionError, match="pass --steps N"):
        default()


def test_flags_alone_take_the_base_s_scheduler_and_say_so():
    entry = default(PlanFlags(steps=(12,)))
    assert (entry.plan.solver, entry.plan.timestep_spacing, entry.plan.guidance) == (
        Solver.DDIM, "leading", Guidance.of(7.5),
    )  # fmt: skip
    assert entry.source == "flags, DDIMScheduler of the base, guidance 7.5 as diffusers' default"


def test_a_multistep_scheduler_of_the_base_is_refused_by_name():
    pndm = BaseClue(family="sd15", names=(), scheduler_config={**DDIM_CONFIG, "_class_name": "PNDMScheduler"})
    with pytest.raises(PlanError, match="PNDM"):
        default(PlanFlags(steps=(12,)), base=pndm)
    assert default(PlanFlags(steps=(12,), scheduler="euler"), base=pndm).plan.solver is Solver.EULER


def test_a_file_name_is_enough():
    entry = default(loras=[lora("Hyper-SD15-4steps-lora.safetensors")])
    assert entry.plan.net_timesteps().tolist() == [999, 749, 499, 249]
    assert entry.plan.guidance.kind is GuidanceKind.NONE
    assert entry.source == "preset Hyper-SD15-4steps-lora (file name Hyper-SD15-4steps-lora.safetensors)"


def test_metadata_goes_before_the_file_name_and_flags_before_both():
    told = FewStepPlan(solver=Solver.TCD, num_steps=6, eta=0.3)
    files = [lora("Hyper-SD15-4steps-lora.safetensors", told)]
    assert default(loras=files).plan == told
    entry = default(PlanFlags(eta=0.7, guidance=2.0, prediction_type="v-prediction"), loras=files)
    assert (entry.plan.num_steps, entry.plan.eta, entry.plan.guidance.scale) == (6, 0.7, 2.0)
    assert entry.plan.prediction_type is PredictionType.V_PREDICTION
    assert entry.source.endswith("with --eta 0.7 --guidance 2.0 --prediction-type v-prediction")


def test_the_card_comes_last_and_makes_the_spacing_trailing():
    base = BaseClue(family="sd15", names=(), scheduler_config=DDIM_CONFIG, card=CARD)
    entry = default(base=base)
    assert (entry.plan.num_steps, entry.plan.timestep_spacing, entry.plan.guidance.scale) == (25, "trailing", 3.0)
    assert default(base=base, loras=[lora("Hyper-SD15-2steps-lora.safetensors")]).steps == 2
    assert default(PlanFlags(steps=(8,)), base=base).source == "card of the built-in model, with --steps 8"


def test_several_step_counts_are_several_tables_the_first_is_the_default():
    plans = choose_plans(PlanFlags(steps=(1, 2, 8)), base=SD15, loras=[lora("Hyper-SD15-1step-lora.safetensors")])
    assert [entry.steps for entry in plans.entries] == [1, 2, 8]
    assert plans.default.plan.eta == 1.0
    assert plans.for_steps(8).table.rows[0].t == 999


def test_explicit_timesteps_set_the_count():
    entry = default(PlanFlags(timesteps=(800, 400)), loras=[lora("Hyper-SD15-1step-lora.safetensors")])
    assert (entry.steps, entry.plan.net_timesteps().tolist()) == (2, [800, 400])
    assert "--timesteps 800,400" in entry.source


def test_a_scheduler_without_eta_drops_that_of_the_preset():
    assert default(PlanFlags(scheduler="euler"), loras=[lora("Hyper-SD15-1step-lora.safetensors")]).plan.eta == 0.0


def test_two_loras_that_disagree_are_an_error_and_two_that_agree_are_not():
    four, eight = lora("Hyper-SD15-4steps-lora.safetensors"), lora("Hyper-SD15-8steps-lora.safetensors")
    with pytest.raises(OptionError, match="have different plans"):
        default(loras=[four, eight])
    assert default(loras=[four, lora("style.safetensors")]).steps == 4
    assert default(loras=[four, four]).steps == 4


def test_a_lora_of_another_family_and_one_that_is_a_unet_are_refused_in_one_line():
    with pytest.raises(OptionError, match="the base is of family sd15"):
        lora_origin(lora("Hyper-SDXL-4steps-lora.safetensors"), "sd15")
    with pytest.raises(OptionError, match="pass it as --unet"):
        lora_origin(lora("Hyper-SDXL-1step-Unet.safetensors"), "sdxl")
    for name in ("Hyper-SD3-4steps-CFG-lora.safetensors", "Hyper-FLUX.1-dev-8steps-lora.safetensors"):
        with pytest.raises(OptionError, match="cannot be exported yet"):
            lora_origin(lora(name), "sd15")


def test_a_unet_s_name_brings_its_plan():
    base = BaseClue(family="sdxl", names=("Hyper-SDXL-1step-Unet.safetensors",), scheduler_config=DDIM_CONFIG)
    assert default(base=base).plan.net_timesteps().tolist() == [800]


def test_embedded_guidance_is_a_constant_and_not_a_second_branch():
    base = BaseClue(family="sd15", names=(), scheduler_config=DDIM_CONFIG, embeds_guidance=True)
    entry = default(PlanFlags(steps=(4,), scheduler="lcm", guidance=8.0), base=base)
    assert entry.plan.guidance == Guidance(kind=GuidanceKind.EMBEDDED, scale=8.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (PlanFlags(steps=(4,), scheduler="dpmpp"), "--scheduler dpmpp: not one-step; choose from ddim"),
        (PlanFlags(steps=(4,), prediction_type="noise"), "--prediction-type noise: choose from epsilon"),
    ],
)
def test_unknown_names(flags, message):
    with pytest.raises(OptionError, match=message):
        default(flags)


def test_describe():
    assert describe(FewStepPlan(solver=Solver.DDIM, num_steps=1)) == "1 step of ddim, eta 0, epsilon, no guidance"
    plan = FewStepPlan(solver=Solver.LCM, num_steps=1, timesteps=(800,), guidance=Guidance.of(2.5))
    assert describe(plan) == "1 step of lcm at 800, epsilon, guidance 2.5"


def test_apples_scheduler_is_a_plan_of_up_to_three_steps():
    files = [lora("Hyper-SD15-1step-lora.safetensors")]  # TCD with fresh noise
    entry = default(PlanFlags(steps=(2,), scheduler="apple-dpmpp"), loras=files)
    assert (entry.plan.solver, entry.plan.timesteps, entry.plan.eta) == (Solver.DDIM, (999, 500), 0.0)
    assert entry.plan.set_alpha_to_one
    assert entry.source.endswith("with --steps 2 --scheduler apple-dpmpp")
    alone = default(PlanFlags(steps=(3, 1), scheduler="apple_dpmpp", guidance=2.0))
    assert (alone.plan.timesteps, alone.plan.guidance) == ((999, 666, 333), Guidance.of(2.0))
    with pytest.raises(PlanError, match="steps 4: apple-dpmpp has 1 to 3"):
        default(PlanFlags(steps=(4,), scheduler="apple-dpmpp"))
    for flags in (PlanFlags(steps=(1,), eta=0.5), PlanFlags(timesteps=(800,))):
        with pytest.raises(OptionError, match=r"^--scheduler apple-dpmpp with --(eta|timesteps): it has its own"):
            default(replace(flags, scheduler="apple-dpmpp"))

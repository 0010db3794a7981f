"""Which plan an export gets: flags > the LoRA's metadata > a preset's file name > the card > an error that asks."""

from dataclasses import replace

import pytest

from hypersd_export.diffusion import (
    FewStepPlan,
    Guidance,
    GuidanceKind,
    PredictionType,
    Solver,
    TimestepSpacing,
    plans_to_metadata,
)
from hypersd_export.errors import OptionError, PlanError
from hypersd_export.plan_choice import BaseClue, LoraClue, choose_plans, describe, lora_origin
from hypersd_export.spec import PlanFlags

DDIM = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
BASE = BaseClue(family="sd15", names=("some/model",), scheduler_config=DDIM)
CARD = replace(BASE, card={"steps": 25, "guidance": 4.0})
TCD = FewStepPlan(solver=Solver.TCD, num_steps=4, eta=0.3)


def lora(name: str, *plans: FewStepPlan, folder: str = "/loras") -> LoraClue:
    metadata = plans_to_metadata(plans) if plans else None
    return LoraClue(name=name, path=f"{folder}/{name}", plan_json=metadata)


def chosen(flags=None, *, base=BASE, loras=()):
    entries = choose_plans(flags or PlanFlags(), base=base, loras=loras).entries
    return [(entry.plan, entry.source) for entry in entries]


def test_the_metadata_of_a_lora_is_its_plan_and_beats_its_file_name():
    assert chosen(loras=[lora("Hyper-SD15-8steps-lora.safetensors", TCD)]) == [
        (TCD, "metadata of Hyper-SD15-8steps-lora.safetensors")
    ]


def test_a_list_of_plans_becomes_several_entries_the_first_the_default():
    two = replace(TCD, num_steps=2)
    assert [plan for plan, _ in chosen(loras=[lora("a.safetensors", TCD, two)])] == [TCD, two]
    plan, source = chosen(PlanFlags(steps=(2,)), loras=[lora("a.safetensors", TCD, two)])[0]
    assert plan == two
    assert source == "metadata of a.safetensors, with --steps 2"


def test_the_file_name_of_a_preset():
    [(plan, source)] = chosen(loras=[lora("Hyper-SD15-4steps-lora.safetensors")])
    assert (plan.solver, plan.num_steps, plan.guidance.kind) == (Solver.DDIM, 4, GuidanceKind.NONE)
    assert source == "preset Hyper-SD15-4steps-lora (file name Hyper-SD15-4steps-lora.safetensors)"


def test_a_generic_file_name_is_looked_up_by_its_folder():
    clue = lora("pytorch_lora_weights.safetensors", folder="/x/lcm-lora-sdv1-5")
    [(plan, source)] = chosen(loras=[clue])
    assert plan.solver is Solver.LCM
    assert "lcm-lora-sdv1-5" in source


def test_flags_override_single_fields_and_the_reason_names_both():
    flags = PlanFlags(steps=(1, 8), scheduler="tcd", eta=0.5, guidance=3.0, prediction_type="v-prediction")
    plans = chosen(flags, loras=[lora("Hyper-SD15-4steps-lora.safetensors")])
    assert [plan.num_steps for plan, _ in plans] == [1, 8]
    plan, source = plans[0]
    assert (plan.solver, plan.eta, plan.guidance) == (Solver.TCD, 0.5, Guidance.of(3.0))
    assert plan.prediction_type is PredictionType.V_PREDICTION
    assert source.endswith("with --steps 1 --scheduler tcd --eta 0.5 --guidance 3.0 --prediction-type v-prediction")


def test_a_solver_without_eta_drops_the_plans_eta():
    [(plan, _)] = chosen(PlanFlags(scheduler="lcm"), loras=[lora("a.safetensors", TCD)])
    assert (plan.solver, plan.eta) == (Solver.LCM, 0.0)
    with pytest.raises(PlanError, match="eta"):
        chosen(PlanFlags(scheduler="euler", eta=0.5), loras=[lora("a.safetensors", TCD)])


def test_explicit_timesteps_set_the_step_count():
    [(plan, source)] = chosen(PlanFlags(timesteps=(999, 499)), loras=[lora("a.safetensors", TCD)])
    assert (plan.num_steps, plan.timesteps) == (2, (999, 499))
    assert source == "metadata of a.safetensors, with --timesteps 999,499"
    with pytest.raises(PlanError, match="fall strictly"):
        chosen(PlanFlags(timesteps=(499, 999)), loras=[lora("a.safetensors", TCD)])


def test_a_style_lora_without_a_plan_takes_the_other_ones():
    style = lora("style.safetensors")
    assert lora_origin(style, "sd15") is None
    assert [plan for plan, _ in chosen(loras=[style, lora("a.safetensors", TCD)])] == [TCD]


def test_two_loras_with_different_plans_are_an_error_and_with_one_plan_are_not():
    first, second = lora("a.safetensors", TCD), lora("b.safetensors", replace(TCD, eta=0.0))
    with pytest.raises(OptionError, match=r"--lora a.safetensors and --lora b.safetensors have different plans"):
        chosen(loras=[first, second])
    assert len(chosen(loras=[first, lora("c.safetensors", TCD)])) == 1


def test_presets_that_cannot_be_exported_are_refused_by_name():
    with pytest.raises(OptionError, match="Hyper-SD3-4steps-CFG-lora"):
        chosen(loras=[lora("Hyper-SD3-4steps-CFG-lora.safetensors")])
    with pytest.raises(OptionError, match=r"FLUX is a transformer"):
        chosen(loras=[lora("Hyper-FLUX.1-dev-8steps-lora.safetensors")])
    with pytest.raises(OptionError, match=r"\(sdxl\), and the base is of family sd15"):
        chosen(loras=[lora("Hyper-SDXL-4steps-lora.safetensors")])


def test_a_whole_unet_is_no_lora_and_gives_its_plan_as_the_unet():
    with pytest.raises(OptionError, match="pass it as --unet"):
        chosen(loras=[lora("LCM_Dreamshaper_v7.safetensors")])
    base = replace(BASE, names=("SimianLuo/LCM_Dreamshaper_v7",), embeds_guidance=True)
    [(plan, source)] = chosen(base=base)
    assert (plan.solver, plan.guidance) == (Solver.LCM, Guidance(kind=GuidanceKind.EMBEDDED, scale=8.0))
    assert source.startswith("preset LCM_Dreamshaper_v7")
    [(plan, _)] = chosen(PlanFlags(guidance=5.0), base=base)
    assert plan.guidance == Guidance(kind=GuidanceKind.EMBEDDED, scale=5.0)


def test_the_card_of_the_built_in_model_is_ddim_trailing_with_its_guidance():
    [(plan, source)] = chosen(base=CARD)
    assert (plan.solver, plan.num_steps, plan.timestep_spacing) == (Solver.DDIM, 25, TimestepSpacing.TRAILING)
    assert plan.guidance == Guidance(kind=GuidanceKind.CFG, scale=4.0)
    assert source == "card of the built-in model"
    [(plan, source)] = chosen(PlanFlags(steps=(8,), guidance=1.0), base=CARD)
    assert (plan.num_steps, plan.guidance.kind) == (8, GuidanceKind.NONE)


def test_a_base_without_anything_asks_for_steps():
    with pytest.raises(OptionError, match="pass --steps N"):
        chosen()
    with pytest.raises(OptionError, match="pass --steps N"):
        chosen(loras=[lora("style.safetensors")])


def test_a_base_with_steps_takes_its_own_scheduler_and_says_so():
    [(plan, source)] = chosen(PlanFlags(steps=(30,)))
    assert (plan.solver, plan.timestep_spacing, plan.steps_offset) == (Solver.DDIM, TimestepSpacing.LEADING, 1)
    assert plan.guidance == Guidance(kind=GuidanceKind.CFG, scale=7.5)
    assert source == "flags, DDIMScheduler of the base, guidance 7.5 as diffusers' default"
    [(plan, source)] = chosen(PlanFlags(timesteps=(999, 499), guidance=1.0, scheduler="euler"))
    assert (plan.solver, plan.timesteps) == (Solver.EULER, (999, 499))
    assert source == "flags"


def test_a_multistep_scheduler_is_refused_with_the_nearest_plan_unless_a_flag_names_another():
    base = replace(BASE, scheduler_config={**DDIM, "_class_name": "PNDMScheduler", "skip_prk_steps": True})
    with pytest.raises(PlanError, match="PNDMScheduler"):
        chosen(PlanFlags(steps=(4,)), base=base)
    [(plan, _)] = chosen(PlanFlags(steps=(4,), scheduler="ddim"), base=base)
    assert plan.solver is Solver.DDIM


def test_unknown_names_list_the_known_ones():
    with pytest.raises(OptionError, match="--scheduler dpm: not one-step; choose from ddim, tcd"):
        chosen(PlanFlags(steps=(4,), scheduler="dpm"))
    with pytest.raises(OptionError, match="--prediction-type x0: choose from epsilon"):
        chosen(PlanFlags(prediction_type="x0"), base=CARD)


def test_describe():
    assert describe(TCD) == "4 steps of tcd, eta 0.3, epsilon, no guidance"
    cfg = FewStepPlan(solver=Solver.EULER, num_steps=1, guidance=Guidance.of(3.0), timesteps=(800,))
    assert describe(cfg) == "1 step of euler at 800, epsilon, guidance 3"

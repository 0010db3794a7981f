"""Every preset against the schedule that its authors document, written out."""

import pytest

from hypersd_export.diffusion import (
    PRESETS,
    Guidance,
    GuidanceKind,
    PredictionType,
    Solver,
    match_file_name,
    preset,
)
from hypersd_export.errors import PlanError

T1, T2, T4 = (999,), (999, 499), (999, 749, 499, 249)
T8 = (999, 874, 749, 624, 499, 374, 249, 124)
T12 = (999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82)
# LCM and TCD: 50 distillation steps of 20, spaced by index.
C2, C4 = (999, 499), (999, 759, 499, 259)
C8 = (999, 879, 759, 639, 499, 379, 259, 139)
C16 = (999, 939, 879, 819, 759, 699, 639, 579, 499, 439, 379, 319, 259, 199, 139, 79)
NONE, EPS = Guidance(), PredictionType.EPSILON


def cfg(scale):
    return Guidance(kind=GuidanceKind.CFG, scale=scale)


def embedded(scale):
    return Guidance(kind=GuidanceKind.EMBEDDED, scale=scale)


# name: family, kind, solver, timesteps, eta, guidance, prediction
VP = {
    "Hyper-SD15-1step-lora": ("sd15", "lora", "tcd", T1, 1.0, NONE, EPS),
    "Hyper-SD15-2steps-lora": ("sd15", "lora", "ddim", T2, 0, NONE, EPS),
    "Hyper-SD15-4steps-lora": ("sd15", "lora", "ddim", T4, 0, NONE, EPS),
    "Hyper-SD15-8steps-lora": ("sd15", "lora", "ddim", T8, 0, NONE, EPS),
    "Hyper-SD15-8steps-CFG-lora": ("sd15", "lora", "ddim", T8, 0, cfg(5.0), EPS),
    "Hyper-SD15-12steps-CFG-lora": ("sd15", "lora", "ddim", T12, 0, cfg(5.0), EPS),
    "Hyper-SDXL-1step-lora": ("sdxl", "lora", "tcd", T1, 1.0, NONE, EPS),
    "Hyper-SDXL-2steps-lora": ("sdxl", "lora", "ddim", T2, 0, NONE, EPS),
    "Hyper-SDXL-4steps-lora": ("sdxl", "lora", "ddim", T4, 0, NONE, EPS),
    "Hyper-SDXL-8steps-lora": ("sdxl", "lora", "ddim", T8, 0, NONE, EPS),
    "Hyper-SDXL-8steps-CFG-lora": ("sdxl", "lora", "ddim", T8, 0, cfg(5.0), EPS),
    "Hyper-SDXL-12steps-CFG-lora": ("sdxl", "lora", "ddim", T12, 0, cfg(5.0), EPS),
    "Hyper-SDXL-1step-Unet": ("sdxl", "unet", "lcm", (800,), 0, NONE, EPS),
    "lcm-lora-sdv1-5": ("sd15", "lora", "lcm", C4, 0, NONE, EPS),
    "lcm-lora-sdxl": ("sdxl", "lora", "lcm", C4, 0, NONE, EPS),
    "lcm-lora-ssd-1b": ("sdxl", "lora", "lcm", C4, 0, NONE, EPS),
    "LCM_Dreamshaper_v7": ("sd15", "unet", "lcm", C4, 0, embedded(8.0), EPS),
    "lcm-sdxl": ("sdxl", "unet", "lcm", C4, 0, embedded(8.0), EPS),
    "TCD-SD15-LoRA": ("sd15", "lora", "tcd", C4, 0.3, NONE, EPS),
    "TCD-SDXL-LoRA": ("sdxl", "lora", "tcd", C4, 0.3, NONE, EPS),
    **{
        f"pcm_{family}_{kind}_{steps}step_converted": (family, "lora", "tcd", timesteps, 0, guidance, EPS)
        for family in ("sd15", "sdxl")
        for kind, steps, timesteps, guidance in (
            ("smallcfg", 2, C2, NONE),
            ("smallcfg", 4, C4, NONE),
            ("smallcfg", 8, C8, NONE),
            ("smallcfg", 16, C16, NONE),
            ("normalcfg", 4, C4, cfg(7.5)),
            ("normalcfg", 8, C8, cfg(7.5)),
            ("normalcfg", 16, C16, cfg(7.5)),
        )
    },
    "pcm_sd15_lcmlike_lora_converted": ("sd15", "lora", "lcm", C4, 0, NONE, EPS),
    "pcm_sdxl_lcmlike_lora_converted": ("sdxl", "lora", "lcm", C4, 0, NONE, EPS),
    "sdxl_lightning_1step_unet_x0": ("sdxl", "unet", "euler", T1, 0, NONE, PredictionType.SAMPLE),
    "sdxl_lightning_2step_unet": ("sdxl", "unet", "euler", T2, 0, NONE, EPS),
    "sdxl_lightning_4step_unet": ("sdxl", "unet", "euler", T4, 0, NONE, EPS),
    "sdxl_lightning_8step_unet": ("sdxl", "unet", "euler", T8, 0, NONE, EPS),
    "sdxl_lightning_2step_lora": ("sdxl", "lora", "euler", T2, 0, NONE, EPS),
    "sdxl_lightning_4step_lora": ("sdxl", "lora", "euler", T4, 0, NONE, EPS),
    "sdxl_lightning_8step_lora": ("sdxl", "lora", "euler", T8, 0, NONE, EPS),
    "sd-turbo": ("sd21", "unet", "euler_ancestral", T1, 0, NONE, EPS),
    "sdxl-turbo": ("sdxl", "unet", "euler_ancestral", T1, 0, NONE, EPS),
}
# name: family, steps, guidance, timesteps (sigma * 1000) at 1024 x 1024 as diffusers 0.42 prints them
FLOW = {
    "Hyper-SD3-4steps-CFG-lora": ("sd3", 4, cfg(3.0), (1000, 857.7, 602.2, 8.9)),
    "Hyper-SD3-8steps-CFG-lora": ("sd3", 8, cfg(5.0), (1000, 947.5, 882.8, 800.8, 693.8, 548.0, 338.0, 8.9)),
    "Hyper-SD3-16steps-CFG-lora": (
        "sd3", 16, cfg(7.0), (
            1000, 976.8, 951.4, 923.3, 892.3, 857.7, 818.9, 775.2, 725.4, 668.3, 602.2, 524.5, 432.2, 320.6, 183.0, 8.9,
        ),
    ),
    "Hyper-FLUX.1-dev-8steps-lora": (
        "flux", 8, embedded(3.5), (1000, 956.7, 904.5, 840.3, 759.5, 654.6, 512.8, 310.9),
    ),
    "Hyper-FLUX.1-dev-16steps-lora": (
        "flux", 16, embedded(3.5), (
            1000, 979.3, 956.7, 931.9, 904.5, 874.2, 840.3, 802.4, 759.5, 710.7, 654.6, 589.4, 512.8, 421.6, 310.9,
            173.9,
        ),
    ),
}  # fmt: skip


def test_the_lists_are_complete():
    assert [entry.name for entry in PRESETS] == list(dict.fromkeys(entry.name for entry in PRESETS))
    assert {entry.name for entry in PRESETS} == {*VP, *FLOW}


@pytest.mark.parametrize("name", list(VP))
def test_documented_schedule(name):
    family, kind, solver, timesteps, eta, guidance, prediction = VP[name]
    entry = preset(name)
    assert (entry.family, entry.kind, entry.lora_scale) == (family, kind, 1.0)
    assert entry.exportable
    plan = entry.plan
    assert (plan.solver, plan.eta, plan.guidance, plan.prediction_type) == (Solver(solver), eta, guidance, prediction)
    table = plan.table()
    assert tuple(row.t for row in table.rows) == timesteps
    assert len(timesteps) == plan.num_steps
    if plan.solver is Solver.EULER or plan.solver is Solver.EULER_ANCESTRAL:
        assert 14.6 < table.init_noise_sigma < 14.7


@pytest.mark.parametrize("name", list(FLOW))
def test_documented_flow_schedule(name):
    family, steps, guidance, timesteps = FLOW[name]
    entry = preset(name)
    assert (entry.family, entry.kind, entry.lora_scale, entry.exportable) == (family, "lora", 0.125, False)
    assert "cannot be exported yet" in entry.note
    assert (entry.plan.num_steps, entry.plan.guidance) == (steps, guidance)
    rows = entry.plan.table(height=1024, width=1024).rows
    assert [row.t for row in rows] == pytest.approx(timesteps, abs=0.06)


@pytest.mark.parametrize("name", list(FLOW))
def test_flow_schedules_from_the_formulas(name):
    """SD3: shift 3 applied to the end of the range and then to every point; FLUX: exp(1.15) at 4096 tokens, once."""
    steps = preset(name).plan.num_steps
    rows = preset(name).plan.table(height=1024, width=1024).rows
    if name.startswith("Hyper-SD3"):
        low = 3 * 0.001 / (1 + 2 * 0.001)
        base = [1 - i * (1 - low) / (steps - 1) for i in range(steps)]
        expected = [3000 * s / (1 + 2 * s) for s in base]
    else:
        base = [1 - i / steps for i in range(steps)]
        expected = [1000 * 3.158192909689767 / (3.158192909689767 + 1 / s - 1) for s in base]
    assert [row.t for row in rows] == pytest.approx(expected, rel=1e-9)


def test_other_documented_step_counts():
    assert preset("Hyper-SD15-1step-lora").steps == (1, 2, 3, 4, 5, 6, 7, 8)
    assert preset("Hyper-SDXL-4steps-lora").steps == (4,)
    assert preset("Hyper-SD3-8steps-CFG-lora").steps == (6, 8)
    assert preset("Hyper-SD3-16steps-CFG-lora").steps == (12, 16)
    assert preset("sdxl-turbo").steps == (1, 2, 3, 4)
    rows = preset("sdxl-turbo").plan_for(3).table().rows
    assert [row.t for row in rows] == [999, 666, 332]
    unified = preset("Hyper-SDXL-1step-lora").plan_for(4)
    assert (unified.solver, unified.eta, unified.net_timesteps().tolist()) == (Solver.TCD, 1.0, list(C4))
    with pytest.raises(PlanError, match=r"explicit timesteps \[800\]"):
        preset("Hyper-SDXL-1step-Unet").plan_for(2)


FILE_NAMES = {
    "Hyper-SD15-4steps-lora.safetensors": "Hyper-SD15-4steps-lora",
    "/models/loras/hyper-sd15-4step-lora.safetensors": "Hyper-SD15-4steps-lora",
    r"C:\loras\Hyper-SDXL-1step-lora.safetensors": "Hyper-SDXL-1step-lora",
    "Hyper-SDXL-12steps-CFG-lora.safetensors": "Hyper-SDXL-12steps-CFG-lora",
    "Hyper-SDXL-1step-Unet.safetensors": "Hyper-SDXL-1step-Unet",
    "Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors": "Hyper-SDXL-1step-Unet",
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": "Hyper-FLUX.1-dev-8steps-lora",
    "Hyper-SD3-16steps-CFG-lora.safetensors": "Hyper-SD3-16steps-CFG-lora",
    "latent-consistency/lcm-lora-sdv1-5": "lcm-lora-sdv1-5",
    "lcm-lora-sdxl/pytorch_lora_weights.safetensors": "lcm-lora-sdxl",
    "models--latent-consistency--lcm-lora-ssd-1b/snapshots/0a/pytorch_lora_weights.safetensors": "lcm-lora-ssd-1b",
    "lcm_lora_sdxl.safetensors": "lcm-lora-sdxl",
    "SimianLuo/LCM_Dreamshaper_v7": "LCM_Dreamshaper_v7",
    "lcm-sdxl/diffusion_pytorch_model.fp16.safetensors": "lcm-sdxl",
    "h1t/TCD-SD15-LoRA/pytorch_lora_weights.safetensors": "TCD-SD15-LoRA",
    "pcm_sdxl_normalcfg_8step_converted_fp16.safetensors": "pcm_sdxl_normalcfg_8step_converted",
    "sd15/pcm_sd15_smallcfg_2step_converted.safetensors": "pcm_sd15_smallcfg_2step_converted",
    "sdxl_lightning_1step_x0.safetensors": "sdxl_lightning_1step_unet_x0",
    "sdxl_lightning_1step_unet_x0.safetensors": "sdxl_lightning_1step_unet_x0",
    "sdxl_lightning_4step.safetensors": "sdxl_lightning_4step_unet",
    "sdxl_lightning_8step_lora.safetensors": "sdxl_lightning_8step_lora",
    "sd_turbo.safetensors": "sd-turbo",
    "stabilityai/sdxl-turbo": "sdxl-turbo",
    "sd_xl_turbo_1.0_fp16.safetensors": "sdxl-turbo",
    "sdxl-turbo/unet/diffusion_pytorch_model.safetensors": "sdxl-turbo",
}


@pytest.mark.parametrize("file_name", list(FILE_NAMES))
def test_file_names(file_name):
    found = match_file_name(file_name)
    assert found is not None
    assert found.name == FILE_NAMES[file_name]


@pytest.mark.parametrize("entry", PRESETS, ids=lambda entry: entry.name)
def test_every_preset_is_found_by_its_own_name(entry):
    assert match_file_name(f"{entry.name}.safetensors") is entry
    assert preset(entry.name.upper()) is entry
    matching = [other.name for other in PRESETS if other.matches(entry.name)]
    assert matching == [entry.name]


@pytest.mark.parametrize(
    "file_name",
    [
        "my_style.safetensors",
        "Hyper-SD15-4steps-lora/my_style.safetensors",  # a folder says nothing of a file with a name of its own
        "Hyper-SD15-3steps-lora.safetensors",
        "Hyper-SD15-4steps-lora-rank1.safetensors",
        "sd_xl_turbo_lora_v1.safetensors",
        "pytorch_lora_weights.safetensors",
        "sdxl_lightning_1step_lora.safetensors",
        "",
        "/",
    ],
)
def test_other_file_names(file_name):
    assert match_file_name(file_name) is None


def test_unknown_preset_names_what_is_close():
    with pytest.raises(
        PlanError, match=r"^preset 'Hyper-SD15-3steps-lora' is not known; there are \d+, such as Hyper-SD15-"
    ):
        preset("Hyper-SD15-3steps-lora")
    with pytest.raises(PlanError, match=r"such as Hyper-SD15-4steps-lora$"):
        preset("zzz")

"""Every official few-step checkpoint and the plan it was made for.

A file name is enough to know the schedule: `match_file_name`. Sources: the model cards and repositories named in
`Preset.base` and `note`; each plan's timesteps are written out in tests/unit/test_diffusion_presets.py.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from hypersd_export.diffusion.plan import FewStepPlan, Guidance, GuidanceKind, PredictionType, Solver
from hypersd_export.diffusion.schedule import FlowConvention, FlowSchedule, TimestepSpacing
from hypersd_export.errors import PlanError

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
FLUX = "black-forest-labs/FLUX.1-dev"
_BASES = {"sd15": SD15, "sdxl": SDXL}
_NOT_YET = "{} is a transformer pipeline, which cannot be exported yet; its plan is known"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One checkpoint: what it fits, and how it is sampled.

    family: sd15, sd21, sdxl, sd3 or flux. kind: "lora", or "unet" for whole UNet (or whole pipeline) weights.
    base: the hub id of the model it was distilled from. also_steps: other step counts that its authors document.
    pattern: a case-insensitive regex that matches the whole file stem. exportable: False with the reason in `note`.
    """

    name: str
    family: str
    kind: str
    plan: FewStepPlan
    base: str
    pattern: str
    lora_scale: float = 1.0
    also_steps: tuple[int, ...] = ()
    exportable: bool = True
    note: str = ""

    @property
    def steps(self) -> tuple[int, ...]:
        """The documented step counts, rising."""
        return tuple(sorted({self.plan.num_steps, *self.also_steps}))

    def plan_for(self, num_steps: int) -> FewStepPlan:
        """The plan with another step count, documented or not (see `steps`); refused if its timesteps are explicit."""
        return self.plan.with_steps(num_steps)

    def matches(self, stem: str) -> bool:
        """Whether a file stem, or a folder's name, is this checkpoint."""
        return re.fullmatch(self.pattern, stem, re.IGNORECASE) is not None


def _ddim(steps: int, guidance: float = 1.0) -> FewStepPlan:
    return FewStepPlan(solver=Solver.DDIM, num_steps=steps, guidance=Guidance.of(guidance))


def _consistency(solver: Solver, steps: int, guidance: Guidance | None = None, eta: float = 0.0) -> FewStepPlan:
    return FewStepPlan(solver=solver, num_steps=steps, eta=eta, guidance=guidance or Guidance())


def _euler(
    steps: int, *, solver: Solver = Solver.EULER, prediction: PredictionType = PredictionType.EPSILON
) -> FewStepPlan:
    return FewStepPlan(
        solver=solver, num_steps=steps, prediction_type=prediction, timestep_spacing=TimestepSpacing.TRAILING
    )


def _hyper_sd(family: str) -> list[Preset]:
    label = family.upper()
    base = _BASES[family]
    one = Preset(
        name=f"Hyper-{label}-1step-lora", family=family, kind="lora", base=base, also_steps=(2, 3, 4, 5, 6, 7, 8),
        plan=_consistency(Solver.TCD, 1, eta=1.0), pattern=f"hyper-{label}-1step-lora",
        note="unified LoRA, 1 to 8 steps; a lower eta gives more detail at several steps",
    )  # fmt: skip
    few = [
        Preset(
            name=f"Hyper-{label}-{steps}steps-lora", family=family, kind="lora", base=base, plan=_ddim(steps),
            pattern=f"hyper-{label}-{steps}steps?-lora",
        )
        for steps in (2, 4, 8)
    ]  # fmt: skip
    cfg = [
        Preset(
            name=f"Hyper-{label}-{steps}steps-CFG-lora", family=family, kind="lora", base=base,
            plan=_ddim(steps, 5.0), pattern=f"hyper-{label}-{steps}steps?-cfg-lora",
            note="guidance 5 to 8, negative prompts work",
        )
        for steps in (8, 12)
    ]  # fmt: skip
    return [one, *few, *cfg]


def _hyper_sdxl_unet() -> Preset:
    return Preset(
        name="Hyper-SDXL-1step-Unet", family="sdxl", kind="unet", base=SDXL,
        plan=FewStepPlan(solver=Solver.LCM, num_steps=1, timesteps=(800,)),
        pattern=r"hyper-sdxl-1step-unet(-comfyui)?([._-]fp(16|32))?",
        note="starts at timestep 800, not 999; the -Comfyui file is a whole checkpoint",
    )  # fmt: skip


def _hyper_sd3(steps: int, guidance: float, also: tuple[int, ...]) -> Preset:
    return Preset(
        name=f"Hyper-SD3-{steps}steps-CFG-lora", family="sd3", kind="lora", base=SD3, lora_scale=0.125,
        plan=FewStepPlan(
            solver=Solver.FLOW_EULER, num_steps=steps, prediction_type=PredictionType.FLOW,
            schedule=FlowSchedule(shift=3.0), guidance=Guidance.of(guidance),
        ),
        pattern=f"hyper-sd3-{steps}steps?-cfg-lora", also_steps=also, exportable=False, note=_NOT_YET.format("SD3"),
    )  # fmt: skip


def _hyper_flux(steps: int) -> Preset:
    return Preset(
        name=f"Hyper-FLUX.1-dev-{steps}steps-lora", family="flux", kind="lora", base=FLUX, lora_scale=0.125,
        plan=FewStepPlan(
            solver=Solver.FLOW_EULER, num_steps=steps, prediction_type=PredictionType.FLOW,
            schedule=FlowSchedule(convention=FlowConvention.FLUX, use_dynamic_shifting=True),
            guidance=Guidance(kind=GuidanceKind.EMBEDDED, scale=3.5),
        ),
        pattern=rf"hyper-flux\.1-dev-{steps}steps?-lora", exportable=False, note=_NOT_YET.format("FLUX"),
    )  # fmt: skip


def _lcm() -> list[Preset]:
    loras = (
        ("lcm-lora-sdv1-5", "sd15", SD15, r"(pytorch_)?lcm[-_]lora[-_]sd(v?1[-_.]?5|v1)"),
        ("lcm-lora-sdxl", "sdxl", SDXL, r"(pytorch_)?lcm[-_]lora[-_]sdxl([-_]?base)?([-_]?1[._]0)?"),
        ("lcm-lora-ssd-1b", "sdxl", "segmind/SSD-1B", r"(pytorch_)?lcm[-_]lora[-_]ssd[-_]?1b"),
    )
    models = (
        ("LCM_Dreamshaper_v7", "sd15", "Lykon/dreamshaper-7", r"lcm[-_]dreamshaper[-_]v?7.*"),
        ("lcm-sdxl", "sdxl", SDXL, r"lcm[-_]sdxl([-_]unet)?"),
    )
    embedded = Guidance(kind=GuidanceKind.EMBEDDED, scale=8.0)
    return [
        *(
            Preset(
                name=name, family=family, kind="lora", base=base, pattern=pattern, plan=_consistency(Solver.LCM, 4),
                also_steps=(2, 3, 5, 6, 7, 8), note="latent-consistency on the hub; guidance 1 to 2",
            )
            for name, family, base, pattern in loras
        ),
        *(
            Preset(
                name=name, family=family, kind="unet", base=base, pattern=pattern, also_steps=(1, 2, 3, 5, 6, 7, 8),
                plan=_consistency(Solver.LCM, 4, embedded), note="guidance 3 to 13, embedded as timestep_cond",
            )
            for name, family, base, pattern in models
        ),
    ]  # fmt: skip


def _tcd(family: str) -> Preset:
    label = family.upper()
    return Preset(
        name=f"TCD-{label}-LoRA", family=family, kind="lora", base=_BASES[family],
        plan=_consistency(Solver.TCD, 4, eta=0.3), pattern=f"tcd[-_]{label}[-_]lora",
        also_steps=(2, 3, 5, 6, 7, 8, 12, 16, 20), note="h1t on the hub; eta 0.2 to 0.3 at few steps",
    )  # fmt: skip


def _pcm(family: str) -> list[Preset]:
    """wangfuyun/PCM_Weights, sampled as in the authors' demo: TCDScheduler, eta 0, guidance 0 or 7.5."""
    kinds = [("smallcfg", steps, 1.0) for steps in (2, 4, 8, 16)] + [("normalcfg", s, 7.5) for s in (4, 8, 16)]
    return [
        *(
            Preset(
                name=f"pcm_{family}_{kind}_{steps}step_converted", family=family, kind="lora", base=_BASES[family],
                plan=_consistency(Solver.TCD, steps, Guidance.of(guidance)),
                pattern=rf"pcm_{family}_{kind}_{steps}step(_converted)?(_fp16)?",
            )
            for kind, steps, guidance in kinds
        ),
        Preset(
            name=f"pcm_{family}_lcmlike_lora_converted", family=family, kind="lora", base=_BASES[family],
            plan=_consistency(Solver.LCM, 4), pattern=rf"pcm_{family}_lcmlike_lora(_converted)?(_fp16)?",
            also_steps=(2, 3, 5, 6, 7, 8),
        ),
    ]  # fmt: skip


def _lightning() -> list[Preset]:
    one = Preset(
        name="sdxl_lightning_1step_unet_x0", family="sdxl", kind="unet", base=SDXL,
        plan=_euler(1, prediction=PredictionType.SAMPLE), pattern=r"sdxl_lightning_1step(_unet)?_x0",
        note="predicts x0, not epsilon",
    )  # fmt: skip
    unets = [
        Preset(
            name=f"sdxl_lightning_{steps}step_unet", family="sdxl", kind="unet", base=SDXL, plan=_euler(steps),
            pattern=rf"sdxl_lightning_{steps}step(_unet)?",
        )
        for steps in (2, 4, 8)
    ]  # fmt: skip
    loras = [
        Preset(
            name=f"sdxl_lightning_{steps}step_lora", family="sdxl", kind="lora", base=SDXL, plan=_euler(steps),
            pattern=rf"sdxl_lightning_{steps}step_lora",
        )
        for steps in (2, 4, 8)
    ]  # fmt: skip
    return [one, *unets, *loras]


def _turbo() -> list[Preset]:
    """Whole models; one step, or up to 4, by Euler-ancestral on trailing timesteps (equal to Euler at one step)."""
    plan = _euler(1, solver=Solver.EULER_ANCESTRAL)
    return [
        Preset(
            name="sd-turbo", family="sd21", kind="unet", base="stabilityai/sd-turbo", plan=plan,
            pattern=r"sd[-_]turbo(_fp16)?", also_steps=(2, 3, 4),
        ),
        Preset(
            name="sdxl-turbo", family="sdxl", kind="unet", base="stabilityai/sdxl-turbo", plan=plan,
            pattern=r"(sdxl[-_]turbo|sd_xl_turbo_1\.0(_fp16)?)", also_steps=(2, 3, 4),
        ),
    ]  # fmt: skip


PRESETS: tuple[Preset, ...] = (
    *_hyper_sd("sd15"),
    *_hyper_sd("sdxl"),
    _hyper_sdxl_unet(),
    _hyper_sd3(4, 3.0, ()),
    _hyper_sd3(8, 5.0, (6,)),
    _hyper_sd3(16, 7.0, (12,)),
    _hyper_flux(8),
    _hyper_flux(16),
    *_lcm(),
    _tcd("sd15"),
    _tcd("sdxl"),
    *_pcm("sd15"),
    *_pcm("sdxl"),
    *_lightning(),
    *_turbo(),
)
"""All presets; names are file stems of the official releases, or the hub repository's name where that is generic."""

_GENERIC = re.compile(
    r"(pytorch_lora_weights|diffusion_pytorch_model|model|adapter_model|unet)([._-](fp16|bf16|fp32|non_ema))*", re.I
)
_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")


def match_file_name(name: str) -> Preset | None:
    """The preset of a checkpoint by its file name (or path, or hub id), None if there is none.

    The last path component decides. Where that is generic (pytorch_lora_weights.safetensors and the like, as all LCM
    LoRAs are called) the folders above it are asked, nearest first, hub cache folders included.
    """
    components = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", ".")]
    for component in reversed(components):
        stem = _stem(component)
        for entry in PRESETS:
            if entry.matches(stem):
                return entry
        if component == components[-1] and not _GENERIC.fullmatch(stem):
            return None
    return None


def preset(name: str) -> Preset:
    """The preset of that name (any case); `PlanError` names those that come close."""
    for entry in PRESETS:
        if entry.name.lower() == name.lower():
            return entry
    start = name.lower()[:8]
    close = [entry.name for entry in PRESETS if entry.name.lower().startswith(start)] or ["Hyper-SD15-4steps-lora"]
    raise PlanError(f"preset {name!r} is not known; there are {len(PRESETS)}, such as {', '.join(close[:4])}")


def _stem(component: str) -> str:
    """The name without weight suffix; of a hub cache folder (models--owner--repo) the repository."""
    for suffix in _SUFFIXES:
        if component.lower().endswith(suffix):
            component = component[: -len(suffix)]
    return component.rsplit("--", 1)[-1] if component.startswith("models--") else component

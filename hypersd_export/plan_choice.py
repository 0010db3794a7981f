"""Which plan an export gets, and why: flags > the LoRA's own metadata > a preset's file name > the built-in card > ask.

A single flag overrides a single field of what the rest of the chain says; the reason, which is printed and stands in
plan.json as `source`, names both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypersd_export.diffusion import (
    FewStepPlan,
    Guidance,
    GuidanceKind,
    PlanEntry,
    PlanFile,
    PredictionType,
    Solver,
    TimestepSpacing,
    plans_from_metadata,
)
from hypersd_export.diffusion.apple import APPLE_DPMPP, as_apple
from hypersd_export.diffusion.presets import Preset, match_file_name
from hypersd_export.diffusion.scheduler_config import plan_from_scheduler_config
from hypersd_export.errors import OptionError
from hypersd_export.spec import PlanFlags

TEACHER_GUIDANCE = 7.5
"""StableDiffusionPipeline's default guidance_scale, for a base that says nothing about itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraClue:
    """What a LoRA file says about its plan: its name, where it lies, and its metadata's plan (JSON) if it has one."""

    name: str
    path: str
    plan_json: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseClue:
    """What the base says: its family, names to match with presets of whole UNets, scheduler config, built-in card."""

    family: str
    names: tuple[str, ...]
    scheduler_config: Mapping[str, Any]
    embeds_guidance: bool = False
    card: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Plans from one place, and the words for it; `complete` if the flags are in the words already."""

    plans: tuple[FewStepPlan, ...]
    reason: str
    complete: bool = False


def choose_plans(
    flags: PlanFlags, *, base: BaseClue, loras: Sequence[LoraClue], height: int | None = None, width: int | None = None
) -> PlanFile:
    """The tables of an export, the default first, each with the reason why.

    `height` and `width` in pixels matter to flow plans alone. Raises `OptionError` when nothing says how many steps,
    when two LoRAs disagree, or when a preset's family cannot be exported yet; `PlanError` for impossible plans.
    """
    origin = _of_loras(loras, base.family) or _of_unet(base)
    if origin is None and base.card is not None:
        origin = _of_card(base, base.card)
    if origin is None:
        origin = _of_flags(flags, base)
    entries = []
    for plan in _selected(origin, flags):
        chosen = _override(plan, flags, base)
        said = [] if origin.complete else _said(chosen, flags)
        source = f"{origin.reason}, with {' '.join(said)}" if said else origin.reason
        entries.append(PlanEntry(plan=chosen, table=chosen.table(height=height, width=width), source=source))
    return PlanFile(entries=tuple(entries))


def lora_origin(lora: LoraClue, family: str) -> Origin | None:
    """What one LoRA says: its metadata first, then the preset that its file name belongs to; None for neither.

    `family` is the base's: a preset of another one is refused here, before anything is loaded.
    """
    if lora.plan_json is not None:
        return Origin(plans=plans_from_metadata(lora.plan_json), reason=f"metadata of {lora.name}")
    preset = match_file_name(lora.path)
    if preset is None:
        return None
    if preset.kind != "lora":
        raise OptionError(f"--lora {lora.name}: {preset.name} is a whole UNet, not a LoRA; pass it as --unet")
    origin = _of_preset(preset, f"file name {lora.name}")
    if preset.family != family:
        raise OptionError(
            f"--lora {lora.name}: {preset.name} is for {preset.base} ({preset.family}), and the base is of family "
            f"{family}; use a LoRA for this base"
        )
    return origin


def _of_preset(preset: Preset, where: str) -> Origin:
    if not preset.exportable:
        raise OptionError(f"preset {preset.name} ({where}): {preset.note or preset.family + ' is not exported yet'}")
    return Origin(plans=(preset.plan,), reason=f"preset {preset.name} ({where})")


def _of_loras(loras: Sequence[LoraClue], family: str) -> Origin | None:
    found = [(lora, origin) for lora in loras if (origin := lora_origin(lora, family)) is not None]
    for lora, origin in found[1:]:
        if origin.plans != found[0][1].plans:
            raise OptionError(
                f"--lora {found[0][0].name} and --lora {lora.name} have different plans "
                f"({describe(found[0][1].plans[0])}; {describe(origin.plans[0])}): keep one of them"
            )
    return found[0][1] if found else None


def _of_unet(base: BaseClue) -> Origin | None:
    for name in base.names:
        preset = match_file_name(name)
        if preset is not None and preset.kind == "unet":
            return _of_preset(preset, f"name {name}")
    return None


def _of_card(base: BaseClue, card: Mapping[str, Any]) -> Origin:
    plan = plan_from_scheduler_config(
        base.scheduler_config,
        num_steps=int(card["steps"]),
        guidance=Guidance.of(float(card["guidance"])),
        solver=Solver.DDIM,
    )
    return Origin(
        plans=(replace(plan, timestep_spacing=TimestepSpacing.TRAILING),), reason="card of the built-in model"
    )


def _of_flags(flags: PlanFlags, base: BaseClue) -> Origin:
    count = flags.steps[0] if flags.steps else len(flags.timesteps or ())
    if not count:
        raise OptionError(
            "nothing says how many steps: no LoRA with a plan, no file name of a known preset; pass --steps N "
            "(and --scheduler, --guidance where the base's own are not wanted)"
        )
    plan = plan_from_scheduler_config(
        base.scheduler_config,
        num_steps=count,
        guidance=_guidance(TEACHER_GUIDANCE, embedded=base.embeds_guidance),
        timesteps=flags.timesteps,
        eta=flags.eta or 0.0,
        solver=None if flags.scheduler is None else _solver(flags.scheduler),
    )
    reasons = ["flags"]
    if flags.scheduler is None:
        reasons.append(f"{base.scheduler_config.get('_class_name')} of the base")
    if flags.guidance is None:
        reasons.append(f"guidance {TEACHER_GUIDANCE:g} as diffusers' default")
    return Origin(plans=(plan,), reason=", ".join(reasons), complete=True)


def _selected(origin: Origin, flags: PlanFlags) -> list[FewStepPlan]:
    """One plan per step count that was asked for, or all that the origin has."""
    if flags.timesteps is not None:
        first = origin.plans[0]
        return [replace(first, num_steps=len(flags.timesteps), timesteps=flags.timesteps)]
    if flags.steps is None:
        return list(origin.plans)
    known = {plan.num_steps: plan for plan in origin.plans}
    return [known.get(count) or origin.plans[0].with_steps(count) for count in flags.steps]


def _override(plan: FewStepPlan, flags: PlanFlags, base: BaseClue) -> FewStepPlan:
    changes: dict[str, Any] = {}
    if _is_apple(flags.scheduler):
        _check_apple(flags)
        plan = as_apple(plan)
    if flags.scheduler is not None:
        changes["solver"] = _solver(flags.scheduler)
        if changes["solver"] not in (Solver.DDIM, Solver.TCD):
            changes["eta"] = 0.0
    if flags.eta is not None:
        changes["eta"] = flags.eta
    if flags.guidance is not None:
        embedded = plan.guidance.kind is GuidanceKind.EMBEDDED or base.embeds_guidance
        changes["guidance"] = _guidance(flags.guidance, embedded=embedded)
    if flags.prediction_type is not None:
        changes["prediction_type"] = _prediction_type(flags.prediction_type)
    return replace(plan, **changes)


def _said(after: FewStepPlan, flags: PlanFlags) -> list[str]:
    """The flags that an entry's reason names, with their values."""
    values = {
        "--steps": after.num_steps if flags.steps is not None else None,
        "--timesteps": ",".join(map(str, flags.timesteps)) if flags.timesteps is not None else None,
        "--scheduler": flags.scheduler,
        "--eta": flags.eta,
        "--guidance": flags.guidance,
        "--prediction-type": flags.prediction_type,
    }
    return [f"{option} {value}" for option, value in values.items() if value is not None]


def _guidance(scale: float, *, embedded: bool) -> Guidance:
    return Guidance(kind=GuidanceKind.EMBEDDED, scale=scale) if embedded else Guidance.of(scale)


def _is_apple(name: str | None) -> bool:
    return name is not None and name.replace("_", "-").lower() == APPLE_DPMPP


def _check_apple(flags: PlanFlags) -> None:
    for option, given in (("--timesteps", flags.timesteps), ("--eta", flags.eta)):
        if given is not None:
            raise OptionError(f"--scheduler {APPLE_DPMPP} with {option}: it has its own; leave {option} away")


def _solver(name: str) -> Solver:
    if _is_apple(name):
        return Solver.DDIM
    try:
        return Solver(name.replace("-", "_").lower())
    except ValueError:
        known = ", ".join([*Solver, APPLE_DPMPP])
        raise OptionError(f"--scheduler {name}: not one-step; choose from {known}") from None


def _prediction_type(name: str) -> PredictionType:
    try:
        return PredictionType(name.replace("-", "_").lower())
    except ValueError:
        raise OptionError(f"--prediction-type {name}: choose from {', '.join(PredictionType)}") from None


def describe(plan: FewStepPlan) -> str:
    """A plan in one phrase, such as `4 steps of ddim, eta 0, epsilon, no guidance`."""
    guidance = {
        GuidanceKind.NONE: "no guidance",
        GuidanceKind.CFG: f"guidance {plan.guidance.scale:g}",
        GuidanceKind.EMBEDDED: f"embedded guidance {plan.guidance.scale:g}",
    }[plan.guidance.kind]
    steps = "1 step" if plan.num_steps == 1 else f"{plan.num_steps} steps"
    at = f" at {','.join(map(str, plan.timesteps))}" if plan.timesteps is not None else ""
    eta = f", eta {plan.eta:g}" if plan.solver in (Solver.DDIM, Solver.TCD) else ""
    return f"{steps} of {plan.solver}{at}{eta}, {plan.prediction_type}, {guidance}"

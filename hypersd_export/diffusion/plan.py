"""A few-step plan: which solver, at which timesteps, on which noise schedule, with which guidance; and its table.

A plan is what a user, a LoRA's metadata or a preset says; `FewStepPlan.table()` turns it into constants. Only solvers
that are linear in (x, output, noise) and keep no history can be a plan.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np

from hypersd_export.diffusion import rows as _rows
from hypersd_export.diffusion.jsonio import (
    checked_bool,
    checked_enum,
    checked_int,
    checked_list,
    checked_number,
    checked_object,
    coerce_enum,
    is_int,
    is_number,
)
from hypersd_export.diffusion.prediction import PredictionType
from hypersd_export.diffusion.schedule import (
    BetaSchedule,
    FloatArray,
    FlowConvention,
    FlowSchedule,
    NoiseSchedule,
    TimestepSpacing,
    consistency_timesteps,
    spaced_timesteps,
)
from hypersd_export.diffusion.solver import LCM_TIMESTEP_SCALING
from hypersd_export.diffusion.table import Row, StepTable, start_row
from hypersd_export.errors import PlanError

__all__ = [
    "FewStepPlan", "Guidance", "GuidanceKind", "PredictionType", "Row", "Solver", "StepTable", "start_row",
]  # fmt: skip


class Solver(StrEnum):
    """The one-step solvers; each is a diffusers scheduler class (see `diffusers_call`)."""

    DDIM = "ddim"
    TCD = "tcd"
    LCM = "lcm"
    EULER = "euler"
    EULER_ANCESTRAL = "euler_ancestral"
    FLOW_EULER = "flow_euler"


class GuidanceKind(StrEnum):
    """How guidance enters: not at all, by a second (unconditional) evaluation, or as an input of the network."""

    NONE = "none"
    CFG = "cfg"
    EMBEDDED = "embedded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Guidance by the convention out = u + scale * (c - u), so that scale 1 is the conditional output alone.

    `none` has scale 1. `cfg` needs scale > 1 (at 1 and below diffusers turns it off). `embedded` is a constant of the
    network: FLUX's 3.5; an LCM UNet's `timestep_cond` embeds `scale - 1`, because that paper's w is one less.
    """

    kind: GuidanceKind = GuidanceKind.NONE
    scale: float = 1.0

    def __post_init__(self) -> None:
        coerce_enum(self, "kind", GuidanceKind, "guidance kind")
        if not is_number(self.scale):
            raise PlanError(f"guidance scale {self.scale!r}: must be a finite number")
        if self.kind is GuidanceKind.NONE and self.scale != 1.0:
            raise PlanError(f"guidance none with scale {self.scale}: scale must be 1; use kind cfg or embedded")
        if self.kind is GuidanceKind.CFG and self.scale <= 1.0:
            raise PlanError(f"guidance cfg with scale {self.scale}: must be above 1; use kind none for no guidance")
        if self.kind is GuidanceKind.EMBEDDED and self.scale < 0.0:
            raise PlanError(f"guidance embedded with scale {self.scale}: must not be negative")

    @classmethod
    def of(cls, scale: float) -> "Guidance":
        """What a user's `--guidance SCALE` means: none up to 1 (0 included, as on the model cards), else cfg."""
        if is_number(scale) and 0.0 <= scale <= 1.0:
            return cls()
        return cls(kind=GuidanceKind.CFG, scale=scale)

    @property
    def embedded(self) -> float | None:
        """The scale that is a constant of the network; None for guidance of any other kind."""
        return self.scale if self.kind is GuidanceKind.EMBEDDED else None

    def to_json(self) -> dict[str, Any]:
        """{"kind": …, "scale": …}."""
        return {"kind": self.kind.value, "scale": self.scale}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Guidance":
        """Read what `to_json` wrote."""
        data = checked_object(data, what="guidance", required={"kind"}, optional={"scale"})
        kind = checked_enum(GuidanceKind, data["kind"], what="guidance kind")
        return cls(kind=kind, scale=checked_number(data.get("scale", 1.0), what="guidance scale"))


@dataclass(frozen=True, kw_only=True, slots=True)
class FewStepPlan:
    """A validated few-step plan; an impossible one raises `PlanError` on construction.

    num_steps: 1 … num_train_timesteps (LCM and TCD: … original_inference_steps unless `timesteps` are given).
    timesteps: explicit, falling, instead of the solver's own choice.
    timestep_spacing, steps_offset: how DDIM and the Euler solvers choose; TCD and LCM go by original_inference_steps.
    set_alpha_to_one: DDIM's final alphas_cumprod is 1, else that of timestep 0 (the SD configs say the latter).
    eta: stochasticity of DDIM and TCD, 0 … 1; TCD's is "gamma" in the paper.
    schedule: `FlowSchedule` with solver flow_euler and prediction flow, `NoiseSchedule` with all others.
    """

    solver: Solver
    num_steps: int
    prediction_type: PredictionType = PredictionType.EPSILON
    schedule: NoiseSchedule | FlowSchedule = field(default_factory=NoiseSchedule)
    timesteps: tuple[int, ...] | None = None
    timestep_spacing: TimestepSpacing = TimestepSpacing.TRAILING
    steps_offset: int = 0
    set_alpha_to_one: bool = False
    eta: float = 0.0
    guidance: Guidance = field(default_factory=Guidance)
    original_inference_steps: int = 50
    timestep_scaling: float = LCM_TIMESTEP_SCALING

    def __post_init__(self) -> None:
        coerce_enum(self, "solver", Solver, "solver")
        coerce_enum(self, "prediction_type", PredictionType, "prediction type")
        coerce_enum(self, "timestep_spacing", TimestepSpacing, "timestep_spacing")
        if isinstance(self.timesteps, list):
            object.__setattr__(self, "timesteps", tuple(self.timesteps))
        self._check_numbers()
        self._check_kind()
        self._check_timesteps()

    @property
    def is_flow(self) -> bool:
        """Whether this is a flow-matching plan."""
        return self.solver is Solver.FLOW_EULER

    def with_steps(self, num_steps: int) -> "FewStepPlan":
        """The same plan with another step count; refused where the timesteps are explicit."""
        if num_steps == self.num_steps:
            return self
        if self.timesteps is not None:
            raise PlanError(
                f"steps {num_steps}: this plan has the explicit timesteps {list(self.timesteps)}; pass --timesteps too"
            )
        return replace(self, num_steps=num_steps)

    def table(self, *, height: int | None = None, width: int | None = None) -> StepTable:
        """The constants of every step, computed in float64.

        `height` and `width` (pixels of the image) matter to flow plans with dynamic shifting only, which raise
        `PlanError` without them.
        """
        if isinstance(self.schedule, FlowSchedule):
            return _rows.flow_rows(self.num_steps, self.schedule, height=height, width=width)
        timesteps = self.net_timesteps()
        if self.solver is Solver.DDIM:
            return _rows.ddim_rows(self, self.schedule, timesteps)
        if self.solver is Solver.TCD:
            return _rows.tcd_rows(self, self.schedule, timesteps)
        if self.solver is Solver.LCM:
            return _rows.lcm_rows(self, self.schedule, timesteps)
        return _rows.euler_rows(self, self.schedule, timesteps, ancestral=self.solver is Solver.EULER_ANCESTRAL)

    def net_timesteps(self) -> FloatArray:
        """The timesteps at which a VP plan calls the network, falling: float64 [num_steps]."""
        total = self.schedule.num_train_timesteps
        if self.is_flow:
            raise PlanError("a flow plan's timesteps come with its table: sigma * 1000")
        if self.timesteps is not None:
            return np.array(self.timesteps, dtype=np.float64)
        if self.solver in (Solver.TCD, Solver.LCM):
            return consistency_timesteps(self.num_steps, total, self.original_inference_steps)
        rounded = self.solver is Solver.DDIM
        return spaced_timesteps(self.num_steps, total, self.timestep_spacing, self.steps_offset, rounded=rounded)

    def to_json(self) -> dict[str, Any]:
        """Every field, explicit; enums by value."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["schedule"] = _schedule_to_json(self.schedule)
        data["guidance"] = self.guidance.to_json()
        data["timesteps"] = None if self.timesteps is None else list(self.timesteps)
        return {key: value.value if isinstance(value, StrEnum) else value for key, value in data.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FewStepPlan":
        """Read what `to_json` wrote; keys other than solver and num_steps may be left to their defaults."""
        required = {"solver", "num_steps"}
        data = checked_object(data, what="plan", required=required, optional=set(_READERS) - required)
        return cls(**{key: _READERS[key](value) for key, value in data.items()})

    def _check_numbers(self) -> None:
        total = self.schedule.num_train_timesteps
        if not is_int(self.num_steps) or not 1 <= self.num_steps <= total:
            raise PlanError(f"steps {self.num_steps}: must be a whole number from 1 to {total}")
        if not is_number(self.eta) or not 0.0 <= self.eta <= 1.0:
            raise PlanError(f"eta {self.eta}: must be from 0 (deterministic) to 1 (fully stochastic)")
        if not is_int(self.steps_offset) or self.steps_offset < 0:
            raise PlanError(f"steps_offset {self.steps_offset}: must be a whole number, 0 or 1 in practice")
        if not is_number(self.timestep_scaling) or not self.timestep_scaling > 0.0:
            raise PlanError(f"timestep_scaling {self.timestep_scaling}: must be positive, 10 for LCM")
        original = self.original_inference_steps
        if not is_int(original) or not 1 <= original <= total:
            raise PlanError(f"original_inference_steps {original}: must be a whole number from 1 to {total}")
        if self.solver in (Solver.TCD, Solver.LCM) and self.timesteps is None and self.num_steps > original:
            raise PlanError(
                f"steps {self.num_steps}: {self.solver} takes at most original_inference_steps = {original}, "
                "or explicit timesteps"
            )

    def _check_kind(self) -> None:
        flows = (
            self.is_flow,
            isinstance(self.schedule, FlowSchedule),
            self.prediction_type is PredictionType.FLOW,
        )
        if any(flows) and not all(flows):
            raise PlanError(
                f"solver {self.solver} with prediction {self.prediction_type} on a {type(self.schedule).__name__}: "
                "flow_euler, flow and FlowSchedule go together"
            )
        if self.eta and self.solver not in (Solver.DDIM, Solver.TCD):
            raise PlanError(f"eta {self.eta}: solver {self.solver} has none; eta is for ddim and tcd")

    def _check_timesteps(self) -> None:
        if self.is_flow:
            if self.timesteps is not None:
                raise PlanError("flow_euler takes no explicit timesteps: its sigmas follow from steps and shift")
            return
        total = self.schedule.num_train_timesteps
        if self.timesteps is not None:
            _check_explicit(self.timesteps, self.num_steps)
        timesteps = self.net_timesteps()
        if timesteps[0] > total - 1:
            raise PlanError(
                f"timestep {timesteps[0]:g}: the schedule ends at {total - 1}; use fewer steps, a smaller "
                "steps_offset or num_train_timesteps of that size"
            )
        if (
            self.prediction_type is PredictionType.EPSILON
            and isinstance(self.schedule, NoiseSchedule)
            and self.schedule.rescale_betas_zero_snr
            and self.solver not in (Solver.EULER, Solver.EULER_ANCESTRAL)
            and timesteps[0] == total - 1
        ):
            raise PlanError(
                f"epsilon prediction at timestep {total - 1} with rescale_betas_zero_snr: no signal is left there to "
                "divide by; use v_prediction, or solver euler"
            )


def _check_explicit(timesteps: tuple[int, ...], num_steps: int) -> None:
    if not isinstance(timesteps, tuple) or not all(is_int(t) for t in timesteps):
        raise PlanError(f"timesteps {timesteps!r}: must be a tuple of whole numbers")
    if len(timesteps) != num_steps:
        raise PlanError(f"timesteps {list(timesteps)}: {len(timesteps)} of them for {num_steps} steps")
    if any(later >= earlier for earlier, later in pairwise(timesteps)):
        raise PlanError(f"timesteps {list(timesteps)}: must fall strictly, from noise to picture")
    if timesteps[-1] < 0:
        raise PlanError(f"timestep {timesteps[-1]}: must not be negative")


def _schedule_to_json(schedule: NoiseSchedule | FlowSchedule) -> dict[str, Any]:
    kind = "flow" if isinstance(schedule, FlowSchedule) else "vp"
    data = {key: value.value if isinstance(value, StrEnum) else value for key, value in asdict(schedule).items()}
    return {"kind": kind, **data}


def _schedule_from_json(data: object) -> NoiseSchedule | FlowSchedule:
    data = checked_object(data, what="schedule", required={"kind"}, optional=set(_VP_READERS) | set(_FLOW_READERS))
    if data["kind"] not in ("vp", "flow"):
        raise PlanError(f"schedule kind {data['kind']!r}: must be vp or flow")
    readers = _VP_READERS if data["kind"] == "vp" else _FLOW_READERS
    checked_object(data, what=f"{data['kind']} schedule", required={"kind"}, optional=set(readers))
    values = {key: readers[key](value) for key, value in data.items() if key != "kind"}
    return NoiseSchedule(**values) if readers is _VP_READERS else FlowSchedule(**values)


def _timesteps_from_json(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    return tuple(checked_int(t, what="timestep") for t in checked_list(value, what="timesteps"))


def _reader(check: Any, what: str) -> Any:
    return lambda value: check(value, what=what)


def _enum_reader(kind: type[StrEnum], what: str) -> Any:
    return lambda value: checked_enum(kind, value, what=what)


_VP_READERS: dict[str, Any] = {
    "num_train_timesteps": _reader(checked_int, "num_train_timesteps"),
    "beta_start": _reader(checked_number, "beta_start"),
    "beta_end": _reader(checked_number, "beta_end"),
    "beta_schedule": _enum_reader(BetaSchedule, "beta_schedule"),
    "rescale_betas_zero_snr": _reader(checked_bool, "rescale_betas_zero_snr"),
}
_FLOW_READERS: dict[str, Any] = {
    "num_train_timesteps": _reader(checked_int, "num_train_timesteps"),
    "convention": _enum_reader(FlowConvention, "flow convention"),
    "shift": _reader(checked_number, "shift"),
    "use_dynamic_shifting": _reader(checked_bool, "use_dynamic_shifting"),
    "base_shift": _reader(checked_number, "base_shift"),
    "max_shift": _reader(checked_number, "max_shift"),
    "base_image_seq_len": _reader(checked_int, "base_image_seq_len"),
    "max_image_seq_len": _reader(checked_int, "max_image_seq_len"),
    "pixels_per_token": _reader(checked_int, "pixels_per_token"),
}
_READERS: dict[str, Any] = {
    "solver": _enum_reader(Solver, "solver"),
    "num_steps": _reader(checked_int, "steps"),
    "prediction_type": _enum_reader(PredictionType, "prediction type"),
    "schedule": _schedule_from_json,
    "timesteps": _timesteps_from_json,
    "timestep_spacing": _enum_reader(TimestepSpacing, "timestep_spacing"),
    "steps_offset": _reader(checked_int, "steps_offset"),
    "set_alpha_to_one": _reader(checked_bool, "set_alpha_to_one"),
    "eta": _reader(checked_number, "eta"),
    "guidance": Guidance.from_json,
    "original_inference_steps": _reader(checked_int, "original_inference_steps"),
    "timestep_scaling": _reader(checked_number, "timestep_scaling"),
}

"""The step table: a few-step schedule as constants, which is all that a runtime needs.

    x = init_noise_sigma * noise
    for row in rows:
        out = net(row.k * x, row.t)
        x = row.a * x + row.b * out + row.c * z          # z ~ N(0, I), only where row.c != 0

and for image-to-image from row i:  x = rows[i].p * z0 + rows[i].q * noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hypersd_export.diffusion.jsonio import checked_list, checked_number, checked_object
from hypersd_export.errors import PlanError

PAST_THE_GRID = -1
"""`Row.t_to` of a row that lands beyond the schedule's timesteps, on the clean sample (or the plan's final alpha)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One step: the network's timestep `t`, the landing timestep `t_to`, and the coefficients of the module docstring.

    `t` is a float because Euler under linspace and flow matching (sigma * 1000) have fractional timesteps; `t_to` is -1
    where the step lands past the grid. `p` and `q` make a starting sample for this row from clean latents and noise.
    """

    t: float
    t_to: float
    k: float
    a: float
    b: float
    c: float
    p: float
    q: float

    def __post_init__(self) -> None:
        for field in fields(self):
            checked_number(getattr(self, field.name), what=f"row field {field.name}")


_ROW_KEYS = {field.name for field in fields(Row)}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTable:
    """A whole schedule: at least one row, and the scale of the initial noise."""

    rows: tuple[Row, ...]
    init_noise_sigma: float = 1.0

    def __post_init__(self) -> None:
        if not self.rows:
            raise PlanError("a step table needs at least one row")
        if checked_number(self.init_noise_sigma, what="init_noise_sigma") <= 0:
            raise PlanError(f"init_noise_sigma {self.init_noise_sigma}: must be positive")

    @property
    def noise_streams(self) -> tuple[int, ...]:
        """The 1-based row numbers that need fresh noise, in order: the noise streams of `noise.step_noise`."""
        return tuple(number for number, row in enumerate(self.rows, start=1) if row.c != 0)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; floats survive the round trip exactly."""
        rows = [{field.name: getattr(row, field.name) for field in fields(Row)} for row in self.rows]
        return {"init_noise_sigma": self.init_noise_sigma, "rows": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StepTable":
        """Read what `to_json` wrote; `PlanError` for anything else."""
        table = checked_object(data, what="step table", required={"rows", "init_noise_sigma"}, optional=set())
        rows = []
        for number, entry in enumerate(checked_list(table["rows"], what="step table rows"), start=1):
            row = checked_object(entry, what=f"step table row {number}", required=_ROW_KEYS, optional=set())
            rows.append(Row(**{key: checked_number(row[key], what=f"row {number} field {key}") for key in _ROW_KEYS}))
        scale = checked_number(table["init_noise_sigma"], what="init_noise_sigma")
        return cls(rows=tuple(rows), init_noise_sigma=scale)


def start_row(num_steps: int, strength: float) -> int:
    """The row where image-to-image starts: num_steps - min(floor(num_steps * strength), num_steps).

    `strength` in (0, 1]: 1 starts from row 0. `PlanError` if no row is left. Source: diffusers'
    StableDiffusionImg2ImgPipeline.get_timesteps; there too few steps mean an unchanged picture, here an error.
    """
    if not (isinstance(strength, int | float) and 0.0 < strength <= 1.0):
        raise PlanError(f"strength {strength}: must be above 0 and at most 1")
    kept = min(int(num_steps * strength), num_steps)
    if kept == 0:
        raise PlanError(f"strength {strength} leaves none of {num_steps} steps: pass at least {1 / num_steps:.3g}")
    return num_steps - kept

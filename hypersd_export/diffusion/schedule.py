"""Noise levels: betas to alphas_cumprod (VP), shifted sigmas (flow), and the timesteps that a step count selects.

Everything is computed in float64 from the formulas of diffusers 0.42, whose own tables are float32: they agree to 1e-6.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from math import exp

import numpy as np
import numpy.typing as npt

from hypersd_export.diffusion.jsonio import coerce_enum, is_int, is_number
from hypersd_export.errors import PlanError

FloatArray = npt.NDArray[np.float64]

EULER_LAST_ALPHA_CUMPROD = 2.0**-24
"""What diffusers' Euler schedulers put in place of a terminal alphas_cumprod of 0, so that sigma is finite (4096)."""


class BetaSchedule(StrEnum):
    """How betas run from `beta_start` to `beta_end`; the names are diffusers'."""

    LINEAR = "linear"
    SCALED_LINEAR = "scaled_linear"
    SQUAREDCOS_CAP_V2 = "squaredcos_cap_v2"


class TimestepSpacing(StrEnum):
    """How N timesteps are chosen among T: Table 2 of arXiv 2305.08891; the names are diffusers'."""

    LEADING = "leading"
    TRAILING = "trailing"
    LINSPACE = "linspace"


class FlowConvention(StrEnum):
    """How diffusers' pipelines choose flow-match sigmas before the shift.

    `sd3`: `set_timesteps(N)`, linspace between the *already shifted* ends and shifted again.
    `flux`: the pipeline passes `sigmas = linspace(1, 1/N, N)`, shifted once.
    """

    SD3 = "sd3"
    FLUX = "flux"


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseSchedule:
    """A discrete variance-preserving schedule; the defaults are those of SD 1.5, SD 2.1 and SDXL.

    Raises `PlanError` for values that give no schedule. Source: diffusers' DDIMScheduler.__init__.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = BetaSchedule.SCALED_LINEAR
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        coerce_enum(self, "beta_schedule", BetaSchedule, "beta_schedule")
        _check_total(self.num_train_timesteps)
        if (
            not (is_number(self.beta_start) and is_number(self.beta_end))
            or not 0.0 < self.beta_start <= self.beta_end < 1.0
        ):
            raise PlanError(
                f"beta_start {self.beta_start} and beta_end {self.beta_end}: need 0 < start <= end < 1, "
                "usually 0.00085 and 0.012"
            )
        if self.rescale_betas_zero_snr and self.num_train_timesteps < 2:
            raise PlanError("rescale_betas_zero_snr needs num_train_timesteps >= 2")

    def alphas_cumprod(self) -> FloatArray:
        """The signal power of each timestep: float64 [num_train_timesteps], falling, read-only.

        x_t = sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) noise (DDPM, arXiv 2006.11239 eq. 4). With
        `rescale_betas_zero_snr` the last entry is exactly 0 (arXiv 2305.08891, algorithm 1).
        """
        return _alphas_cumprod(self)

    def euler_sigmas(self) -> FloatArray:
        """sqrt((1 - a)/a) of each timestep: float64 [num_train_timesteps], rising, finite.

        As diffusers' Euler schedulers do, a terminal `a` under `rescale_betas_zero_snr` is 2**-24 here, not 0.
        """
        a = self.alphas_cumprod().copy()
        if self.rescale_betas_zero_snr:
            a[-1] = EULER_LAST_ALPHA_CUMPROD
        return np.sqrt((1.0 - a) / a)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowSchedule:
    """A flow-matching schedule, x_t = (1 - sigma) x0 + sigma noise; the network's timestep is sigma * 1000.

    The defaults are those of SD3; FLUX.1-dev is `convention=flux, use_dynamic_shifting=True`. `pixels_per_token` is the
    side in pixels of what one transformer token covers (VAE factor 8 times patch 2), which the dynamic shift needs.
    Source: diffusers' FlowMatchEulerDiscreteScheduler and the SD3 and FLUX pipelines.
    """

    num_train_timesteps: int = 1000
    convention: FlowConvention = FlowConvention.SD3
    shift: float = 3.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    pixels_per_token: int = 16

    def __post_init__(self) -> None:
        coerce_enum(self, "convention", FlowConvention, "flow convention")
        _check_total(self.num_train_timesteps)
        if not (is_number(self.shift) and self.shift > 0.0):
            raise PlanError(f"shift {self.shift}: must be positive, 3.0 for SD3")
        if self.use_dynamic_shifting and self.max_image_seq_len <= self.base_image_seq_len:
            raise PlanError(
                f"max_image_seq_len {self.max_image_seq_len} must exceed base_image_seq_len {self.base_image_seq_len}"
            )

    def sigmas(self, num_steps: int, *, height: int | None = None, width: int | None = None) -> FloatArray:
        """Falling noise levels: float64 [num_steps + 1], the last one 0.

        `height` and `width` are in pixels and needed (else `PlanError`) under `use_dynamic_shifting` only.
        """
        if self.convention is FlowConvention.SD3:
            lowest = 1.0 / self.num_train_timesteps
            if not self.use_dynamic_shifting:
                lowest = float(self._static_shift(np.asarray(lowest)))
            base = np.linspace(1.0, lowest, num_steps)
        else:
            base = np.linspace(1.0, 1.0 / num_steps, num_steps)
        shifted = self._dynamic_shift(base, height, width) if self.use_dynamic_shifting else self._static_shift(base)
        return np.append(shifted, 0.0)

    def _static_shift(self, sigmas: FloatArray) -> FloatArray:
        return self.shift * sigmas / (1.0 + (self.shift - 1.0) * sigmas)

    def _dynamic_shift(self, sigmas: FloatArray, height: int | None, width: int | None) -> FloatArray:
        if height is None or width is None:
            raise PlanError("this flow schedule depends on the image size: pass height and width in pixels")
        tokens = (height // self.pixels_per_token) * (width // self.pixels_per_token)
        if tokens < 1:
            raise PlanError(f"image size {width}x{height}: at least {self.pixels_per_token} pixels a side")
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = self.base_shift + slope * (tokens - self.base_image_seq_len)
        return exp(mu) / (exp(mu) + (1.0 / sigmas - 1.0))


def _check_total(num_train_timesteps: int) -> None:
    if not is_int(num_train_timesteps) or not 1 <= num_train_timesteps <= 1_000_000:
        raise PlanError(f"num_train_timesteps {num_train_timesteps!r}: from 1 to 1000000, usually 1000")


@lru_cache(maxsize=32)
def _alphas_cumprod(schedule: NoiseSchedule) -> FloatArray:
    betas = _betas(schedule)
    a: FloatArray = np.cumprod(1.0 - betas, dtype=np.float64)
    if schedule.rescale_betas_zero_snr:
        root = np.sqrt(a)
        first, last = root[0], root[-1]
        a = ((root - last) * (first / (first - last))) ** 2
    a.setflags(write=False)
    return a


def _betas(schedule: NoiseSchedule) -> FloatArray:
    count = schedule.num_train_timesteps
    if schedule.beta_schedule is BetaSchedule.LINEAR:
        return np.linspace(schedule.beta_start, schedule.beta_end, count)
    if schedule.beta_schedule is BetaSchedule.SCALED_LINEAR:
        return np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, count) ** 2
    # squaredcos_cap_v2 (arXiv 2102.09672 eq. 17) ignores beta_start and beta_end, and caps betas at 0.999.
    edges = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    betas: FloatArray = np.minimum(1.0 - edges[1:] / edges[:-1], 0.999)
    return betas


def spaced_timesteps(
    num_steps: int, num_train_timesteps: int, spacing: TimestepSpacing, steps_offset: int = 0, *, rounded: bool = True
) -> FloatArray:
    """The N timesteps of diffusers' DDIM and Euler schedulers, falling: float64 [num_steps].

    `rounded=False` keeps the fractions that the Euler schedulers keep under linspace (in float32, as there).
    Deviation: for 62 step counts (61, 103, 121, ...) diffusers' trailing `arange` overshoots by rounding and yields one
    more timestep, -1; that one is dropped here. May exceed `num_train_timesteps - 1` under leading with an offset: the
    plan refuses that.
    """
    if spacing is TimestepSpacing.LINSPACE:
        steps = np.linspace(0, num_train_timesteps - 1, num_steps)[::-1]
        return steps.round() if rounded else steps.astype(np.float32).astype(np.float64)
    if spacing is TimestepSpacing.LEADING:
        ratio = num_train_timesteps // num_steps
        return (np.arange(num_steps) * ratio)[::-1].astype(np.float64) + steps_offset
    ratio_exact = num_train_timesteps / num_steps
    return np.round(np.arange(num_train_timesteps, 0, -ratio_exact))[:num_steps] - 1.0


def trailing_overshoots(num_steps: int, num_train_timesteps: int) -> bool:
    """Whether diffusers' trailing spacing yields one timestep too many (see `spaced_timesteps`)."""
    return len(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)) != num_steps


def consistency_timesteps(num_steps: int, num_train_timesteps: int, original_inference_steps: int) -> FloatArray:
    """The N timesteps of diffusers' LCMScheduler and TCDScheduler, falling: float64 [num_steps].

    Evenly spaced by *index* in the distillation grid i*k - 1, k = T // original_inference_steps; so 4 of 50 gives
    999, 759, 499, 259 and not 999, 749, 499, 249. Needs num_steps <= original_inference_steps <= T.
    """
    k = num_train_timesteps // original_inference_steps
    grid = (np.arange(1, original_inference_steps + 1) * k - 1)[::-1]
    indices = np.floor(np.linspace(0, original_inference_steps, num_steps, endpoint=False)).astype(np.int64)
    return grid[indices].astype(np.float64)

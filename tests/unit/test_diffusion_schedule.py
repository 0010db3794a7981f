"""Noise schedules, flow schedules and timestep spacings: literal values and identities."""

import numpy as np
import pytest

from hypersd_export.diffusion import BetaSchedule, FlowConvention, FlowSchedule, NoiseSchedule, TimestepSpacing
from hypersd_export.diffusion.schedule import consistency_timesteps, spaced_timesteps, trailing_overshoots
from hypersd_export.errors import PlanError


def test_stable_diffusion_values():
    """alphas_cumprod of SD 1.5 at the timesteps that few-step models use, as printed in the literature."""
    a = NoiseSchedule().alphas_cumprod()
    assert a.dtype == np.float64
    assert a.shape == (1000,)
    expected = {0: 0.99915, 124: 0.863, 249: 0.675, 499: 0.278, 749: 0.0566, 800: 0.0369, 999: 0.00466}
    for t, value in expected.items():
        np.testing.assert_allclose(a[t], value, rtol=2e-3)
    np.testing.assert_allclose(NoiseSchedule().euler_sigmas()[999], 14.6146, rtol=1e-4)


def test_alphas_cumprod_is_shared_and_read_only():
    a = NoiseSchedule().alphas_cumprod()
    assert a is NoiseSchedule().alphas_cumprod()
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 0.5


@pytest.mark.parametrize("beta_schedule", list(BetaSchedule))
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_cumprod_falls_within_the_unit_interval(beta_schedule, zero_snr):
    schedule = NoiseSchedule(beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr)
    plain = NoiseSchedule(beta_schedule=beta_schedule).alphas_cumprod()
    a = schedule.alphas_cumprod()
    assert (np.diff(a) < 0).all()
    assert a[0] < 1
    assert a[-1] == 0 if zero_snr else a[-1] > 0
    np.testing.assert_allclose(a[0], plain[0], rtol=1e-12)
    assert np.isfinite(schedule.euler_sigmas()).all()


def test_zero_snr_gives_sigma_4096_to_euler():
    np.testing.assert_allclose(NoiseSchedule(rescale_betas_zero_snr=True).euler_sigmas()[-1], 4096, rtol=1e-7)


def test_names_are_as_good_as_members():
    assert NoiseSchedule(beta_schedule="linear") == NoiseSchedule(beta_schedule=BetaSchedule.LINEAR)
    assert FlowSchedule(convention="flux") == FlowSchedule(convention=FlowConvention.FLUX)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_timesteps": 0}, r"^num_train_timesteps 0: from 1 to 1000000"),
        ({"num_train_timesteps": "many"}, r"^num_train_timesteps 'many': from 1"),
        ({"beta_start": 0.02, "beta_end": 0.01}, r"^beta_start 0.02 and beta_end 0.01: need 0 < start <= end < 1"),
        ({"beta_end": "x"}, r"need 0 < start <= end < 1"),
        ({"beta_schedule": "sigmoid"}, r"^beta_schedule 'sigmoid': must be one of linear, scaled_linear"),
        ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, r"needs num_train_timesteps >= 2"),
    ],
)
def test_bad_noise_schedule_is_one_line(arguments, message):
    with pytest.raises(PlanError, match=message):
        NoiseSchedule(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_timesteps": -1}, r"^num_train_timesteps -1"),
        ({"shift": 0.0}, r"^shift 0.0: must be positive"),
        ({"convention": "wan"}, r"^flow convention 'wan': must be one of sd3, flux"),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 256}, r"must exceed base_image_seq_len 256"),
    ],
)
def test_bad_flow_schedule_is_one_line(arguments, message):
    with pytest.raises(PlanError, match=message):
        FlowSchedule(**arguments)


TRAILING = {
    1: [999],
    2: [999, 499],
    3: [999, 666, 332],
    4: [999, 749, 499, 249],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
    12: [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82],
}


@pytest.mark.parametrize("num_steps", list(TRAILING))
def test_trailing(num_steps):
    assert spaced_timesteps(num_steps, 1000, TimestepSpacing.TRAILING).tolist() == TRAILING[num_steps]


def test_leading_and_linspace():
    assert spaced_timesteps(4, 1000, TimestepSpacing.LEADING, 1).tolist() == [751, 501, 251, 1]
    assert spaced_timesteps(3, 1000, TimestepSpacing.LEADING).tolist() == [666, 333, 0]
    assert spaced_timesteps(4, 1000, TimestepSpacing.LINSPACE).tolist() == [999, 666, 333, 0]
    assert spaced_timesteps(3, 1000, TimestepSpacing.LINSPACE).tolist() == [999, 500, 0]
    assert spaced_timesteps(3, 1000, TimestepSpacing.LINSPACE, rounded=False).tolist() == [999, 499.5, 0]
    assert spaced_timesteps(1, 1000, TimestepSpacing.LINSPACE).tolist() == [0]


def test_trailing_always_has_n_timesteps():
    """Also where the floating-point range of diffusers runs one too far."""
    for num_steps in range(1, 1001):
        steps = spaced_timesteps(num_steps, 1000, TimestepSpacing.TRAILING)
        assert len(steps) == num_steps
        assert steps[0] == 999
        assert steps[-1] >= 0
        assert (np.diff(steps) < 0).all()
    assert [n for n in range(1, 130) if trailing_overshoots(n, 1000)] == [61, 103, 121, 122]


CONSISTENCY = {
    1: [999],
    2: [999, 499],
    4: [999, 759, 499, 259],
    8: [999, 879, 759, 639, 499, 379, 259, 139],
}


@pytest.mark.parametrize("num_steps", list(CONSISTENCY))
def test_consistency(num_steps):
    assert consistency_timesteps(num_steps, 1000, 50).tolist() == CONSISTENCY[num_steps]


def test_flow_sigmas():
    """SD3 at 4 steps, computed by hand from shift(s) = 3s/(1 + 2s), applied to the range's end and then to all."""
    low = 3 * 0.001 / 1.002
    base = [1 - i * (1 - low) / 3 for i in range(4)]
    expected = [3 * s / (1 + 2 * s) for s in base] + [0]
    np.testing.assert_allclose(FlowSchedule().sigmas(4), expected, rtol=1e-12)
    flux = FlowSchedule(convention=FlowConvention.FLUX, shift=1.0)
    np.testing.assert_allclose(flux.sigmas(4), [1, 0.75, 0.5, 0.25, 0], rtol=1e-12)


def test_dynamic_shift():
    """At 4096 tokens mu is max_shift, at 256 base_shift; more pixels mean more noise for longer."""
    schedule = FlowSchedule(convention=FlowConvention.FLUX, use_dynamic_shifting=True)
    for side, mu in ((1024, 1.15), (256, 0.5)):
        sigmas = schedule.sigmas(2, height=side, width=side)
        np.testing.assert_allclose(sigmas, [1, np.exp(mu) / (np.exp(mu) + 1), 0], rtol=1e-12)
    with pytest.raises(PlanError, match="pass height and width"):
        schedule.sigmas(2)
    with pytest.raises(PlanError, match="image size 8x8: at least 16 pixels"):
        schedule.sigmas(2, height=8, width=8)

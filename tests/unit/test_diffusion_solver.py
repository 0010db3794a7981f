"""Prediction conversions and solver steps: identities, NumPy = torch, and exact answers for Gaussian data."""

import numpy as np
import pytest
import torch

from hypersd_export.diffusion import (
    FewStepPlan,
    FlowSchedule,
    NoiseSchedule,
    PredictionType,
    Solver,
    add_noise,
    ancestral_sigmas,
    ddim_jump,
    ddim_step,
    eps_of,
    euler_step,
    flow_step,
    jump,
    lcm_denoise,
    lcm_scalings,
    run,
    target_of,
    tcd_step,
    v_of,
    x0_and_eps,
    x0_of,
)
from hypersd_export.errors import PlanError

VP = (PredictionType.EPSILON, PredictionType.V_PREDICTION, PredictionType.SAMPLE)
RNG = np.random.default_rng(0)
X0, NOISE = RNG.standard_normal((2, 4, 3, 3)), RNG.standard_normal((2, 4, 3, 3))
A = np.array([0.3, 0.9]).reshape(2, 1, 1, 1)  # one level per image, as a trainer has it


@pytest.mark.parametrize("prediction", VP)
def test_target_converts_back_to_x0_and_noise(prediction):
    x = add_noise(X0, NOISE, A)
    out = target_of(X0, NOISE, A, prediction)
    x0, eps = x0_and_eps(out, x, A, prediction)
    np.testing.assert_allclose(x0, X0, atol=1e-12)
    np.testing.assert_allclose(eps, NOISE, atol=1e-12)
    np.testing.assert_allclose(x0_of(out, x, A, prediction), X0, atol=1e-12)
    np.testing.assert_allclose(eps_of(out, x, A, prediction), NOISE, atol=1e-12)


@pytest.mark.parametrize("prediction", [PredictionType.V_PREDICTION, PredictionType.SAMPLE])
def test_zero_signal_is_exact_for_v_and_sample(prediction):
    """At alphas_cumprod 0, x is the noise and v is -x0: nothing is divided by alpha."""
    out = target_of(X0, NOISE, 0.0, prediction)
    x0, eps = x0_and_eps(out, NOISE, 0.0, prediction)
    np.testing.assert_array_equal(x0, X0)
    np.testing.assert_array_equal(eps, NOISE)


def test_v_is_a_rotation():
    np.testing.assert_allclose(v_of(X0, NOISE, A) ** 2 + add_noise(X0, NOISE, A) ** 2, X0**2 + NOISE**2, atol=1e-12)


def test_flow_has_a_target_but_no_alphas():
    np.testing.assert_array_equal(target_of(X0, NOISE, A, PredictionType.FLOW), NOISE - X0)
    with pytest.raises(PlanError, match="flow_euler"):
        x0_and_eps(X0, X0, A, PredictionType.FLOW)


def test_ddim_jump_is_a_semigroup():
    """On a fixed (x0, eps) line: identity at t = s, composition, and the forward process itself."""
    x = add_noise(X0, NOISE, A)
    np.testing.assert_allclose(ddim_jump(x, NOISE, A, A), x, atol=1e-12)
    np.testing.assert_allclose(ddim_jump(x, NOISE, A, 0.95), add_noise(X0, NOISE, 0.95), atol=1e-12)
    twice = ddim_jump(ddim_jump(x, NOISE, A, 0.93), NOISE, 0.93, 0.99)
    np.testing.assert_allclose(twice, ddim_jump(x, NOISE, A, 0.99), atol=1e-12)
    np.testing.assert_allclose(ddim_jump(x, NOISE, A, 1.0), X0, atol=1e-12)


def test_ddim_jump_is_the_semilinear_form_of_tcd():
    """TCD eq. 16: (sigma_s/sigma_t) x - alpha_s (exp(-h) - 1) x0, h = lambda_s - lambda_t."""
    a, b = 0.3, 0.8
    x = add_noise(X0, NOISE, a)
    half_log_snr = [0.5 * np.log(level / (1 - level)) for level in (a, b)]
    h = half_log_snr[1] - half_log_snr[0]
    expected = ((1 - b) / (1 - a)) ** 0.5 * x - b**0.5 * (np.exp(-h) - 1) * X0
    np.testing.assert_allclose(ddim_jump(x, NOISE, a, b), expected, atol=1e-12)


def test_ddim_step_keeps_the_variance():
    """The coefficients of eps and noise add up to 1 - a_to in square, for every eta; eta 0 is the jump."""
    for eta in (0.0, 0.3, 1.0):
        kept, fresh = (float(ddim_step(0.0, *pair, 0.3, 0.8, eta=eta)) for pair in ((1.0, 0.0), (0.0, 1.0)))
        np.testing.assert_allclose(kept**2 + fresh**2, 0.2, rtol=1e-12)
    np.testing.assert_allclose(ddim_step(X0, NOISE, X0, 0.3, 0.8), jump(X0, NOISE, 0.8), atol=1e-12)
    # From zero signal with eta 1 everything is fresh, and the root of what is kept must not be of a negative number.
    for a_to in np.linspace(0.001, 0.999, 997):
        assert float(ddim_step(0.0, 1.0, 0.0, 0.0, float(a_to), eta=1.0)) == 0.0


def test_tcd_step_keeps_the_variance():
    kept, fresh = (float(tcd_step(0.0, *pair, 0.9, 0.5)) for pair in ((1.0, 0.0), (0.0, 1.0)))
    np.testing.assert_allclose(kept**2 + fresh**2, 0.5, rtol=1e-12)
    np.testing.assert_allclose(float(tcd_step(1.0, 0.0, 0.0, 0.9, 0.5)), 0.5**0.5, rtol=1e-12)
    np.testing.assert_allclose(tcd_step(X0, NOISE, X0, 0.7, 0.7), jump(X0, NOISE, 0.7), atol=1e-12)


def test_lcm_boundary():
    """c_skip(0) = 1 and c_out(0) = 0; at t = 999 practically the reverse."""
    assert lcm_scalings(0) == (1.0, 0.0)
    np.testing.assert_allclose(lcm_scalings(999), (0.25 / (9990**2 + 0.25), 9990 / (9990**2 + 0.25) ** 0.5), rtol=1e-12)
    np.testing.assert_array_equal(lcm_denoise(NOISE, X0, 0), NOISE)


def test_euler_steps():
    x = X0 + 3.0 * NOISE
    np.testing.assert_allclose(euler_step(x, X0, 3.0, 1.5), X0 + 1.5 * NOISE, atol=1e-12)
    np.testing.assert_allclose(euler_step(x, X0, 3.0, 0.0), X0, atol=1e-12)
    down, up = ancestral_sigmas(3.0, 1.5)
    np.testing.assert_allclose((down**2 + up**2, down), (1.5**2, 0.75), rtol=1e-12)
    assert ancestral_sigmas(3.0, 0.0) == (0.0, 0.0)
    np.testing.assert_allclose(flow_step(0.4 * X0 + 0.6 * NOISE, NOISE - X0, 0.6, 0.0), X0, atol=1e-12)


def test_torch_tensors_give_the_same_numbers():
    x0, noise, a = (torch.from_numpy(array) for array in (X0, NOISE, A))
    b = A * 0 + 0.95
    pairs = [
        (add_noise(x0, noise, a), add_noise(X0, NOISE, A)),
        (ddim_jump(x0, noise, a, torch.from_numpy(b)), ddim_jump(X0, NOISE, A, b)),
        (ddim_step(x0, noise, x0, a, 0.95, eta=0.5), ddim_step(X0, NOISE, X0, A, 0.95, eta=0.5)),
        (tcd_step(x0, noise, x0, 0.95, a), tcd_step(X0, NOISE, X0, 0.95, A)),
        (lcm_denoise(x0, noise, 499), lcm_denoise(X0, NOISE, 499)),
        (v_of(x0, noise, a), v_of(X0, NOISE, A)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-13, atol=1e-13)


# Gaussian data N(0, s^2): at every level the marginal is N(0, var), so the optimal prediction is linear in x and the
# probability-flow ODE merely rescales x by the ratio of standard deviations. This is exact, and has no diffusers in it.
S = 0.6


def gaussian_net(schedule, prediction):
    """The optimal VP network for N(0, S^2) data."""
    a = schedule.alphas_cumprod()

    def net(x, t):
        level = np.interp(t, np.arange(len(a)), a)
        var = level * S**2 + 1 - level
        x0, eps = level**0.5 * S**2 / var * x, (1 - level) ** 0.5 / var * x
        return target_of(x0, eps, level, prediction)

    return net


def ddim_error(num_steps, prediction):
    schedule = NoiseSchedule()
    a = schedule.alphas_cumprod()
    plan = FewStepPlan(solver=Solver.DDIM, num_steps=num_steps, prediction_type=prediction, schedule=schedule)
    gain = run(plan.table(), gaussian_net(schedule, prediction), 1.0)
    exact = ((a[0] * S**2 + 1 - a[0]) / (a[-1] * S**2 + 1 - a[-1])) ** 0.5
    return abs(gain / exact - 1)


@pytest.mark.parametrize("prediction", VP)
def test_ddim_converges_to_the_ode_at_first_order(prediction):
    """Twice the steps, half the error (step counts that divide 1000, so that trailing tiles the schedule)."""
    errors = {n: ddim_error(n, prediction) for n in (20, 25, 40, 50, 100, 125, 200, 250)}
    for n in (20, 25, 50, 100, 125):
        assert 1.85 < errors[n] / errors[2 * n] < 2.15, (n, errors)
    order = np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0]
    np.testing.assert_allclose(order, -1.0, atol=0.05)
    assert errors[250] < 0.01


def test_predictions_are_equivalent():
    errors = [ddim_error(7, prediction) for prediction in VP]
    np.testing.assert_allclose(errors, errors[0], rtol=1e-9)


def test_flow_euler_converges_to_the_ode_at_first_order():
    def net(x, t):
        sigma = t / 1000
        var = (1 - sigma) ** 2 * S**2 + sigma**2
        return (sigma - (1 - sigma) * S**2) / var * x

    def error(num_steps):
        schedule = FlowSchedule(convention="flux", shift=1.0)
        plan = FewStepPlan(solver="flow_euler", num_steps=num_steps, prediction_type="flow", schedule=schedule)
        return abs(run(plan.table(), net, 1.0) / S - 1)

    for n in (20, 50, 100, 200):
        assert 1.85 < error(n) / error(2 * n) < 2.15


def variance_after(plan, net):
    """The exact variance of the sample when x and all step noises are independent normals: the net is linear."""
    table = plan.table()
    variance = table.init_noise_sigma**2
    for row in table.rows:
        gain = row.a + row.b * row.k * net(1.0, row.t)
        variance = gain**2 * variance + row.c**2
    return variance


@pytest.mark.parametrize(
    "arguments",
    [
        {"solver": Solver.DDIM, "eta": 1.0},
        {"solver": Solver.DDIM, "eta": 0.3},
        {"solver": Solver.EULER},
        {"solver": Solver.EULER_ANCESTRAL},
        {"solver": Solver.TCD, "original_inference_steps": 500},
    ],
)
@pytest.mark.parametrize("prediction", VP)
def test_samples_converge_to_the_data_variance(arguments, prediction):
    """Within 3 % at 500 steps, and at least a factor 2.5 closer than at 125: first order, up to the schedule's ends."""
    schedule = NoiseSchedule()
    net = gaussian_net(schedule, prediction)
    errors = [
        abs(variance_after(FewStepPlan(num_steps=n, prediction_type=prediction, **arguments), net) / S**2 - 1)
        for n in (125, 500)
    ]
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 2.5, errors

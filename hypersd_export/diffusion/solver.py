"""Stateless solver steps: each is a formula from one noise level to another, with no counter and no history.

VP levels are given as alphas_cumprod values (`a_from`, `a_to`), VE levels as sigmas; each a float or an array that
broadcasts to the sample. Samples are NumPy arrays, torch tensors or floats. Every step is linear in (x, x0, eps,
noise); `rows.py` reads the coefficients of the step table off these very functions.
"""

from hypersd_export.diffusion.arrays import Array

LCM_SIGMA_DATA = 0.5
LCM_TIMESTEP_SCALING = 10.0


def add_noise(x0: Array, noise: Array, a: Array) -> Array:
    """x_t = sqrt(a) x0 + sqrt(1 - a) noise: the forward process (arXiv 2006.11239 eq. 4)."""
    return a**0.5 * x0 + (1 - a) ** 0.5 * noise


def jump(x0: Array, eps: Array, a_to: Array) -> Array:
    """The point at level `a_to` of the straight DDIM path through (x0, eps)."""
    return a_to**0.5 * x0 + (1 - a_to) ** 0.5 * eps


def ddim_jump(x: Array, eps: Array, a_from: Array, a_to: Array) -> Array:
    """Psi(x_t, eps, t -> s): deterministic DDIM from level `a_from` to `a_to` (arXiv 2010.02502 eq. 12, sigma = 0).

    Equals TCD's trajectory consistency function in semi-linear form (arXiv 2402.19159 eq. 16). `a_to == a_from` is the
    identity; `a_from` must not be 0 (use `prediction.x0_and_eps` and `jump` there).
    """
    return jump((x - (1 - a_from) ** 0.5 * eps) / a_from**0.5, eps, a_to)


def ddim_step(x0: Array, eps: Array, noise: Array, a_from: Array, a_to: Array, *, eta: float = 0.0) -> Array:
    """One DDIM step with stochasticity eta in [0, 1] (arXiv 2010.02502 eq. 12 and 16; diffusers' DDIMScheduler.step).

    The noise has the variance eta^2 (1 - a_to) fresh, fresh = (1 - a_from / a_to) / (1 - a_from). Factored so, no root
    goes below 0: `1 - a_to - std^2` as the paper writes it does by rounding, at eta 1 from zero SNR.
    """
    fresh = eta * eta * ((1 - a_from / a_to) / (1 - a_from))
    kept = ((1 - a_to) * (1 - fresh)) ** 0.5
    return a_to**0.5 * x0 + kept * eps + ((1 - a_to) * fresh) ** 0.5 * noise


def tcd_step(x0: Array, eps: Array, noise: Array, a_s: Array, a_to: Array) -> Array:
    """Strategic stochastic sampling: jump to the cleaner level `a_s`, then diffuse back to `a_to` <= `a_s`.

    Source: arXiv 2402.19159 algorithm 4; diffusers' TCDScheduler.step. `a_s == a_to` adds no noise.
    """
    ratio = a_to / a_s
    return ratio**0.5 * jump(x0, eps, a_s) + (1 - ratio) ** 0.5 * noise


def lcm_scalings(t: Array, timestep_scaling: float = LCM_TIMESTEP_SCALING) -> tuple[Array, Array]:
    """(c_skip, c_out) of a latent consistency model at timestep t (arXiv 2310.04378, sec. 4; diffusers' LCMScheduler).

    sigma_data is 0.5. diffusers multiplies the timestep by `timestep_scaling` (10); the paper divides by 0.1.
    """
    scaled = t * timestep_scaling
    total = scaled * scaled + LCM_SIGMA_DATA**2
    return LCM_SIGMA_DATA**2 / total, scaled / total**0.5


def lcm_denoise(x: Array, x0: Array, t: Array, timestep_scaling: float = LCM_TIMESTEP_SCALING) -> Array:
    """The consistency function c_skip x + c_out x0."""
    c_skip, c_out = lcm_scalings(t, timestep_scaling)
    return c_out * x0 + c_skip * x


def euler_step(x: Array, x0: Array, sigma_from: Array, sigma_to: Array) -> Array:
    """One Euler step of the VE probability-flow ODE dx/dsigma = (x - x0)/sigma (arXiv 2206.00364 eq. 3)."""
    ratio = sigma_to / sigma_from
    return ratio * x + (1 - ratio) * x0


def ancestral_sigmas(sigma_from: Array, sigma_to: Array) -> tuple[Array, Array]:
    """(sigma_down, sigma_up) with sigma_down^2 + sigma_up^2 = sigma_to^2 (k-diffusion's get_ancestral_step, eta 1)."""
    sigma_up = sigma_to * (1 - (sigma_to / sigma_from) ** 2) ** 0.5
    return sigma_to * sigma_to / sigma_from, sigma_up


def flow_step(x: Array, flow: Array, sigma_from: Array, sigma_to: Array) -> Array:
    """One Euler step of the flow ODE, dx/dsigma = flow = noise - x0 (arXiv 2403.03206 eq. 2)."""
    return x + (sigma_to - sigma_from) * flow

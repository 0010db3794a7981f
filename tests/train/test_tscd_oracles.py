"""TSCD against problems whose solution is known in closed form; all in float64.

With Ψ(x, ε, t → s) = r x + c ε, where r = α_s/α_t and c = σ_s − r σ_t, every network that is affine in x makes every
jump affine in x, so a chain of jumps is one affine map. Two distributions of data make the exact denoiser affine: a
point mass (the ODE's paths are straight, one ε serves every end) and a Gaussian (they are curved, and it does not).
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from hypersd_export.diffusion import (
    NoiseSchedule,
    PredictionType,
    edge_timesteps,
    lower_edge,
    target_of,
    target_range,
    x0_and_eps,
)
from hypersd_export.errors import PlanError
from trainer.distill.config import METHODS, recipe, with_method
from trainer.distill.plans import plans_for
from trainer.losses.tscd import (
    Boundary,
    Distance,
    End,
    Grid,
    Indices,
    Pair,
    consistency_distance,
    consistency_pair,
    draw_indices,
    psi,
)

ALPHAS = torch.tensor(NoiseSchedule().alphas_cumprod())
EPS, V, SAMPLE = PredictionType.EPSILON, PredictionType.V_PREDICTION, PredictionType.SAMPLE
CASES = [(8, 40), (4, 40), (2, 50), (1, 50), (8, 8), (5, 200), (3, 9), (1, 1), (1, 200), (50, 50)]
LEGAL = [(k, n) for n in range(1, 201) for k in range(1, n + 1) if n % k == 0]
MEAN, STD = 0.7, 0.5


def _grid(segments, points):
    return Grid.of(ALPHAS, points=points, segments=segments)


def _all_indices(grid, end=End.RANDOM):
    """Every legal (i_n, i_end) of a grid."""
    low, _ = target_range(torch.arange(1, grid.points + 1), grid.points, grid.segments)
    starts, ends = [], []
    for start, edge in enumerate(low.tolist(), 1):
        here = [edge] if end is End.EDGE else list(range(edge, start))
        starts += [start] * len(here)
        ends += here
    return Indices(torch.tensor(starts), torch.tensor(ends))


def _level(values, x):
    return values.view(-1, *[1] * (x.ndim - 1))


def _never(x, t, rows):
    raise AssertionError("this network must not be called")


def _loss(x0, noise, indices, grid, prediction_type=EPS, *, student, target, teacher, boundary=Boundary.DDIM):
    pair = consistency_pair(
        x0, noise, indices, grid, student=student, target=target, teacher=teacher, prediction_type=prediction_type,
        boundary=boundary,
    )  # fmt: skip
    return consistency_distance(pair, Distance.MSE)


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Networks that are affine in x.


def jump_factors(grid, start, end):
    """(r, c) of Ψ from grid index `start` to `end`."""
    a_from, a_to = grid.alphas[start], grid.alphas[end]
    r = (a_to / a_from).sqrt()
    return r, (1 - a_to).sqrt() - r * (1 - a_from).sqrt()


@dataclass(frozen=True)
class Affine:
    """y = slope · x + shift."""

    slope: torch.Tensor
    shift: torch.Tensor

    def then(self, other: "Affine") -> "Affine":
        return Affine(other.slope * self.slope, other.slope * self.shift + other.shift)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.slope * x + self.shift


def gaussian_eps(a, mean=MEAN, std=STD):
    """E[ε | x_t] for x0 ~ N(mean, std²): σ (x − α mean) / (α² std² + σ²)."""
    alpha, sigma = a.sqrt(), (1 - a).sqrt()
    slope = sigma / (a * std**2 + sigma**2)
    return Affine(slope, -slope * alpha * mean)


def jump_by(eps, grid, start, end):
    """The affine map Ψ(x, eps(x), start → end)."""
    r, c = jump_factors(grid, start, end)
    return Affine(r + c * eps.slope, c * eps.shift)


def eps_that_lands(goal, grid, start, end):
    """The ε, affine in x, whose jump start → end is the affine map `goal`."""
    r, c = jump_factors(grid, start, end)
    return Affine((goal.slope - r) / c, goal.shift / c)


def composed_ddim(grid, ends):
    """{start: the teacher's DDIM steps start → start − 1 → … → ends[start] as one affine map}, for Gaussian data."""
    chains = {}
    for start in range(1, grid.points + 1):
        step = jump_by(gaussian_eps(grid.alphas[start]), grid, start, start - 1)
        chains[start] = step if ends[start] == start - 1 else step.then(chains[start - 1])
        assert ends[start] == start - 1 or ends[start] == ends[start - 1]
    return chains


class Table(nn.Module):
    """A network that is affine in x, with its own coefficients at every grid index; as any prediction type."""

    def __init__(self, grid, by_index, prediction_type=EPS):
        """by_index: {grid index: Affine, in terms of ε}."""
        super().__init__()
        self.index = {int(t): i for i, t in enumerate(grid.timesteps.tolist()) if i > 0}
        assert len(self.index) == grid.points
        zero = torch.zeros((), dtype=torch.float64)
        table = [by_index.get(i, Affine(zero, zero)) for i in range(grid.points + 1)]
        self.slope = nn.Parameter(torch.stack([row.slope for row in table]))
        self.shift = nn.Parameter(torch.stack([row.shift for row in table]))
        self.prediction_type = prediction_type
        self.calls: list[torch.Tensor] = []
        self.graded: list[bool] = []

    def forward(self, x, t, rows):
        self.calls.append(rows)
        self.graded.append(torch.is_grad_enabled())
        index = torch.tensor([self.index[int(each)] for each in t])
        eps = _level(self.slope[index], x) * x + _level(self.shift[index], x)
        a = _level(ALPHAS[t], x)
        return target_of((x - (1 - a).sqrt() * eps) / a.sqrt(), eps, a, self.prediction_type)


def teacher_table(grid, prediction_type=EPS):
    eps = {i: gaussian_eps(grid.alphas[i]) for i in range(1, grid.points + 1)}
    return Table(grid, eps, prediction_type)


# Point-mass data.


@pytest.mark.parametrize("prediction_type", [EPS, V, SAMPLE])
@pytest.mark.parametrize(("segments", "points"), CASES)
def test_point_mass_has_no_loss_anywhere(segments, points, prediction_type):
    """Every path is the straight line to mu, so the exact denoiser is consistent for every (t_n, t_end)."""
    grid = _grid(segments, points)
    indices = _all_indices(grid)
    mu = _normal(1, 2, 3, 3) * 2

    def exact(x, t, rows):
        a = _level(ALPHAS[t], x)
        eps = (x - a.sqrt() * mu) / (1 - a).sqrt()
        return target_of(mu.expand_as(x), eps, a, prediction_type)

    x0 = mu.expand(len(indices.start), -1, -1, -1)
    losses = _loss(
        x0, _normal(*x0.shape, seed=1), indices, grid, prediction_type, student=exact, target=exact, teacher=exact
    )
    assert losses.max() <= 1e-12


# Gaussian data, the end fixed to the segment's edge.


@pytest.mark.parametrize("prediction_type", [EPS, V])
@pytest.mark.parametrize(("segments", "points"), [c for c in CASES if c != (1, 1)])
def test_the_composed_ddim_student_has_no_loss_at_fixed_ends(segments, points, prediction_type):
    grid = _grid(segments, points)
    indices = _all_indices(grid, End.EDGE)
    ends = dict(zip(indices.start.tolist(), indices.end.tolist(), strict=True))
    eps = {i: eps_that_lands(chain, grid, i, ends[i]) for i, chain in composed_ddim(grid, ends).items()}
    student, teacher = Table(grid, eps, prediction_type), teacher_table(grid, prediction_type)
    x0 = MEAN + STD * _normal(points, 1, 2, 2)
    losses = _loss(
        x0, _normal(*x0.shape, seed=1), indices, grid, prediction_type, student=student, target=student, teacher=teacher
    )
    assert losses.max() <= 1e-24
    if segments < points:  # and it is another function than the teacher, whose own loss is not 0
        own = _loss(
            x0, _normal(*x0.shape, seed=1), indices, grid, prediction_type,
            student=teacher, target=teacher, teacher=teacher,
        )  # fmt: skip
        assert own.max() > 1e-6


def test_the_composed_ddim_student_tends_to_the_exact_path():
    """The exact path keeps z = (x_t − α_t mean) / std(x_t); DDIM's error at the end falls as 1/N."""

    def spread(a):
        return (a * STD**2 + 1 - a).sqrt()

    errors = []
    for points in (25, 50, 100, 200):
        grid = _grid(1, points)
        chain = composed_ddim(grid, dict.fromkeys(range(1, points + 1), 0))[points]
        top, bottom = grid.alphas[points], grid.alphas[0]
        exact = Affine(
            spread(bottom) / spread(top), bottom.sqrt() * MEAN - spread(bottom) / spread(top) * top.sqrt() * MEAN
        )
        x = torch.tensor([-2.0, -0.3, 0.1, 2.5], dtype=torch.float64)
        errors.append(float((chain(x) - exact(x)).abs().max()))
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert 1.6 < coarse / fine < 2.4


# Gaussian data, random ends: weighted least squares.


def quadrature(grid, indices):
    """(x0, noise) that put x_start at m ± d: the mean of a quadratic over them is its mean over N(m, d²), exactly."""
    a = grid.alphas[indices.start]
    spread = (a * STD**2 + 1 - a).sqrt()
    noise = torch.stack([spread, -spread], dim=1) / (1 - a).sqrt()[:, None]
    return torch.full_like(noise, MEAN), noise


def least_squares(grid, start, ends, land):
    """(ε at `start`, loss there) that minimise the mean over `ends` and x_start ~ N(m, d²); land(e): the target's map.

    A jump to e multiplies ε by c_e, so in z = (x − m)/d the loss is mean_e c_e² ((p − p_e)² + (q − q_e)²) for
    ε = p z + q and ε_e = p_e z + q_e, the ε that lands at e; p* and q* are the means of p_e and q_e with weights c_e².
    """
    a = grid.alphas[start]
    m, d = a.sqrt() * MEAN, (a * STD**2 + 1 - a).sqrt()
    wanted = [eps_that_lands(land(e), grid, start, e) for e in ends]
    p, q = torch.stack([w.slope * d for w in wanted]), torch.stack([w(m) for w in wanted])
    weights = torch.stack([jump_factors(grid, start, e)[1] for e in ends]).square()
    best_p, best_q = ((weights * each).sum() / weights.sum() for each in (p, q))
    loss = (weights * ((p - best_p).square() + (q - best_q).square())).mean()
    return Affine(best_p / d, best_q - best_p / d * m), loss


def target_map(grid, eps):
    """start, end → the affine map of x_start that the target gives: the teacher's step, then eps[start − 1]'s jump."""

    def land(start, end):
        step = jump_by(gaussian_eps(grid.alphas[start]), grid, start, start - 1)
        return step if end == start - 1 else step.then(jump_by(eps[start - 1], grid, start - 1, end))

    return land


def best_student(grid, target_eps=None):
    """({index: ε*}, {index: loss}); against a fixed target, or (None) against itself, from the lowest index up."""
    best, losses = {}, {}
    for start in range(1, grid.points + 1):
        edge = int(lower_edge(start, grid.points, grid.segments))
        land = target_map(grid, best if target_eps is None else target_eps)
        best[start], losses[start] = least_squares(grid, start, range(edge, start), lambda e, s=start, f=land: f(s, e))
    return best, losses


def _losses_by_start(grid, student, target, teacher):
    """The exact expected loss of each start index: the mean over its ends and over x_start."""
    indices = _all_indices(grid)
    each = _loss(*quadrature(grid, indices), indices, grid, student=student, target=target, teacher=teacher)
    return torch.stack([each[indices.start == i].mean() for i in range(1, grid.points + 1)])


@pytest.mark.parametrize("own_target", [False, True])
@pytest.mark.parametrize(("segments", "points"), [(4, 40), (2, 50), (1, 20), (3, 9)])
def test_random_ends_have_a_minimum_above_zero_at_the_weighted_least_squares_student(segments, points, own_target):
    grid = _grid(segments, points)
    teacher = teacher_table(grid)
    fixed = {i: gaussian_eps(grid.alphas[i]) for i in range(1, points + 1)}
    best, expected = best_student(grid, None if own_target else fixed)
    student, target = Table(grid, best), Table(grid, best if own_target else fixed)

    losses = _losses_by_start(grid, student, target, teacher)
    torch.testing.assert_close(losses, torch.stack([expected[i] for i in range(1, points + 1)]), rtol=1e-9, atol=1e-24)
    several = torch.arange(1, points + 1) - lower_edge(torch.arange(1, points + 1), points, segments) > 1
    assert (losses[several] > 1e-12).all()  # one ε cannot serve several ends of a curved path
    assert (losses[~several] < 1e-24).all()  # a single end it can

    losses.sum().backward()
    scale = _losses_by_start(grid, teacher_table(grid), target, teacher).sum().detach()
    assert student.slope.grad.abs().max() <= 1e-12 * max(1.0, float(scale))
    assert student.shift.grad.abs().max() <= 1e-12 * max(1.0, float(scale))

    for name in ("slope", "shift"):
        for sign in (-1.0, 1.0):
            moved = Table(grid, best)
            with torch.no_grad():
                getattr(moved, name)[1:] += sign * 1e-3
            worse = _losses_by_start(grid, moved, target, teacher)
            assert (worse > losses.detach()).all()
            worse.sum().backward()
            assert (getattr(moved, name).grad[1:] * sign > 0).all()


def test_draws_weigh_the_ends_as_the_expectation_does():
    """The mean loss over `draw_indices` tends to the exact one: starts uniform, ends uniform given the start."""
    grid = _grid(2, 8)
    teacher = teacher_table(grid)
    exact = _losses_by_start(grid, teacher, teacher, teacher).mean().detach()
    indices = draw_indices(20_000, grid, End.RANDOM, torch.Generator().manual_seed(0))
    each = _loss(*quadrature(grid, indices), indices, grid, student=teacher, target=teacher, teacher=teacher).detach()
    assert float((each.mean() - exact).abs()) < 4 * float(each.std()) / 20_000**0.5


# The two ends of the family.


@pytest.mark.parametrize("points", [1, 8, 50])
def test_with_as_many_segments_as_points_the_teacher_is_the_minimiser_and_no_target_is_asked(points):
    grid = _grid(points, points)
    for end in End:
        indices = draw_indices(500, grid, end, torch.Generator().manual_seed(0))
        assert torch.equal(indices.end, indices.start - 1)
    indices = _all_indices(grid)
    teacher, student = teacher_table(grid), teacher_table(grid)
    losses = _loss(*quadrature(grid, indices), indices, grid, student=student, target=_never, teacher=teacher)
    assert losses.max() < 1e-28
    losses.sum().backward()
    assert student.slope.grad.abs().max() < 1e-12
    for sign in (-1.0, 1.0):
        moved = teacher_table(grid)
        with torch.no_grad():
            moved.slope[1:] += sign * 1e-3
        losses = _loss(*quadrature(grid, indices), indices, grid, student=moved, target=_never, teacher=teacher)
        assert (losses > 0).all()
        losses.sum().backward()
        assert (moved.slope.grad[1:] * sign > 0).all()


def _curve(seed):
    """A network that is not affine."""
    a, b, c = _normal(3, seed=seed).tolist()
    return lambda x, t, rows: torch.tanh(a * x + _level(t, x) / 500) + b * x + c


def tcd_function(x, out, t, s):
    """f(x_t, t, s) of TCD in its semi-linear form: (σ_s/σ_t) x_t − α_s (e^{−h} − 1) x̂0 with h = λ_s − λ_t."""

    def parts(u):
        return ALPHAS[u].sqrt().view(-1, 1, 1, 1), (1 - ALPHAS[u]).sqrt().view(-1, 1, 1, 1)

    (alpha_t, sigma_t), (alpha_s, sigma_s) = parts(t), parts(s)
    h = torch.log(alpha_s / sigma_s) - torch.log(alpha_t / sigma_t)
    return sigma_s / sigma_t * x - alpha_s * torch.expm1(-h) * (x - sigma_t * out) / alpha_t


def test_one_segment_is_tcd():
    grid = _grid(1, 50)
    starts = torch.arange(1, 51)
    low, high = target_range(starts, 50, 1)
    assert low.tolist() == [0] * 50
    assert torch.equal(high, starts - 1)
    indices = _all_indices(grid)
    student, target, teacher = (_curve(seed) for seed in (1, 2, 3))
    count = len(indices.start)
    x0, noise = _normal(count, 1, 2, 2), _normal(count, 1, 2, 2, seed=1)
    pair = consistency_pair(
        x0, noise, indices, grid, student=student, target=target, teacher=teacher, prediction_type=EPS
    )
    times = torch.tensor([0, *range(19, 1000, 20)])  # TCD's grid: i·20 − 1, and the landing point 0
    t_n, t_m, t_end = times[indices.start], times[indices.start - 1], times[indices.end]
    x = ALPHAS[t_n].sqrt().view(-1, 1, 1, 1) * x0 + (1 - ALPHAS[t_n]).sqrt().view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(pair.x_start, x, rtol=1e-14, atol=1e-14)
    rows = torch.arange(count)
    torch.testing.assert_close(pair.student, tcd_function(x, student(x, t_n, rows), t_n, t_end), rtol=1e-11, atol=1e-11)
    x_m = tcd_function(x, teacher(x, t_n, rows), t_n, t_m)
    torch.testing.assert_close(
        pair.target, tcd_function(x_m, target(x_m, t_m, rows), t_m, t_end), rtol=1e-11, atol=1e-11
    )


def _lcm_script(x0, noise, index, student, conditional, unconditional, w):
    """(student's side, target's side) as diffusers' LCM LoRA script has them, restated.

    Its grid is (1 … 50)·20 − 1 with index from 0, x̂0 and ε are guided apart with c + w (c − u), the student is its
    own target, and c_skip and c_out have σ_d = 0.5 and the timestep times 10.
    """
    grid = np.arange(1, 51) * 20 - 1
    cumprod = ALPHAS.numpy()
    before = np.concatenate([cumprod[:1], cumprod[grid[:-1]]])

    def column(values):
        return torch.as_tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)

    def boundary(t):
        scaled = column(t) * 10.0
        return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5

    def original(out, x, t):
        return (x - column(1 - cumprod[t]).sqrt() * out) / column(cumprod[t]).sqrt()

    start = grid[index]
    later = np.maximum(start - 20, 0)
    rows = torch.arange(len(x0))
    x = column(cumprod[start]).sqrt() * x0 + column(1 - cumprod[start]).sqrt() * noise
    c_skip, c_out = boundary(start)
    mine = c_skip * x + c_out * original(student(x, torch.as_tensor(start), rows), x, start)

    outs = [net(x, torch.as_tensor(start), rows) for net in (conditional, unconditional)]
    clean = [original(out, x, start) for out in outs]
    x0_hat, eps = (c + w * (c - u) for c, u in (clean, outs))
    x_before = column(before[index]).sqrt() * x0_hat + column(1 - before[index]).sqrt() * eps
    c_skip, c_out = boundary(later)
    theirs = c_skip * x_before + c_out * original(student(x_before, torch.as_tensor(later), rows), x_before, later)
    return mine, theirs


def test_the_lcm_boundary_is_that_of_diffusers_script():
    config = with_method(recipe("sd15"), "lcm")
    stage = config.stages[0]
    assert (stage.segments, stage.points, config.boundary, config.distance) == (1, 50, Boundary.LCM, Distance.HUBER)
    grid = _grid(1, 50)
    indices = _all_indices(grid, config.end)
    student, conditional, unconditional = (_curve(seed) for seed in (1, 2, 3))
    x0, noise, w = _normal(50, 1, 2, 2), _normal(50, 1, 2, 2, seed=1), 2.5

    def guided(x, t, rows):  # our convention u + w (c − u): one more than the script's
        u, c = unconditional(x, t, rows), conditional(x, t, rows)
        return u + (w + 1) * (c - u)

    asked = []

    def target(x, t, rows):
        asked.extend(rows.tolist())
        return student(x, t, rows)

    pair = consistency_pair(
        x0, noise, indices, grid, student=student, target=target, teacher=guided, prediction_type=EPS,
        boundary=config.boundary,
    )  # fmt: skip
    mine, theirs = _lcm_script(x0, noise, indices.start.numpy() - 1, student, conditional, unconditional, w)
    torch.testing.assert_close(pair.student, mine, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(pair.target, theirs, rtol=1e-11, atol=1e-11)
    assert asked == list(range(1, 50))  # at timestep 0 c_out is 0: the network is not asked where it does not count
    expected = ((mine - theirs).square() + 0.001**2).sqrt() - 0.001
    torch.testing.assert_close(
        consistency_distance(pair, config.distance, config.huber_c), expected.mean((1, 2, 3)), rtol=1e-11, atol=1e-12
    )


def test_distances_known_answers():
    zero = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    student = torch.tensor([[0.3, 0.4], [0.0, 0.0]], dtype=torch.float64).view(2, 1, 1, 2)
    pair = Pair(zero, zero, student, zero, Indices(torch.ones(2).long(), torch.zeros(2).long()))
    assert consistency_distance(pair, Distance.MSE).tolist() == pytest.approx([0.125, 0.0], abs=1e-16)
    huber = consistency_distance(pair, Distance.HUBER, 0.3)
    assert huber.tolist() == pytest.approx([(0.18**0.5 - 0.3 + 0.5 - 0.3) / 2, 0.0], abs=1e-16)


# Who is asked, how often, and who learns.


def _affine_nets(grid):
    return [Table(grid, {i: Affine(*_normal(2, seed=s + i)) for i in range(1, grid.points + 1)}) for s in (10, 99, 500)]


@pytest.mark.parametrize("boundary", Boundary)
@pytest.mark.parametrize("prediction_type", [EPS, V])
def test_only_the_student_learns_and_only_its_pass_is_under_grad_mode(boundary, prediction_type):
    grid = _grid(1, 50)
    student, target, teacher = _affine_nets(grid)
    indices = draw_indices(32, grid, End.EDGE, torch.Generator().manual_seed(0))
    x0 = _normal(32, 1, 2, 2)
    _loss(
        x0, _normal(*x0.shape, seed=1), indices, grid, prediction_type, student=student, target=target, teacher=teacher,
        boundary=boundary,
    ).sum().backward()  # fmt: skip
    assert student.graded == [True]
    assert target.graded == [False]
    assert teacher.graded == [False]
    assert student.slope.grad.abs().max() > 0
    for net in (target, teacher):
        assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize(("segments", "points"), [(8, 40), (1, 50), (2, 2), (4, 8)])
def test_passes_are_one_of_all_rows_each_and_the_target_s_only_of_unfinished_ones(segments, points):
    grid = _grid(segments, points)
    student, target, teacher = _affine_nets(grid)
    indices = draw_indices(64, grid, End.RANDOM, torch.Generator().manual_seed(1))
    order = []
    nets = {}
    for name, net in (("student", student), ("target", target), ("teacher", teacher)):
        nets[name] = lambda x, t, rows, net=net, name=name: (order.append((name, len(x))), net(x, t, rows))[1]
    x0 = _normal(64, 1, 1, 1)
    pair = consistency_pair(x0, _normal(64, 1, 1, 1, seed=1), indices, grid, **nets, prediction_type=EPS)
    unfinished = torch.nonzero(indices.end < indices.start - 1).flatten()
    expected = [("teacher", 64), *([("target", len(unfinished))] if len(unfinished) else []), ("student", 64)]
    assert order == expected
    assert torch.equal(teacher.calls[0], torch.arange(64))
    assert torch.equal(student.calls[0], torch.arange(64))
    if len(unfinished):
        assert torch.equal(target.calls[0], unfinished)
    # The rows that are skipped are the teacher's step itself, bit for bit.
    finished = indices.end == indices.start - 1
    a_from, a_to = (_level(grid.alphas[i[finished]], x0) for i in (indices.start, indices.end))
    out = teacher(pair.x_start[finished], grid.timesteps[indices.start[finished]], finished)
    assert torch.equal(pair.target[finished], psi(pair.x_start[finished], out, a_from, a_to, EPS).detach())


@pytest.mark.parametrize(
    ("segments", "points", "share"),
    [(8, 40, 0.5433), (4, 40, 0.7071), (2, 50, 0.8474), (1, 50, 0.9100), (50, 50, 0.0), (1, 1, 0.0)],
)
def test_the_expected_share_of_target_rows(segments, points, share):
    """1 − H_L / L with L = N/k points a segment and H_L the harmonic number: the figures of docs/math.md."""
    length = points // segments
    formula = 1 - sum(Fraction(1, j) for j in range(1, length + 1)) / length
    assert float(formula) == pytest.approx(share, abs=5e-5)
    grid = _grid(segments, points)
    starts = torch.arange(1, points + 1)
    low, high = target_range(starts, points, segments)
    counted = [1 - Fraction(1, int(h - lo + 1)) for lo, h in zip(low, high, strict=True)]
    assert sum(counted) / points == formula
    drawn = draw_indices(40_000, grid, End.RANDOM, torch.Generator().manual_seed(0))
    assert float((drawn.end < drawn.start - 1).double().mean()) == pytest.approx(share, abs=0.01)


def test_the_edge_share_moves_random_ends_to_the_edge_and_nothing_else():
    grid, count = _grid(2, 16), 20_000

    def drawn(end, share):
        return draw_indices(count, grid, end, torch.Generator().manual_seed(3), share)

    plain, edge = drawn(End.RANDOM, 0.0), drawn(End.EDGE, 0.0)
    assert torch.equal(drawn(End.RANDOM, 1.0).end, edge.end)
    mixed = drawn(End.RANDOM, 0.4)
    assert torch.equal(mixed.start, plain.start)
    moved = mixed.end != plain.end
    assert torch.equal(mixed.end[moved], edge.end[moved])
    free = plain.end != edge.end
    assert float(moved[free].double().mean()) == pytest.approx(0.4, abs=0.015)


# Indices, levels, timesteps.


def test_every_index_of_every_legal_grid_up_to_200():
    for segments, points in LEGAL:
        length = points // segments
        start = torch.arange(1, points + 1)
        low, high = target_range(start, points, segments)
        assert (low >= 0).all()
        assert (low <= high).all()
        assert torch.equal(high, start - 1)
        assert (low % length == 0).all()
        assert (start - low <= length).all()
        assert (start - low >= 1).all()
        boundary = start[start % length == 0]
        # a boundary point belongs to the segment below it: its own edge is a whole segment lower
        assert torch.equal(lower_edge(boundary, points, segments), boundary - length)
        assert int(high[low == low[-1]].min()) == int(low[-1])
        assert int(_grid(segments, points).timesteps[-1]) == 999


def test_draws_obey_the_bounds_on_every_legal_grid_up_to_200():
    generator = torch.Generator().manual_seed(0)
    for segments, points in LEGAL:
        grid = _grid(segments, points)
        for end in End:
            drawn = draw_indices(64, grid, end, generator)
            low, high = target_range(drawn.start, points, segments)
            assert ((drawn.start >= 1) & (drawn.start <= points)).all()
            assert ((low <= drawn.end) & (drawn.end <= high)).all()
            if end is End.EDGE:
                assert torch.equal(drawn.end, low)
            # never a jump to a noisier level
            assert (grid.alphas[drawn.end] >= grid.alphas[drawn.start]).all()
            assert (grid.timesteps[drawn.end] < grid.timesteps[drawn.start]).all()


def test_every_legal_end_is_drawn_and_all_alike():
    grid = _grid(2, 8)
    count = 40_000
    drawn = draw_indices(count, grid, End.RANDOM, torch.Generator().manual_seed(0))
    table = torch.zeros(9, 9)
    table.index_put_((drawn.start, drawn.end), torch.ones(count), accumulate=True)
    legal = _all_indices(grid)
    assert len(legal.start) == 20
    seen = table[legal.start, legal.end]
    assert int(seen.sum()) == count  # nothing else is drawn
    low, high = target_range(legal.start, 8, 2)
    expected = count / 8 / (high - low + 1)
    assert (seen > 0).all()  # both inclusive ends among them
    chi_square = float(((seen - expected).square() / expected).sum())
    assert chi_square < 43.8  # 19 degrees of freedom: one in a thousand


def test_the_extreme_draws_stay_inside():
    """floor(u · n) is below n for the largest float64 below 1, whatever n."""
    largest = 1 - 2.0**-53
    assert all(np.floor(largest * n) == n - 1 for n in range(1, 201))


@pytest.mark.parametrize("prediction_type", [EPS, V, SAMPLE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_jump_to_its_own_level_is_the_identity_bit_for_bit(prediction_type, dtype):
    a = ALPHAS.to(dtype).view(-1, 1, 1, 1)
    x, out = (_normal(1000, 1, 2, 2, seed=s).to(dtype) for s in (0, 1))
    assert torch.equal(psi(x, out, a, a, prediction_type), x)


@pytest.mark.parametrize("prediction_type", [EPS, V, SAMPLE])
def test_jumps_along_one_line_compose(prediction_type):
    """Ψ(Ψ(x, t → s), s → u) with the same (x̂0, ε) is Ψ(x, t → u), for any prediction type."""
    a_t, a_s, a_u = (ALPHAS[t].view(1, 1, 1, 1) for t in (999, 500, 3))
    x, eps = _normal(5, 1, 2, 2), _normal(5, 1, 2, 2, seed=1)
    x0, _ = x0_and_eps(eps, x, a_t, EPS)
    outs = [target_of(x0, eps, a, prediction_type) for a in (a_t, a_s)]
    middle = psi(x, outs[0], a_t, a_s, prediction_type)
    whole = psi(x, outs[0], a_t, a_u, prediction_type)
    torch.testing.assert_close(psi(middle, outs[1], a_s, a_u, prediction_type), whole, rtol=1e-12, atol=1e-12)


def test_zero_terminal_snr_needs_v_and_stays_finite():
    alphas = torch.tensor(NoiseSchedule(rescale_betas_zero_snr=True).alphas_cumprod())
    assert alphas[-1] == 0
    grid = Grid.of(alphas, points=4, segments=1)
    indices = Indices(torch.tensor([4, 4, 4, 4]), torch.tensor([0, 1, 2, 3]))
    x0 = _normal(4, 1, 2, 2)
    net = _curve(1)
    pair = consistency_pair(
        x0, _normal(4, 1, 2, 2, seed=1), indices, grid, student=net, target=net, teacher=net, prediction_type=V
    )
    assert torch.isfinite(pair.student).all()
    assert torch.isfinite(pair.target).all()


def _trailing(segments):
    """diffusers' DDIMScheduler, timestep_spacing="trailing", restated."""
    return (np.round(np.arange(1000, 0, -1000 / segments)).astype(np.int64) - 1).tolist()


@pytest.mark.parametrize(("segments", "points"), CASES)
def test_segment_edges_are_the_timesteps_of_ddim_trailing(segments, points):
    grid = _grid(segments, points)
    edges = grid.timesteps[torch.arange(points, 0, -(points // segments))].tolist()
    if 1000 % segments == 0:
        assert edges == _trailing(segments) == list(edge_timesteps(segments))
    assert edges[0] == 999


@pytest.mark.parametrize("name", ["builtin", "sd15", "sdxl"])
def test_every_released_plan_steps_on_the_grid_of_its_stage(name):
    config = recipe(name)
    assert [stage.segments for stage in config.stages] == [8, 4, 2, 1]
    for stage in config.stages:
        grid = set(_grid(stage.segments, stage.points).timesteps.tolist())
        plans = plans_for(config, stage, schedule=NoiseSchedule(), prediction_type=PredictionType.EPSILON)
        counts = {8: [8], 4: [4], 2: [2], 1: [1, 2, 4, 8]}[stage.segments]  # the last LoRA serves all, by TCD's sampler
        assert [plan.num_steps for plan in plans] == counts
        for plan in plans:
            assert set(plan.net_timesteps().tolist()) <= grid
            assert plan.net_timesteps().max() == 999


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_a_legal_grid(method):
    for stage in with_method(recipe("builtin"), method).stages:
        assert _grid(stage.segments, stage.points).points == stage.points


def test_illegal_grids_are_refused():
    with pytest.raises(PlanError, match="8 segments on a grid of 50 points"):
        _grid(8, 50)
    with pytest.raises(PlanError, match="grid of 1001 points"):
        _grid(1, 1001)

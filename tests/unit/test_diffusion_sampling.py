"""The table loop: NumPy and torch alike, noise where it is due, image-to-image."""

import numpy as np
import pytest
import torch

from hypersd_export.diffusion import (
    FewStepPlan,
    FlowSchedule,
    Row,
    Solver,
    StepTable,
    run,
    start_row,
    start_sample,
    steps,
)
from hypersd_export.errors import PlanError

SHAPE = (2, 4, 6, 6)


def noise(stream):
    return np.random.default_rng(stream).standard_normal(SHAPE).astype(np.float32)


def net(x, t):
    """Arithmetic only, so that NumPy and torch have nothing to differ in but the loop itself."""
    return x * (0.5 + t / 2000) - x * x * x / (1.0 + x * x)


PLANS = [
    FewStepPlan(solver=Solver.DDIM, num_steps=5),
    FewStepPlan(solver=Solver.DDIM, num_steps=5, eta=1.0),
    FewStepPlan(solver=Solver.TCD, num_steps=4, eta=0.3),
    FewStepPlan(solver=Solver.LCM, num_steps=4),
    FewStepPlan(solver=Solver.EULER, num_steps=4),
    FewStepPlan(solver=Solver.EULER_ANCESTRAL, num_steps=4, prediction_type="v_prediction"),
    FewStepPlan(solver="flow_euler", num_steps=4, prediction_type="flow", schedule=FlowSchedule()),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.solver}-{plan.eta}")
def test_numpy_and_torch_give_the_same_numbers(plan):
    table = plan.table()
    x = noise(0) * table.init_noise_sigma
    ours = run(table, net, x, step_noise=noise)
    theirs = run(table, net, torch.from_numpy(x), step_noise=lambda stream: torch.from_numpy(noise(stream)))
    assert (ours.dtype, theirs.dtype) == (np.float32, torch.float32)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_the_loop_is_the_formula():
    row = Row(t=500.0, t_to=100.0, k=0.5, a=2.0, b=3.0, c=4.0, p=0.0, q=1.0)
    last = Row(t=100.0, t_to=-1.0, k=1.0, a=1.0, b=-1.0, c=0.0, p=0.0, q=1.0)
    calls = []

    def net(x, t):
        calls.append((x, t))
        return x + t

    def step_noise(stream):
        calls.append(stream)
        return 10.0

    x = 2 * 1.0 + 3 * (0.5 * 1.0 + 500) + 4 * 10
    assert run(StepTable(rows=(row, last)), net, 1.0, step_noise=step_noise) == x - (x + 100)
    assert calls == [(0.5, 500.0), 1, (x, 100.0)]


def test_steps_yields_every_sample_and_computes_lazily():
    table = FewStepPlan(solver=Solver.DDIM, num_steps=3).table()
    calls = []

    def net(x, t):
        calls.append(t)
        return x

    walk = steps(table, net, 1.0)
    assert calls == []
    index, row, first = next(walk)
    assert (index, row, calls) == (0, table.rows[0], [999.0])
    rest = list(walk)
    assert [i for i, _, _ in rest] == [1, 2]
    assert rest[-1][2] == run(table, lambda x, _: x, 1.0)
    assert first != rest[-1][2]


def test_start_skips_rows_but_keeps_their_streams():
    table = FewStepPlan(solver=Solver.LCM, num_steps=4).table()
    streams = []

    def step_noise(stream):
        streams.append(stream)
        return 0.0

    run(table, lambda x, _: x, 1.0, step_noise=step_noise, start=1)
    assert streams == [2, 3]
    assert table.noise_streams == (1, 2, 3)


@pytest.mark.parametrize("start", [-1, 4])
def test_start_beyond_the_table(start):
    table = FewStepPlan(solver=Solver.DDIM, num_steps=4).table()
    with pytest.raises(PlanError, match=f"^start row {start}: the table has rows 0 to 3$"):
        run(table, net, noise(0), start=start)
    with pytest.raises(PlanError, match=f"^start row {start}"):
        start_sample(table, start=start, latents=0.0, noise=1.0)


def test_missing_noise_is_said():
    table = FewStepPlan(solver=Solver.LCM, num_steps=2).table()
    with pytest.raises(PlanError, match=r"^row 1 adds noise \(c = 0\.8499\): pass step_noise$"):
        run(table, net, noise(0))


@pytest.mark.parametrize(
    ("num_steps", "strength", "row"),
    [(4, 1.0, 0), (4, 0.5, 2), (4, 0.6, 2), (4, 0.25, 3), (4, 0.99, 1), (50, 0.8, 10), (1, 1.0, 0), (10, 0.7, 3)],
)
def test_start_row(num_steps, strength, row):
    assert start_row(num_steps, strength) == row


@pytest.mark.parametrize(
    ("num_steps", "strength", "message"),
    [
        (4, 0.0, r"^strength 0.0: must be above 0 and at most 1$"),
        (4, 1.01, r"^strength 1.01: must be above 0"),
        (4, float("nan"), r"^strength nan: must be above 0"),
        (4, 0.2, r"^strength 0.2 leaves none of 4 steps: pass at least 0.25$"),
        (1, 0.6, r"^strength 0.6 leaves none of 1 steps: pass at least 1$"),
    ],
)
def test_bad_strength(num_steps, strength, message):
    with pytest.raises(PlanError, match=message):
        start_row(num_steps, strength)


def test_start_sample_of_each_kind():
    """VP: alpha, sigma; Euler: 1, sigma; flow: 1 - sigma, sigma."""
    vp = FewStepPlan(solver=Solver.DDIM, num_steps=4).table().rows[2]
    np.testing.assert_allclose(vp.p**2 + vp.q**2, 1.0, rtol=1e-12)
    euler = FewStepPlan(solver=Solver.EULER, num_steps=4).table().rows[2]
    assert euler.p == 1.0
    np.testing.assert_allclose(euler.q, vp.q / vp.p, rtol=1e-12)
    flow = PLANS[-1].table().rows[2]
    np.testing.assert_allclose((flow.p + flow.q, flow.q), (1.0, flow.t / 1000), rtol=1e-12)
    table = FewStepPlan(solver=Solver.DDIM, num_steps=4).table()
    np.testing.assert_allclose(start_sample(table, start=2, latents=2.0, noise=3.0), 2 * vp.p + 3 * vp.q)

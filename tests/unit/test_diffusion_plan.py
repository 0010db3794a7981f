"""Plans: validation in one line, JSON both ways, and the rows' invariants and literal values."""

import json

import numpy as np
import pytest

from hypersd_export.diffusion import (
    FewStepPlan,
    FlowSchedule,
    Guidance,
    GuidanceKind,
    NoiseSchedule,
    PredictionType,
    Row,
    Solver,
    StepTable,
)
from hypersd_export.errors import PlanError

ZERO_SNR = NoiseSchedule(rescale_betas_zero_snr=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, r"^steps 0: must be a whole number from 1 to 1000$"),
        ({"num_steps": -1}, r"^steps -1: must be a whole number from 1 to 1000$"),
        ({"num_steps": 1001}, r"^steps 1001: must be a whole number from 1 to 1000$"),
        ({"num_steps": 2.5}, r"^steps 2.5: must be a whole number"),
        ({"num_steps": True}, r"^steps True: must be a whole number"),
        (
            {"num_steps": 51, "solver": "tcd"},
            r"^steps 51: tcd takes at most original_inference_steps = 50, or explicit",
        ),
        ({"num_steps": 51, "solver": "lcm"}, r"^steps 51: lcm takes at most"),
        ({"solver": "dpm"}, r"^solver 'dpm': must be one of ddim, tcd, lcm, euler, euler_ancestral, flow_euler$"),
        ({"prediction_type": "eps"}, r"^prediction type 'eps': must be one of epsilon, v_prediction, sample, flow$"),
        ({"timestep_spacing": "karras"}, r"^timestep_spacing 'karras': must be one of leading, trailing, linspace$"),
        ({"eta": -0.1}, r"^eta -0.1: must be from 0"),
        ({"eta": 1.1}, r"^eta 1.1: must be from 0"),
        ({"eta": float("nan")}, r"^eta nan: must be from 0"),
        ({"eta": 0.5, "solver": "lcm"}, r"^eta 0.5: solver lcm has none; eta is for ddim and tcd$"),
        ({"steps_offset": -1}, r"^steps_offset -1: must be a whole number"),
        ({"timestep_scaling": 0.0}, r"^timestep_scaling 0.0: must be positive"),
        ({"original_inference_steps": 0}, r"^original_inference_steps 0: must be a whole number from 1 to 1000$"),
        ({"original_inference_steps": 1001}, r"^original_inference_steps 1001"),
        ({"timesteps": (999, 499)}, r"^timesteps \[999, 499\]: 2 of them for 4 steps$"),
        ({"timesteps": (999, 499, 499, 1)}, r"must fall strictly"),
        ({"timesteps": (1, 2, 3, 4)}, r"must fall strictly"),
        ({"timesteps": (999, 499, 1, -1)}, r"^timestep -1: must not be negative$"),
        ({"timesteps": (1000, 499, 2, 1)}, r"^timestep 1000: the schedule ends at 999"),
        ({"timesteps": (9.5, 4, 2, 1)}, r"must be a tuple of whole numbers$"),
        ({"timesteps": "999"}, r"must be a tuple of whole numbers$"),
        ({"schedule": FlowSchedule()}, r"flow_euler, flow and FlowSchedule go together$"),
        ({"solver": "flow_euler"}, r"^solver flow_euler with prediction epsilon on a NoiseSchedule"),
        ({"prediction_type": "flow"}, r"go together$"),
        ({"schedule": ZERO_SNR}, r"^epsilon prediction at timestep 999 with rescale_betas_zero_snr: no signal is left"),
        ({"schedule": ZERO_SNR, "solver": "lcm"}, r"no signal is left"),
        ({"schedule": ZERO_SNR, "solver": "tcd"}, r"no signal is left"),
    ],
)
def test_impossible_plans_are_one_line(arguments, message):
    with pytest.raises(PlanError, match=message) as caught:
        FewStepPlan(**{"solver": Solver.DDIM, "num_steps": 4, **arguments})
    assert "\n" not in str(caught.value)


def test_flow_refuses_explicit_timesteps():
    with pytest.raises(PlanError, match="flow_euler takes no explicit timesteps"):
        FewStepPlan(solver="flow_euler", num_steps=1, prediction_type="flow", schedule=FlowSchedule(), timesteps=(999,))


def test_zero_snr_with_epsilon_is_allowed_where_it_is_finite():
    """Below the last timestep, and in Euler, which follows diffusers' 2^-24."""
    FewStepPlan(solver=Solver.LCM, num_steps=1, timesteps=(800,), schedule=ZERO_SNR)
    FewStepPlan(solver=Solver.DDIM, num_steps=4, timestep_spacing="leading", schedule=ZERO_SNR)
    assert FewStepPlan(solver=Solver.EULER, num_steps=2, schedule=ZERO_SNR).table().rows[0].k < 2.5e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "none", "scale": 0.0}, r"^guidance none with scale 0.0: scale must be 1"),
        ({"kind": "cfg", "scale": 1.0}, r"^guidance cfg with scale 1.0: must be above 1"),
        ({"kind": "embedded", "scale": -1.0}, r"^guidance embedded with scale -1.0: must not be negative$"),
        ({"kind": "pag", "scale": 2.0}, r"^guidance kind 'pag': must be one of none, cfg, embedded$"),
        ({"kind": "cfg", "scale": float("inf")}, r"^guidance scale inf: must be a finite number$"),
        ({"kind": "cfg", "scale": "7"}, r"^guidance scale '7': must be a finite number$"),
    ],
)
def test_impossible_guidance(arguments, message):
    with pytest.raises(PlanError, match=message):
        Guidance(**arguments)


def test_guidance_of_a_number():
    assert Guidance.of(0) == Guidance.of(0.5) == Guidance.of(1) == Guidance()
    assert Guidance.of(7.5) == Guidance(kind=GuidanceKind.CFG, scale=7.5)
    with pytest.raises(PlanError, match="guidance cfg with scale -1"):
        Guidance.of(-1)


def test_with_steps():
    plan = FewStepPlan(solver=Solver.DDIM, num_steps=4)
    assert plan.with_steps(4) is plan
    assert plan.with_steps(8).net_timesteps().tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    explicit = FewStepPlan(solver=Solver.LCM, num_steps=1, timesteps=(800,))
    assert explicit.with_steps(1) is explicit
    with pytest.raises(
        PlanError, match=r"^steps 2: this plan has the explicit timesteps \[800\]; pass --timesteps too"
    ):
        explicit.with_steps(2)


PLANS = [
    FewStepPlan(solver=Solver.DDIM, num_steps=3, eta=0.25, guidance=Guidance.of(7.5), set_alpha_to_one=True),
    FewStepPlan(solver=Solver.DDIM, num_steps=2, prediction_type=PredictionType.V_PREDICTION, schedule=ZERO_SNR),
    FewStepPlan(solver=Solver.TCD, num_steps=4, eta=0.3),
    FewStepPlan(solver=Solver.LCM, num_steps=1, timesteps=(800,), guidance=Guidance(kind="embedded", scale=8.0)),
    FewStepPlan(solver=Solver.EULER, num_steps=3, timestep_spacing="linspace", prediction_type="sample"),
    FewStepPlan(solver=Solver.EULER_ANCESTRAL, num_steps=4, steps_offset=1, timestep_spacing="leading"),
    FewStepPlan(solver="flow_euler", num_steps=4, prediction_type="flow", schedule=FlowSchedule(shift=2.5)),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.solver.value)
def test_json_round_trip(plan):
    text = json.dumps(plan.to_json(), allow_nan=False)
    assert FewStepPlan.from_json(json.loads(text)) == plan
    table = plan.table()
    assert StepTable.from_json(json.loads(json.dumps(table.to_json(), allow_nan=False))) == table


def test_json_defaults_and_lists():
    assert FewStepPlan.from_json({"solver": "ddim", "num_steps": 4}) == FewStepPlan(solver=Solver.DDIM, num_steps=4)
    assert FewStepPlan(solver="lcm", num_steps=1, timesteps=[800]).timesteps == (800,)
    assert FewStepPlan.from_json({"solver": "ddim", "num_steps": 4.0}).num_steps == 4
    assert Guidance.from_json({"kind": "none"}) == Guidance()
    assert FewStepPlan.from_json({"solver": "ddim", "num_steps": 1, "schedule": {"kind": "vp"}}).is_flow is False


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"^plan: expected a JSON object, found list$"),
        ({"solver": "ddim"}, r"^plan: missing num_steps$"),
        ({"solver": "ddim", "num_steps": 4, "stepz": 1, "a": 2}, r"^plan: unknown a, stepz; known are eta, guidance"),
        ({"solver": "ddim", "num_steps": "4"}, r"^steps '4': must be a whole number$"),
        ({"solver": "ddim", "num_steps": 4, "eta": None}, r"^eta None: must be a finite number$"),
        ({"solver": "ddim", "num_steps": 4, "set_alpha_to_one": 1}, r"^set_alpha_to_one 1: must be true or false$"),
        ({"solver": "ddim", "num_steps": 4, "timesteps": 999}, r"^timesteps: expected a JSON array, found int$"),
        ({"solver": "ddim", "num_steps": 1, "timesteps": ["a"]}, r"^timestep 'a': must be a whole number$"),
        ({"solver": "ddim", "num_steps": 4, "guidance": {}}, r"^guidance: missing kind$"),
        ({"solver": "ddim", "num_steps": 4, "guidance": 7.5}, r"^guidance: expected a JSON object, found float$"),
        ({"solver": "ddim", "num_steps": 4, "schedule": {"kind": "edm"}}, r"^schedule kind 'edm': must be vp or flow$"),
        (
            {"solver": "ddim", "num_steps": 4, "schedule": {"kind": ["vp"]}},
            r"^schedule kind \['vp'\]: must be vp or flow",
        ),
        ({"solver": "ddim", "num_steps": 4, "schedule": {"kind": "vp", "shift": 3}}, r"^vp schedule: unknown shift"),
        ({"solver": "x", "num_steps": 4}, r"^solver 'x': must be one of"),
    ],
)
def test_bad_json_is_one_line(data, message):
    with pytest.raises(PlanError, match=message) as caught:
        FewStepPlan.from_json(data)
    assert "\n" not in str(caught.value)


def row_json(**changes):
    return {"t": 1.0, "t_to": -1, "k": 1, "a": 1, "b": 0, "c": 0, "p": 0, "q": 1, **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rows": [], "init_noise_sigma": 1}, r"^a step table needs at least one row$"),
        ({"rows": [row_json()], "init_noise_sigma": 0}, r"^init_noise_sigma 0.0: must be positive$"),
        ({"rows": [row_json()]}, r"^step table: missing init_noise_sigma$"),
        ({"rows": {}, "init_noise_sigma": 1}, r"^step table rows: expected a JSON array, found dict$"),
        ({"rows": [{"t": 1}], "init_noise_sigma": 1}, r"^step table row 1: missing a, b, c, k, p, q, t_to$"),
        ({"rows": [row_json(z=1)], "init_noise_sigma": 1}, r"^step table row 1: unknown z"),
        ({"rows": [row_json(a="1")], "init_noise_sigma": 1}, r"^row 1 field a '1': must be a finite number$"),
        ({"rows": [row_json(a=float("nan"))], "init_noise_sigma": 1}, r"^row 1 field a nan: must be a finite number$"),
    ],
)
def test_bad_table_json_is_one_line(data, message):
    with pytest.raises(PlanError, match=message):
        StepTable.from_json(data)


def test_rows_are_finite():
    with pytest.raises(PlanError, match="row field b inf: must be a finite number"):
        Row(**row_json(b=float("inf")))


def test_ddim_lands_where_diffusers_does():
    """t - 1000 // N, which at N = 3 and 12 is not the next listed timestep; -1 past the end."""
    three = FewStepPlan(solver=Solver.DDIM, num_steps=3).table()
    assert [(row.t, row.t_to) for row in three.rows] == [(999, 666), (666, 333), (332, -1)]
    twelve = FewStepPlan(solver=Solver.DDIM, num_steps=12).table()
    assert [row.t_to for row in twelve.rows] == [916, 833, 749, 666, 583, 499, 416, 333, 249, 166, 83, -1]
    seven = FewStepPlan(solver=Solver.DDIM, num_steps=7).table()
    assert (seven.rows[-1].t, seven.rows[-1].t_to) == (142, 0)
    explicit = FewStepPlan(solver=Solver.DDIM, num_steps=3, timesteps=(900, 400, 5)).table()
    assert [row.t_to for row in explicit.rows] == [400, 5, -1]


def test_one_step_of_ddim_by_hand():
    """x0 = (x - sigma out)/alpha, then to alphas_cumprod[0] (the SD configs) or to 1."""
    a = NoiseSchedule().alphas_cumprod()
    alpha, sigma = a[999] ** 0.5, (1 - a[999]) ** 0.5
    (row,) = FewStepPlan(solver=Solver.DDIM, num_steps=1, set_alpha_to_one=True).table().rows
    np.testing.assert_allclose((row.k, row.a, row.b, row.c), (1, 1 / alpha, -sigma / alpha, 0), rtol=1e-12)
    np.testing.assert_allclose((row.p, row.q), (alpha, sigma), rtol=1e-12)
    (row,) = FewStepPlan(solver=Solver.DDIM, num_steps=1).table().rows
    expected = (a[0] ** 0.5 / alpha, (1 - a[0]) ** 0.5 - a[0] ** 0.5 * sigma / alpha)
    np.testing.assert_allclose((row.a, row.b), expected, rtol=1e-12)


def test_zero_snr_rows_do_not_divide():
    """v at alphas_cumprod 0: x0 = -out and eps = x, exactly."""
    plan = FewStepPlan(solver=Solver.DDIM, num_steps=2, prediction_type="v_prediction", schedule=ZERO_SNR)
    a = ZERO_SNR.alphas_cumprod()
    row = plan.table().rows[0]
    np.testing.assert_allclose((row.a, row.b), ((1 - a[499]) ** 0.5, -(a[499] ** 0.5)), rtol=1e-15)
    assert (row.p, row.q) == (0.0, 1.0)


def test_tcd_last_row_lands_on_alpha_0():
    a = NoiseSchedule().alphas_cumprod()
    for eta in (0.0, 0.3, 1.0):
        row = FewStepPlan(solver=Solver.TCD, num_steps=4, eta=eta).table().rows[-1]
        assert (row.t, row.t_to, row.c) == (259, 0, 0)
        np.testing.assert_allclose(row.a, (a[0] / a[259]) ** 0.5, rtol=1e-12)


def test_lcm_of_the_one_step_unet_by_hand():
    a = NoiseSchedule().alphas_cumprod()[800]
    c_skip, c_out = 0.25 / (8000**2 + 0.25), 8000 / (8000**2 + 0.25) ** 0.5
    (row,) = FewStepPlan(solver=Solver.LCM, num_steps=1, timesteps=(800,)).table().rows
    expected = (800, c_skip + c_out / a**0.5, -c_out * ((1 - a) / a) ** 0.5, 0)
    np.testing.assert_allclose((row.t, row.a, row.b, row.c), expected, rtol=1e-12)


def test_euler_rows_and_initial_scale():
    plan = FewStepPlan(solver=Solver.EULER, num_steps=4)
    table = plan.table()
    sigmas = plan.schedule.euler_sigmas()[[999, 749, 499, 249]]
    np.testing.assert_allclose([row.k for row in table.rows], 1 / np.sqrt(sigmas**2 + 1), rtol=1e-12)
    np.testing.assert_allclose([row.a for row in table.rows], 1, rtol=1e-12)
    np.testing.assert_allclose([row.b for row in table.rows], np.append(np.diff(sigmas), -sigmas[-1]), rtol=1e-12)
    np.testing.assert_allclose(table.init_noise_sigma, sigmas[0], rtol=1e-12)
    leading = FewStepPlan(solver=Solver.EULER, num_steps=4, timestep_spacing="leading", steps_offset=1).table()
    top = plan.schedule.euler_sigmas()[751]
    np.testing.assert_allclose(leading.init_noise_sigma, (top**2 + 1) ** 0.5, rtol=1e-12)


def test_euler_is_ddim_in_another_scale():
    """Where the timesteps and landings agree, a VE Euler step with epsilon is the VP DDIM step: x_ve = x_vp / alpha."""
    euler = FewStepPlan(solver=Solver.EULER, num_steps=4).table()
    ddim = FewStepPlan(solver=Solver.DDIM, num_steps=4).table()
    for one, other, following in zip(euler.rows, ddim.rows, ddim.rows[1:], strict=False):
        np.testing.assert_allclose(other.a, following.p / other.p, rtol=1e-9)
        np.testing.assert_allclose(other.b, one.b * following.p, rtol=1e-9)


def test_ancestral_rows_end_without_noise():
    rows = FewStepPlan(solver=Solver.EULER_ANCESTRAL, num_steps=4).table().rows
    assert [row.c > 0 for row in rows] == [True, True, True, False]
    one = FewStepPlan(solver=Solver.EULER_ANCESTRAL, num_steps=1).table()
    assert one == FewStepPlan(solver=Solver.EULER, num_steps=1).table()


def test_flow_rows():
    plan = PLANS[-1]
    rows = plan.table().rows
    sigmas = plan.schedule.sigmas(4)
    np.testing.assert_allclose([row.t for row in rows], sigmas[:-1] * 1000)
    np.testing.assert_allclose([row.t_to for row in rows], sigmas[1:] * 1000)
    np.testing.assert_allclose([row.b for row in rows], np.diff(sigmas))
    assert {(row.k, row.a, row.c) for row in rows} == {(1.0, 1.0, 0.0)}
    with pytest.raises(PlanError, match="a flow plan's timesteps come with its table"):
        plan.net_timesteps()


def test_dynamic_flow_needs_the_image_size():
    schedule = FlowSchedule(convention="flux", use_dynamic_shifting=True)
    plan = FewStepPlan(solver="flow_euler", num_steps=2, prediction_type="flow", schedule=schedule)
    with pytest.raises(PlanError, match="pass height and width in pixels"):
        plan.table()
    assert plan.table(height=1024, width=1024).rows[1].t > plan.table(height=512, width=512).rows[1].t

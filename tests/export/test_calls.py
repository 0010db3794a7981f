"""verify/calls.py: an artifact is held against what torch answered in the golden picture's own loop, and no row of a
call of several images is like another."""

import json

import numpy as np
import pytest
import torch

from hypersd_export.diffusion import Guidance, GuidanceKind, PlanFile, philox_normal, start_sample
from hypersd_export.runtime.text import rows
from hypersd_export.verify import reference, worker
from hypersd_export.verify.calls import full, noted

SHAPE = (4, 4, 4)


class UNet:
    """A network whose every row depends on its latents, its timestep and its text alone; it counts its rows."""

    dtype = torch.float32

    def __init__(self):
        self.rows = 0

    def __call__(self, x, t, encoder_hidden_states):
        self.rows += len(x)
        out = 0.9 * x.roll(1, dims=-1) + t / 1000 + encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        return type("Output", (), {"sample": out})


@pytest.fixture
def plans(exported):
    return PlanFile.from_json(json.loads((exported.path / "plan.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("more", [1, 3])
def test_calls_of_several_images_are_each_images_own(plans, guided, more):
    unet, calls, table = UNet(), {}, plans.default.table
    cond, uncond = ({"encoder_hidden_states": np.full((1, 2, 3), value, np.float32)} for value in (0.5, -0.25))
    guidance = Guidance(kind=GuidanceKind.CFG, scale=3.0) if guided else Guidance(kind=GuidanceKind.NONE, scale=1.0)
    latents = reference.denoise(
        unet, table, guidance, cond=cond, uncond=uncond if guided else None, seed=3, shape=SHAPE,
        watch=noted(calls, table),
    )  # fmt: skip
    branches = [uncond, cond] if guided else [cond]
    assert list(calls) == [(row.t, row.k) for row in table.rows]
    assert unet.rows == len(table.rows) * len(branches)

    text = rows(branches, more)
    found = full(calls, unet, [(table, latents)], guidance, text=text, more=more, seed=5)
    assert unet.rows == len(table.rows) * len(branches) * (1 + more)
    assert list(found) == list(calls)
    for number, (key, (sample, output)) in enumerate(found.items()):
        again = reference.unet_output(UNet(), sample, key[0], rows(branches, 1 + more), guidance)
        np.testing.assert_array_equal(output, again)  # every row has the text of its own branch
        by_branch = sample.reshape(len(branches), 1 + more, *SHAPE)
        np.testing.assert_array_equal(by_branch[:, 0], calls[key][0])
        assert len({row.tobytes() for row in by_branch[0]}) == 1 + more
        noise = philox_normal(seed=5, index=0, stream=number, shape=(more, *SHAPE))
        clean = np.repeat(latents, more, axis=0)
        expected = key[1] * start_sample(table, start=number, latents=clean, noise=noise)
        np.testing.assert_array_equal(by_branch[-1, 1:], expected.astype(np.float32))


def test_a_call_that_two_plans_have_in_common_is_kept_once(plans):
    table, calls = plans.default.table, {}
    first = tuple(np.full((1, *SHAPE), value, np.float32) for value in (1, 2))
    for given in (first, (first[1], first[0])):
        watch = noted(calls, table)
        for row in table.rows:
            watch(given[0], row.t, given[1])
    assert all(call[0] is first[0] and call[1] is first[1] for call in calls.values())


def test_torch_calls_the_unet_for_the_gates_alone_nowhere(request_for, plans, monkeypatch):
    """Of one image at a time: a call a step; pictures of each plan's latents and of noise, two encoded again."""
    counts = dict.fromkeys(("unet_output", "decode", "encode"), 0)

    def counted(name, real):
        def call(*arguments, **options):
            counts[name] += 1
            return real(*arguments, **options)

        return call

    for name in counts:
        monkeypatch.setattr(reference, name, counted(name, getattr(reference, name)))
    assert request_for.shapes.batch == 1
    report = worker.verify(request_for)
    assert report["failures"] == []
    assert counts == {
        "unet_output": sum(entry.steps for entry in plans.entries), "decode": len(plans.entries) + 1, "encode": 2,
    }  # fmt: skip
    assert len(report["parity"]["unet"]["per_step"]) == len(
        {(row.t, row.k) for e in plans.entries for row in e.table.rows}
    )

"""What a layer's bits cost, measured, against NumPy; and packages of mixed widths within their budgets."""

from dataclasses import replace

import numpy as np
import pytest

from hypersd_export import coreml_mixed
from hypersd_export.errors import BuildError
from hypersd_export.graphs.spec import Graph
from hypersd_export.job import open_job
from hypersd_export.runtime.ports import Port
from hypersd_export.targets.coreml import convert, package
from hypersd_export.targets.coreml.palettize import restored
from hypersd_export.verify import sensitivity
from hypersd_export.verify.mil import open_package

pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")


class Net(torch.nn.Module):
    """Layers that matter more and less: the output is 0.01 of one and all of two behind one another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks_0_resnets_0 = torch.nn.Linear(64, 256, bias=False)
        self.down_blocks_0_attentions_0 = torch.nn.Linear(64, 256, bias=False)
        self.mid_block_resnets_0 = torch.nn.Linear(256, 64, bias=False)

    def forward(self, x):
        hidden = torch.relu(self.down_blocks_0_resnets_0(x))
        return self.mid_block_resnets_0(hidden + 0.01 * self.down_blocks_0_attentions_0(x))


def by_numpy(x, weights):
    first, dull, last = (weights[name].astype(np.float64) for name in LAYERS)
    return (np.maximum(x @ first.T, 0) + 0.01 * (x @ dull.T)) @ last.T


LAYERS = ("down_blocks_0_resnets_0", "down_blocks_0_attentions_0", "mid_block_resnets_0")


@pytest.fixture(scope="module")
def net():
    return Net().eval()


@pytest.fixture(scope="module")
def source(net, tmp_path_factory):
    """(the package in float32, two calls)."""
    path = tmp_path_factory.mktemp("mixed") / "raw.mlpackage"
    graph = Graph(name="net", module=net, inputs={"x": torch.randn(8, 64)}, output_names=("y",))
    convert.build(graph, path, precision="fp32", deployment_target="iOS17")
    return path, [{"x": np.random.default_rng(seed).standard_normal((8, 64), np.float32)} for seed in (0, 1)]


@pytest.fixture(scope="module")
def rated(source):
    path, calls = source
    return coreml_mixed.rate(path, calls, deployment_target="iOS17", progress=lambda _: None)


def test_errors_of_single_layers_are_those_of_numpy(net, source, rated):
    _, calls = source
    weights = {name: getattr(net, name).weight.detach().numpy() for name in LAYERS}
    assert rated["by"] == "layer"
    assert len(rated["layers"]) == 3
    for layer in rated["layers"].values():
        name = next(name for name in LAYERS if name in layer["weights"][0])
        errors = {option["bits"]: option["error"] for option in layer["options"]}
        assert list(errors) == [None, 8, 6, 4, 2]
        assert errors[None] == 0
        for bits in (8, 6, 4, 2):
            small = weights | {name: restored(weights[name], bits=bits, size=None)}
            found, exact = (np.stack([by_numpy(call["x"], each) for call in calls]) for each in (small, weights))
            expected = np.square(found - exact).sum((1, 2)) / np.square(exact).sum((1, 2))
            assert errors[bits] == pytest.approx(expected.mean(), rel=1e-3)


def test_a_package_within_its_budget_that_loses_what_was_foretold(source, rated, tmp_path):
    path, calls = source
    whole = package.facts(path)["bytes"]
    built = {
        budget: coreml_mixed.build(path, tmp_path / f"{budget}.mlpackage", rated=rated, budget=budget, calls=calls,
                                   deployment_target="iOS17")
        for budget in (0.2, 0.14)
    }  # fmt: skip
    for budget, each in built.items():
        assert 0.7 * budget * whole < each["bytes"] <= budget * whole
        assert each["bytes_before"] == whole
        mixed = each["palettes"]
        assert {name: mixed[name] for name in ("bits", "budget", "by")} == {
            "bits": "mixed",
            "budget": budget,
            "by": "layer",
        }
        assert mixed["measured_db"] == pytest.approx(mixed["expected_db"], abs=1.5)
        bits = {name: next(layer["bits"] or 32 for n, layer in mixed["layers"].items() if name in n) for name in LAYERS}
        assert bits["down_blocks_0_attentions_0"] < min(bits["down_blocks_0_resnets_0"], bits["mid_block_resnets_0"])
    assert built[0.2]["palettes"]["measured_db"] > built[0.14]["palettes"]["measured_db"] + 3
    exact, found = (open_package(each).evaluate(calls[0])["y"] for each in (path, tmp_path / "0.2.mlpackage"))
    assert 10 < -10 * np.log10(sensitivity.relative_error(found, exact)) < 40


def test_a_budget_that_cannot_be_met_names_the_smallest(source, rated, tmp_path):
    path, calls = source
    common = {"rated": rated, "calls": calls, "deployment_target": "iOS17"}
    with pytest.raises(
        BuildError, match=r"^--size-budget 0.01: the smallest that palettes make .* is 0\.\d+ of"
    ) as caught:
        coreml_mixed.build(path, tmp_path / "small.mlpackage", budget=0.01, **common)
    least = float(str(caught.value).partition(" is ")[2].split()[0])
    found = coreml_mixed.build(path, tmp_path / "least.mlpackage", budget=least, **common)
    assert {layer["bits"] for layer in found["palettes"]["layers"].values()} == {2}


def test_large_networks_are_measured_by_block_at_two_widths(source, rated, monkeypatch):
    path, calls = source
    monkeypatch.setattr(coreml_mixed, "EACH_LAYER", 10)
    found = coreml_mixed.rate(path, calls, deployment_target="iOS17", progress=lambda _: None)
    assert found["by"] == "block"
    assert list(found["layers"]) == sorted(found["layers"], key=LAYERS.index)
    each = {
        entry["weights"][0]: {o["bits"]: o["error"] for o in entry["options"]} for entry in rated["layers"].values()
    }
    for entry in found["layers"].values():
        errors = {option["bits"]: option["error"] for option in entry["options"]}
        for bits in (8, 6, 4, 2):  # of one call, and at 8 and 6 bits foretold from 4
            assert errors[bits] == pytest.approx(each[entry["weights"][0]][bits], rel=0.3)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_calls_are_what_the_unet_sees(tiny_spec, guidance):
    spec = replace(tiny_spec, plan=replace(tiny_spec.plan, guidance=guidance, steps=(2,)))
    job = open_job(spec)
    first, last = sensitivity.calls_of(job.source, job.plans.default, job.shapes)
    rows = job.plans.default.table.rows
    assert [float(call["timestep"]) for call in (first, last)] == [rows[0].t, rows[-1].t]
    shape = job.shapes.channels, job.shapes.latent_height, job.shapes.latent_width
    count = 2 if guidance > 1 else 1
    assert first["sample"].shape == (count, *shape)
    assert first["encoder_hidden_states"].shape == (count, job.shapes.tokens, job.shapes.text_width)
    assert 0.7 < first["sample"].std() < 1.3
    assert not np.allclose(first["encoder_hidden_states"][-1], last["encoder_hidden_states"][-1])


def test_calls_by_a_packages_own_names(source):
    opened = open_package(source[0])
    x = np.ones((64, 8), np.float32)
    (found,) = sensitivity.fed(opened, [{"sample": x}], {"sample": Port(name="x", axes=(1, 0))})
    assert {name: value.shape for name, value in found.items()} == {"x": (8, 64)}


def test_an_error_that_is_no_number_counts_as_the_worst():
    assert sensitivity.relative_error(np.array([np.nan, 1.0]), np.ones(2)) == sensitivity.WORST
    assert sensitivity.relative_error(np.array([1.5, 1.0]), np.ones(2)) == 0.125

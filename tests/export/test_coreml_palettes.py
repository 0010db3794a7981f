"""Weights as palettes: the k-means against known optima, and packages against what coremltools decompresses."""

import numpy as np
import pytest

from hypersd_export.bundle.digest import digest_tree
from hypersd_export.graphs.spec import Graph
from hypersd_export.targets.coreml import convert, package, palettize, vendor
from hypersd_export.targets.coreml.palettize import palette

ct = pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")


def ratio_db(values, bits):
    found, indices = palette(values, bits=bits)
    assert (len(found), found.dtype, indices.dtype) == (1 << bits, values.dtype, np.uint8)
    assert np.all(np.diff(found.astype(np.float64)) >= 0)
    restored = found[indices].astype(np.float64)
    exact = values.reshape(-1).astype(np.float64)
    error = np.mean((restored - exact) ** 2)
    return 10 * np.log10(np.mean(exact**2) / max(error, 1e-30)), restored


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("bits", "best"), [(2, 9.30), (3, 14.62), (4, 20.22), (6, 31.89), (8, 43.8)])
def test_normal_weights_get_the_best_quantiser(bits, best, dtype):
    """Max's table (1960) of the least error for normal data, in dB; of 8 bits the asymptotic formula."""
    values = np.random.default_rng(0).standard_normal((400, 500)).astype(dtype) * dtype(0.02)
    found, _ = ratio_db(values, bits)
    assert best - 0.2 < found < best + 0.3  # a finite sample can be a little better than its distribution


def test_few_distinct_values_stay_as_they_are():
    values = np.random.default_rng(1).choice(np.array([-1.5, 0.0, 0.25, 7.0], np.float16), (30, 4))
    _, restored = ratio_db(values, 6)
    assert np.array_equal(restored, values.reshape(-1))
    ones = np.full((8, 8), 0.5, np.float16)
    found, indices = palette(ones, bits=2)
    assert np.array_equal(found[indices], ones.reshape(-1))


def test_each_element_has_the_nearest_value():
    values = np.random.default_rng(2).standard_gamma(0.5, 999).astype(np.float32) - np.float32(0.3)
    found, indices = palette(values, bits=3)
    distances = np.abs(values[:, None].astype(np.float64) - found[None].astype(np.float64))
    assert np.allclose(distances[np.arange(999), indices], distances.min(axis=1))


class Net(torch.nn.Module):
    """A convolution, a linear layer, one that is too small, and an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(100, 32)
        self.conv = torch.nn.Conv2d(4, 24, 7)
        self.wide = torch.nn.Linear(32, 96)
        self.small = torch.nn.Linear(96, 4)

    def forward(self, ids, picture):
        return self.small(torch.relu(self.wide(self.table(ids)))), self.conv(picture)


@pytest.fixture(scope="module", params=["macOS13", "iOS18"])
def packages(request, tmp_path_factory):
    """(deployment target, the network in half, the same with 4 bits a weight)."""
    folder = tmp_path_factory.mktemp("palettes")
    inputs = {"ids": torch.arange(5)[None], "picture": torch.randn(1, 4, 9, 9)}
    graph = Graph(name="net", module=Net(), inputs=inputs, output_names=("words", "features"))
    raw, small = folder / "raw.mlpackage", folder / "small.mlpackage"
    convert.build(graph, raw, precision="fp16", deployment_target=request.param)
    built = palettize.build(raw, small, bits=4, deployment_target=request.param)
    return request.param, raw, small, built, {name: value.numpy() for name, value in inputs.items()}


def lut_elements(op):
    value = op.inputs["lut"].arguments[0].value if "lut" in op.inputs else op.attributes["lut"]
    return int(np.prod([axis.constant.size for axis in value.type.tensorType.dimensions]))


def test_large_weights_of_layers_become_palettes(packages):
    target, raw, small, built, _ = packages
    assert built["palettes"] == {"bits": 4, "group_size": 16 if target == "iOS18" else None, "weights": 2}
    # half a byte in place of two for 4704 and 3072 elements; embedding and small layer stay
    saved = package.facts(raw)["weight_bytes"] - built["weight_bytes"]
    assert 0.7 * 1.5 * 7776 < saved <= 1.5 * 7776
    ops = package.main_block(vendor.read_model(small / package.MODEL_FILE)).operations
    luts = {op.outputs[0].name: op for op in ops if op.type.startswith("constexpr_lut")}
    assert len(luts) == 2
    # From iOS 18 on 96 output channels are six groups; 24 are no whole number of 16, and one group.
    sizes = {name: lut_elements(op) for name, op in luts.items()}
    assert sorted(sizes.values()) == ([16, 6 * 16] if target == "iOS18" else [16, 16])


def test_they_give_what_coremltools_decompresses(packages, tmp_path):
    from hypersd_export.verify.mil import open_package

    _, raw, small, _, inputs = packages
    exact, found = (open_package(path).evaluate(inputs) for path in (raw, small))
    whole = tmp_path / "whole.mlpackage"
    before = digest_tree(small, "*")
    with package.loaded(small, tmp_path) as model:
        package.save(ct.optimize.coreml.decompress_weights(model), whole)
    assert digest_tree(small, "*") == before
    restored = open_package(whole).evaluate(inputs)
    for name in exact:
        assert np.array_equal(found[name], restored[name])
        error = np.sqrt(np.mean((found[name] - exact[name]) ** 2) / np.mean(exact[name] ** 2))
        assert 0.01 < error < 0.2


def test_the_same_bytes_again(packages, tmp_path):
    target, raw, small, _, _ = packages
    palettize.build(raw, tmp_path / "again.mlpackage", bits=4, deployment_target=target)
    assert digest_tree(tmp_path / "again.mlpackage", "*") == digest_tree(small, "*")

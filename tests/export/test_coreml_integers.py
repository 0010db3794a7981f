"""Weights as integers and scales: against the rounding worked out by hand, and against what coremltools reads."""

import numpy as np
import pytest

from hypersd_export.bundle.digest import digest_tree
from hypersd_export.graphs.spec import Graph
from hypersd_export.targets.coreml import convert, package, quantize, vendor
from hypersd_export.verify.mil import open_package

ct = pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")


class Net(torch.nn.Module):
    """A convolution whose 4 inputs are no whole block, a linear layer, one that is too small, and an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(100, 64)
        self.conv = torch.nn.Conv2d(4, 24, 7)
        self.wide = torch.nn.Linear(64, 96)
        self.small = torch.nn.Linear(96, 4)

    def forward(self, ids, picture):
        return self.small(torch.relu(self.wide(self.table(ids)))), self.conv(picture)


@pytest.fixture(scope="module")
def net():
    return Net().eval()


@pytest.fixture(scope="module", params=["macOS13", "iOS18"])
def raw(request, net, tmp_path_factory):
    """(deployment target, the network in half, inputs)."""
    inputs = {"ids": torch.arange(5)[None], "picture": torch.randn(1, 4, 9, 9)}
    graph = Graph(name="net", module=net, inputs=inputs, output_names=("words", "features"))
    path = tmp_path_factory.mktemp("integers") / "raw.mlpackage"
    convert.build(graph, path, precision="fp16", deployment_target=request.param)
    return request.param, path, {name: value.numpy() for name, value in inputs.items()}


def rounded(weight, levels, block):
    """Each row's (or block's) largest magnitude is `levels`: the nearest multiples of the step, divided in half."""
    whole = half(weight).astype(np.float16)
    rows = whole.reshape(len(whole), -1) if block is None else whole.reshape(-1, block)
    step = np.abs(rows).max(axis=1, keepdims=True) / np.float16(levels)
    return torch.from_numpy((np.round(rows / step).astype(np.float64) * step).reshape(whole.shape))


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


def half(weight):
    return weight.detach().numpy().astype(np.float16).astype(np.float64)


def by_hand(net, inputs, levels, block):
    ids, picture = (torch.from_numpy(inputs[name]) for name in ("ids", "picture"))
    table, small, *biases = (
        torch.from_numpy(half(each))
        for each in (net.table.weight, net.small.weight, net.wide.bias, net.small.bias, net.conv.bias)
    )
    words = torch.relu(table[ids] @ rounded(net.wide.weight, levels, block).T + biases[0]) @ small.T + biases[1]
    features = torch.nn.functional.conv2d(picture.double(), rounded(net.conv.weight, levels, None), biases[2])
    return {"words": words.numpy(), "features": features.numpy()}


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_weights_are_rounded_to_even_steps(raw, net, tmp_path, form):
    target, source, inputs = raw
    if form == "int4" and target != "iOS18":
        return
    path = tmp_path / "small.mlpackage"
    built = quantize.build(source, path, form=form, deployment_target=target)
    assert built["integers"] == {"form": form, "weights": 2, "blocks": int(form == "int4")}
    bits, levels, block = (8, 127, None) if form == "int8" else (4, 7, 32)
    saved = package.facts(source)["weight_bytes"] - built["weight_bytes"]
    assert 0.85 < saved / ((24 * 4 * 49 + 64 * 96) * (16 - bits) / 8) <= 1.0  # less the scales
    found, expected = open_package(path).evaluate(inputs, rounding="fp32"), by_hand(net, inputs, levels, block)
    exact = open_package(source).evaluate(inputs, rounding="fp32")
    for name, value in expected.items():
        assert rms(found[name] - value) < 0.05 * rms(found[name] - exact[name]), name
    error = rms(found["features"] - exact["features"]) / rms(exact["features"])
    assert error == pytest.approx(0.0043 if form == "int8" else 0.078, rel=0.3)  # a step of uniform weights / sqrt(12)


def test_they_give_what_coremltools_decompresses_and_the_same_bytes_again(raw, tmp_path):
    target, source, inputs = raw
    for name in ("small", "again"):
        quantize.build(source, tmp_path / f"{name}.mlpackage", form="int8", deployment_target=target)
    assert digest_tree(tmp_path / "again.mlpackage") == digest_tree(tmp_path / "small.mlpackage")
    with package.loaded(tmp_path / "small.mlpackage", tmp_path) as model:
        package.save(ct.optimize.coreml.decompress_weights(model), tmp_path / "whole.mlpackage")
    found, restored = (open_package(tmp_path / f"{name}.mlpackage").evaluate(inputs) for name in ("small", "whole"))
    for name, value in restored.items():
        assert np.abs(found[name] - value).max() <= 2e-3 * np.abs(value).max(), name
    kinds = {
        op.type
        for op in package.main_block(vendor.read_model(tmp_path / "small.mlpackage" / package.MODEL_FILE)).operations
    }
    assert ("constexpr_blockwise_shift_scale" in kinds) == (target == "iOS18")

"""A package cut in two: where, what goes across, and that the chain computes what the whole does."""

import numpy as np
import pytest

from hypersd_export.bundle.digest import digest_tree
from hypersd_export.errors import BuildError
from hypersd_export.graphs.spec import Graph
from hypersd_export.runtime.chain import chained
from hypersd_export.targets.coreml import chunk, convert, package, palettize, vendor
from hypersd_export.verify.coreml import InterpretedGraph
from hypersd_export.verify.mil import open_package

pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")


class Net(torch.nn.Module):
    """Five equal layers in a row; the first one's result is also added at the end, and so is an input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(5)])

    def forward(self, sample, bias):
        first = x = self.layers[0](sample).relu()
        for layer in self.layers[1:]:
            x = layer(x).relu()
        return x + first + bias


INPUTS = {"sample": torch.randn(1, 8, 6, 6), "bias": torch.randn(1, 8, 1, 1)}
KINDS = {"fp16": ("fp16", None), "fp32": ("fp32", None), "4 bits": ("fp16", 4)}


@pytest.fixture(scope="module", params=KINDS)
def cut(request, tmp_path_factory):
    """(the whole, its two pieces, what was said of them)."""
    folder = tmp_path_factory.mktemp("chunk")
    precision, bits = KINDS[request.param]
    whole = folder / "whole.mlpackage"
    graph = Graph(name="net", module=Net(), inputs=INPUTS, output_names=("y",))
    convert.build(graph, whole, precision=precision, deployment_target="iOS18")
    if bits is not None:
        raw, whole = whole, folder / "small.mlpackage"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(palettize, "MIN_ELEMENTS", 100)
            palettize.build(raw, whole, bits=bits, deployment_target="iOS18")
    pieces = folder / "first.mlpackage", folder / "second.mlpackage"
    return whole, pieces, chunk.build(whole, *pieces)


def graph_of(*paths):
    return chained(tuple(InterpretedGraph(package=open_package(path)) for path in paths))


def test_the_chain_is_the_whole(cut):
    whole, pieces, built = cut
    one, two = graph_of(whole), graph_of(*pieces)
    assert {name: t.shape for name, t in two.inputs.items()} == {name: t.shape for name, t in one.inputs.items()}
    assert two.outputs == one.outputs == ("y",)
    feeds = {name: value.numpy() for name, value in INPUTS.items()}
    assert np.abs(one.run(**feeds)["y"]).max() > 1
    np.testing.assert_allclose(two.run(**feeds)["y"], one.run(**feeds)["y"], rtol=2e-3, atol=1e-6)
    np.testing.assert_array_equal(two.fixed(bias=feeds["bias"])(sample=feeds["sample"])["y"], two.run(**feeds)["y"])
    assert len(built["across"]) == 2  # the row's value, and the first layer's


def test_each_piece_is_a_package_of_its_own(cut):
    whole, pieces, built = cut
    first, second = (open_package(path).function() for path in pieces)
    assert set(first.inputs) == {"sample"}
    assert set(second.inputs) == {"bias", *built["across"]}
    assert set(first.outputs) == set(built["across"])
    for path, facts in zip(pieces, built["chunks"], strict=True):
        assert facts == package.facts(path)
        features = vendor.read_model(path / package.MODEL_FILE).description
        assert {f.type.multiArrayType.dataType for f in (*features.input, *features.output)} == {chunk.FEATURE_FLOAT32}
        assert {f.name for f in features.output} == set(open_package(path).function().outputs)
        assert {f.name for f in features.input} == set(open_package(path).function().inputs)
    whole_weights = package.facts(whole)["weight_bytes"]
    assert sum(facts["weight_bytes"] for facts in built["chunks"]) <= whole_weights + 64 + 512
    share = built["chunks"][0]["weight_bytes"] / whole_weights
    assert chunk.BALANCE[0] - 0.1 < share < chunk.BALANCE[1] + 0.1
    convolutions = [f.op_types()["conv"] for f in (first, second)]
    assert sum(convolutions) == 5
    assert min(convolutions) == 2


def test_the_same_bytes_again_and_the_whole_untouched(cut, tmp_path):
    whole, pieces, _ = cut
    before = digest_tree(whole, "*")
    chunk.build(whole, tmp_path / "a.mlpackage", tmp_path / "b.mlpackage")
    assert [digest_tree(tmp_path / f"{name}.mlpackage", "*") for name in "ab"] == [digest_tree(p, "*") for p in pieces]
    assert digest_tree(whole, "*") == before


def test_coremltools_reads_the_pieces(cut, tmp_path):
    _, pieces, _ = cut
    for path in pieces:
        with package.loaded(path, tmp_path) as model:
            assert model.get_spec().specificationVersion == 9


def test_a_program_of_one_op_cannot_be_cut(tmp_path):
    graph = Graph(
        name="one", module=torch.nn.Conv2d(16, 16, 1), inputs={"input": torch.ones(1, 16, 2, 2)}, output_names=("y",)
    )
    convert.build(graph, tmp_path / "one.mlpackage", precision="fp32", deployment_target="iOS17")
    with pytest.raises(BuildError, match="a program of 1 ops cannot be cut in two: leave --chunk-unet away"):
        chunk.build(tmp_path / "one.mlpackage", tmp_path / "a.mlpackage", tmp_path / "b.mlpackage")
    assert not (tmp_path / "a.mlpackage").exists()

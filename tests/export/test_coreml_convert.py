"""A graph as a Core ML package, held against torch through the interpreter; and that its bytes do not change."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from hypersd_export.bundle.digest import digest_tree
from hypersd_export.errors import BuildError, MissingBackend
from hypersd_export.graphs.spec import Component, Graph, Shapes
from hypersd_export.targets.coreml import convert, package, vendor
from hypersd_export.verify.metrics import psnr
from hypersd_export.verify.source import SourceRequest, open_source

pytest.importorskip("coremltools")
torch = pytest.importorskip("torch")

SHAPES = Shapes(
    batch=1, unet_batch=1, channels=4, latent_height=4, latent_width=4, vae_scale=4, tokens=16, text_width=32
)


def reference(graph):
    with torch.no_grad():
        found = graph.module(*graph.inputs.values())
    found = found if isinstance(found, tuple) else (found,)
    return {name: value.numpy() for name, value in zip(graph.output_names, found, strict=True)}


def evaluate(path, graph, rounding):
    from hypersd_export.verify.mil import open_package

    return open_package(path).evaluate({n: v.numpy() for n, v in graph.inputs.items()}, rounding=rounding)


@pytest.fixture(scope="module")
def text_encoder(tiny_base) -> Graph:
    from hypersd_export.graphs.components import build_graph

    module, _ = open_source(SourceRequest(base=str(tiny_base))).load("text_encoder", torch.float32)
    return convert.plain(build_graph(Component.TEXT_ENCODER, module, SHAPES))


def test_precision_is_that_of_weights_and_arithmetic_but_not_of_the_outputs(text_encoder, tmp_path):
    expected = reference(text_encoder)
    sizes = []
    for precision, least, most in (("fp16", 60, 100), ("fp32", 120, 200)):
        path = tmp_path / f"{precision}.mlpackage"
        built = convert.build(text_encoder, path, precision=precision, deployment_target="macOS15")
        found = evaluate(path, text_encoder, precision)
        assert set(found) == set(expected)
        for name, value in found.items():
            assert value.dtype == np.float32  # a half output is what coremltools would declare by itself
            assert least < psnr(value, expected[name]) < most
        assert built["precision"] == precision
        assert built["bytes"] == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        sizes.append(built["weight_bytes"])
    weights = sum(parameter.numel() for parameter in text_encoder.module.parameters())
    assert sizes == [pytest.approx(2 * weights, rel=0.1), pytest.approx(4 * weights, rel=0.1)]


class TimeEmbedding(torch.nn.Module):
    """As a UNet begins."""

    def __init__(self) -> None:
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        super().__init__()
        torch.manual_seed(0)
        self.angles = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embed = TimestepEmbedding(32, 64)

    def forward(self, timestep):
        return self.embed(self.angles(timestep))


def test_the_angles_of_the_time_embedding_are_not_halved(tmp_path, monkeypatch):
    graph = Graph(
        name="toy", module=TimeEmbedding(), inputs={"timestep": torch.tensor([997.0])}, output_names=("embedding",)
    )
    errors = []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(convert.Float32, "__call__", lambda self, op: False)
        path = tmp_path / f"{kept}.mlpackage"
        convert.build(graph, path, precision="fp16", deployment_target="iOS16")
        found = evaluate(path, graph, "fp16")["embedding"]
        errors.append(float(np.abs(found - reference(graph)["embedding"]).max()))
    assert errors[0] < 1e-3
    assert errors[1] > 20 * errors[0]


def test_two_conversions_give_the_same_bytes(text_encoder, tmp_path):
    digests = set()
    for name in ("a", "b"):
        path = tmp_path / f"{name}.mlpackage"
        convert.build(text_encoder, path, precision="fp16", deployment_target="iOS17")
        digests.add(digest_tree(path, "*"))
    assert len(digests) == 1
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert files == {"Manifest.json", package.MODEL_FILE, package.WEIGHTS_FILE}
    model = vendor.read_model(path / package.MODEL_FILE)
    assert "conversion_date" not in " ".join(model.description.metadata.userDefined)
    manifest = json.loads((path / "Manifest.json").read_text())
    root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    assert (path / "Data" / root["path"]).is_file()


def test_a_graph_that_the_converter_refuses_is_one_line(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    graph = Graph(name="odd", module=Odd(), inputs={"x": torch.ones(3, 3)}, output_names=("y",))
    with pytest.raises(BuildError, match=r"^coremltools does not take the graph: .*svd") as caught:
        convert.build(graph, tmp_path / "odd.mlpackage", precision="fp16", deployment_target="iOS17")
    assert "\n" not in str(caught.value)


def test_inputs_have_the_names_of_the_arguments(tmp_path):
    graph = Graph(
        name="toy", module=torch.nn.Linear(2, 2), inputs={"sample": torch.ones(1, 2)}, output_names=("y",)
    )  # fmt: skip
    with pytest.raises(TypeError, match="missing a required argument"):
        convert.exported(graph)
    assert convert.exported(replace(graph, inputs={"input": torch.ones(1, 2)})) is not None


def test_a_missing_coremltools_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingBackend, match=r"pip install 'hypersd\[coreml\]'"):
        vendor.load(tmp_path)

"""Core ML packages held against torch: components and picture through the interpreter, and what is spoilt is named."""

import shutil
import struct

import numpy as np
import pytest

from hypersd_export.errors import BundleError
from hypersd_export.graphs.components import build_graph
from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.runtime.graph import Tensor, filled
from hypersd_export.runtime.ports import Port, PortedGraph
from hypersd_export.targets import Target
from hypersd_export.targets.coreml import convert
from hypersd_export.verify import worker
from hypersd_export.verify.coreml import InterpretedGraph, InterpretedRuntime
from hypersd_export.verify.gates import COMPONENT_DB
from hypersd_export.verify.mil import open_package
from hypersd_export.verify.request import VerifyRequest
from hypersd_export.verify.source import SourceRequest, open_source
from tests.mil_programs import save_program
from tests.tiny import COMPONENTS

mb = pytest.importorskip("coremltools.converters.mil").Builder


@pytest.fixture(scope="module")
def packages(tiny_base, exported, tmp_path_factory):
    """A folder of fp16 packages of the tiny pipeline's components."""
    import torch

    folder = tmp_path_factory.mktemp("packages")
    source = open_source(SourceRequest(base=str(tiny_base)))
    shapes = Shapes(**exported.manifest.options["shapes"])
    for component in COMPONENTS:
        module, _ = source.load(component.source, torch.float32)
        graph = convert.plain(build_graph(component, module, shapes))
        convert.build(graph, folder / f"{component}.mlpackage", precision="fp16", deployment_target="iOS17")
    return folder


@pytest.fixture
def request_for(tiny_base, exported, packages, tmp_path):
    """A verification of a copy of the packages."""
    folder = shutil.copytree(packages, tmp_path / "packages")
    (tmp_path / "out").mkdir()
    source = SourceRequest(base=str(tiny_base))
    return VerifyRequest(
        source=source, digests=open_source(source).digests, bundle=exported.path,
        components=dict.fromkeys(Component, folder), out=tmp_path / "out",
        shapes=Shapes(**exported.manifest.options["shapes"]), precision="fp16", provider="cpu", prompt="a cat",
        negative_prompt="", seed=1, compare=True, golden_db=35.0, target=Target.COREML,
    )  # fmt: skip


def test_components_and_picture_are_torchs_to_half_precision(request_for):
    assert VerifyRequest.from_json(request_for.to_json()) == request_for
    seen: list[str] = []
    report = worker.verify(request_for, seen.append)
    assert report["failures"] == []
    figures = {name: figure["psnr_db"] for name, figure in report["parity"].items()}
    assert set(figures) == {*COMPONENTS, "image"}
    assert all(55 < figures[name] < COMPONENT_DB["fp32"] for name in COMPONENTS)  # rounded, and no more than that
    assert figures["image"] > 45
    assert "interpreter: unet" in seen
    assert "interpreter: image in 2 steps" in seen


def spoil_weight(path):
    """Turn the sign of the largest weights of a package."""
    file = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    raw = bytearray(file.read_bytes())
    block = open_package(path).function().block
    offsets = [op.attributes["val"].blobFileValue.offset for op in block.operations
               if op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue"]  # fmt: skip
    records = [struct.unpack_from("<IIQQ", raw, offset)[2:] for offset in offsets]
    size, start = max(records)
    weight = np.frombuffer(raw, np.float16, size // 2, start)
    raw[start : start + size] = (-weight).tobytes()
    file.write_bytes(raw)


def spoil_program(path, change):
    """Write a package back whose block of ops was changed."""
    package = open_package(path)
    change(package.function().block)
    (package.file.root / "model.mlmodel").write_bytes(package.file.model.SerializeToString())


def test_a_spoilt_weight_and_a_spoilt_op_are_named_with_the_picture(request_for):
    folder = request_for.components[Component.UNET]
    spoil_weight(folder / "unet.mlpackage")
    spoil_weight(folder / "text_encoder.mlpackage")

    def activation(block):
        next(op for op in block.operations if op.type == "silu").type = "sigmoid"

    spoil_program(folder / "vae_decoder.mlpackage", activation)
    spoil_program(folder / "vae_encoder.mlpackage", activation)
    report = worker.verify(request_for)
    assert {failure.split()[0] for failure in report["failures"]} == {*COMPONENTS, "image"}
    assert report["parity"]["image"]["psnr_db"] < 35


def test_a_spoilt_shape_stops_the_evaluation(request_for):
    folder = request_for.components[Component.VAE_DECODER]
    path = folder / "vae_decoder.mlpackage"

    def wider(block):
        convolution = next(op for op in block.operations if op.type == "conv")
        convolution.outputs[0].type.tensorType.dimensions[1].constant.size += 1

    spoil_program(path, wider)
    graph = InterpretedRuntime(packages={"vae_decoder": path}).graph("vae_decoder")
    with pytest.raises(BundleError, match=r"op .* \(conv\) has the shape .*, the package declares .*: export it again"):
        graph.run(latent_sample=filled(graph.inputs["latent_sample"], 0.5))


def test_a_package_that_is_missing_is_said_so(request_for):
    runtime = InterpretedRuntime(packages={"unet": request_for.components[Component.UNET] / "other.mlpackage"})
    with pytest.raises(BundleError, match="no package of vae_decoder, only of unet: export the bundle again"):
        runtime.graph("vae_decoder")
    with pytest.raises(BundleError, match=r"other.mlpackage is missing: export it again"):
        runtime.graph("unet")
    assert not runtime.is_single_graph


@pytest.fixture
def apple(tmp_path):
    """A graph in another layout: states [1, C, 1, S] and a half sample in, `noise_pred` and turned states out."""
    states, sample = np.zeros((1, 3, 1, 5), np.float32), np.zeros((1, 4), np.float16)

    def body(x, y):
        half = mb.cast(x=x, dtype="fp16")
        return mb.mul(x=y, y=mb.reduce_sum(x=half, axes=[1, 2, 3]), name="noise_pred"), mb.mul(
            x=x, y=2.0, name="states"
        )

    path = save_program(body, [states, sample], tmp_path)
    ports = {
        "encoder_hidden_states": Port(name="x0", axes=(0, 2, None, 1)),
        "sample": Port(name="x1"),
        "out_sample": Port(name="noise_pred"),
        "out_states": Port(name="states", axes=(0, 2, None, 1)),
    }
    return PortedGraph(graph=InterpretedGraph(package=open_package(path)), ports=ports)


def test_a_graph_of_another_layout_has_our_names_and_shapes(apple):
    assert apple.inputs == {
        "encoder_hidden_states": Tensor(shape=(1, 5, 3), dtype=np.float32),
        "sample": Tensor(shape=(1, 4), dtype=np.float16),
    }
    assert apple.outputs == ("out_sample", "out_states")
    states = np.arange(15, dtype=np.float32).reshape(1, 5, 3)
    run = apple.fixed(encoder_hidden_states=states)
    found = run(sample=np.full((1, 4), 0.5))
    np.testing.assert_array_equal(found["out_sample"], np.full((1, 4), 0.5 * states.sum()))
    np.testing.assert_array_equal(found["out_states"], 2 * states)
    assert found["out_sample"].dtype == np.float16


def test_inputs_that_the_package_does_not_take_are_the_bundles_fault(apple):
    with pytest.raises(BundleError, match=r"takes x0, x1, not x1: export the bundle again"):
        apple.run(sample=np.zeros((1, 4)))
    with pytest.raises(BundleError, match=r"input x1 is fp16 \[1, 4\], not \[2, 4\]: export the bundle again"):
        apple.run(sample=np.zeros((2, 4)), encoder_hidden_states=np.zeros((1, 5, 3)))


def test_ports_survive_the_way_through_json():
    port = Port(name="x", axes=(0, 2, None, 1))
    assert Port.from_json(port.to_json()) == port

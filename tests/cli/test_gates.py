"""Every gate of an ONNX export broken on purpose, from the command line: exit code 1, one line, nothing published.

The graphs are those of the tiny base, exported once (`quick_build`); a test damages one of them or what is beside it.
The overflow of fp16 graphs is in tests/export/test_fp16_bundle.py, the golden picture of `verify` in test_export.py.
"""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from hypersd_export.cli import app
from tests.export.conftest import export_cache, exported, in_process, quick_build, tiny_spec  # noqa: F401
from tests.tiny import COMPONENTS

pytestmark = pytest.mark.usefixtures("quick_build", "in_process")


def damage(path):
    """Shrink the large weights of a graph by a fifth."""
    model = onnx.load(path)
    for weight in model.graph.initializer:
        if len(weight.raw_data) > 1000:
            weight.CopyFrom(numpy_helper.from_array(np.float32(0.8) * numpy_helper.to_array(weight), weight.name))
    onnx.save(model, path)


def behind(monkeypatch, module, name, action):
    """Call `action(*arguments)` after `module.name` has done its work."""
    real = getattr(module, name)

    def both(*arguments, **options):
        result = real(*arguments, **options)
        action(*arguments)
        return result

    monkeypatch.setattr(module, name, both)


@pytest.fixture
def failure(tiny_base, tmp_path):
    """Exports with these options and returns the one line, once it is seen that the command failed as it should."""

    def run(*options):
        out = tmp_path / "place" / "bundle"
        command = ["--base", tiny_base, "--steps", "2", "--scheduler", "ddim", "--guidance", "1", *options]
        command += ["--cache-dir", tmp_path / "cache", "--out", out]
        done = CliRunner().invoke(app, [str(argument) for argument in command])
        assert done.exit_code == 1, done.output
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "Traceback" not in done.output
        assert not out.exists()
        return lines[0].removeprefix("error: not the same as torch: ")

    return run


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_components_gate(component, failure, monkeypatch):
    from hypersd_export.targets import onnx as target

    def after(graph, folder):
        if graph.name == component:
            damage(folder / "model.onnx")

    behind(monkeypatch, target, "build", after)
    failed = {part.split()[0] for part in failure().split("; ")}
    assert failed & set(COMPONENTS) == {component}


def test_the_pictures_gate_where_every_component_is_right(failure, monkeypatch):
    """A runtime that scales latents by another factor."""
    from hypersd_export.runtime.pipeline import Pipeline

    decode = Pipeline.decode
    monkeypatch.setattr(Pipeline, "decode", lambda self, latents: decode(self, 1.2 * latents))
    assert failure().startswith("image ")


def test_the_single_graphs_gate_where_every_part_is_right(failure, monkeypatch):
    from hypersd_export.targets import onnx_pipeline

    behind(monkeypatch, onnx_pipeline, "compose", lambda parts, wiring, folder: damage(folder / "pipeline.onnx"))
    assert failure("--single-graph").startswith("image ")


def test_the_tokenizers_gate(failure, monkeypatch):
    from hypersd_export.runtime.tokenizer import Tokenizer

    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, *rest: encode(self, f"{text} x", *rest))
    assert failure().startswith("tokenizer gives other ids than transformers for ")


def test_the_gate_at_the_ends_of_a_range(failure):
    """These graphs have no free axis, whatever the export says."""
    assert "Got invalid dimensions for input" in failure("--dynamic", "batch=1:2")


def test_the_gate_of_integer_weights(failure, monkeypatch):
    """They may lose much, but not as much as these."""
    from hypersd_export.targets import onnx_quantize

    real = onnx_quantize.to_int8

    def loud(*arguments):
        levels, scale = real(*arguments)
        return levels, -scale

    monkeypatch.setattr(onnx_quantize, "to_int8", loud)
    failed = failure("--quantize", "int8")
    assert "unet 1" in failed
    assert "(needs 15)" in failed
    assert "vae" not in failed

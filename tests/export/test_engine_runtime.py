"""Exported graphs as engines on the device of NumPy memory: the TensorRT runtime draws what the ONNX runtime draws."""

import shutil

import numpy as np
import pytest

from hypersd_export.runtime import nvidia
from hypersd_export.runtime.pipeline import Pipeline
from tests.engine_bundles import COMPONENTS, reseal, write_engine
from tests.fake_device import FakeDevice


@pytest.fixture
def engines(lora_exported, tmp_path, monkeypatch):
    """TCD in 3 steps with guidance and fresh noise, two oblong pictures at a time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nvidia, "open_device", lambda flavour: FakeDevice())
    bundle = tmp_path / "bundle"
    shutil.copytree(lora_exported.path, bundle, ignore=shutil.ignore_patterns("*.onnx", "*.onnx_data"))
    files = {name: lora_exported.path / name / "model.onnx" for name in COMPONENTS}
    return reseal(bundle, {name: write_engine(bundle, name, file) for name, file in files.items()})


def test_the_same_pictures(engines, lora_exported):
    mine, theirs = Pipeline.from_bundle(engines), Pipeline.from_bundle(lora_exported.path)
    assert (mine.runtime.name, mine.size) == ("tensorrt", theirs.size)
    for seed in (1, 2):  # enqueued, then captured
        settings = {"negative_prompt": "a dog", "seed": seed, "num_images": 3}
        ours, other = (pipeline("a cat and a dog", **settings) for pipeline in (mine, theirs))
        np.testing.assert_array_equal(ours.latents, other.latents)
        for picture, reference in zip(ours.images, other.images, strict=True):
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(reference))
    assert {graph.captured for graph in mine.runtime.graphs.values()} == {True}
    assert mine.golden().passed
    picture = ours.images[0]
    again, reference = (pipeline("a cat", init_image=picture, strength=0.7, seed=3) for pipeline in (mine, theirs))
    np.testing.assert_array_equal(again.latents, reference.latents)

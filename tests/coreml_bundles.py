"""Hand-made bundles of "packages" and a Mac of onnxruntime: a package here is a folder with an ONNX graph.

The device is as strict as Core ML: it takes exactly the declared names, shapes and types.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_export.bundle.digest import digest_tree
from hypersd_export.bundle.manifest import FILE_NAME, read_manifest, write_manifest
from hypersd_export.errors import BundleError
from hypersd_export.runtime.onnx import OnnxGraph, open_graph
from tests.bundles import make_bundle

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


class FakeModel:
    def __init__(self, graph: OnnxGraph, spoil: float) -> None:
        self.graph, self.spoil = graph, spoil
        self.inputs, self.outputs = graph.inputs, graph.outputs

    def predict(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, tensor in self.inputs.items():
            value = feeds[name]
            if value.dtype != tensor.dtype or any(
                s not in (None, n) for s, n in zip(tensor.shape, value.shape, strict=True)
            ):
                raise BundleError(f"{name} is {value.dtype} {value.shape}, wanted {tensor}")
        found = self.graph.run(**feeds)
        return {
            name: value + np.float32(self.spoil) if value.dtype.kind == "f" else value for name, value in found.items()
        }


class FakeMac:
    """`runtime.coreml.Device`; `loaded` is what was loaded, in order. spoil: added to every float output."""

    name = "Fake M9, macOS 99.0"

    def __init__(self, *, spoil: float = 0.0, refuse: tuple[str, ...] = ()) -> None:
        self.loaded: list[tuple[str, str, str]] = []
        self.functions: list[str | None] = []
        self.spoil, self.refuse = spoil, refuse

    def load(self, package: Path, digest: str, units: str, function: str | None = None) -> FakeModel:
        if units in self.refuse:
            raise BundleError(f"{package} does not load on {units}: no such unit")
        self.loaded.append((package.name, digest, units))
        self.functions.append(function)
        return FakeModel(open_graph(package / "model.onnx"), self.spoil)


def make_package_bundle(folder: Path, *bundle_options: Any, onnx: bool = False, **options: Any) -> Path:
    """`make_bundle` with each graph as COMPONENT/COMPONENT.mlpackage, and the manifest of a Core ML target; and, with
    `onnx`, of the ONNX graphs too."""
    bundle = make_bundle(folder, *bundle_options, timestep_rank=1, **options)
    for name in COMPONENTS:
        package = bundle / name / f"{name}.mlpackage"
        package.mkdir()
        shutil.copyfile(bundle / name / "model.onnx", package / "model.onnx")
        if not onnx:
            (bundle / name / "model.onnx").unlink()
    return reseal(bundle, onnx=onnx)


def reseal(bundle: Path, *, onnx: bool = False) -> Path:
    """Write the manifest of what is in the folder now."""
    old = read_manifest(bundle)
    (bundle / FILE_NAME).unlink()
    components = {
        path.parent.name: {
            "packages": [path.relative_to(bundle).as_posix()], "digests": [digest_tree(path)], "bytes": 10, "ops": 1,
        }
        for path in sorted(bundle.glob("*/*.mlpackage"))
    }  # fmt: skip
    target = {"precision": "fp16", "compute_units": "all", "components": components, "ports": {}}
    targets = {"coreml": target} | ({"onnx": {"precision": "fp32", "opset": 18}} if onnx else {})
    write_manifest(
        bundle, hypersd="0.0.0", base=old.base, loras=old.loras, targets=targets, options=old.options,
        versions=old.versions, stages=old.stages, parity=old.parity,
    )  # fmt: skip
    return bundle


def target_of(bundle: Path) -> dict[str, Any]:
    """The Core ML target in a bundle's manifest."""
    found: dict[str, Any] = json.loads((bundle / FILE_NAME).read_text())["targets"]["coreml"]
    return found

"""Core ML on this Mac, by coremltools: packages compiled once and kept, loaded, and asked for predictions.

The compiled model is what is loaded, and not the package: coremltools writes a package's manifest again when it opens
one, and a bundle's files must stay as they are. Everything of coremltools is imported inside.
"""

import importlib.metadata
import logging
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_export.bundle.cache import StageCache, default_cache_dir
from hypersd_export.errors import BundleError, HypersdError, MissingBackend, OptionError
from hypersd_export.runtime.graph import Array, Tensor, first_line

COMPILED = "coreml-compiled"
"""The name of compiled models in the cache."""
MODEL_FILE = "Data/com.apple.CoreML/model.mlmodel"
_UNITS = {"all": "ALL", "cpu-only": "CPU_ONLY", "cpu-and-gpu": "CPU_AND_GPU", "cpu-and-ne": "CPU_AND_NE"}
_DTYPES: Mapping[int, Any] = {65552: np.float16, 65568: np.float32, 65600: np.float64, 131104: np.int32}
"""Element types of a package's inputs and outputs."""


def open_device() -> "MacDevice":
    """This machine.

    Raises:
        OptionError: it is no Mac.
        MissingBackend: coremltools is not installed.
    """
    if sys.platform != "darwin":
        raise OptionError(
            "runtime 'coreml': Core ML runs on a Mac only (the export has checked the packages by its interpreter); "
            "use --runtime onnx with a bundle that has ONNX graphs"
        )
    try:
        logging.getLogger("coremltools").setLevel(logging.ERROR)  # its notes are about versions of torch
        import coremltools
    except ModuleNotFoundError as error:
        raise MissingBackend(str(error.name), "coreml", "runtime 'coreml'") from error
    return MacDevice(coremltools=coremltools, cache=StageCache(default_cache_dir()))


@dataclass(frozen=True, kw_only=True, slots=True)
class MacDevice:
    """`runtime.coreml.Device`. coremltools: the module; cache: where compiled models are kept."""

    coremltools: Any
    cache: StageCache

    @property
    def name(self) -> str:
        """The chip and the system."""
        return f"{chip()}, macOS {platform.mac_ver()[0]}"

    def load(self, package: Path, digest: str, units: str, function: str | None = None) -> "MacModel":
        """See `Device`."""
        described = self._describe(package, function)
        depends = {
            "package": digest,
            "system": platform.mac_ver()[0],
            "machine": platform.machine(),
            "coremltools": importlib.metadata.version("coremltools"),
        }

        def build(folder: Path) -> None:
            self.coremltools.models.utils.compile_model(str(package.resolve()), str(folder / "model.mlmodelc"))

        try:
            compiled = self.cache.fetch(COMPILED, depends, build) / "model.mlmodelc"
            model = self.coremltools.models.CompiledMLModel(
                str(compiled),
                compute_units=getattr(self.coremltools.ComputeUnit, _UNITS[units]),
                **({} if function is None else {"function_name": function}),
            )
        except HypersdError:
            raise
        except Exception as error:  # Core ML's own, which have no class of their own
            raise BundleError(f"{package} does not load on {units}: {first_line(error)}") from error
        return MacModel(path=package, model=model, inputs=described[0], outputs=described[1])

    def _describe(self, package: Path, function: str | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Inputs and outputs of a function, from the package's own file."""
        from coremltools.proto import Model_pb2

        try:
            description = Model_pb2.Model.FromString((package / MODEL_FILE).read_bytes()).description
        except Exception as error:  # protobuf's, which it does not want imported
            raise BundleError(f"{package} cannot be read ({first_line(error)}): export the bundle again") from error
        wanted = function or description.defaultFunctionName
        own = next((each for each in description.functions if each.name == wanted), description)
        inputs = {
            feature.name: Tensor(
                shape=tuple(int(size) for size in feature.type.multiArrayType.shape),
                dtype=_DTYPES.get(feature.type.multiArrayType.dataType, np.float32),
            )
            for feature in own.input
        }
        return inputs, tuple(feature.name for feature in own.output)


@dataclass(frozen=True, kw_only=True, slots=True)
class MacModel:
    """`runtime.coreml.Model`: a compiled model that was loaded."""

    path: Path
    model: Any
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]

    def predict(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Model`."""
        try:
            found = self.model.predict(dict(feeds))
        except Exception as error:  # Core ML's own, which have no class of their own
            raise BundleError(f"{self.path} failed: {first_line(error)}") from error
        return {name: _array(found[name]) for name in self.outputs}


def _array(value: Any) -> Array:
    """An output as a new array; a PIL image [H, W] as [1, 3, H, W]."""
    if hasattr(value, "convert"):
        return np.asarray(value.convert("RGB")).transpose(2, 0, 1)[None].copy()
    return np.array(value)


def chip() -> str:
    """Such as Apple M2; the architecture's name where the system does not tell."""
    try:
        done = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return platform.machine()
    return done.stdout.strip() or platform.machine()

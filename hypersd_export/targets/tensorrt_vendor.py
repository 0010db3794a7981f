"""The two libraries of one vendor, `tensorrt_rtx` and `tensorrt`, behind what the builder needs of either.

They share one Python API; where they differ stands here and nowhere else. `NAMES`, `RTX_NAMES` and `CLASSIC_NAMES` list
all that is used of them, and the tests compare the lists with these sources and with the installed packages.
"""

import ctypes
import importlib.metadata
import importlib.util
import mmap
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hypersd_export.bundle.engines import CLASSIC, FLAVOURS, RTX
from hypersd_export.errors import BuildError, MissingBackend

NAMES: Mapping[str, tuple[str, ...]] = {
    "": (
        "Builder", "BuilderFlag", "IBuilderConfig", "ILogger", "INetworkDefinition", "IProgressMonitor", "LayerType",
        "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserFlag", "OnnxParserRefitter",
        "ParserError", "Refitter", "Runtime", "SerializationFlag",
    ),
    "Builder": (
        "build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile",
    ),
    "BuilderFlag": ("REFIT", "STRIP_PLAN"),
    "IBuilderConfig": (
        "add_optimization_profile", "builder_optimization_level", "progress_monitor", "set_flag",
        "set_memory_pool_limit",
    ),
    "ICudaEngine": ("create_serialization_config", "serialize_with_config"),
    "ILayer": ("get_input", "get_output", "metadata", "name", "num_inputs", "num_outputs", "type"),
    "ILogger": ("ERROR", "INTERNAL_ERROR"),
    "INetworkDefinition": (
        "get_input", "get_layer", "get_output", "num_inputs", "num_layers", "num_outputs",
    ),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("phase_finish", "phase_start", "step_complete"),
    "ISerializationConfig": ("clear_flag", "set_flag"),
    "ITensor": ("dtype", "name", "shape"),
    "LayerType": (
        "ASSERTION", "CAST", "CONCATENATION", "CONDITION", "CONSTANT", "CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT",
        "GATHER", "IDENTITY", "ITERATOR", "LOOP_OUTPUT", "RECURRENCE", "SELECT", "SHAPE", "SHUFFLE", "SLICE", "SQUEEZE",
        "TRIP_LIMIT", "UNSQUEEZE",
    ),
    "MemoryPoolType": ("WORKSPACE",),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "OnnxParser": ("get_error", "num_errors", "parse_from_file", "set_flag"),
    "OnnxParserFlag": ("NATIVE_INSTANCENORM",),
    "OnnxParserRefitter": ("refit_from_file",),
    "ParserError": ("desc", "node_name", "node_operator"),
    "Refitter": ("get_missing_weights", "refit_cuda_engine"),
    "Runtime": ("deserialize_cuda_engine",),
    "SerializationFlag": ("EXCLUDE_WEIGHTS", "INCLUDE_REFIT"),
}  # fmt: skip
"""All that is used of both, by class; "" is the module itself."""
RTX_NAMES: Mapping[str, tuple[str, ...]] = {
    "": ("ComputeCapability", "EngineInvalidityDiagnostics", "EngineValidity"),
    "BuilderFlag": ("REQUIRE_USER_ALLOCATION",),
    "ComputeCapability": ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
    "EngineInvalidityDiagnostics": ("MALFORMED_ENGINE", "VERSION_MISMATCH"),
    "EngineValidity": ("INVALID",),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "Runtime": ("get_engine_validity",),
}
"""What is used of `tensorrt_rtx` alone."""
CLASSIC_NAMES: Mapping[str, tuple[str, ...]] = {
    "IBuilderConfig": ("create_timing_cache", "get_timing_cache", "set_timing_cache"),
    "ITimingCache": ("serialize",),
}
"""What is used of `tensorrt` alone, on a GPU: `tensorrt_rtx` has the calls, and they do nothing."""

_EXTRAS = {RTX: "tensorrt", CLASSIC: "tensorrt-classic"}
_DISTRIBUTIONS = {
    RTX: ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
    CLASSIC: ("tensorrt", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
}
_MAJOR, _MINOR = 75, 76
_NO_DEVICE_ERRORS = ("CUDA driver version is insufficient", "no CUDA-capable device", "Error reading CUDA GPU")


def module(flavour: str) -> Any:
    """The library; `MissingBackend` with its extra where it is not installed or does not load."""
    name = FLAVOURS[flavour]
    try:
        found = import_module(name)
    except ImportError as error:
        raise MissingBackend(name, _EXTRAS[flavour], "--target tensorrt") from error
    return found


def installed(flavour: str) -> bool:
    """Whether the library's package is there; nothing is imported."""
    return importlib.util.find_spec(FLAVOURS[flavour]) is not None


def installed_version(flavour: str) -> str:
    """The library's version as its package says, for cache keys; nothing is imported.

    Raises `MissingBackend` where it is not installed.
    """
    for name in _DISTRIBUTIONS[flavour]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise MissingBackend(FLAVOURS[flavour], _EXTRAS[flavour], "--target tensorrt")


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the first GPU as its driver tells, such as (8, 9); None without a driver or a GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, numbers = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return numbers[0].value, numbers[1].value


@dataclass(slots=True)
class Vendor:
    """One library, opened: networks, configurations, and the errors that it logged."""

    flavour: str
    trt: Any
    logger: Any
    errors: list[str]

    @classmethod
    def open(cls, flavour: str) -> "Vendor":
        """Import the library and make its logger; `MissingBackend` as `module`."""
        trt = module(flavour)
        errors: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                serious = severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
                if serious and not any(known in message for known in _NO_DEVICE_ERRORS):
                    errors.append(message)

        return cls(flavour=flavour, trt=trt, logger=Logger(), errors=errors)

    @property
    def version(self) -> str:
        """The library's own version, such as 1.7.1.116."""
        return str(self.trt.__version__)

    def network(self) -> tuple[Any, Any, Any]:
        """(builder, an empty strongly typed network, its ONNX parser)."""
        trt = self.trt
        builder = trt.Builder(self.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.logger)
        parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
        return builder, network, parser

    def config(self, builder: Any, options: Mapping[str, Any], capabilities: Sequence[str]) -> Any:
        """A builder configuration; `options` as `EngineOptions.to_json` writes them."""
        trt = self.trt
        config = builder.create_builder_config()
        config.builder_optimization_level = options["optimization_level"]
        if options["workspace_mb"] is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace_mb"] * 1_000_000)
        if options["weights"] != "full":
            config.set_flag(trt.BuilderFlag.REFIT)
        if options["weights"] == "stripped":
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        if self.flavour == RTX:
            # Then nothing is allocated while it runs, and its work can be captured as a CUDA graph: a Loop's too.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
            config.num_compute_capabilities = len(capabilities)
            for number, capability in enumerate(capabilities):
                name = f"SM{capability.replace('.', '')}"
                config.set_compute_capability(getattr(trt.ComputeCapability, name), number)
        return config

    def use_timing_cache(self, config: Any, path: Path) -> None:
        """Let the build know what former ones have measured; on a GPU only."""
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        config.set_timing_cache(cache, False)

    def save_timing_cache(self, config: Any, path: Path) -> None:
        """Write what this build has measured, whole or not at all."""
        scratch = path.with_name(f"{path.name}.new")
        scratch.write_bytes(memoryview(config.get_timing_cache().serialize()))
        scratch.replace(path)

    def malformed(self, path: Path) -> bool:
        """Whether the library says that these bytes are no engine of its own version; False where it cannot tell.

        Without a GPU it calls every engine invalid, and only the diagnosis tells a malformed one.
        """
        if self.flavour != RTX:
            return False
        trt = self.trt
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            validity, diagnosis = trt.Runtime(self.logger).get_engine_validity(data)
        kinds = trt.EngineInvalidityDiagnostics
        serious = int(kinds.MALFORMED_ENGINE) | int(kinds.VERSION_MISMATCH)
        return validity == trt.EngineValidity.INVALID and bool(int(diagnosis) & serious)

    def refitted(self, engine: Path, onnx: Path) -> Any:
        """The bytes of an engine with the weights of an ONNX file of its graph, to be refitted again; needs a GPU.

        Raises `BuildError` if the library refuses, or if a weight of the engine is not in the file.
        """
        trt = self.trt
        with engine.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            loaded = trt.Runtime(self.logger).deserialize_cuda_engine(data)
        if loaded is None:
            raise BuildError(f"{engine.name} does not load: {self.last_error()}; export it again")
        refitter = trt.Refitter(loaded, self.logger)
        reader = trt.OnnxParserRefitter(refitter, self.logger)
        taken = reader.refit_from_file(str(onnx))
        missing = refitter.get_missing_weights()
        if not taken or missing:
            lacks = f"{len(missing)} weights are missing, {missing[0]!r} first" if missing else self.last_error()
            raise BuildError(f"{engine.name} does not take the weights of {onnx.name}: {lacks}; export it again")
        if not refitter.refit_cuda_engine():
            raise BuildError(f"{engine.name} was not refitted: {self.last_error()}; export it again")
        form = loaded.create_serialization_config()
        form.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
        form.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
        return loaded.serialize_with_config(form)

    def last_error(self) -> str:
        """What the library logged last, in one line of up to 300 characters."""
        return " ".join((self.errors or ["the library gives no reason"])[-1].split())[:300]

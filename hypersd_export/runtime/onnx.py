"""onnxruntime sessions: one per component, on the provider that was asked for and on no other.

Results are fresh arrays, and no buffer is both an input and an output: a UNet whose output buffer is its input buffer
overwrites the latents that the step still needs.
"""

import contextlib
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.errors import BundleError, MissingBackend, OptionError
from hypersd_export.runtime.graph import Array, Run, Tensor, as_input, first_line
from hypersd_export.runtime.onnx_binding import DEVICES, BoundGraph, can_bind

PIPELINE_FILE = "pipeline.onnx"
"""The whole pipeline as one graph."""
ORT_CUDA = "ort-cuda"
"""The variant of graphs that have onnxruntime's own CUDA ops (`hypersd-export ort-cuda`)."""
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}

OPTIONS: Mapping[str, Mapping[str, str]] = {"CUDAExecutionProvider": {"use_tf32": "0", "prefer_nhwc": "1"}}
"""Of a provider. TF32 keeps 10 bits of every factor: a float32 bundle would not be what its gates say. Convolutions in
NHWC are what tensor cores want: SD 1.5's UNet took 16.0 ms on an H100 with it, 19.1 without (docs/results/h100.md)."""

_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxGraph:
    """A loaded ONNX graph."""

    path: Path
    session: Any
    inputs: Mapping[str, Tensor]
    results: Mapping[str, Tensor]
    provider: str = "cpu"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return tuple(self.results)

    def run(self, **feeds: npt.ArrayLike) -> dict[str, Array]:
        """Evaluate the graph; inputs are cast to its types, and the outputs are new arrays by name.

        Raises:
            BundleError: onnxruntime refuses the inputs or fails inside, which means that the bundle does not fit.
        """
        arrays = {name: as_input(value, self.inputs[name]) for name, value in feeds.items()}
        try:
            outputs = self.session.run(None, arrays)
        except Exception as error:  # onnxruntime's own types, which share no base class
            raise BundleError(f"{self.path} failed: {first_line(error)}") from error
        return dict(zip(self.outputs, outputs, strict=True))

    def fixed(self, **feeds: npt.ArrayLike) -> Run:
        """`run` with these inputs given once and for all: bound buffers, where a device has a memory of its own."""
        if self.provider == "cpu" or not can_bind(self.inputs, self.results, self.provider):
            return functools.partial(self.run, **feeds)
        return self.bound(**feeds)

    def bound(self, **feeds: npt.ArrayLike) -> BoundGraph:
        """The graph with a buffer for each input and output, these inputs in theirs; all shapes have to be fixed."""
        graph = BoundGraph(
            session=self.session, where=str(self.path), inputs=self.inputs, outputs=self.results,
            device=DEVICES[self.provider],
        )  # fmt: skip
        graph.set(feeds)
        return graph


@dataclass(kw_only=True)
class OnnxRuntime:
    """A bundle's ONNX graphs in onnxruntime; with `cuda_graph` the UNet's calls are captured once and replayed."""

    path: Path
    provider: str = "cpu"
    threads: int | None = None
    cuda_graph: bool = False
    name: str = field(default="onnx", init=False)
    _graphs: dict[Path, OnnxGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        resolve_provider(self.provider)
        if self.cuda_graph and self.provider != "cuda":
            raise OptionError(f"--cuda-graph with provider {self.provider!r}: it is CUDA's; give --provider cuda")
        if self.cuda_graph and self.is_single_graph:
            raise OptionError("--cuda-graph: CUDA cannot capture this bundle's Loop; export without --single-graph")

    @property
    def is_single_graph(self) -> bool:
        """Whether the bundle holds one `pipeline.onnx`."""
        return (self.path / PIPELINE_FILE).is_file()

    def graph(self, component: str) -> OnnxGraph:
        """A component's graph; see `open_graph`."""
        return self._open(self.path / component / "model.onnx", cuda_graph=self.cuda_graph and component == "unet")

    def single(self) -> OnnxGraph:
        """`pipeline.onnx`; see `open_graph`."""
        return self._open(self.path / PIPELINE_FILE)

    def _open(self, path: Path, *, cuda_graph: bool = False) -> OnnxGraph:
        if path not in self._graphs:
            graph = open_graph(path, provider=self.provider, threads=self.threads, cuda_graph=cuda_graph)
            self._graphs[path] = graph
        return self._graphs[path]


def import_onnxruntime() -> Any:
    """The onnxruntime module, or `MissingBackend` with the extra that brings it."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingBackend("onnxruntime", "cpu", "the runtime") from error
    return onnxruntime


def resolve_provider(name: str) -> str:
    """onnxruntime's name of a provider.

    Raises:
        OptionError: there is no such provider, or the installed onnxruntime was built without it.
        MissingBackend: "cuda" and "tensorrt" with the CPU build of onnxruntime.
    """
    provider = PROVIDERS.get(name)
    if provider is None:
        raise OptionError(f"provider {name!r} is not known: choose one of {', '.join(PROVIDERS)}")
    available = import_onnxruntime().get_available_providers()
    if provider in available:
        return provider
    if name in ("cuda", "tensorrt"):
        raise MissingBackend("onnxruntime-gpu", "gpu", f"provider {name!r}")
    here = ", ".join(short for short, long in PROVIDERS.items() if long in available)
    raise OptionError(f"provider {name!r} is not in this build of onnxruntime: it has {here}")


def _preload(onnxruntime: Any) -> None:
    """Load CUDA's libraries out of NVIDIA's pip packages (extra `gpu`); the system's own need no help."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; the session says what fails
        onnxruntime.preload_dlls()


def open_graph(
    path: Path, *, provider: str = "cpu", threads: int | None = None, optimise: bool = True, cuda_graph: bool = False
) -> OnnxGraph:
    """Load a model.onnx.

    Args:
        path: the file; its external data lie beside it.
        provider: a key of `PROVIDERS`. A graph's nodes that the provider does not have run on the CPU, as onnxruntime
            does it; the provider as a whole is never replaced.
        threads: for one operator; onnxruntime's choice (one per core) if None.
        optimise: let onnxruntime rewrite the graph first; without it every node is evaluated as it stands in the
            file and in the file's order, and memory is given back as soon as a value is used up.
        cuda_graph: let CUDA capture a call and replay it (`OnnxGraph.bound` alone may be called then).

    Raises:
        OptionError, MissingBackend: see `resolve_provider`; or the provider does not start on this machine.
        BundleError: the file is missing or is no ONNX graph.
    """
    wanted = resolve_provider(provider)
    if threads is not None and threads < 1:
        raise OptionError(f"--threads {threads}: must be at least 1")
    onnxruntime = import_onnxruntime()
    if not path.is_file():
        raise BundleError(f"{path} is missing: export the bundle again")
    options = session_options(onnxruntime, threads=threads, optimise=optimise)
    settings = {**OPTIONS.get(wanted, {}), **({"enable_cuda_graph": "1"} if cuda_graph else {})}
    if provider in ("cuda", "tensorrt"):
        _preload(onnxruntime)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[(wanted, settings)], enable_fallback=0)
    except Exception as error:  # onnxruntime's own types, which share no base class
        raise BundleError(f"cannot load {path} on {provider}: {first_line(error)}") from error
    if wanted not in session.get_providers():
        raise OptionError(f"provider {provider!r} does not start on this machine: check its driver, or use another")
    return OnnxGraph(
        path=path,
        session=session,
        inputs={node.name: _tensor(node, path) for node in session.get_inputs()},
        results={node.name: _tensor(node, path) for node in session.get_outputs()},
        provider=provider,
    )


def session_options(onnxruntime: Any, *, threads: int | None = None, optimise: bool = True) -> Any:
    """The options of every session; arguments as in `open_graph`. `benchmarks.session_options` measures others."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads that spin while they wait take the CPU from everything else; without it a busy machine is twice as fast.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # What an arena has taken it keeps: a sixth of all that SD 1.5's UNet needs, and no call is faster for it
    # (docs/results/session_options.md).
    options.enable_cpu_mem_arena = False
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _tensor(node: Any, path: Path) -> Tensor:
    if node.type not in _DTYPES:
        raise BundleError(f"{path} has {node.name!r} of type {node.type}, which this runtime does not know")
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return Tensor(shape=shape, dtype=_DTYPES[node.type])

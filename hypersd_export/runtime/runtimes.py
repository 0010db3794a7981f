"""Which runtime runs a bundle: one of the targets that it was exported to."""

from pathlib import Path

from hypersd_export.bundle.manifest import Manifest
from hypersd_export.errors import OptionError
from hypersd_export.runtime.graph import Runtime

RUNTIMES = ("onnx", "tensorrt", "coreml")


def resolve_runtime(name: str | None, manifest: Manifest) -> str:
    """The runtime by its target's name; the manifest's first target if `name` is None.

    Raises:
        OptionError: there is no such runtime, or the bundle was not exported to its target.
    """
    targets = list(manifest.targets)
    wanted = name if name is not None else next(iter(targets), "onnx")
    if wanted not in RUNTIMES:
        raise OptionError(f"runtime {wanted!r} is not known: choose one of {', '.join(RUNTIMES)}")
    if targets and wanted not in targets:
        raise OptionError(
            f"runtime {wanted!r}: this bundle was exported to {', '.join(targets)}; export it with --target {wanted}"
        )
    return wanted


def open_runtime(
    name: str | None, bundle: Path, manifest: Manifest, *, provider: str | None, threads: int | None,
    function: str | None = None, cuda_graph: bool = False,
) -> Runtime:  # fmt: skip
    """Open what runs this bundle; `threads` and `cuda_graph` are onnxruntime's alone, `provider` its own or Core ML's
    compute units, and `function` one of those that Core ML's packages have.

    Raises:
        OptionError, MissingBackend: see `resolve_runtime`, and what the runtime itself raises.
    """
    wanted = resolve_runtime(name, manifest)
    if function is not None and wanted != "coreml":
        raise OptionError(f"function {function}: only Core ML's packages have several, and runtime {wanted!r} does not")
    if wanted == "onnx":
        from hypersd_export.runtime.onnx import ORT_CUDA, OnnxRuntime

        cuda_alone = manifest.targets.get("onnx", {}).get("variant") == ORT_CUDA
        if cuda_alone and provider not in (None, "cuda"):
            raise OptionError(
                f"--provider {provider}: this bundle has onnxruntime's own CUDA ops; give --provider cuda, or use the "
                "bundle that it was made from"
            )
        provider = provider or ("cuda" if cuda_alone else "cpu")
        return OnnxRuntime(path=bundle, provider=provider, threads=threads, cuda_graph=cuda_graph)
    others = {
        f"--provider {provider}": provider is not None and wanted == "tensorrt",
        f"--threads {threads}": threads is not None,
        "--cuda-graph": cuda_graph,
    }
    for option, given in others.items():
        if given:
            raise OptionError(f"{option}: it is onnxruntime's, and runtime {wanted!r} has no such choice")
    if wanted == "coreml":
        from hypersd_export.runtime.coreml import open_packages

        return open_packages(bundle, manifest.targets["coreml"], units=provider, function=function)
    from hypersd_export.runtime.tensorrt import TensorRTRuntime

    return TensorRTRuntime.open(bundle, manifest.targets["tensorrt"])

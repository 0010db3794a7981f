"""TensorRT: `build` makes one engine of one ONNX graph, in a process of its own, checked before and after.

One vendor has two libraries with nearly one Python API. `tensorrt_rtx` ("rtx") builds for GeForce and RTX cards ahead
of time, with no GPU in the machine; `tensorrt` ("classic") builds for the very GPU that it runs on. Precision is the
graph's: networks are strongly typed. What cannot be known without a GPU is said in docs/tensorrt.md.
"""

import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_export.bundle.digest import digest_json, sha256_file
from hypersd_export.bundle.engines import (
    CLASSIC,
    FLAVOURS,
    PIPELINE,
    RTX,
    RTX_CAPABILITIES,
    WEIGHTS,
    EngineRecord,
    capability_name,
    engine_digest,
    engine_name,
    why_unusable,
)
from hypersd_export.errors import BuildError, BundleError, HypersdError, MissingBackend, OptionError
from hypersd_export.targets import tensorrt_vendor as vendor
from hypersd_export.targets.tensorrt_checks import Profile
from hypersd_export.targets.tensorrt_worker import REPORT
from hypersd_export.worker import reported_error, run_worker, why_died

AUTO = "auto"
DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""All for which `tensorrt_rtx` builds fp16 UNets: one engine for all of them is hardly larger than for one."""
LEVELS = range(6)
DEFAULT_LEVEL = 3
WORKER = "hypersd_export.targets.tensorrt_worker"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How engines are built; all of it is part of their digest.

    flavour: "rtx" or "classic". capabilities: of the GPUs that they are for, ascending. weights: see `bundle.engines`.
    optimization_level: the builder's, 0 to 5. workspace_mb: what a tactic may use of the GPU's memory; None is the
    library's own limit, which is all of it.
    """

    flavour: str
    capabilities: tuple[str, ...]
    weights: str = "full"
    optimization_level: int = DEFAULT_LEVEL
    workspace_mb: int | None = None

    def __post_init__(self) -> None:
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise OptionError(f"workspace of {self.workspace_mb} MB: at least 1, or leave it to the library")

    def to_json(self) -> dict[str, Any]:
        """The builder's options, as they stand in a record; flavour and capabilities stand there by themselves."""
        names = ("weights", "optimization_level", "workspace_mb")
        return {name: getattr(self, name) for name in names}


def check_options(
    flavour: str, capabilities: Sequence[str] | None, weights: str, level: int, precision: str = "fp16"
) -> None:
    """Refuse, before anything is opened, what can be refused without knowing the machine. Raises `OptionError`."""
    if flavour not in (AUTO, *FLAVOURS):
        raise OptionError(f"--trt-flavour {flavour}: choose auto, {RTX} or {CLASSIC}")
    if weights not in WEIGHTS:
        raise OptionError(f"--weights {weights}: choose {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}")
    if level not in LEVELS:
        raise OptionError(f"--trt-level {level}: from 0 to {LEVELS.stop - 1}")
    for capability in capabilities or ():
        if flavour != CLASSIC:
            _check_rtx_capability(capability, flavour, precision)


def _check_rtx_capability(capability: str, flavour: str, precision: str) -> None:
    if capability == "9.0":
        if flavour == RTX:
            raise OptionError(
                "--compute-capability 9.0: H100 and H200 are not TensorRT-RTX's; build on that GPU with "
                "--trt-flavour classic"
            )
        return  # auto: known once the machine is
    if capability not in RTX_CAPABILITIES:
        raise OptionError(f"--compute-capability {capability}: TensorRT-RTX has {', '.join(RTX_CAPABILITIES)}")
    if capability == "7.5" and precision == "fp16" and flavour == RTX:
        raise OptionError(
            "--compute-capability 7.5: TensorRT-RTX fails to build fp16 UNets for Turing cards; build on that GPU with "
            "--trt-flavour classic"
        )


def parse_capabilities(text: str | None) -> tuple[str, ...] | None:
    """`8.6,8.9` as ("8.6", "8.9"), ascending; None stays None. Raises `OptionError` for anything else."""
    if text is None:
        return None
    found = [part.strip() for part in text.split(",")]
    for part in found:
        major, dot, minor = part.partition(".")
        if not (dot and major.isdecimal() and minor.isdecimal() and part.isascii()):
            raise OptionError(f"--compute-capability {text}: such as 8.9, or 8.6,8.9")
        if found.count(part) > 1:
            raise OptionError(f"--compute-capability {text}: {part} is there twice")
    return tuple(sorted(found, key=_number))


def _number(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


def resolve(
    *,
    flavour: str = AUTO,
    capabilities: Sequence[str] | None = None,
    weights: str = "full",
    optimization_level: int = DEFAULT_LEVEL,
    workspace_mb: int | None = None,
) -> tuple[EngineOptions, str]:
    """The options on this machine, and in one line which library was chosen and why.

    Raises:
        OptionError: a capability that the library does not build for, or a build that needs a GPU and has none.
        MissingBackend: the library is not installed.
    """
    check_options(flavour, capabilities, weights, optimization_level)
    gpu = vendor.gpu_capability()
    here = None if gpu is None else capability_name(gpu)
    chosen, reason = choose_flavour(flavour, here)
    version = vendor.installed_version(chosen)
    if chosen == CLASSIC:
        found = _classic_capabilities(capabilities, here)
    else:
        for capability in capabilities or ():
            _check_rtx_capability(capability, RTX, "fp16")
        if capabilities is None and here not in (None, *RTX_CAPABILITIES):
            raise OptionError(
                f"--target tensorrt: the GPU here ({here}) is not TensorRT-RTX's; install tensorrt "
                "(hypersd[tensorrt-classic]), or name the GPUs that it is for with --compute-capability"
            )
        found = tuple(capabilities or DEFAULT_CAPABILITIES)
        if weights != "full" and here is None:
            raise OptionError(f"--weights {weights}: TensorRT-RTX writes such engines only with a GPU; use full here")
    options = EngineOptions(
        flavour=chosen, capabilities=found, weights=weights,
        optimization_level=optimization_level, workspace_mb=workspace_mb,
    )  # fmt: skip
    return options, f"TensorRT: {FLAVOURS[chosen]} {version} for compute capability {', '.join(found)} ({reason})"


def choose_flavour(flavour: str, here: str | None) -> tuple[str, str]:
    """The library for `flavour`, which may be "auto", and why; `here` is the capability of this machine's GPU."""
    if flavour != AUTO:
        return flavour, f"--trt-flavour {flavour}"
    if here is None:
        return RTX, "no GPU here, and only TensorRT-RTX builds without one"
    if vendor.installed(CLASSIC):
        return CLASSIC, f"a GPU of {here} is here and tensorrt is installed"
    return RTX, f"a GPU of {here} is here, and tensorrt is not installed"


def _classic_capabilities(asked: Sequence[str] | None, here: str | None) -> tuple[str, ...]:
    if here is None:
        raise OptionError(
            "--trt-flavour classic: tensorrt builds on the GPU that the engine is for, and no driver and GPU are found "
            "here; use --trt-flavour rtx, or build there"
        )
    if asked is not None and tuple(asked) != (here,):
        raise OptionError(
            f"--compute-capability {','.join(asked)}: tensorrt builds for the GPU in this machine, which is {here}; "
            "leave it out, or use --trt-flavour rtx"
        )
    return (here,)


def onnx_digest(path: Path) -> str:
    """Hex SHA-256 of an ONNX file, or over it and the data files beside it (`<name>_data`, `<name>.data`)."""
    data = [path.with_name(path.name + ending) for ending in ("_data", ".data")]
    digests = [sha256_file(file) for file in (path, *data) if file.is_file()]
    return digests[0] if len(digests) == 1 else digest_json(digests)


def shape_tag(tensor: Mapping[str, Any]) -> str:
    """An input's shape for a file name, such as 1x4x64x64, or 1x4x64x64-4x4x64x64 where it is free."""
    shapes = (tensor["least"], tensor["most"]) if tensor["least"] else (tensor["shape"],)
    return "-".join("x".join(map(str, shape)) or "scalar" for shape in shapes)


def build(
    onnx: Path,
    folder: Path,
    *,
    component: str,
    options: EngineOptions,
    precision: str = "fp16",
    profile: Profile | None = None,
    fp32_nodes: Collection[str] = (),
    glue_nodes: Collection[str] = (),
    timing_cache: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> EngineRecord:
    """Build the engine of one ONNX file into `folder`, under its own name, and return its record.

    Args:
        onnx: the graph; its data file, if it has one, stands beside it.
        folder: an existing folder.
        component: as the bundle calls it; `PIPELINE` for the whole.
        options: from `resolve`.
        precision: what the graph computes in; "fp16" has every layer checked.
        profile: for inputs with free dimensions.
        fp32_nodes: ONNX nodes that an fp16 graph computes in float32, by the range scan.
        glue_nodes: others that may be in float32, such as a single graph's table and image; not in the record.
        timing_cache: a file that keeps what the builder measured, for "classic" alone: without a GPU nothing is.
        progress: told in a few words what the builder is at.

    Raises:
        OptionError: `profile` does not fit the graph, or a timing cache is asked of "rtx".
        MissingBackend: the library is not installed.
        BuildError: the graph is not taken, is read otherwise than intended, or the build came to nothing.
    """
    if timing_cache is not None and options.flavour == RTX:
        raise OptionError("a timing cache: TensorRT-RTX measures nothing while it builds; leave it out")
    if not onnx.is_file():
        raise BuildError(f"{onnx} is missing: export again")
    digest = onnx_digest(onnx)
    with tempfile.TemporaryDirectory(prefix=".engine-", dir=folder) as scratch:
        engine = Path(scratch) / f"{component}.engine"
        request = {
            "onnx": str(onnx.resolve()),
            "engine": str(engine),
            "flavour": options.flavour,
            "capabilities": options.capabilities,
            "options": options.to_json(),
            "precision": precision,
            "profile": {name: [list(shape) for shape in shapes] for name, shapes in (profile or {}).items()},
            "fp32_nodes": sorted(fp32_nodes),
            "glue_nodes": sorted(glue_nodes),
            "timing_cache": None if timing_cache is None else str(timing_cache.resolve()),
        }
        report = _in_process_of_its_own(request, Path(scratch), f"the engine of {component}", progress)
        record = _record(report, engine, component, options, precision, digest, sorted(fp32_nodes))
        path = engine.rename(folder / Path(record.file).name)
    reason = why_unusable(record, path, flavour=options.flavour, onnx_sha256=digest)
    if reason is not None:
        path.unlink()
        raise BuildError(f"the engine is not what was asked for: {reason}")
    return record


def refit(
    record: EngineRecord,
    engine: Path,
    onnx: Path,
    folder: Path,
    *,
    fp32_nodes: Collection[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> EngineRecord:
    """Another engine in `folder`: that of `record` with the weights of an ONNX file of the same graph; on its GPU.

    Args:
        record, engine: the engine, built with weights "refit" or "stripped", and its file.
        onnx: the graph with other weights; its data file, if it has one, stands beside it.
        folder: an existing folder.
        fp32_nodes: ONNX nodes that this graph computes in float32, which have to be those of the engine.
        progress: as in `build`.

    Raises:
        OptionError: there is no GPU.
        BundleError: the engine is not usable here, or computes other nodes in float32.
        BuildError: the library does not refit it.
        MissingBackend: the library is not installed.
    """
    gpu = vendor.gpu_capability()
    if gpu is None:
        raise OptionError(
            f"{engine.name}: engines are refitted on the GPU that runs them, and no driver and GPU are found here; "
            "do it there, or export again"
        )
    reason = why_unusable(record, engine, capability=gpu, contents=True)
    if reason is None and sorted(fp32_nodes) != sorted(record.fp32_nodes):
        reason = f"{engine.name} computes other ops in float32 than these weights need: export the bundle again"
    if reason is not None:
        raise BundleError(reason)
    options = EngineOptions(
        flavour=record.flavour, capabilities=record.capabilities, **{**record.options, "weights": "refit"}
    )
    digest = onnx_digest(onnx)
    with tempfile.TemporaryDirectory(prefix=".engine-", dir=folder) as scratch:
        new = Path(scratch) / f"{record.component}.engine"
        request = {
            "refit": str(engine.resolve()), "onnx": str(onnx.resolve()), "engine": str(new), "flavour": record.flavour
        }  # fmt: skip
        took = _in_process_of_its_own(request, Path(scratch), f"refitting {record.component}", progress)
        same = {name: record.to_json()[name] for name in ("inputs", "outputs", "layers")}
        made = _record(same | took, new, record.component, options, record.precision, digest, sorted(fp32_nodes))
        new.rename(folder / Path(made.file).name)
    return made


def _record(
    report: Mapping[str, Any],
    engine: Path,
    component: str,
    options: EngineOptions,
    precision: str,
    onnx_sha256: str,
    fp32_nodes: Sequence[str],
) -> EngineRecord:
    version, capabilities = str(report["version"]), options.capabilities
    digest = engine_digest(
        onnx_sha256=onnx_sha256,
        flavour=options.flavour,
        version=version,
        capabilities=capabilities,
        options=options.to_json(),
    )
    name = engine_name(
        component,
        flavour=options.flavour,
        version=version,
        capabilities=capabilities,
        precision=precision,
        tag=shape_tag(report["inputs"][0]),
        digest=digest,
    )
    facts = {
        **report,
        "component": component,
        "file": name if component == PIPELINE else f"{component}/{name}",
        "flavour": options.flavour,
        "capabilities": capabilities,
        "precision": precision,
        "weights": options.weights,
        "options": options.to_json(),
        "onnx_sha256": onnx_sha256,
        "sha256": sha256_file(engine),
        "bytes": engine.stat().st_size,
        "fp32_nodes": fp32_nodes,
    }
    return EngineRecord.from_json(facts, f"the report on {component}")


def _in_process_of_its_own(
    request: Mapping[str, Any], scratch: Path, what: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """The worker's report. Raises the worker's error, or `BuildError` for one that ended without a report."""
    path = scratch / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    found = run_worker(
        WORKER, path, scratch / REPORT, progress=progress, failure=lambda code, log: BuildError(_why(code, what, log))
    )
    if "error" in found:
        raise _error(found["error"])
    return found


def _why(code: int, what: str, log: str) -> str:
    said = "\n".join(line for line in log.splitlines() if "cudaError" not in line)
    return why_died(what, code, said, way_out="try --target onnx, and report this with the graph")


def _error(found: Mapping[str, str]) -> HypersdError:
    """The worker's error, as the class that it was there."""
    if found["kind"] == MissingBackend.__name__:
        return MissingBackend(found["package"], found["extra"], "--target tensorrt")
    return reported_error(found)

"""`python -m hypersd_export.targets.tensorrt_worker request.json`: one engine, built or refitted in its own process.

A failed build leaves the library's process unable to build anything more, and the memory that a build needs is given
back when the process ends. Writes the engine and `report.json` beside the request; lines on standard output say how far
it is. SIGINT asks the build to stop, which it does after its next step.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypersd_export.bundle.engines import EngineTensor
from hypersd_export.errors import BuildError, HypersdError, MissingBackend
from hypersd_export.targets import tensorrt_checks as checks
from hypersd_export.targets.tensorrt_vendor import Vendor
from hypersd_export.worker import INTERRUPTED

REPORT = "report.json"
INTERVAL_S = 0.2
"""Progress is said so often at most."""


class Interrupted(Exception):  # noqa: N818 (no error)
    """The build was asked to stop."""


class Stop:
    """A wish to stop, which the library asks after; a KeyboardInterrupt inside its calls would end the process."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self, *_: object) -> None:
        """Wish; a signal handler."""
        self.wanted = True


def build(request: Mapping[str, Any], progress: Callable[[str], None], stop: Stop) -> dict[str, Any]:
    """Build the engine that `request` (see `tensorrt.build`) asks for, checking the network before and the file after.

    Raises `HypersdError`, or `Interrupted`.
    """
    started = time.perf_counter()
    onnx, engine = Path(request["onnx"]), Path(request["engine"])
    facts = checks.read_onnx(onnx)
    checks.check_profile(facts, request["profile"])
    vendor = Vendor.open(request["flavour"])
    progress("parsing")
    builder, network, parser = vendor.network()
    if not parser.parse_from_file(str(onnx)):
        found = [parser.get_error(number) for number in range(parser.num_errors)]
        errors = [(error.node_name(), error.node_operator(), error.desc()) for error in found]
        raise BuildError(f"TensorRT does not take {onnx.parent.name}/{onnx.name}: {checks.parse_errors(errors)}")
    inputs, outputs = checks.interface(network)
    layers = checks.read_layers(network)
    problems = checks.interface_problems(facts, inputs, outputs)
    if request["precision"] == "fp16":
        problems += checks.precision_problems(
            layers, request["fp32_nodes"], facts.ops, glue_nodes=request["glue_nodes"]
        )
    if problems:
        raise BuildError(f"TensorRT reads {onnx.name} otherwise than was intended: {checks.listed(problems)}")
    config = vendor.config(builder, request["options"], request["capabilities"])
    config.progress_monitor = _monitor(vendor, progress, stop)
    inputs = _set_profile(builder, config, inputs, request["profile"])
    cache = None if request["timing_cache"] is None else Path(request["timing_cache"])
    if cache is not None:
        vendor.use_timing_cache(config, cache)
    plan = builder.build_serialized_network(network, config)
    if stop.wanted:
        raise Interrupted
    if plan is None:
        raise BuildError(f"TensorRT could not build {engine.stem}: {vendor.last_error()}")
    with engine.open("wb") as stream:
        stream.write(memoryview(plan))
    if cache is not None:
        vendor.save_timing_cache(config, cache)
    if vendor.malformed(engine):
        raise BuildError(f"TensorRT calls the engine that it has just built malformed ({engine.name}): build it again")
    return {
        "version": vendor.version,
        "inputs": [asdict(tensor) for tensor in inputs],
        "outputs": [asdict(tensor) for tensor in outputs],
        "layers": checks.count_types(layers),
        **_took(started),
    }


def refit(request: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Refit the engine that `request` (see `tensorrt.refit`) names; raises `HypersdError`."""
    started = time.perf_counter()
    vendor = Vendor.open(request["flavour"])
    progress("refitting")
    with Path(request["engine"]).open("wb") as stream:
        stream.write(memoryview(vendor.refitted(Path(request["refit"]), Path(request["onnx"]))))
    return {"version": vendor.version, **_took(started)}


def _took(started: float) -> dict[str, float]:
    return {"seconds": round(time.perf_counter() - started, 2), "peak_mb": round(peak_mb(), 1)}


def _set_profile(
    builder: Any, config: Any, inputs: tuple[EngineTensor, ...], profile: checks.Profile
) -> tuple[EngineTensor, ...]:
    """Give every input its range, which of a fixed shape is that shape; the inputs with their bounds."""
    ranges = builder.create_optimization_profile()
    bounded = []
    for tensor in inputs:
        least, usual, most = profile.get(tensor.name, (tensor.shape,) * 3)
        ranges.set_shape(tensor.name, tuple(least), tuple(usual), tuple(most))
        free = -1 in tensor.shape
        bounds = {"least": tuple(least), "most": tuple(most)} if free else {}
        bounded.append(EngineTensor(name=tensor.name, shape=tensor.shape, dtype=tensor.dtype, **bounds))
    if config.add_optimization_profile(ranges) < 0:
        raise BuildError("TensorRT does not take the optimisation profile: give other shapes")
    return tuple(bounded)


def _monitor(vendor: Vendor, progress: Callable[[str], None], stop: Stop) -> Any:
    """The library's progress as lines; a step is answered with whether to go on."""
    trt = vendor.trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.said = 0.0

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            self.say(phase)

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            steps = self.steps.get(phase, 0)
            if steps > 1:
                self.say(f"{phase} {step + 1}/{steps}")
            return not stop.wanted

        def say(self, text: str) -> None:
            now = time.monotonic()
            if now - self.said < INTERVAL_S:
                return
            self.said = now
            try:
                progress(text)
            except OSError:  # nobody listens any more
                stop()

    return Monitor()


def peak_mb() -> float:
    """The most resident memory of this process so far, in MB (10^6 bytes)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        import psutil

        memory = psutil.Process().memory_info()
        return float(getattr(memory, "peak_wset", memory.rss)) / 1e6


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Read the request, build, write the report: the engine's facts, or the one line of a `HypersdError`."""
    path = Path((sys.argv[1:] if arguments is None else arguments)[0])
    request = json.loads(path.read_text(encoding="utf-8"))
    stop = Stop()
    signal.signal(signal.SIGINT, stop)
    try:
        report = refit(request, _say) if "refit" in request else build(request, _say, stop)
    except Interrupted:
        return INTERRUPTED
    except HypersdError as error:
        extra = {"package": error.package, "extra": error.extra} if isinstance(error, MissingBackend) else {}
        report = {"error": {"kind": type(error).__name__, "message": str(error), **extra}}
    (path.parent / REPORT).write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

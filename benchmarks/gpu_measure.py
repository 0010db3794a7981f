"""One bundle on one runtime: golden picture, cold start, latency. A process of its own for each, so that a GPU that one
bundle has brought to a halt is not the next one's.

    python -m benchmarks.gpu_measure BUNDLE RUNTIME PROVIDER RUNS WARMUP REPORT
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stats import summary
from hypersd_export.bundle.disk import write_atomic
from hypersd_export.errors import HypersdError
from hypersd_export.runtime.tensorrt import TensorRTRuntime

PROMPT = "a fox on a blue background, noto style"


def latency(
    draw: Callable[[int], Mapping[str, float]], runs: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Wall time of `draw(seed)` for `runs` seeds: whole, by component (whose seconds `draw` returns), and images/s."""
    whole: list[float] = []
    parts: dict[str, list[float]] = {}
    for seed in range(runs):
        began = clock()
        seconds = draw(seed)
        whole.append(1000 * (clock() - began))
        for name, value in seconds.items():
            parts.setdefault(name, []).append(1000 * value)
    return {
        "image_ms": summary(whole),
        "images_per_s": round(1000 * runs / sum(whole), 2),
        "components_ms": {name: summary(values) for name, values in parts.items()},
    }


def device_times(runtime: TensorRTRuntime, draw: Callable[[int], object], runs: int) -> dict[str, Any]:
    """By component, one call of its engine on the device, by CUDA events: copies in, compute, copies out."""
    for graph in runtime.graphs.values():
        graph.timed, graph.timings = True, []
    for seed in range(runs):
        draw(seed)
    times = {}
    for name, graph in runtime.graphs.items():
        graph.timed = False
        calls = [asdict(timing) for timing in graph.timings]
        times[name] = {part: summary([call[part] for call in calls]) for part in calls[0]}
    return times


def measure(bundle: Path, runtime: str, provider: str | None, *, runs: int, warmup: int) -> dict[str, Any]:
    """What one bundle does on one runtime; one picture a call.

    Raises:
        HypersdError: the bundle does not open or does not run there.
    """
    from hypersd_export.runtime.pipeline import Pipeline

    began = time.perf_counter()
    pipeline = Pipeline.from_bundle(bundle, runtime=runtime, provider=provider)
    opened = time.perf_counter()
    pipeline(PROMPT)
    first = time.perf_counter()
    golden = pipeline.golden()
    for _ in range(warmup):
        pipeline(PROMPT)

    def draw(seed: int) -> Mapping[str, float]:
        return pipeline(PROMPT, seed=seed).seconds

    result = {
        "provider": pipeline.provider,
        "precision": _precision(bundle, runtime),
        "golden": {
            "passed": golden.passed, "equal": bool(np.isinf(golden.psnr_db)), "min_psnr_db": golden.min_psnr_db,
            "psnr_db": None if np.isinf(golden.psnr_db) else round(golden.psnr_db, 2), "line": golden.line(),
        },
        "open_s": round(opened - began, 4),
        "first_image_s": round(first - opened, 4),
        **latency(draw, runs),
    }  # fmt: skip
    if isinstance(pipeline.runtime, TensorRTRuntime):
        result["device_ms"] = device_times(pipeline.runtime, draw, runs)
        result["cuda_graph"] = {name: graph.captured for name, graph in pipeline.runtime.graphs.items()}
    return result


def _precision(bundle: Path, runtime: str) -> str:
    from hypersd_export.bundle.manifest import read_manifest

    return str(read_manifest(bundle).targets.get(runtime, {}).get("precision", "not stated"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the figures, or the error's kind and line, as JSON."""
    bundle, runtime, provider, runs, warmup, report = sys.argv[1:] if arguments is None else arguments
    try:
        result = measure(Path(bundle), runtime, provider or None, runs=int(runs), warmup=int(warmup))
    except HypersdError as error:
        result = {"error": str(error), "kind": type(error).__name__}
    write_atomic(Path(report), json.dumps(result).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

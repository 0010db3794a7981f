"""Our export and optimum-onnx's of one pipeline folder, in turn: `python -m benchmarks.export_race PIPELINE --out DIR`

Both export all components (text encoder, UNet, VAE decoder and encoder) without holding them against torch: ours in
fp16 with `--no-verify --no-golden --no-scan`, optimum's in its own environment (`make peer-optimum`) in float32, as its
fp16 export wants a GPU. Wall time and the peak of the process tree's resident memory are measured from outside, mapped
files included. One more export of ours, with scan and gates, says what those cost. `--lora`: ours with a LoRA fused as
well, for which optimum-onnx has no door. Writes export_race.json.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.bench import peers
from benchmarks.bench.machine import cpu_name
from benchmarks.results import last_line, one_line_error, write_result
from hypersd_export.bundle.manifest import read_manifest
from hypersd_export.errors import HypersdError
from hypersd_export.usage import measure

OURS = ("--steps", "1", "--scheduler", "tcd", "--eta", "0", "--guidance", "1", "--precision", "fp16")
BARE = ("--no-verify", "--no-golden", "--no-scan")
VERIFICATION = ("onnx-fp16-scan", "verify")
"""The stages that `--no-scan --no-verify --no-golden` leave away."""
PACKAGES = ("hypersd", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime")


def stages(bundle: Path) -> dict[str, dict[str, float]]:
    """Seconds and MB of each stage, as a bundle's manifest has them."""
    return {stage["name"]: {"s": stage["seconds"], "mb": stage["peak_mb"]} for stage in read_manifest(bundle).stages}


def timed(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Wall seconds and peak MB of a command and all that it starts; HypersdError if it fails."""
    with measure() as usage:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env=dict(environment)
        )  # fmt: skip
    if done.returncode:
        raise HypersdError(f"{Path(command[0]).name} … failed: {last_line(done.stderr)[:300]}")
    return {"s": round(usage.seconds, 2), "mb": round(usage.peak_mb, 1)}


def ours(pipeline: Path, scratch: Path, *options: str, lora: str = "none") -> dict[str, Any]:
    """One export of ours, from nothing."""
    command = [sys.executable, "-m", "hypersd_export.cli", "--base", str(pipeline), "--lora", lora, *OURS, *options,
               "--out", str(scratch / "bundle"), "--cache-dir", str(scratch / "cache")]  # fmt: skip
    return timed(command, os.environ) | {"stages": stages(scratch / "bundle")}


def optimums(pipeline: Path, scratch: Path) -> dict[str, Any]:
    """One export of optimum-onnx's."""
    python, script = peers.python_of("optimum"), peers.painter_of("optimum")
    if python is None:
        raise HypersdError(f"optimum is not installed: {peers.PEERS['optimum']}")
    command = [str(python), str(script), "convert", str(pipeline), str(scratch / "onnx")]
    return timed(command, peers.peer_environment())


def race(pipeline: Path, rounds: int, lora: Path | None) -> dict[str, Any]:
    """All in turn, so many times, and ours once with everything."""
    runs: dict[str, Callable[[Path], dict[str, Any]]] = {
        "ours": lambda scratch: ours(pipeline, scratch, *BARE), "optimum": lambda scratch: optimums(pipeline, scratch),
    }  # fmt: skip
    if lora is not None:
        runs["ours with a LoRA"] = lambda scratch: ours(pipeline, scratch, *BARE, lora=str(lora))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            with tempfile.TemporaryDirectory() as scratch:
                done = run(Path(scratch))
            found[name].append(done)
            print(f"round {number + 1}: {name} {done['s']:.1f} s, {done['mb']:,.0f} MB", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        proven = ours(pipeline, Path(scratch))
    return {"rounds": found, "proven": proven, **summary(found, proven)}


def summary(found: Mapping[str, Sequence[Mapping[str, Any]]], proven: Mapping[str, Any]) -> dict[str, Any]:
    """Medians, their ratios, and the verification over the export."""
    median = {
        name: {key: statistics.median(one[key] for one in runs) for key in ("s", "mb")} for name, runs in found.items()
    }
    alone = [one["stages"].values() for one in found["ours"]]
    export = {
        "s": statistics.median(sum(stage["s"] for stage in run) for run in alone),
        "mb": statistics.median(max(stage["mb"] for stage in run) for run in alone),
    }
    checks = [figures for name, figures in proven["stages"].items() if name in VERIFICATION]
    return {
        "median": {**median, "our export alone": export},
        "optimum_over_ours": {
            "whole command": median["optimum"]["s"] / median["ours"]["s"],
            "export alone": median["optimum"]["s"] / export["s"],
        },
        "verification": {
            "s": sum(one["s"] for one in checks), "mb": max(one["mb"] for one in checks),
            "over_export": sum(one["s"] for one in checks) / export["s"],
        },
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="a diffusers folder, such as benchmarks.random_pipeline writes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", type=Path, help="time ours with this LoRA too (benchmarks.random_pipeline --lora)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    with one_line_error(options.out) as ended:
        if options.rounds < 1:
            raise HypersdError(f"--rounds {options.rounds}: at least 1")
        options.out.mkdir(parents=True, exist_ok=True)
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
        versions = {name: version(name) for name in PACKAGES}
        result = {"pipeline": options.pipeline.name, "machine": machine, "versions": versions}
        result |= race(options.pipeline, options.rounds, options.lora)
        write_result(options.out, "export_race", result)
        print({key: result[key] for key in ("median", "optimum_over_ours", "verification")})
    return ended.code


if __name__ == "__main__":
    sys.exit(main())

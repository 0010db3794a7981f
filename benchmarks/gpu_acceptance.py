"""Everything that needs an NVIDIA GPU, in one command: `python -m benchmarks.gpu_acceptance --out DIR`

Exports the built-in model to TensorRT for this very GPU (the components' engines, one engine with a Loop, one with the
steps unrolled, engines that are refitted; 1, 2, 4 and 8 steps each), holds the golden picture of each to its gate, and
measures: cold start, p50, p90 and p99 of an image, by component on the host's and on the device's clock, and the same
bundle's ONNX graphs on onnxruntime's CUDA provider where that is installed. Writes gpu_acceptance.json and
gpu_acceptance.md.

Every export and every measurement is a process of its own. One that fails is in the report and in the exit code, and
the others go on.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from benchmarks import acceptance
from benchmarks.acceptance import Case, Step, Trials, print_step
from benchmarks.gpu_report import markdown
from hypersd_export.bundle import engines
from hypersd_export.bundle.engines import CLASSIC, RTX, engine_records
from hypersd_export.bundle.manifest import read_manifest
from hypersd_export.job import default_loras
from hypersd_export.runtime.device import DeviceInfo
from hypersd_export.spec import ExportSpec, PlanFlags

FORMAT = "hypersd-gpu-acceptance/1"
STEPS = (1, 2, 4, 8)
REFIT = "refit"
FORMS = {
    "components": (),
    "loop": ("--single-graph",),
    "unrolled": ("--single-graph", "--unroll"),
    REFIT: ("--weights", "refit"),
}
"""How the pipeline is cut into engines, with hypersd-export's options for it; the last are the components' engines of a
weaker LoRA, which are given the right one's weights afterwards."""
PACKAGES = ("hypersd", "tensorrt-rtx", "tensorrt", "cuda-bindings", "onnxruntime-gpu", "onnxruntime", "torch", "numpy")


class Workers(Protocol):
    """What is done in other processes; tests put their own here."""

    def export(self, case: Case, bundle: Path, device: DeviceInfo) -> None:
        """Write the case's bundle with targets tensorrt and onnx; HypersdError if that fails."""

    def measure(self, bundle: Path, runtime: str, provider: str | None) -> dict[str, Any]:
        """`benchmarks.gpu_measure.measure`; HypersdError if that fails."""


class Processes(acceptance.Processes):
    """The real workers."""

    __slots__ = ()

    def export(self, case: Case, bundle: Path, device: DeviceInfo) -> None:
        """See `Workers`."""
        for command in export_commands(case, bundle, device):
            self._run(["hypersd_export.cli", *command])


def export_commands(case: Case, bundle: Path, device: DeviceInfo) -> list[list[str]]:
    """The arguments of `hypersd-export` that make the case's bundle, one call after the other."""
    first = bundle.with_name(f"{bundle.name}-before") if case.form == REFIT else bundle
    command = ["--target", "tensorrt", "--target", "onnx", "--steps", str(case.steps),
               "--trt-flavour", device.flavour, "--out", str(first), "--overwrite", *FORMS[case.form]]  # fmt: skip
    if device.flavour == RTX:  # the classic library builds for the GPU of this machine and no other
        command += ["--compute-capability", capability_name(device)]
    if case.form != REFIT:
        return [command]
    (lora,) = default_loras(ExportSpec(plan=PlanFlags(steps=(case.steps,))))
    again = ["refit", str(first), "--lora", lora, "--out", str(bundle), "--overwrite"]
    return [[*command, "--lora", f"{lora}:0.5"], again]


def capability_name(device: DeviceInfo) -> str:
    """Such as 8.9."""
    return engines.capability_name(device.capability)


def choose_device(flavour: str) -> DeviceInfo:
    """What this machine has; "auto" is the library that `hypersd-export` would build with here.

    Raises:
        OptionError, MissingBackend: no driver, no GPU, or the library is not installed.
    """
    from hypersd_export.runtime import nvidia
    from hypersd_export.targets import tensorrt, tensorrt_vendor

    gpu = tensorrt_vendor.gpu_capability()
    chosen, _ = tensorrt.choose_flavour(flavour, None if gpu is None else engines.capability_name(gpu))
    return nvidia.open_device(chosen).info


def accept(
    cases: Sequence[Case], device: DeviceInfo, workers: Workers, bundles: Path, *, tell: Callable[[Step], None]
) -> list[Step]:
    """Try everything; `tell` is given each step as it ends."""
    trials = Trials(tell=tell)
    for case in cases:
        bundle = bundles / case.name
        with trials.trying(f"{case.name} export") as exported:
            workers.export(case, bundle, device)
            exported.figures = bundle_figures(bundle)
        for runtime, provider in (("tensorrt", None), ("onnx", "cuda")):
            name, measured = f"{case.name} {runtime}", functools.partial(workers.measure, bundle, runtime, provider)
            trials.measure(name, exported, measured)
    return trials.steps


def bundle_figures(bundle: Path) -> dict[str, Any]:
    """Of each engine: its file's MB, the build's seconds and peak memory in MB."""
    records = engine_records(read_manifest(bundle).targets.get("tensorrt", {}), bundle)
    return {
        "engines": {
            name: {"mb": round(r.bytes / 1e6, 3), "build_s": round(r.seconds, 2), "peak_mb": round(r.peak_mb, 1)}
            for name, r in records.items()
        }
    }


def report(device: DeviceInfo, options: Mapping[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    """The JSON report."""
    told = {**asdict(device), "capability": capability_name(device)}
    return acceptance.report(FORMAT, told, PACKAGES, options, steps)


def main(arguments: Sequence[str] | None = None, workers: Workers | None = None) -> int:
    """Run everything and write the reports: 0 if all passed, else 1."""
    parser = acceptance.parser(__doc__, forms=tuple(FORMS), steps=STEPS)
    parser.add_argument("--flavour", choices=("auto", RTX, CLASSIC), default="auto")
    options = parser.parse_args(arguments)

    def work(bundles: Path, asked: dict[str, Any]) -> dict[str, Any]:
        made = workers or Processes(runs=options.runs, warmup=options.warmup, timeout=options.timeout)
        device = choose_device(options.flavour)
        bundles.mkdir(parents=True, exist_ok=True)
        cases = [Case(form=form, steps=count) for form in options.forms for count in options.steps]
        return report(device, asked, accept(cases, device, made, bundles, tell=print_step))

    return acceptance.run("gpu_acceptance", options, work, markdown)


if __name__ == "__main__":
    sys.exit(main())

"""Everything that needs a Mac, in one command: `python -m benchmarks.mac_acceptance --out DIR`

Exports the built-in model to Core ML in every form (separate packages, the attention of the Neural Engine, palettes, a
UNet in two, Apple's layout, one package for all), lets Core ML compile and load each on each of its compute units,
holds the golden picture to its gate, and measures: cold start, p50, p90 and p99 of an image, by component. The same
bundle's ONNX graphs on onnxruntime's CPU provider stand beside them. Writes mac_acceptance.json and mac_acceptance.md.

Every export and every measurement is a process of its own. One that fails is in the report and in the exit code, and
the others go on.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks import acceptance
from benchmarks.acceptance import Step, Trials, print_step
from benchmarks.gpu_report import table
from hypersd_export.bundle.manifest import read_manifest
from hypersd_export.bundle.packages import package_records
from hypersd_export.runtime.coreml import UNITS

FORMAT = "hypersd-mac-acceptance/1"
FORMS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "split-einsum": ("--attention", "split-einsum"),
    "split-einsum-v2": ("--attention", "split-einsum-v2"),
    "6-bit": ("--palettize", "6"),
    "4-bit-grouped": ("--palettize", "4", "--deployment-target", "macOS15"),
    "chunked": ("--chunk-unet",),
    "apple": ("--layout", "apple", "--allow-approximate-schedule"),
    "single": ("--single-graph",),
}
"""The forms of the packages, with hypersd-export's options for each."""
STEPS = (1, 4)
PACKAGES = ("hypersd", "coremltools", "onnxruntime", "torch", "numpy")


class Case(acceptance.Case):
    """One bundle of packages."""

    __slots__ = ()

    def command(self, bundle: Path) -> list[str]:
        """The arguments of `hypersd-export`."""
        return ["--target", "coreml", "--target", "onnx", "--steps", str(self.steps), "--out", str(bundle),
                "--overwrite", *FORMS[self.form]]  # fmt: skip


class Workers(Protocol):
    """What is done in other processes; tests put their own here."""

    def export(self, case: Case, bundle: Path) -> None:
        """Write the case's bundle with targets coreml and onnx; HypersdError if that fails."""

    def measure(self, bundle: Path, runtime: str, provider: str | None) -> dict[str, Any]:
        """`benchmarks.gpu_measure.measure`; HypersdError if that fails."""


class Processes(acceptance.Processes):
    """The real workers."""

    __slots__ = ()

    def export(self, case: Case, bundle: Path) -> None:
        """See `Workers`."""
        self._run(["hypersd_export.cli", *case.command(bundle)])


def accept(
    cases: Sequence[Case], units: Sequence[str], workers: Workers, bundles: Path, *, tell: Callable[[Step], None]
) -> list[Step]:
    """Try everything; `tell` is given each step as it ends."""
    trials = Trials(tell=tell)
    for case in cases:
        bundle = bundles / case.name
        with trials.trying(f"{case.name} export") as exported:
            workers.export(case, bundle)
            exported.figures = bundle_figures(bundle)
        for unit in units:
            measured = functools.partial(workers.measure, bundle, "coreml", unit)
            trials.measure(f"{case.name} {unit}", exported, measured)
        trials.measure(f"{case.name} onnx", exported, functools.partial(workers.measure, bundle, "onnx", "cpu"))
    return trials.steps


def bundle_figures(bundle: Path) -> dict[str, Any]:
    """The MB of each component's packages."""
    records = package_records(read_manifest(bundle).targets.get("coreml", {}), bundle)
    sizes = {
        name: sum(
            file.stat().st_size for each in record.packages for file in (bundle / each).rglob("*") if file.is_file()
        )
        for name, record in records.items()
    }
    return {"packages_mb": {name: round(size / 1e6, 3) for name, size in sizes.items()}}


def report(device: str, options: Mapping[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    """The JSON report."""
    return acceptance.report(FORMAT, device, PACKAGES, options, steps)


def markdown(found: Mapping[str, Any]) -> str:
    """The report as a page: what passed, sizes, and latency by case and compute units."""
    machine, steps = found["machine"], found["steps"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    failed = [f"- FAILED {step['name']}: {step['note']}" for step in steps if step["passed"] is False]
    left_out = [f"- left out {step['name']}: {step['note']}" for step in steps if step["passed"] is None]
    lines = [
        f"# Mac acceptance: {found['device']}, {'passed' if found['passed'] else 'FAILED'}", "",
        f"{found['created']}. {machine['system']}, Python {machine['python']}; {packages}.", "",
        f"{found['options']['runs']} timed images after {found['options']['warmup']} for warming up, one at a time; a "
        "latency is from the prompt's text to pixels. The first image's time has the loading in it, and, where a "
        "package is met for the first time, its compilation.", "",
        f"{len(steps)} steps, {len(failed)} failed, {len(left_out)} left out.", "", *failed, *left_out, "",
        "## Latency of an image", "", _latency(steps), "## Sizes", "", _sizes(steps),
    ]  # fmt: skip
    return "\n".join(lines)


def _latency(steps: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for step in steps:
        figures = step["figures"]
        if "image_ms" not in figures:
            continue
        image, golden, parts = figures["image_ms"], figures["golden"], figures["components_ms"]
        picture = "equal" if golden["equal"] else f"{golden['psnr_db']:.1f} dB"
        rows.append(
            [
                step["name"], picture if golden["passed"] else f"{picture}, FAILED", f"{figures['first_image_s']:.2f}",
                f"{image['p50']:.2f}", f"{image['p90']:.2f}", f"{image['p99']:.2f}", str(image["count"]),
                f"{figures['images_per_s']:.1f}",
                ", ".join(f"{name} {times['p50']:.2f}" for name, times in parts.items()),
            ]
        )  # fmt: skip
    head = ["bundle and units", "golden", "first image s", "p50 ms", "p90 ms", "p99 ms", "images", "images/s",
            "p50 ms by component"]  # fmt: skip
    return table(head, rows) if rows else "Nothing was measured.\n"


def _sizes(steps: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [step["name"].removesuffix(" export"), f"{sum(sizes.values()):.1f}",
         ", ".join(f"{name} {size:.1f}" for name, size in sizes.items())]
        for step in steps if (sizes := step["figures"].get("packages_mb"))
    ]  # fmt: skip
    return table(["bundle", "MB of packages", "by component"], rows) if rows else "Nothing was exported.\n"


def main(arguments: Sequence[str] | None = None, workers: Workers | None = None) -> int:
    """Run everything and write the reports: 0 if all passed, else 1."""
    from hypersd_export.runtime import mac

    parser = acceptance.parser(__doc__, forms=tuple(FORMS), steps=STEPS)
    parser.add_argument("--units", nargs="+", choices=list(UNITS), default=list(UNITS))
    options = parser.parse_args(arguments)

    def work(bundles: Path, asked: dict[str, Any]) -> dict[str, Any]:
        made = workers or Processes(runs=options.runs, warmup=options.warmup, timeout=options.timeout)
        device = mac.open_device().name
        bundles.mkdir(parents=True, exist_ok=True)
        cases = [Case(form=form, steps=count) for form in options.forms for count in options.steps]
        return report(device, asked, accept(cases, options.units, made, bundles, tell=print_step))

    return acceptance.run("mac_acceptance", options, work, markdown)


if __name__ == "__main__":
    sys.exit(main())

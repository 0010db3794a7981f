"""`hypersd-bench all`: the built-in model in every form, timed and examined against everybody, as one report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bench.commands import Selection, run_latency
from benchmarks.bench.entrants import TEACHER, TORCH, VERSUS
from benchmarks.bench.examine import Asked, run_quality
from benchmarks.bench.latency import Options
from benchmarks.bench.report import write_report
from benchmarks.bench.tables import Progress
from hypersd_export.bundle.manifest import verify_files
from hypersd_export.errors import BundleError, HypersdError, OptionError
from hypersd_export.spec import ExportSpec, PlanFlags
from hypersd_export.targets import Target

FORMS: Mapping[str, Mapping[str, Any]] = {
    "onnx-fp32": {"targets": (Target.ONNX,), "precision": "fp32"},
    "onnx-fp16": {"targets": (Target.ONNX,), "precision": "fp16"},
    "onnx-int8": {"targets": (Target.ONNX,), "precision": "fp32", "quantize": "int8"},
    "onnx-single": {"targets": (Target.ONNX,), "precision": "fp32", "single_graph": True},
    "coreml": {"targets": (Target.COREML,)},
    "tensorrt": {"targets": (Target.TENSORRT,)},
}
"""How the built-in model is exported, by `ExportSpec`'s fields. Core ML is examined through the interpreter; TensorRT's
engines are built where that needs no GPU, and run where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Everything:
    """forms, versus: None is all of them. count: prompts of the quality."""

    steps: tuple[int, ...]
    forms: tuple[str, ...] | None = None
    versus: tuple[str, ...] | None = None
    count: int = 1024
    options: Options = field(default_factory=Options)
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.forms or ()) - set(FORMS))
        if unknown:
            raise OptionError(f"--form {unknown[0]}: choose from {', '.join(FORMS)}")

    def specs(self, folder: Path) -> dict[str, ExportSpec]:
        """What is exported, by name: the forms of the first step count, then those of the next."""
        return {
            f"{form}-{steps}": ExportSpec(
                **FORMS[form], plan=PlanFlags(steps=(steps,)), out=folder / f"{form}-{steps}", overwrite=True,
                cache_dir=self.cache_dir,
            )
            for steps in self.steps
            for form in self.forms or FORMS
        }  # fmt: skip


def run_all(asked: Everything, out: Path, *, command: Sequence[str]) -> dict[str, Any]:
    """Export what is not there, measure, and write the report into `out`; what cannot be exported has a row that says
    why. Raises `HypersdError` if nothing could be."""
    bundles, absent = export_all(asked.specs(out / "bundles"))
    if not bundles:
        raise BundleError(f"nothing could be exported: {absent[0][1] if absent else 'no step counts'}")
    versus = VERSUS if asked.versus is None else asked.versus
    selection = Selection(
        bundles=tuple(bundles), versus=versus, absent=tuple(absent), cache_dir=asked.cache_dir
    )  # fmt: skip
    run_latency(selection, asked.options, prompt=None, out=out, command=command)
    examined = Selection(
        bundles=tuple(bundles), versus=tuple(kind for kind in versus if kind in (TORCH, TEACHER)),
        absent=tuple(absent), cache_dir=asked.cache_dir,
    )  # fmt: skip
    run_quality(examined, Asked(count=asked.count), out=out, command=command)
    return write_report(out)


def export_all(specs: Mapping[str, ExportSpec]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Bundles that are there or were made, and the names of those that cannot be, each with the reason."""
    from hypersd_export.export import export

    made, absent = [], []
    with Progress() as progress:
        for name, spec in specs.items():
            try:
                if not is_current(spec):
                    progress.note(f"{name}: exporting")
                    export(spec)
                made.append(spec.out)
            except HypersdError as error:
                progress.note(f"{name}: cannot be exported: {error}")
                absent.append((name, str(error)))
    return made, absent


def is_current(spec: ExportSpec) -> bool:
    """Whether the bundle at `spec.out` is whole, and of the same options, weights and tool versions: then it is kept,
    and with it the pictures that were drawn of it."""
    from hypersd_export.job import open_job, tool_versions

    if not spec.out.exists():
        return False
    try:
        manifest = verify_files(spec.out)
    except BundleError:
        return False
    job = open_job(spec)
    wanted = {"options": job.options(), "loras": job.lora_records(), "versions": tool_versions()}
    found = {name: getattr(manifest, name) for name in wanted}
    same: bool = json.loads(json.dumps(wanted)) == found and manifest.base["digest"] == job.source.base.digest
    return same

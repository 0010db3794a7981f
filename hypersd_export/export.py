"""The export: load → fuse → graphs → target → verify → publish.

Every stage is timed, with the peak memory of the process tree; every finished stage is kept in the cache under the
digest of all that it depends on, so that a second run, or one after a Ctrl-C, goes on where the first one ended. The
bundle grows beside its destination and is renamed into place at the very end.
"""

import datetime
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_export import __version__
from hypersd_export.assemble import assemble, write_card
from hypersd_export.build import COMPOSE, Built, OnnxGraphs, Workshop
from hypersd_export.bundle.manifest import NOT_VERIFIED, Manifest, bundle_digest, write_manifest
from hypersd_export.bundle.publish import check_destination, staged
from hypersd_export.clock import Clock, Reporter, Silent, StageRecord
from hypersd_export.job import GOLDEN_SEED, Job, check_backends, open_job, tool_versions
from hypersd_export.plan_choice import describe
from hypersd_export.spec import ExportSpec
from hypersd_export.targets import Target
from hypersd_export.verify.gates import IMAGE_DB
from hypersd_export.verify.process import run_verification
from hypersd_export.verify.request import VerifyRequest

__all__ = ["COMPOSE", "Clock", "Exported", "Reporter", "Silent", "StageRecord", "export"]

LOAD, ASSEMBLE, VERIFY, PUBLISH = "load", "assemble", "verify", "publish"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A published bundle."""

    path: Path
    digest: str
    manifest: Manifest
    stages: tuple[StageRecord, ...]


def export(spec: ExportSpec, *, reporter: Reporter | None = None, isolate: bool = True) -> Exported:
    """Export a bundle to `spec.out`; raises `HypersdError` in one line, and the destination is then as it was.

    `isolate=False` verifies in this process (for tests): the memory of the verification then counts as the export's.
    """
    reporter = reporter or Silent()
    clock = Clock(reporter)
    check_backends(spec)  # before the clock, which itself needs psutil
    check_destination(spec.out, overwrite=spec.overwrite)
    with clock.stage(LOAD):
        job = open_job(spec)
        announce(job, reporter)
    workshop = Workshop(job, clock)
    built = [workshop.build(target) for target in spec.targets]
    with staged(spec.out, overwrite=spec.overwrite) as bundle:
        with clock.stage(ASSEMBLE):
            assemble(job, built, bundle)
        parity = verify(job, built, bundle, clock, isolate=isolate)
        manifest = describe_bundle(job, built, parity, bundle, clock)
        reporter.begin(PUBLISH)
    return Exported(
        path=spec.out.resolve(),
        digest=bundle_digest(spec.out),
        manifest=manifest,
        stages=tuple(clock.records),
    )


def announce(job: Job, reporter: Reporter) -> None:
    """Say what was decided and why, and warn."""
    for entry in job.plans.entries:
        reporter.note(f"plan: {describe(entry.plan)} ({entry.source})")
    for lora, scale in job.source.loras:
        reporter.note(f"LoRA: {lora.path.name} at scale {scale:g} ({lora.format}, rank {max(lora.ranks, default=0)})")
    for warning in job.source.warnings():
        reporter.note(f"warning: {warning}")


def verify(job: Job, built: Sequence[Built], bundle: Path, clock: Clock, *, isolate: bool) -> dict[str, Any] | str:
    """Golden files and parity figures, or "not verified" where nothing was compared; golden/ is copied into the bundle.

    All ONNX graphs are held against torch, published or not. The figures of the first ones are named after the
    components, those of others have their precision behind the name.
    """
    found = {each.onnx.precision: each.onnx for each in built if each.onnx is not None}
    published = {each.onnx.precision for each in built if each.onnx is not None and each.target is Target.ONNX}
    sets = sorted(found.values(), key=lambda graphs: graphs.precision not in published)
    golden_db = min(IMAGE_DB[each.precision] for each in built)
    parity: dict[str, Any] = {}
    for graphs in sets or [OnnxGraphs(precision=built[0].precision, components={})]:  # without any: golden alone
        first = graphs is sets[0] if sets else True
        figures = verify_graphs(
            job, graphs, bundle, clock,
            first=first, published=graphs.precision in published, golden_db=golden_db, isolate=isolate,
        )  # fmt: skip
        parity |= {name if first else f"{name} {graphs.precision}": value for name, value in figures.items()}
    return parity or NOT_VERIFIED


def verify_graphs(
    job: Job,
    graphs: OnnxGraphs,
    bundle: Path,
    clock: Clock,
    *,
    first: bool,
    published: bool,
    golden_db: float,
    isolate: bool,
) -> dict[str, Any]:
    """The parity figures of one set of ONNX graphs; the golden files of the first go into the bundle, with
    `golden_db` as the bound for every runtime.

    Graphs that are not `published` are assembled in a scratch folder, as the final image needs a bundle that draws.
    """

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            drawn = bundle
            if graphs.components and not published:
                drawn = Path(scratch)
                source = Built(target=Target.ONNX, precision=graphs.precision, files=graphs.files(), record={})
                assemble(job, [source], drawn)
            request = VerifyRequest(
                source=job.request,
                digests=job.source.digests,
                bundle=drawn,
                components={component: stage.path for component, stage in graphs.components.items()},
                out=folder,
                shapes=job.shapes,
                precision=graphs.precision,
                provider=job.spec.provider,
                prompt=job.prompt,
                negative_prompt="",
                seed=GOLDEN_SEED,
                compare=job.spec.verify and bool(graphs.components),
                golden_db=golden_db,
            )
            parity = run_verification(request, progress=clock.reporter.detail, isolate=isolate)
        (folder / "parity.json").write_text(json.dumps(parity), encoding="utf-8")

    name = VERIFY if first else f"{VERIFY}-{graphs.precision}"
    with clock.stage(name) as record:
        stage = job.cache.get(name, job.verify_depends(graphs.keys(), graphs.precision, golden_db), build)
        record.cached = stage.cached
        if first:
            shutil.copytree(stage.path / "golden", bundle / "golden")
        parity: dict[str, Any] = json.loads((stage.path / "parity.json").read_text(encoding="utf-8"))
    return parity


def describe_bundle(
    job: Job, built: Sequence[Built], parity: dict[str, Any] | str, bundle: Path, clock: Clock
) -> Manifest:
    """Card and manifest: the last files of a bundle."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    targets = {each.target.value: dict(each.record) for each in built}
    write_card(job, bundle, targets, parity, created)
    base = job.source.base
    return write_manifest(
        bundle,
        hypersd=__version__,
        base={"name": base.name, "family": str(base.family), "digest": base.digest},
        loras=job.lora_records(),
        targets=targets,
        options=job.options(),
        versions=tool_versions(),
        stages=[record.to_json() for record in clock.records],
        parity=parity,
        created=created,
    )

"""The export: load → fuse → graphs → target → verify → publish.

Every stage is timed, with the peak memory of the process tree; every finished stage is kept in the cache under the
digest of all that it depends on, so that a second run, or one after a Ctrl-C, goes on where the first one ended. The
bundle grows beside its destination and is renamed into place at the very end.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_export import __version__, collector
from hypersd_export.assemble import assemble, write_card
from hypersd_export.build import COMPOSE, Built, Workshop
from hypersd_export.bundle.cache import noted_digests
from hypersd_export.bundle.manifest import Manifest, bundle_digest, write_manifest
from hypersd_export.bundle.publish import check_destination, staged
from hypersd_export.clock import Clock, Reporter, Silent, StageRecord
from hypersd_export.job import Job, check_backends, open_job, tool_versions
from hypersd_export.plan_choice import describe
from hypersd_export.proof import VERIFY, verify
from hypersd_export.spec import ExportSpec

__all__ = ["COMPOSE", "VERIFY", "Clock", "Exported", "Reporter", "Silent", "StageRecord", "export"]

LOAD, ASSEMBLE, PUBLISH = "load", "assemble", "publish"


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
    with staged(spec.out, overwrite=spec.overwrite) as bundle:
        workshop = Workshop(job, clock, bundle)
        with collector.paused():
            built = [workshop.build(target) for target in spec.targets]
        with clock.stage(ASSEMBLE):
            assemble(job, built, bundle, workshop.delivered)
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
        noted=noted_digests({name: source for each in built for name, source in each.files.items()}),
    )

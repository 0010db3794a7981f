"""The export: load → fuse → graphs → target → verify → publish.

Every stage is timed, with the peak memory of the process tree; every finished stage is kept in the cache under the
digest of all that it depends on, so that a second run, or one after a Ctrl-C, goes on where the first one ended. The
bundle grows beside its destination and is renamed into place at the very end.
"""

import datetime
import functools
import gc
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hypersd_export import __version__
from hypersd_export.assemble import assemble, write_card
from hypersd_export.bundle.cache import Stage
from hypersd_export.bundle.manifest import NOT_VERIFIED, Manifest, bundle_digest, write_manifest
from hypersd_export.bundle.publish import check_destination, staged
from hypersd_export.graphs.spec import Component
from hypersd_export.job import GOLDEN_SEED, Job, check_backends, open_job, tool_versions
from hypersd_export.plan_choice import describe
from hypersd_export.spec import ExportSpec
from hypersd_export.targets import Target
from hypersd_export.usage import measure
from hypersd_export.verify.process import run_verification
from hypersd_export.verify.request import VerifyRequest

LOAD, COMPOSE, ASSEMBLE, VERIFY, PUBLISH = "load", "onnx-pipeline", "assemble", "verify", "publish"


@dataclass(slots=True)
class StageRecord:
    """What a stage took: wall-clock seconds, the process tree's peak in MB, and whether the cache had it."""

    name: str
    seconds: float = 0.0
    peak_mb: float = 0.0
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        seconds, peak = round(self.seconds, 3), round(self.peak_mb, 1)
        return {"name": self.name, "seconds": seconds, "peak_mb": peak, "cached": self.cached}


class Reporter(Protocol):
    """Who wants to know how far the export is."""

    def note(self, text: str) -> None:
        """A decision and its reason, or a warning, in one line."""

    def begin(self, stage: str) -> None:
        """A stage begins."""

    def detail(self, text: str) -> None:
        """What the stage is at."""

    def end(self, record: StageRecord) -> None:
        """A stage ended."""


class Silent:
    """A reporter that says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin(self, stage: str) -> None:
        """Nothing."""

    def detail(self, text: str) -> None:
        """Nothing."""

    def end(self, record: StageRecord) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A published bundle."""

    path: Path
    digest: str
    manifest: Manifest
    stages: tuple[StageRecord, ...]


@dataclass(slots=True)
class Clock:
    """Times the stages and tells the reporter."""

    reporter: Reporter
    records: list[StageRecord] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageRecord]:
        """Time the body; its record is kept when it ends well."""
        record = StageRecord(name)
        self.reporter.begin(name)
        with measure() as usage:
            yield record
        record.seconds, record.peak_mb = usage.seconds, usage.peak_mb
        self.records.append(record)
        self.reporter.end(record)


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
    targets = {target: build_target(job, target, clock) for target in spec.targets}
    whole = compose_graphs(job, targets[Target.ONNX], clock) if spec.single_graph else None
    with staged(spec.out, overwrite=spec.overwrite) as bundle:
        with clock.stage(ASSEMBLE):
            graphs = {component: stage.path for component, stage in targets[Target.ONNX].items()}
            assemble(job, graphs, bundle, single=None if whole is None else whole.path)
        parity = verify(job, targets[Target.ONNX], whole, bundle, clock, isolate=isolate)
        manifest = describe_bundle(job, targets, whole, parity, bundle, clock)
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


def build_target(job: Job, target: Target, clock: Clock) -> dict[Component, Stage]:
    """Every component of one target, each fused, made a graph and built, or taken from the cache."""
    check_loras = functools.cache(job.source.check_loras)  # once, before the first component is built for nothing
    stages: dict[Component, Stage] = {}

    def build(component: Component, folder: Path) -> None:
        check_loras()
        build_component(job, target, component, folder)
        gc.collect()  # exported programs are full of cycles, and the next component needs the room

    for component in job.components:
        with clock.stage(f"{target}-{component}") as record:
            depends = job.component_depends(target, component)
            stage = job.cache.get(record.name, depends, functools.partial(build, component))
            record.cached = stage.cached
            stages[component] = stage
    return stages


def build_component(job: Job, target: Target, component: Component, folder: Path) -> None:
    """Load → fuse → graph → target, for one component, into `folder`; build.json there says how it went."""
    import torch

    from hypersd_export.graphs.components import build_graph
    from hypersd_export.targets import onnx

    assert target is Target.ONNX, "resolve_targets refuses the others"
    module, fused = job.source.load(component.source, torch.float32)
    guidance = job.embedded_guidance if component is Component.UNET else None
    config = component_config(job, component, module)
    graph = build_graph(component, module, job.shapes, embedded_guidance=guidance)
    built = onnx.build(graph, folder, opset=job.spec.opset, precision=job.spec.precision)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "build.json").write_text(json.dumps({"built": built, "fused": fused}), encoding="utf-8")


def compose_graphs(job: Job, parts: Mapping[Component, Stage], clock: Clock) -> Stage:
    """The single graph of these components, or what the cache has of it."""
    from hypersd_export.targets.onnx_pipeline import compose

    def build(folder: Path) -> None:
        graphs = {component: stage.path / "model.onnx" for component, stage in parts.items()}
        (folder / "build.json").write_text(json.dumps(compose(graphs, job.wiring, folder)), encoding="utf-8")

    with clock.stage(COMPOSE) as record:
        stage = job.cache.get(COMPOSE, job.compose_depends({c: stage.key for c, stage in parts.items()}), build)
        record.cached = stage.cached
    return stage


def component_config(job: Job, component: Component, module: Any) -> dict[str, Any]:
    """The component's config.json with every default explicit, without local paths; the UNet's with this size."""
    if component is Component.TEXT_ENCODER:
        text = module.config.to_json_string(use_diff=False)
    else:
        text = module.to_json_string()
    config: dict[str, Any] = json.loads(text)
    config.pop("_name_or_path", None)
    if component is Component.UNET:
        height, width = job.shapes.latent_height, job.shapes.latent_width
        config["sample_size"] = height if height == width else [height, width]
    return config


def verify(
    job: Job, components: Mapping[Component, Stage], whole: Stage | None, bundle: Path, clock: Clock, *, isolate: bool
) -> dict[str, Any] | str:
    """Golden files and parity figures, or "not verified"; golden/ is copied into the bundle."""

    def build(folder: Path) -> None:
        request = VerifyRequest(
            source=job.request,
            digests=job.source.digests,
            bundle=bundle,
            components={component: stage.path for component, stage in components.items()},
            out=folder,
            shapes=job.shapes,
            precision=job.spec.precision,
            provider=job.spec.provider,
            prompt=job.prompt,
            negative_prompt="",
            seed=GOLDEN_SEED,
            compare=job.spec.verify,
        )
        parity = run_verification(request, progress=clock.reporter.detail, isolate=isolate)
        (folder / "parity.json").write_text(json.dumps(parity), encoding="utf-8")

    with clock.stage(VERIFY) as record:
        keys = {component.value: stage.key for component, stage in components.items()}
        depends = job.verify_depends(keys | ({} if whole is None else {COMPOSE: whole.key}))
        stage = job.cache.get(VERIFY, depends, build)
        record.cached = stage.cached
        shutil.copytree(stage.path / "golden", bundle / "golden")
        parity: dict[str, Any] = json.loads((stage.path / "parity.json").read_text(encoding="utf-8"))
    return parity if job.spec.verify else NOT_VERIFIED


def describe_bundle(
    job: Job,
    targets: Mapping[Target, Mapping[Component, Stage]],
    whole: Stage | None,
    parity: dict[str, Any] | str,
    bundle: Path,
    clock: Clock,
) -> Manifest:
    """Card and manifest: the last files of a bundle."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    built = {target.value: target_record(job, stages, whole) for target, stages in targets.items()}
    write_card(job, bundle, built, parity, created)
    base = job.source.base
    return write_manifest(
        bundle,
        hypersd=__version__,
        base={"name": base.name, "family": str(base.family), "digest": base.digest},
        loras=job.lora_records(),
        targets=built,
        options=job.options(),
        versions=tool_versions(),
        stages=[record.to_json() for record in clock.records],
        parity=parity,
        created=created,
    )


def target_record(job: Job, stages: Mapping[Component, Stage], whole: Stage | None) -> dict[str, Any]:
    """What the manifest says about a target: its options, each graph's figures, and the proof of every fusion."""
    notes = {component: _build_notes(stage) for component, stage in stages.items()}
    single = {} if whole is None else {"single_graph": _build_notes(whole)}
    return {
        **single,
        "precision": job.spec.precision,
        "opset": job.spec.opset,
        "components": {component.value: note["built"] for component, note in notes.items()},
        "fused": [report for component, note in notes.items() if component is not Component.VAE_ENCODER
                  for report in note["fused"]],
    }  # fmt: skip


def _build_notes(stage: Stage) -> dict[str, Any]:
    notes: dict[str, Any] = json.loads((stage.path / "build.json").read_text(encoding="utf-8"))
    return notes

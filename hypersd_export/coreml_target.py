"""The Core ML target: an export's packages, what the bundle gets of them, what the manifest says, what is verified."""

from typing import Any

from hypersd_export import build_coreml
from hypersd_export.build import Artifacts, Built, Workshop, build_notes
from hypersd_export.build_compressed import compressed
from hypersd_export.build_coreml import RESOURCES, Packages, Scales
from hypersd_export.bundle.digest import digest_tree
from hypersd_export.bundle.packages import PIPELINE
from hypersd_export.coreml_worker import PIPELINE_FILE
from hypersd_export.graphs.spec import Component
from hypersd_export.job import Job
from hypersd_export.targets import Target
from hypersd_export.targets.coreml import vendor


def coreml_target(workshop: Workshop) -> Built:
    """Packages of the components, the configs beside them; with Apple's layout its Resources folder too."""
    job = workshop.job
    flags, precision = job.spec.coreml, job.spec.precision_of(Target.COREML)
    workshop.clock.reporter.note(
        f"Core ML: coremltools {vendor.version()} for {flags.deployment_target}, {flags.layout} layout, "
        f"{flags.attention} attention"
    )
    scales = build_coreml.norm_scales(workshop) if precision == "fp16" else {}
    stages = {PIPELINE: build_coreml.pipeline_stage(workshop, scales)} if job.spec.single_graph else {
        component.value: build_coreml.package_stage(workshop, component, scales.get(component.source, {}))
        for component in job.components
    }  # fmt: skip
    raw = Packages(flags=flags, stages=stages)
    packages = build_coreml.cut(workshop, compressed(workshop, raw))
    files, extra = packages.files(), {}
    if flags.layout == "apple":
        plays = build_coreml.played(workshop)
        resources = build_coreml.resources_stage(workshop, packages, plays)
        files |= {f"{RESOURCES}/{path.name}": path for path in sorted(resources.path.iterdir())}
        extra = {"played_by_apple": {str(steps): "exact" if db is None else db for steps, db in plays.items()}}
    return Built(
        target=Target.COREML,
        precision=precision,
        files=files,
        record=record(job, packages, scales) | extra,
        artifacts=tuple(
            artifacts(each, precision, published=each is packages)
            for each in ((packages,) if flags.compression is None else (packages, raw))
        ),
    )


def artifacts(packages: Packages, precision: str, *, published: bool) -> Artifacts:
    """As what is held against torch. Packages with compressed weights differ from it on purpose, so that those which
    they were made from are held against it too."""
    return Artifacts(
        target=Target.COREML,
        precision=precision,
        published=published,
        components={Component(name): stage.path for name, stage in packages.stages.items() if name != PIPELINE},
        whole=packages.stages[PIPELINE].path / PIPELINE_FILE if PIPELINE in packages.stages else None,
        keys={name: stage.key for name, stage in packages.stages.items()},
        files=packages.files(),
        ports=packages.ports,
        compression=packages.flags.compression if published else None,
    )


def record(job: Job, packages: Packages, scales: Scales) -> dict[str, Any]:
    """What the manifest says: options, each package's figures, and the proof of every fusion."""
    flags, notes = packages.flags, {component: build_notes(stage) for component, stage in packages.stages.items()}

    def entry(name: str) -> dict[str, Any]:
        files = packages.names[name]
        digests = [digest_tree(packages.stages[name].path / file) for file in files]
        return {"packages": list(files.values()), "digests": digests, **notes[name]["built"]}

    return {
        "precision": job.spec.precision_of(Target.COREML),
        "coremltools": vendor.version(),
        "deployment_target": flags.deployment_target,
        "layout": flags.layout,
        "attention": flags.attention,
        "compute_units": flags.compute_units,
        "lora_apart": flags.lora_apart,
        "palettize": flags.palettize,
        "quantize": flags.quantize,
        "size_budget": flags.size_budget,
        "scaled_norms": {part: dict(each) for part, each in scales.items()},
        "components": {c: entry(c) for c in packages.stages},
        "ports": {
            component: {name: port.to_json() for name, port in ports.items()}
            for component, ports in packages.ports.items()
        },
        "fused": [report for component, note in notes.items() if component != Component.VAE_ENCODER
                  for report in note["fused"]],
    }  # fmt: skip

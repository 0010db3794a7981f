"""The Core ML target: a package of each component, each a stage of its own in the cache."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypersd_export.build import Artifacts, Built, Workshop, build_notes
from hypersd_export.bundle.cache import Stage
from hypersd_export.coreml_worker import Conversion, run_apart
from hypersd_export.graphs.spec import Component
from hypersd_export.job import code_digests
from hypersd_export.targets import Target
from hypersd_export.targets.coreml import vendor


def coreml_target(workshop: Workshop) -> Built:
    """Packages of the components, the configs beside them."""
    job = workshop.job
    flags, precision = job.spec.coreml, job.spec.precision_of(Target.COREML)
    workshop.clock.reporter.note(
        f"Core ML: coremltools {vendor.version()} for {flags.deployment_target}, {flags.layout} layout, "
        f"{flags.attention} attention"
    )
    stages = {component: package_stage(workshop, component) for component in job.components}
    notes = {component: build_notes(stage) for component, stage in stages.items()}
    files = {f"{c}/{name}": s.path / name for c, s in stages.items() for name in (f"{c}.mlpackage", "config.json")}
    return Built(
        target=Target.COREML,
        precision=precision,
        files=files,
        record=record(workshop, {c.value: note["built"] for c, note in notes.items()}, notes),
        artifacts=(
            Artifacts(
                target=Target.COREML,
                precision=precision,
                published=True,
                components={component: stage.path for component, stage in stages.items()},
                keys={component.value: stage.key for component, stage in stages.items()},
                files=files,
            ),
        ),
    )


def record(
    workshop: Workshop, components: Mapping[str, Mapping[str, Any]], notes: Mapping[Component, Mapping[str, Any]]
) -> dict[str, Any]:
    """What the manifest says: options, each package's figures, and the proof of every fusion."""
    flags = workshop.job.spec.coreml
    return {
        "precision": workshop.job.spec.precision_of(Target.COREML),
        "coremltools": vendor.version(),
        "deployment_target": flags.deployment_target,
        "layout": flags.layout,
        "attention": flags.attention,
        "compute_units": flags.compute_units,
        "components": {
            name: {"packages": [f"{name}/{name}.mlpackage"], **figures} for name, figures in components.items()
        },
        "fused": [report for component, note in notes.items() if component is not Component.VAE_ENCODER
                  for report in note["fused"]],
    }  # fmt: skip


def package_stage(workshop: Workshop, component: Component) -> Stage:
    """The stage of one component: its package and its config.json."""
    job = workshop.job
    conversion = Conversion(
        source=job.request,
        component=component,
        shapes=job.shapes,
        precision=job.spec.precision_of(Target.COREML),
        deployment_target=job.spec.coreml.deployment_target,
        attention=job.spec.coreml.attention if component is Component.UNET else "original",
        layout=job.spec.coreml.layout,
        embedded_guidance=job.embedded_guidance if component is Component.UNET else None,
    )

    def build(folder: Path) -> None:
        workshop.check_loras()
        notes = run_apart(conversion, folder, progress=workshop.clock.reporter.detail)
        (folder / "build.json").write_text(json.dumps(notes), encoding="utf-8")

    depends = {
        **job.component_depends(Target.COREML, component),
        "deployment_target": conversion.deployment_target,
        "attention": conversion.attention,
        "layout": conversion.layout,
        "coremltools": vendor.version(),
        "worker": code_digests(("coreml_worker.py",)),
    }
    return workshop.stage(f"coreml-{component}", depends, build)

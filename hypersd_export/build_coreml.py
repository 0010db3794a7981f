"""Core ML packages as stages of the cache: converted, cut in two, and what Apple's runtime needs beside them."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypersd_export.build import Workshop, build_notes
from hypersd_export.bundle.apple_note import resources_note
from hypersd_export.bundle.cache import Stage
from hypersd_export.bundle.packages import PIPELINE
from hypersd_export.bundle.texts import hidden_output
from hypersd_export.coreml_worker import (
    PIPELINE_FILE,
    Conversion,
    Cutting,
    Joining,
    Measuring,
    Playing,
    Task,
    run_apart,
)
from hypersd_export.diffusion.apple import plays_exactly
from hypersd_export.graphs.spec import Component
from hypersd_export.job import GOLDEN_SEED, code_digests
from hypersd_export.runtime.ports import Port, Ports
from hypersd_export.spec import CoreMLFlags
from hypersd_export.targets import Target
from hypersd_export.targets.coreml import vendor

APPLE_NAMES: Mapping[str, str] = {
    Component.TEXT_ENCODER.value: "TextEncoder",
    Component.TEXT_ENCODER_2.value: "TextEncoder2",
    Component.UNET.value: "Unet",
    Component.VAE_DECODER.value: "VAEDecoder",
    Component.VAE_ENCODER.value: "VAEEncoder",
}
"""What Apple's runtime calls the compiled models."""
APPLE_PORTS: Mapping[str, Ports] = {
    Component.TEXT_ENCODER.value: {"pooler_output": Port(name="pooled_outputs")},
    Component.UNET.value: {
        "encoder_hidden_states": Port(name="encoder_hidden_states", axes=(0, 2, None, 1)),
        "out_sample": Port(name="noise_pred"),
    },
    Component.VAE_DECODER.value: {"latent_sample": Port(name="z"), "sample": Port(name="image")},
    Component.VAE_ENCODER.value: {"sample": Port(name="x"), "latent_parameters": Port(name="latent")},
}
"""Where our inputs and outputs lie in packages of Apple's layout (`graphs.apple`)."""
PIPELINE_PORTS: Mapping[str, Ports] = {"pipeline": {"image": Port(name="image", axes=(0, 3, 1, 2))}}
"""An image of Core ML's is channels first to the program that makes it."""
PIECES = ("unet_chunk1.mlpackage", "unet_chunk2.mlpackage")
"""The UNet's packages where it is cut."""
RESOURCES = "Resources"
Scales = Mapping[str, Mapping[str, float]]
"""Powers of two by part of the pipeline and name of a group norm (`graphs.half_safe`), for those that need one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packages:
    """The stages of one export's packages by component, or the one of `PIPELINE`: `NAME.mlpackage` or its pieces,
    config.json (of the pipeline each part's, in a folder of its name) and build.json in each."""

    flags: CoreMLFlags
    stages: Mapping[str, Stage]

    @property
    def names(self) -> dict[str, dict[str, str]]:
        """Each component's packages, in their order: the name in its stage → the one in the bundle."""
        if PIPELINE in self.stages:
            return {PIPELINE: {PIPELINE_FILE: PIPELINE_FILE}}
        found = {}
        for component, stage in self.stages.items():
            name, piece = (APPLE_NAMES[component], "Chunk") if self.flags.layout == "apple" else (component, "_chunk")
            whole = (stage.path / f"{component}.mlpackage").is_dir()
            names = {f"{component}.mlpackage": name} if whole else {
                file: f"{name}{piece}{number}" for number, file in enumerate(PIECES, start=1)
            }  # fmt: skip
            found[component] = {file: f"{component}/{name}.mlpackage" for file, name in names.items()}
        return found

    @property
    def ports(self) -> Mapping[str, Ports]:
        """Where our inputs and outputs lie, by component; {} where they have our names."""
        if PIPELINE in self.stages:
            return PIPELINE_PORTS
        own = APPLE_PORTS if self.flags.layout == "apple" else {}
        if Component.TEXT_ENCODER_2.value not in self.stages:
            return own
        return {**own, **{c.value: self._hidden(c) for c in (Component.TEXT_ENCODER, Component.TEXT_ENCODER_2)}}

    def _hidden(self, component: str) -> Ports:
        """The outputs of one of SDXL's text encoders."""
        config = json.loads((self.stages[component].path / "config.json").read_text(encoding="utf-8"))
        pooled = "pooler_output" if component == Component.TEXT_ENCODER else "text_embeds"
        return {hidden_output(config): Port(name="hidden_embeds"), pooled: Port(name="pooled_outputs")}

    def files(self) -> dict[str, Path]:
        """What a bundle gets, by its name there."""
        found = {name: self.stages[c].path / file for c, names in self.names.items() for file, name in names.items()}
        for component, stage in self.stages.items():
            for path in stage.path.rglob("config.json"):
                where = path.relative_to(stage.path).as_posix()
                found[where if component == PIPELINE else f"{component}/{where}"] = path
        return found


def cut(workshop: Workshop, packages: Packages) -> Packages:
    """The packages with the UNet in two pieces, if that is asked for."""
    if not packages.flags.chunk_unet:
        return packages
    whole = packages.stages[Component.UNET.value]
    task = Cutting(source=whole.path, name=f"{Component.UNET}.mlpackage", pieces=PIECES)
    depends = {"package": whole.key, "code": code_digests(("targets/coreml", "coreml_worker.py"))}
    stage = derived(workshop, "coreml-unet-chunks", whole, task, depends)
    return replace(packages, stages={**packages.stages, Component.UNET.value: stage})


def derived(workshop: Workshop, name: str, source: Stage, task: Task, depends: Mapping[str, Any]) -> Stage:
    """The stage of a package that is made from another one's: its configs, and its figures added in build.json."""

    def build(folder: Path) -> None:
        notes = build_notes(source)
        notes["built"] |= run_apart(task, folder, progress=workshop.clock.reporter.detail)
        for path in source.path.rglob("config.json"):
            copy = folder / path.relative_to(source.path)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        (folder / "build.json").write_text(json.dumps(notes), encoding="utf-8")

    return workshop.stage(name, depends, build)


def norm_scales(workshop: Workshop) -> Scales:
    """The scales of the group norms whose squares half cannot hold, which are told."""
    job = workshop.job
    asked = Measuring(source=job.request, plans=job.plans, shapes=job.shapes, prompt=job.prompt)
    depends = {
        **job.scan_depends({}),
        "source": job.source.digests,
        "code": code_digests(("model", "diffusion", "runtime", "verify", "coreml_worker.py")),
    }

    def build(folder: Path) -> None:
        workshop.check_loras()
        apart(workshop, asked, folder, "norms.json")

    stage = workshop.stage("coreml-norms", depends, build)
    reports = json.loads((stage.path / "norms.json").read_text(encoding="utf-8"))
    for part, report in reports.items():
        workshop.clock.reporter.note(
            f"fp16 {part}: {len(report['scales'])} of {report['norms']} group norms take a smaller input; values lie "
            f"up to {report['largest']:.3g} from their mean"
        )
    return {part: report["scales"] for part, report in reports.items() if report["scales"]}


def package_stage(workshop: Workshop, component: Component, scales: Mapping[str, float]) -> Stage:
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
        scales=scales,
        lora_apart=job.spec.coreml.lora_apart,
    )

    def build(folder: Path) -> None:
        workshop.check_loras()
        apart(workshop, conversion, folder, "build.json")

    depends = {
        **job.component_depends(Target.COREML, component),
        "deployment_target": conversion.deployment_target,
        "attention": conversion.attention,
        "layout": conversion.layout,
        "scales": dict(scales),
        "lora_apart": conversion.lora_apart and bool(job.source.loras_of(component.source)),
        "coremltools": vendor.version(),
        "worker": code_digests(("coreml_worker.py",)),
    }
    return workshop.stage(f"coreml-{component}", depends, build)


def pipeline_stage(workshop: Workshop, scales: Scales) -> Stage:
    """The stage of the whole pipeline as one package."""
    job = workshop.job
    entry, wiring, flags = job.plans.default, job.wiring, job.spec.coreml
    joining = Joining(
        source=job.request,
        shapes=job.shapes,
        precision=job.spec.precision_of(Target.COREML),
        deployment_target=flags.deployment_target,
        attention=flags.attention,
        table=entry.table,
        guidance=entry.plan.guidance,
        scaling_factor=wiring.scaling_factor,
        shift_factor=wiring.shift_factor,
        empty=wiring.empty,
        scales=scales,
    )

    def build(folder: Path) -> None:
        workshop.check_loras()
        apart(workshop, joining, folder, "build.json")

    depends = {
        "parts": [job.component_depends(Target.COREML, component) for component in job.components],
        "wiring": wiring.to_json(),
        "scales": {part: dict(each) for part, each in scales.items()},
        "deployment_target": flags.deployment_target,
        "attention": flags.attention,
        "coremltools": vendor.version(),
        "worker": code_digests(("coreml_worker.py",)),
    }
    return workshop.stage(f"coreml-{PIPELINE}", depends, build)


def apart(workshop: Workshop, task: Task, folder: Path, file: str) -> None:
    """Do a task in a process of its own; what it returns is written into `folder` too."""
    found = run_apart(task, folder, progress=workshop.clock.reporter.detail)
    (folder / file).write_text(json.dumps(found), encoding="utf-8")


def played(workshop: Workshop) -> dict[int, float | None]:
    """How Apple's scheduler plays each plan: None is exactly, else the PSNR in dB of the picture, which is told."""
    job = workshop.job
    plays: dict[int, float | None] = {
        entry.steps: None if plays_exactly(entry.plan) else 0.0 for entry in job.plans.entries
    }
    if None in plays.values() and len(set(plays.values())) == 1:
        return plays
    asked = Playing(source=job.request, plans=job.plans, shapes=job.shapes, prompt=job.prompt, seed=GOLDEN_SEED)
    depends = {**job.verify_depends({}, "fp32", 0.0), "worker": code_digests(("coreml_worker.py",))}
    stage = workshop.stage("coreml-played", depends, lambda folder: apart(workshop, asked, folder, "played.json"))
    found = json.loads((stage.path / "played.json").read_text(encoding="utf-8"))
    for steps, db in found.items():
        workshop.clock.reporter.note(
            f"{steps} steps as Apple's scheduler plays them: the picture is {db:.1f} dB from the plan's"
        )
    return plays | {int(steps): db for steps, db in found.items()}


def resources_stage(workshop: Workshop, packages: Packages, plays: Mapping[int, float | None]) -> Stage:
    """The stage of Apple's Resources folder: vocab.json, merges.txt, and a README on compiling and calling."""
    job = workshop.job
    base, plan = job.source.base, job.plans.default.plan
    facts = {
        "packages": [name for names in packages.names.values() for name in names.values()],
        "units": packages.flags.compute_units,
        "guidance": plan.guidance.scale if job.shapes.unet_batch > job.shapes.batch else 1.0,
        "scale": job.wiring.scaling_factor,
        "shift": job.wiring.shift_factor,
        "plays": dict(plays),
        "pad": base.tokenizer.pad,
        "channels": job.shapes.channels,
    }

    def build(folder: Path) -> None:
        base.write_tokenizer(folder)
        for path in folder.iterdir():
            if path.name not in ("vocab.json", "merges.txt"):
                path.unlink()
        (folder / "README.md").write_text(resources_note(facts), encoding="utf-8")

    depends = {
        "base": base.digest,
        "facts": {**facts, "plays": [list(item) for item in plays.items()]},
        "code": code_digests(("model", "bundle/apple_note.py")),
    }
    return workshop.stage("coreml-resources", depends, build)

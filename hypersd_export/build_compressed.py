"""The stages of Core ML packages whose weights are compressed: palettes, integers, or palettes of mixed widths."""

import functools
from pathlib import Path
from typing import Any

from hypersd_export.build import Workshop
from hypersd_export.build_coreml import Packages, apart, derived
from hypersd_export.bundle.cache import Stage
from hypersd_export.bundle.packages import PIPELINE
from hypersd_export.coreml_compress import RATED, Compressing, Mixing, Rating
from hypersd_export.graphs.spec import COMPRESSIBLE, Component
from hypersd_export.job import code_digests
from hypersd_export.targets.coreml import QUANTIZED, vendor

COMPRESSED = (*(component.value for component in COMPRESSIBLE), PIPELINE)
"""What is compressed of packages, among them the one of a whole pipeline."""
TEXT_FORM = "int8"
"""What the text encoder gets where the UNet's palettes are mixed: as large as palettes of 8 bits, and nearer."""
_CODE = ("targets/coreml", "coreml_worker.py", "coreml_compress.py", "coreml_mixed.py", "verify")


def compressed(workshop: Workshop, packages: Packages) -> Packages:
    """The packages with UNet and text encoder compressed, a stage each; themselves where that is not asked for."""
    flags = packages.flags
    if flags.compression is None:
        return packages
    mixes, form = flags.size_budget is not None, flags.quantize or str(flags.palettize)
    stages = {
        component: raw if component not in COMPRESSED
        else mixed(workshop, packages) if mixes and component == Component.UNET
        else in_one_form(workshop, packages, component, TEXT_FORM if mixes else form)
        for component, raw in packages.stages.items()
    }  # fmt: skip
    return Packages(flags=flags, stages=stages)


def in_one_form(workshop: Workshop, packages: Packages, component: str, form: str) -> Stage:
    """A component's package with all of its weights in one form, see `Compressing`."""
    raw = packages.stages[component]
    task = Compressing(
        source=raw.path, name=f"{component}.mlpackage", form=form, deployment_target=packages.flags.deployment_target
    )
    depends = {"package": raw.key, "form": form, "coremltools": vendor.version(), "code": code_digests(_CODE[:3])}
    word = form if form in QUANTIZED else f"{form}bit"
    return derived(workshop, f"coreml-{component}-{word}", raw, task, depends)


def mixed(workshop: Workshop, packages: Packages) -> Stage:
    """The UNet's package with palettes of mixed widths within the budget; what each layer's cost is another stage."""
    unet, job = Component.UNET.value, workshop.job
    raw, flags = packages.stages[unet], packages.flags
    name = f"{unet}.mlpackage"
    rating = Rating(
        source=job.request, package=raw.path / name, plans=job.plans, shapes=job.shapes,
        ports=packages.ports.get(unet, {}), deployment_target=flags.deployment_target,
    )  # fmt: skip
    versions = {"coremltools": vendor.version(), "code": code_digests(_CODE)}
    depends: dict[str, Any] = {**job.verify_depends({unet: raw.key}, "fp32", 0.0), **versions}
    rated = workshop.stage("coreml-unet-rating", depends, functools.partial(_rate, workshop, rating))
    task = Mixing(
        source=raw.path, name=name, rated=rated.path, budget=float(flags.size_budget or 0),
        deployment_target=flags.deployment_target,
    )  # fmt: skip
    return derived(
        workshop, "coreml-unet-mixed", raw, task, {"package": raw.key, "rated": rated.key, "budget": task.budget}
    )


def _rate(workshop: Workshop, rating: Rating, folder: Path) -> None:
    apart(workshop, rating, folder, RATED)

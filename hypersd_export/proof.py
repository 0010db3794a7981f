"""Which graphs of an export are held against torch, and the figures of each; and a bundle opened to be checked."""

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypersd_export.assemble import assemble
from hypersd_export.build import Artifacts, Built
from hypersd_export.bundle.manifest import NOT_VERIFIED, bundle_digest, read_manifest, verify_files
from hypersd_export.clock import Clock
from hypersd_export.errors import OptionError
from hypersd_export.graphs.span import corners
from hypersd_export.job import GOLDEN_SEED, Job
from hypersd_export.runtime.folder import Folder
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.runtime.runtimes import resolve_runtime
from hypersd_export.targets import Target
from hypersd_export.verify.gates import IMAGE_DB
from hypersd_export.verify.process import run_verification
from hypersd_export.verify.request import VerifyRequest

VERIFY = "verify"
GOLDEN_ROOM_DB = 3.0
"""How much further than the interpreter's a device's picture of packages with palettes may be from torch's."""


def verify(job: Job, built: Sequence[Built], bundle: Path, clock: Clock, *, isolate: bool) -> dict[str, Any] | str:
    """Golden files and parity figures, or "not verified" where nothing was compared; golden/ is copied into the bundle.

    All graphs that a target is, or was made from, are held against torch, published or not. The figures of the first
    ones are named after the components, those of others have a label behind the name.
    """
    if not job.spec.golden:
        return NOT_VERIFIED
    golden_db = min(IMAGE_DB[each.precision] for each in built)
    parity: dict[str, Any] = {}
    sets = artifacts_of(built) or [Artifacts(target=built[0].target, precision=built[0].precision, published=True)]
    for number, artifacts in enumerate(sets):
        stage = VERIFY if number == 0 else f"{VERIFY}-{artifacts.label}"
        figures, golden = verify_one(job, artifacts, bundle, clock, stage, golden_db=golden_db, isolate=isolate)
        if number == 0:
            shutil.copytree(golden, bundle / "golden")
        parity |= {name if number == 0 else f"{name} {artifacts.label}": value for name, value in figures.items()}
        if artifacts.compression is not None:
            _lower_bound(bundle / "golden" / "golden.json", figures)
    return parity or NOT_VERIFIED


def _lower_bound(path: Path, figures: Mapping[str, Any]) -> None:
    """Palettes change the picture: no runtime can come closer to torch's than the interpreter did, with some room."""
    measured = figures["image"]["psnr_db"] - GOLDEN_ROOM_DB if "image" in figures else 0.0
    golden = json.loads(path.read_text(encoding="utf-8"))
    golden["min_psnr_db"] = min(golden["min_psnr_db"], round(measured, 1))
    path.write_text(json.dumps(golden, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def artifacts_of(built: Sequence[Built]) -> list[Artifacts]:
    """What the targets are or were made from, each once, published ones first."""
    found: dict[str, Artifacts] = {}
    for artifacts in (artifacts for each in built for artifacts in each.artifacts):
        known = found.get(artifacts.label, artifacts)
        found[artifacts.label] = dataclasses.replace(known, published=known.published or artifacts.published)
    return sorted(found.values(), key=lambda artifacts: not artifacts.published)


def verify_one(
    job: Job, artifacts: Artifacts, bundle: Path, clock: Clock, name: str, *, golden_db: float, isolate: bool
) -> tuple[dict[str, Any], Path]:
    """The parity figures of one set of graphs and the folder of its golden files, which have `golden_db` as the bound
    for every runtime.

    Graphs that are not `published` are assembled in a scratch folder, as the final image needs a bundle that draws.
    """

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            drawn = bundle
            if not artifacts.published:
                drawn = Path(scratch)
                source = Built(
                    target=artifacts.target, precision=artifacts.precision, files=artifacts.files, record={}
                )  # fmt: skip
                assemble(job, [source], drawn)
            request = VerifyRequest(
                source=job.request,
                digests=job.source.digests,
                bundle=drawn,
                components=artifacts.components,
                whole=artifacts.whole,
                out=folder,
                shapes=job.shapes,
                precision=artifacts.precision,
                provider=job.spec.provider,
                prompt=job.prompt,
                negative_prompt="",
                seed=GOLDEN_SEED,
                compare=job.spec.verify and bool(artifacts.keys),
                golden_db=golden_db,
                target=Target.COREML if artifacts.target is Target.COREML else Target.ONNX,
                ports=artifacts.ports,
                lossy=artifacts.compression is not None,
                corners=() if job.span is None else corners(job.span, job.shapes),
            )
            parity = run_verification(request, progress=clock.reporter.detail, isolate=isolate)
        (folder / "parity.json").write_text(json.dumps(parity), encoding="utf-8")

    with clock.stage(name) as record:
        depends = job.verify_depends(artifacts.keys, artifacts.precision, golden_db)
        stage = job.cache.get(VERIFY, {**depends, "target": artifacts.target.value}, build)
        record.cached = stage.cached
        parity: dict[str, Any] = json.loads((stage.path / "parity.json").read_text(encoding="utf-8"))
    return parity, stage.path / "golden"


def open_checked(bundle: Path, *, runtime: str | None, provider: str | None, function: str | None = None) -> Pipeline:
    """A bundle with all its files checked, as `Pipeline.from_bundle` opens it; its Core ML packages by the MIL
    interpreter where there is no Mac."""
    manifest = read_manifest(bundle)
    if sys.platform == "darwin" or resolve_runtime(runtime, manifest) != "coreml":
        return Pipeline.from_bundle(bundle, runtime=runtime, provider=provider, check=True, function=function)
    if provider is not None:
        raise OptionError(f"--provider {provider}: without a Mac the interpreter runs Core ML packages; leave it away")
    from hypersd_export.verify.coreml import interpreted

    verify_files(bundle, manifest)
    packages = interpreted(bundle, manifest.targets["coreml"], function)
    plans = Folder(bundle, function).plans()
    return Pipeline(path=bundle, plans=plans, digest=bundle_digest(bundle), runtime=packages, function=function)

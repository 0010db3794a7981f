"""`hypersd-export coreml-merge`: the packages of several bundles as functions of one, which share their weights.

What the bundles have in common stands once: a package that is the same in all is copied; those that differ, by LoRA or
size, become one package with a function of each bundle's name. Each function has its own plan.json and golden/ in
functions/NAME, and everything else is the first bundle's, which is the default.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_export.bundle.digest import digest_tree
from hypersd_export.bundle.manifest import FILE_NAME, Manifest, bundle_digest, verify_files, write_manifest
from hypersd_export.bundle.packages import package_records
from hypersd_export.bundle.publish import check_destination, staged
from hypersd_export.clock import Clock, Reporter, Silent
from hypersd_export.coreml_compress import Merging
from hypersd_export.coreml_worker import run_apart
from hypersd_export.errors import OptionError, ParityError
from hypersd_export.runtime.folder import FUNCTIONS, Folder
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.targets.coreml import GENERATIONS
from hypersd_export.verify.gates import Gate
from hypersd_export.verify.metrics import reported

COREML = "coreml"
GENERATION = 18
SAME_DB = 90.0
"""Least PSNR of a function's outputs to those of the package that it came from: the ops are the same."""
SEED = 20_29
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_ALIKE = ("deployment_target", "precision", "layout")
"""What has to be the same in all bundles."""


def merge(bundles: Sequence[str], out: Path, *, overwrite: bool = False, reporter: Reporter | None = None) -> Manifest:
    """Merge finished bundles into `out`; returns its manifest.

    bundles: NAME=FOLDER each, or a folder, whose own name is the function's then (other characters as "_").

    Raises:
        OptionError: names, or bundles that cannot go together.
        BundleError, DestinationError: a bundle that is damaged or was changed; the place to write to.
        ParityError: a function does not give what its package gave.
    """
    clock = Clock(reporter or Silent())
    folders = named(bundles)
    check_destination(out, overwrite=overwrite)
    with clock.stage("load"):
        manifests = {name: verify_files(folder) for name, folder in folders.items()}
        check_alike(folders, manifests)
    with staged(out, overwrite=overwrite) as bundle:
        with clock.stage("merge"):
            target = assemble(folders, manifests, bundle, progress=clock.reporter.detail)
        with clock.stage("verify"):
            parity = prove(folders, manifests, bundle, target)
        first = next(iter(manifests.values()))
        (bundle / "README.md").write_text(note(folders, target), encoding="utf-8")
        return write_manifest(
            bundle, hypersd=first.hypersd, base=first.base, loras=first.loras, targets={COREML: target},
            options=first.options, versions=first.versions, parity=parity,
            stages=[record.to_json() for record in clock.records],
        )  # fmt: skip


def named(bundles: Sequence[str]) -> dict[str, Path]:
    """The folders by the names of their functions; raises `OptionError`."""
    if len(bundles) < 2:
        raise OptionError("coreml-merge: give two bundles or more")
    found: dict[str, Path] = {}
    for text in bundles:
        name, is_named, path = text.partition("=")
        folder = Path(path) if is_named else Path(text)
        name = name if is_named else re.sub(r"\W", "_", folder.resolve().name, flags=re.ASCII)
        if not _NAME.fullmatch(name):
            raise OptionError(f"{text}: {name!r} is no name of a function (letters, digits, _); give NAME={folder}")
        if name in found:
            raise OptionError(f"{text}: another bundle is named {name} too; give NAME={folder}")
        found[name] = folder
    return found


def check_alike(folders: Mapping[str, Path], manifests: Mapping[str, Manifest]) -> None:
    """`OptionError` unless the bundles can share packages."""
    first_name, first = next(iter(manifests.items()))
    for name, manifest in manifests.items():
        folder, target = folders[name], manifest.targets.get(COREML)
        if target is None or FUNCTIONS in target:
            what = "has functions already" if target else f"was exported to {', '.join(manifest.targets)}"
            raise OptionError(f"{folder} {what}: merge bundles that hypersd-export --target coreml wrote")
        wanted, alike = target["deployment_target"], f"and {folders[first_name]}"
        if GENERATIONS[wanted] < GENERATION:
            raise OptionError(
                f"{folder} is for {wanted}: packages with several functions need iOS18 or macOS15; export it again "
                "with --deployment-target iOS18"
            )
        if manifest.base["digest"] != first.base["digest"]:
            raise OptionError(
                f"{folder} was made from {manifest.base['name']} of sha256 {manifest.base['digest'][:8]}…, {alike} "
                f"from {first.base['name']} of {first.base['digest'][:8]}…: merge bundles of one base"
            )
        for key in _ALIKE:
            other = first.targets[COREML][key]
            if target[key] != other:
                raise OptionError(
                    f"{folder} has {key.replace('_', ' ')} {target[key]}, {alike} {other}: export them alike"
                )
        names, others = (
            {component: record.packages for component, record in package_records(each.targets[COREML]).items()}
            for each in (manifest, first)
        )
        if names != others:
            raise OptionError(f"{folder} {alike} have other packages (--single-graph, --chunk-unet): export them alike")


def assemble(
    folders: Mapping[str, Path], manifests: Mapping[str, Manifest], bundle: Path, *, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Write the merged bundle but for card and manifest; returns the manifest's `targets["coreml"]`."""
    first_name, first = next(iter(folders.items()))
    skipped = shutil.ignore_patterns(FILE_NAME, "README.md", "*.mlpackage")
    shutil.copytree(first, bundle, ignore=skipped, dirs_exist_ok=True)
    for name, folder in folders.items():
        own = bundle / FUNCTIONS / name
        shutil.copytree(folder / "golden", own / "golden")
        shutil.copyfile(folder / "plan.json", own / "plan.json")
    target = dict(manifests[first_name].targets[COREML])
    target["components"] = {
        component: _component(component, entry, folders, manifests, bundle, progress)
        for component, entry in target["components"].items()
    }
    target[FUNCTIONS] = {
        name: {
            "bundle": bundle_digest(folder),
            "loras": list(manifests[name].loras),
            "width": manifests[name].options["width"],
            "height": manifests[name].options["height"],
            "steps": [entry.steps for entry in Folder(folder).plans().entries],
        }
        for name, folder in folders.items()
    }
    return target


def _component(
    component: str, entry: Mapping[str, Any], folders: Mapping[str, Path], manifests: Mapping[str, Manifest],
    bundle: Path, progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Copy a component's packages where they are the same in all bundles, else merge them; the manifest's entry."""
    digests = [manifest.targets[COREML]["components"][component]["digests"] for manifest in manifests.values()]
    if all(each == digests[0] for each in digests):
        for file in entry["packages"]:
            shutil.copytree(next(iter(folders.values())) / file, bundle / file)
        return dict(entry)
    merged = []
    for file in entry["packages"]:
        path = bundle / file
        task = Merging(sources={name: (folder / file).resolve() for name, folder in folders.items()}, name=path.name)
        merged.append(run_apart(task, path.parent, progress=progress))
    figures = {key: sum(each[key] for each in merged) for key in ("ops", "bytes", "weight_bytes", "bytes_apart")}
    return {
        **entry, **figures, "functions": list(folders),
        "digests": [digest_tree(bundle / file) for file in entry["packages"]],
    }  # fmt: skip


def prove(
    folders: Mapping[str, Path], manifests: Mapping[str, Manifest], bundle: Path, target: Mapping[str, Any]
) -> dict[str, Any]:
    """Hold every function against the package that it came from, and its picture against its golden one."""
    from hypersd_export.verify.coreml import interpreted

    gates: list[Gate] = []
    parity: dict[str, Any] = {}
    for name, folder in folders.items():
        mine = interpreted(bundle, target, name)
        theirs = interpreted(folder, manifests[name].targets[COREML])
        for component, entry in target["components"].items():
            if "functions" in entry:
                gate = Gate(name=f"{component} {name}", least_db=SAME_DB)
                feeds = seeded(theirs.graph(component).inputs)
                outputs, exact = (runtime.graph(component).run(**feeds) for runtime in (mine, theirs))
                for output, value in exact.items():
                    gate.compare(outputs[output], value, f"in {output}")
                gates.append(gate)
        pipeline = Pipeline(path=bundle, plans=Folder(bundle, name).plans(), digest="", runtime=mine, function=name)
        golden = pipeline.golden()
        parity[f"image {name}"] = {"psnr_db": round(reported(golden.psnr_db), 2), "least_db": golden.min_psnr_db}
        if not golden.passed:
            raise ParityError(f"function {name} does not reproduce its golden picture: {golden.line()}")
    failures = [failure for gate in gates for failure in gate.failures]
    if failures:
        raise ParityError(f"functions that are not their packages: {', '.join(failures)}")
    return {gate.name: gate.to_json() for gate in gates} | parity


def seeded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of these shapes and types: noise, small ids, and the timestep 500."""
    random = np.random.default_rng(SEED)
    return {
        name: np.full(tensor.shape, 500.0) if name == "timestep"
        else random.integers(0, 100, tensor.shape) if np.dtype(tensor.dtype).kind == "i" or name.endswith("input_ids")
        else random.standard_normal(tensor.shape)
        for name, tensor in inputs.items()
    }  # fmt: skip


def note(folders: Mapping[str, Path], target: Mapping[str, Any]) -> str:
    """README.md: what the functions are and how they are called."""
    first = next(iter(folders.values()))
    merged = {c: entry for c, entry in target["components"].items() if "functions" in entry}
    lines = [
        f"| `{name}` | {each['width']} x {each['height']} | {', '.join(map(str, each['steps']))} | "
        f"{', '.join(lora['file'] for lora in each['loras']) or 'none'} |"
        for name, each in target[FUNCTIONS].items()
    ]
    sizes = ", ".join(
        f"{component} {entry['bytes'] / 1e6:.1f} MB (apart {entry['bytes_apart'] / 1e6:.1f} MB)"
        for component, entry in merged.items()
    )
    default = next(iter(folders))
    return f"""{(first / "README.md").read_text(encoding="utf-8").rstrip()}

## Functions

Several exports in packages that share their weights; what is above is about the default, `{default}`.

| function | picture | steps | LoRA |
|---|---|---|---|
{chr(10).join(lines)}

With several functions: {sizes}. Each has its plan.json and golden/ in `{FUNCTIONS}/NAME`.

    hypersd-generate BUNDLE --function {default} --prompt …

In an app, not compiled here: `functionName` of the `MLModelConfiguration` that a model is loaded with (from iOS 18,
macOS 15 on).
"""

"""`hypersd-export ort-cuda`: a bundle of ONNX graphs with onnxruntime's own CUDA ops, for `--provider cuda` alone.

The portable bundle that it is made from was held against torch; here its golden picture is drawn again if this machine
has the provider, and the new bundle says whether it was.
"""

import shutil
from pathlib import Path
from typing import Any

from hypersd_export.bundle.manifest import (
    FILE_NAME,
    NOT_VERIFIED,
    Manifest,
    bundle_digest,
    verify_files,
    write_manifest,
)
from hypersd_export.bundle.publish import check_destination, staged
from hypersd_export.bundle.span import Span
from hypersd_export.clock import Clock, Reporter, Silent
from hypersd_export.errors import BundleError, HypersdError, OptionError, ParityError
from hypersd_export.graphs.spec import Component
from hypersd_export.runtime.folder import Folder
from hypersd_export.runtime.onnx import ORT_CUDA, PIPELINE_FILE, OnnxRuntime, resolve_provider
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.targets import onnx, onnx_cuda, onnx_fp16
from hypersd_export.verify.metrics import reported


def to_ort_cuda(bundle: Path, out: Path, *, overwrite: bool = False, reporter: Reporter | None = None) -> Manifest:
    """Write `bundle` with onnxruntime's CUDA ops to `out`; returns the new manifest.

    Raises:
        OptionError: what the bundle is of cannot be rewritten.
        BundleError, DestinationError: a bundle that is damaged or was changed; the place to write to.
        ParityError: the golden picture is not reproduced by this machine's CUDA provider.
    """
    clock = Clock(reporter or Silent())
    check_destination(out, overwrite=overwrite)
    with clock.stage("load"):
        manifest = verify_files(bundle)
        check_bundle(bundle, manifest)
    with staged(out, overwrite=overwrite) as folder:
        with clock.stage("fuse"):
            counts = rewrite(bundle, folder, manifest)
        with clock.stage("verify"):
            parity = prove(folder)
        clock.reporter.note(f"golden picture: {_said(parity)}")
        (folder / "README.md").write_text(_card(bundle, counts, parity), encoding="utf-8")
        target = {**manifest.targets["onnx"], "variant": ORT_CUDA, "from": bundle_digest(bundle), "fused": counts}
        return write_manifest(
            folder, hypersd=manifest.hypersd, base=manifest.base, loras=manifest.loras, targets={"onnx": target},
            options=manifest.options, versions=manifest.versions, parity=parity,
            stages=[record.to_json() for record in clock.records],
        )  # fmt: skip


def check_bundle(bundle: Path, manifest: Manifest) -> None:
    """`OptionError` unless the bundle has portable ONNX graphs of fixed shapes, a component each."""
    if list(manifest.targets) != ["onnx"]:
        raise OptionError(f"{bundle} was exported to {', '.join(manifest.targets)}: export it with --target onnx alone")
    if manifest.targets["onnx"].get("variant"):
        raise OptionError(f"{bundle} has {manifest.targets['onnx']['variant']} graphs already")
    if (bundle / PIPELINE_FILE).is_file():
        raise OptionError(f"{bundle} is one graph: export it without --single-graph")
    if Span.of(manifest.options) is not None:
        raise OptionError(f"{bundle} has graphs of free shapes: export it without --dynamic")


def rewrite(bundle: Path, folder: Path, manifest: Manifest) -> dict[str, dict[str, int]]:
    """Copy the bundle into `folder` with the graphs rewritten; returns how many ops each component has of each kind."""
    graphs = onnx.MODEL_FILE, onnx.DATA_FILE
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns(FILE_NAME, *graphs, ".*"), dirs_exist_ok=True)
    found, built = {}, manifest.targets["onnx"]["components"]
    for component in Component:
        path = bundle / component / onnx.MODEL_FILE
        if not path.is_file():
            continue
        model = onnx_fp16.read(path)
        counts = onnx_cuda.fuse(model, kept=built.get(component, {}).get("fp32_nodes", ()))
        if any(counts.values()):
            found[component.value] = counts
            onnx.write(model, folder / component, precision=manifest.targets["onnx"]["precision"])
        else:
            for file in (path.with_name(name) for name in graphs):
                if file.is_file():
                    shutil.copyfile(file, folder / component / file.name)
    if not found:
        raise BundleError(f"{bundle} has no group norm and no attention that onnxruntime's CUDA ops could stand for")
    return found


def prove(folder: Path) -> dict[str, Any] | str:
    """The golden picture by the CUDA provider, as parity figures; "not verified" where there is none of either."""
    try:
        resolve_provider("cuda")
    except HypersdError:
        return NOT_VERIFIED
    if not (folder / "golden").is_dir():
        return NOT_VERIFIED
    runtime = OnnxRuntime(path=folder, provider="cuda")
    report = Pipeline(path=folder, plans=Folder(folder).plans(), digest="", runtime=runtime).golden()
    if not report.passed:
        raise ParityError(f"not the golden picture on cuda: {report.line()}. Nothing was published")
    return {"image": {"psnr_db": round(reported(report.psnr_db), 2), "least_db": report.min_psnr_db}}


def _said(parity: dict[str, Any] | str) -> str:
    if isinstance(parity, str):
        return "not drawn, as this machine has no CUDA provider; hypersd-export verify BUNDLE draws it on one that has"
    return f"{parity['image']['psnr_db']:.1f} dB on cuda"


def _card(bundle: Path, counts: dict[str, dict[str, int]], parity: dict[str, Any] | str) -> str:
    """The portable bundle's card, and what is different."""
    path = bundle / "README.md"
    text = path.read_text(encoding="utf-8").rstrip() + "\n" if path.is_file() else ""
    ops = "; ".join(
        f"{component}: " + ", ".join(f"{count} {op}" for op, count in found.items() if count)
        for component, found in counts.items()
    )
    return (
        f"{text}\n## For onnxruntime's CUDA provider alone\n\nThese graphs have ops of the domain com.microsoft "
        f"({ops}) in place of portable ones. The parity above is that of the portable bundle of digest "
        f"{bundle_digest(bundle)[:12]}; of this one the golden picture was: {_said(parity)}.\n"
    )

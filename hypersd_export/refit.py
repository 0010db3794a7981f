"""`hypersd-export refit`: a bundle again, with another LoRA and all else as it was.

The options stand in the bundle's manifest, so that nothing has to be said twice; the plan is chosen as an export would
with the new LoRA. ONNX graphs that a LoRA touches are the former ones with other weights (`targets.onnx_refill`): every
file is what a fresh export writes. The others come out of the cache, and where that does not have a former graph any
more it is exported again. TensorRT engines that were built with `--weights refit` or `stripped` get the new weights on
the GPU, without another build.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hypersd_export.bundle.manifest import Manifest, read_manifest
from hypersd_export.component import Former
from hypersd_export.errors import BundleError, OptionError
from hypersd_export.spec import CoreMLFlags, DynamicFlags, EngineFlags, ExportSpec, PlanFlags
from hypersd_export.targets import PRECISIONS, Target


def refit_spec(
    bundle: Path,
    loras: Sequence[str],
    out: Path,
    *,
    base: str | None = None,
    unet: str | None = None,
    vae: str | None = None,
    overwrite: bool = False,
    cache_dir: Path | None = None,
) -> ExportSpec:
    """The export of `bundle` with other LoRAs.

    Args:
        bundle: what was exported.
        loras: FILE[:SCALE] each.
        out: the new bundle.
        base, unet, vae: where they are now, if they are not hub ids: a manifest has no paths.
        overwrite, cache_dir: as in `ExportSpec`.

    Raises:
        BundleError: the manifest does not say how the bundle was made.
        OptionError: there is no LoRA, or the engines hold weights that cannot be changed.
    """
    if not loras:
        raise OptionError("refit: name the LoRA with --lora FILE[:SCALE]")
    manifest = read_manifest(bundle)
    if "functions" in manifest.targets.get(Target.COREML.value, {}):
        raise OptionError(f"refit: {bundle} holds several exports; refit those that it was merged of, and merge again")
    if manifest.targets.get(Target.ONNX.value, {}).get("variant"):
        raise OptionError(f"refit: {bundle} was rewritten by ort-cuda; refit the bundle that it was made from")
    said = {name: value for name, value in (("base", base), ("unet", unet), ("vae", vae)) if value is not None}
    try:
        options = _options(manifest) | said
        return ExportSpec(
            **options,
            loras=tuple(loras),
            out=out,
            overwrite=overwrite,
            cache_dir=cache_dir,
            refit_from=bundle.resolve(),
        )
    except (TypeError, KeyError, ValueError) as error:
        raise BundleError(
            f"{bundle} does not say how it was made ({str(error)[:80]}): export again with --lora {loras[0]}"
        ) from error


def _options(manifest: Manifest) -> dict[str, Any]:
    """The fields of an `ExportSpec` from a manifest; KeyError, TypeError or ValueError if they are not there."""
    options = manifest.options
    targets = tuple(Target(name) for name in manifest.targets)
    names = ("base", "unet", "vae", "variant", "revision", "batch", "provider", "single_graph", "unroll", "opset",
             "verify", "allow_pickle")  # fmt: skip
    plan: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options["plan"].items()
    }
    found = {name: options[name] for name in names}
    found |= {
        "targets": targets,
        "plan": PlanFlags(**plan),
        "precision": _precision(options["precision"]),
        "quantize": options.get("quantize"),
        **{name: bool(options.get(name, True)) for name in ("scan", "golden")},
        "size": None if options["size"] is None else tuple(options["size"]),
        "dynamic": _dynamic(options.get("dynamic") or {}),
    }
    if Target.TENSORRT in targets:
        found["engines"] = _engine_flags(manifest.targets[Target.TENSORRT.value])
    if Target.COREML in targets:
        found["coreml"] = CoreMLFlags(**options["coreml"])
    return found


def _dynamic(found: Mapping[str, Any]) -> DynamicFlags:
    """The `--dynamic` of a manifest; a bundle from before there was any has none."""
    batch, size = found.get("batch"), found.get("size")
    return DynamicFlags(
        batch=None if batch is None else (batch[0], batch[1]),
        size=None if size is None else (tuple(size[0]), tuple(size[1])),
    )


def _precision(found: str | Mapping[str, str]) -> str | None:
    """The `--precision` that gives each target the one that it has."""
    each = found if isinstance(found, Mapping) else {Target.ONNX.value: found}
    if all(value == PRECISIONS[Target(name)][0] for name, value in each.items()):
        return None
    return next(iter(each.values()))


def _engine_flags(target: Mapping[str, Any]) -> EngineFlags:
    """The options of the engines, whose library is the one that made them and no other."""
    if target["weights"] == "full":
        raise OptionError(
            "refit: these engines hold weights that cannot be changed; export again with the new --lora, "
            "and with --weights refit on a GPU for engines that can be refitted"
        )
    first = next(iter(target["engines"].values()))
    return EngineFlags(
        flavour=target["flavour"],
        capabilities=tuple(target["capabilities"]),
        weights=target["weights"],
        level=first["options"]["optimization_level"],
    )


def former_of(
    bundle: Path, depends: Mapping[str, Any], lookup: Callable[[Mapping[str, Any]], Path | None]
) -> Former | None:
    """The component of a bundle that is refitted, out of the cache; None if it is not there any more.

    `depends`: what the new one depends on; `lookup`: the folder of the stage that depends on this, if there is one.
    """
    manifest, component = read_manifest(bundle), depends["component"]
    fused = [
        each for each in manifest.targets.get(Target.ONNX.value, {}).get("fused", ()) if each["component"] == component
    ]
    digests = {(lora["file"], lora["scale"]): lora["digest"] for lora in manifest.loras}
    loras = [{"digest": digests.get((each["file"], each["scale"])), "scale": each["scale"]} for each in fused]
    stage = lookup({**depends, "loras": loras})
    modules = frozenset(name for each in fused for name in each["relative_norms"])
    return None if stage is None else Former(stage=stage, modules=modules)


def check_same_base(bundle: Path, digest: str) -> None:
    """`BundleError` unless the base with this digest is the one that `bundle` was made from."""
    base = read_manifest(bundle).base
    if base["digest"] != digest:
        raise BundleError(
            f"{bundle} was made from {base['name']} of sha256 {base['digest'][:8]}…, and this one has {digest[:8]}…: "
            "name the right one with --base, --unet and --vae, or export again"
        )

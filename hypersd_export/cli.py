"""`hypersd-export`: the bare form exports; `inspect`, `verify` and `cache` look after what was exported.

Nothing heavy is imported at module level: `--help` must not wait for torch.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hypersd_export.console import Progress, one_line_errors
from hypersd_export.errors import BundleError, tolerate_any_text

if TYPE_CHECKING:
    from hypersd_export.spec import ExportSpec

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
cache_app = typer.Typer(help="The finished stages that are kept for the next export.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

CacheDir = Annotated[Path | None, typer.Option(help="Where finished stages are kept (default: the XDG cache).")]
Bundle = Annotated[Path, typer.Argument(help="A folder that hypersd-export wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that stands there.")]


@app.callback(invoke_without_command=True)
def export_command(
    context: typer.Context,
    target: Annotated[list[str] | None, typer.Option(help="onnx, tensorrt, coreml or all (default: onnx).")] = None,
    base: Annotated[str, typer.Option(help="builtin, a diffusers folder, a .safetensors or a hub id.")] = "builtin",
    unet: Annotated[str | None, typer.Option(help="Another UNet: folder, file or hub id.")] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE: folder, file or hub id.")] = None,
    variant: Annotated[str | None, typer.Option(help="Weight variant of a folder or hub id, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="Fuse this LoRA; repeatable; `none` for none.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="N[,N…]", help="Step counts; the first is the default.")] = None,
    timesteps: Annotated[str | None, typer.Option(metavar="T,T,…", help="Explicit timesteps, falling.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, tcd, lcm, euler, euler_ancestral, flow_euler or apple-dpmpp.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Fresh noise of ddim and tcd, 0 to 1.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of u + w (c - u); up to 1 is none.")] = None,
    prediction_type: Annotated[str | None, typer.Option(help="epsilon, v_prediction, sample or flow.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or fp16 (default: onnx fp32, the others fp16).")] = None,
    batch: Annotated[int, typer.Option(help="Images in one call of the graphs.")] = 1,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels (default: those of the base).")] = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="ONNX graphs for a range: batch=1:4 or size=256x256:768x768; repeatable."),
    ] = None,
    provider: Annotated[str, typer.Option(help="onnxruntime's provider: graphs are for it, compared on it.")] = "cpu",
    single_graph: Annotated[bool, typer.Option("--single-graph", help="One graph for the whole pipeline.")] = False,
    unroll: Annotated[bool, typer.Option("--unroll", help="Single graph without a Loop.")] = False,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 23.")] = 20,
    trt_flavour: Annotated[
        str, typer.Option(help="rtx (needs no GPU), classic (builds on the GPU it is for) or auto.")
    ] = "auto",
    compute_capability: Annotated[
        str | None, typer.Option(metavar="X.Y[,X.Y…]", help="GPUs of the TensorRT engines (default: all that can be).")
    ] = None,
    weights: Annotated[str, typer.Option(help="Of TensorRT engines: full, stripped or refit.")] = "full",
    trt_level: Annotated[int, typer.Option(help="TensorRT's builder optimisation level, 0 to 5.")] = 3,
    deployment_target: Annotated[
        str, typer.Option(help="Of Core ML packages: iOS16, iOS17, iOS18, macOS13, macOS14 or macOS15.")
    ] = "iOS17",
    attention: Annotated[
        str, typer.Option(help="Of Core ML's UNet: original, split-einsum or split-einsum-v2.")
    ] = "original",
    lora_apart: Annotated[
        bool, typer.Option("--lora-apart", help="Core ML's LoRAs beside the weights, for coreml-merge to share these.")
    ] = False,
    palettize: Annotated[int | None, typer.Option(help="Bits a weight of Core ML packages: 8, 6, 4, 3 or 2.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Weights of ONNX graphs and Core ML packages as integers: int8 or int4.")
    ] = None,
    size_budget: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Palettes with bits by layer, in this share of the UNet package's size."),
    ] = None,
    chunk_unet: Annotated[bool, typer.Option("--chunk-unet", help="Core ML's UNet as two packages.")] = False,
    compute_units: Annotated[
        str, typer.Option(help="What Core ML may use: all, cpu-only, cpu-and-gpu or cpu-and-ne.")
    ] = "all",
    layout: Annotated[str, typer.Option(help="Of Core ML packages: plain, or apple (for Apple's runtime).")] = "plain",
    allow_approximate_schedule: Annotated[
        bool, typer.Option("--allow-approximate-schedule", help="Let Apple's runtime play a plan that is only near.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The bundle's folder.")] = Path("bundle"),
    overwrite: Overwrite = False,
    cache_dir: CacheDir = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare with torch.")] = False,
    no_golden: Annotated[
        bool, typer.Option("--no-golden", help="With --no-verify: no golden picture either, so no torch in float32.")
    ] = False,
    no_scan: Annotated[
        bool,
        typer.Option("--no-scan", help="Do not look for ops that overflow in fp16 graphs (pictures may be black)."),
    ] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes that build graphs, 1 or 2 (default: what pays).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .ckpt and .bin (weights only).")] = False,
) -> None:
    """Fuse a few-step LoRA into a diffusion pipeline and export it with its schedule fixed inside."""
    if context.invoked_subcommand is not None:
        return
    with one_line_errors(out, cache_dir):
        from hypersd_export.spec import (
            CoreMLFlags,
            EngineFlags,
            ExportSpec,
            PlanFlags,
            parse_dynamic,
            parse_ints,
            parse_loras,
            parse_size,
            parse_targets,
        )
        from hypersd_export.targets import Target
        from hypersd_export.targets.tensorrt import parse_capabilities

        targets = parse_targets(target)
        spec = ExportSpec(
            targets=targets,
            base=base,
            unet=unet,
            vae=vae,
            variant=variant,
            revision=revision,
            loras=parse_loras(lora),
            plan=PlanFlags(
                steps=parse_ints("--steps", steps),
                timesteps=parse_ints("--timesteps", timesteps),
                scheduler=scheduler,
                eta=eta,
                guidance=guidance,
                prediction_type=prediction_type,
            ),
            precision=precision,
            batch=batch,
            size=parse_size(size),
            dynamic=parse_dynamic(dynamic),
            provider=provider,
            single_graph=single_graph,
            unroll=unroll,
            opset=opset,
            quantize=None if targets == (Target.COREML,) else quantize,
            engines=EngineFlags(
                flavour=trt_flavour,
                capabilities=parse_capabilities(compute_capability),
                weights=weights,
                level=trt_level,
            ),
            coreml=CoreMLFlags(
                deployment_target=deployment_target,
                attention=attention,
                lora_apart=lora_apart,
                palettize=palettize,
                quantize=quantize if Target.COREML in targets else None,
                size_budget=size_budget,
                chunk_unet=chunk_unet,
                compute_units=compute_units,
                layout=layout,
                approximate=allow_approximate_schedule,
            ),
            out=out,
            overwrite=overwrite,
            cache_dir=cache_dir,
            verify=not no_verify,
            golden=not no_golden,
            scan=not no_scan,
            jobs=jobs,
            allow_pickle=allow_pickle,
        )
        if dry_run:
            _dry_run(spec)
        else:
            _export(spec)


def _dry_run(spec: "ExportSpec") -> None:
    """Everything that is decided before the work, as JSON."""
    from hypersd_export.bundle.publish import check_destination
    from hypersd_export.job import open_job

    check_destination(spec.out, overwrite=spec.overwrite)
    job = open_job(spec)
    base = job.source.base
    plan = {
        "base": {"name": base.name, "family": str(base.family), "digest": base.digest},
        "loras": job.lora_records(),
        "options": job.options(),
        "plans": job.plans.to_json()["entries"],
        "out": str(spec.out.resolve()),
        "cache": str(job.cache.root),
    }
    typer.echo(json.dumps(plan, indent=2, ensure_ascii=False))


def _export(spec: "ExportSpec") -> None:
    from hypersd_export.collector import none_at_exit
    from hypersd_export.export import export

    none_at_exit()
    with Progress() as progress:
        exported = export(spec, reporter=progress)
    progress.table(exported.stages)
    parity = exported.manifest.parity
    progress.note(f"parity with torch: {_parity_line(parity)}")
    typer.echo(str(exported.path))


@app.command()
def inspect(bundle: Bundle, as_json: AsJson = False) -> None:
    """Say what a bundle is: base, LoRAs, plans, targets, parity, and what each stage took."""
    with one_line_errors():
        from hypersd_export.assemble import summary
        from hypersd_export.bundle.manifest import bundle_digest, read_manifest
        from hypersd_export.diffusion import PlanFile
        from hypersd_export.plan_choice import describe

        manifest = read_manifest(bundle)
        plans = PlanFile.from_json(_read_json(bundle / "plan.json"))
        if as_json:
            data = {"digest": bundle_digest(bundle), **summary(manifest), "plans": plans.to_json()["entries"]}
            typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
            return
        base, files = manifest.base, manifest.files
        lines = [("base", f"{base['name']} ({base['family']}), sha256 {base['digest'][:16]}…")]
        lines += [("LoRA", f"{lora['file']} at scale {lora['scale']:g} ({lora['format']})") for lora in manifest.loras]
        lines += [("plan", f"{describe(entry.plan)} ({entry.source})") for entry in plans.entries]
        options = manifest.options
        lines.append(("picture", f"{options.get('width')} x {options.get('height')} px, batch {options.get('batch')}"))
        lines += [
            ("target", f"{name}: {t.get('precision')}{_listed(t, 'opset')}{_listed(t, 'variant')}")
            for name, t in manifest.targets.items()
        ]
        lines.append(("parity", _parity_line(manifest.parity)))
        size = sum(entry.bytes for entry in files.values()) / 1e6
        lines.append(("files", f"{len(files)}, {size:,.1f} MB; hypersd {manifest.hypersd}, {manifest.created}"))
        lines.append(("digest", bundle_digest(bundle)))
        for name, text in lines:
            typer.echo(f"{name:<8} {text}")


def _listed(target: dict[str, Any], key: str) -> str:
    return f", {key} {target[key]}" if key in target else ""


def _parity_line(parity: Any) -> str:
    if isinstance(parity, str):
        return parity
    decibels = {name: float(figures.get("psnr_db", "nan")) for name, figures in parity.items()}
    return ", ".join(f"{name} {'equal' if db >= 200 else f'{db:.0f} dB'}" for name, db in decibels.items())


@app.command()
def verify(
    bundle: Bundle,
    runtime: Annotated[
        str | None, typer.Option(help="onnx, tensorrt or coreml; the bundle's first target by default.")
    ] = None,
    provider: Annotated[str | None, typer.Option(help="onnxruntime's: cpu (the default), cuda, …")] = None,
    function: Annotated[str | None, typer.Option(help="Of packages that have several (default: the first).")] = None,
    as_json: AsJson = False,
) -> None:
    """Check every file's sha256 and reproduce the golden picture, without torch."""
    with one_line_errors():
        from hypersd_export.proof import open_checked
        from hypersd_export.verify.metrics import reported

        pipeline = open_checked(bundle, runtime=runtime, provider=provider, function=function)
        golden = pipeline.golden()
        if as_json:
            data = {"digest": pipeline.digest, "passed": golden.passed, "psnr_db": reported(golden.psnr_db)}
            typer.echo(json.dumps(data))
        elif golden.passed:
            typer.echo(f"all files as exported; {golden.line()}")
        if not golden.passed:
            raise BundleError(f"{bundle}: the golden picture is not reproduced on {pipeline.provider}: {golden.line()}")


@app.command()
def refit(
    bundle: Bundle,
    lora: Annotated[list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="The LoRA; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="The new bundle's folder.")] = Path("bundle-refitted"),
    base: Annotated[str | None, typer.Option(help="Where the base is now (default: the hub id or builtin).")] = None,
    unet: Annotated[str | None, typer.Option(help="Where the other UNet is now.")] = None,
    vae: Annotated[str | None, typer.Option(help="Where the other VAE is now.")] = None,
    overwrite: Overwrite = False,
    cache_dir: CacheDir = None,
) -> None:
    """Make a bundle again with another LoRA; all other options are those in its manifest."""
    with one_line_errors(out, cache_dir):
        from hypersd_export.refit import refit_spec

        where = {"base": base, "unet": unet, "vae": vae}
        _export(refit_spec(bundle, lora or [], out, **where, overwrite=overwrite, cache_dir=cache_dir))


@app.command()
def coreml_merge(
    bundles: Annotated[list[str], typer.Argument(metavar="[NAME=]BUNDLE…", help="Bundles of one base, for iOS18.")],
    out: Annotated[Path, typer.Option(help="The new bundle's folder.")] = Path("bundle-merged"),
    overwrite: Overwrite = False,
) -> None:
    """Make one bundle of several for other LoRAs or sizes, whose Core ML packages share their weights."""
    with one_line_errors(out):
        from hypersd_export.coreml_merge import merge

        with Progress() as progress:
            manifest = merge(bundles, out, overwrite=overwrite, reporter=progress)
        for name, entry in manifest.targets["coreml"]["components"].items():
            if "functions" in entry:
                progress.note(f"{name}: {entry['bytes'] / 1e6:.1f} MB, apart {entry['bytes_apart'] / 1e6:.1f} MB")
        progress.note(f"parity of the functions: {_parity_line(manifest.parity)}")
        typer.echo(str(out.resolve()))


@app.command()
def ort_cuda(
    bundle: Annotated[Path, typer.Argument(help="A bundle of ONNX graphs of fixed shapes.")],
    out: Annotated[Path, typer.Option(help="The new bundle's folder.")] = Path("bundle-ort-cuda"),
    overwrite: Overwrite = False,
) -> None:
    """Make a bundle with onnxruntime's own CUDA ops inside, which runs with --provider cuda alone."""
    with one_line_errors(out):
        from hypersd_export.ort_cuda import to_ort_cuda

        with Progress() as progress:
            manifest = to_ort_cuda(bundle, out, overwrite=overwrite, reporter=progress)
        for name, counts in manifest.targets["onnx"]["fused"].items():
            progress.note(f"{name}: " + ", ".join(f"{count} {op}" for op, count in counts.items()))
        typer.echo(str(out.resolve()))


@cache_app.command("list")
def cache_list(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """List the finished stages: name, size, when it was last used."""
    import datetime

    with one_line_errors(cache_dir=cache_dir):
        cache = _cache(cache_dir)
        entries = cache.entries()
        if as_json:
            rows = [
                {"name": e.name, "key": e.key, "size_bytes": e.size_bytes, "last_used": e.last_used} for e in entries
            ]
            typer.echo(json.dumps({"root": str(cache.root), "entries": rows}))
            return
        for entry in entries:
            used = datetime.datetime.fromtimestamp(entry.last_used).isoformat(" ", "minutes")
            typer.echo(f"{entry.name:<20} {entry.key[:12]} {entry.size_bytes / 1e6:10,.1f} MB  {used}")
        total = sum(entry.size_bytes for entry in entries) / 1e6
        typer.echo(f"{len(entries)} stages, {total:,.1f} MB in {cache.root}")


@cache_app.command("prune")
def cache_prune(
    cache_dir: CacheDir = None,
    older_than_days: Annotated[
        float | None, typer.Option(min=0.0, help="Only what was not used for so long (default: everything).")
    ] = None,
) -> None:
    """Delete finished stages, and the kernels that GPUs compiled of TensorRT engines."""
    with one_line_errors(cache_dir=cache_dir):
        from hypersd_export.runtime.tensorrt import prune_kernels

        cache = _cache(cache_dir)
        count, freed = cache.prune(older_than_days=older_than_days)
        kernels, more = prune_kernels(cache.root, older_than_days=older_than_days)
        compiled = f" and {kernels} files of compiled kernels" if kernels else ""
        typer.echo(f"{count} stages{compiled} deleted, {(freed + more) / 1e6:,.1f} MB freed in {cache.root}")


def _cache(cache_dir: Path | None) -> Any:
    from hypersd_export.bundle.cache import StageCache, default_cache_dir

    return StageCache(cache_dir or default_cache_dir())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path} ({str(error)[:80]}): export the bundle again") from error


def main() -> None:
    """Entry point of the console script."""
    tolerate_any_text()
    app()


if __name__ == "__main__":
    main()

"""`hypersd-generate BUNDLE --prompt TEXT`: pictures from a bundle, with no torch in sight.

Only typer is imported at the top: NumPy, onnxruntime, tokenizers and Pillow come when there is work for them.
"""

import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from hypersd_export.errors import DestinationError, HypersdError, OptionError, tolerate_any_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from hypersd_export.runtime.pipeline import Pipeline
    from hypersd_export.runtime.result import Result
    from hypersd_export.runtime.text import SizeHints

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the command line asked for, apart from the bundle."""

    prompts: tuple[str, ...]
    negative_prompt: str
    guidance: float | None
    steps: int | None
    seed: int
    num_images: int
    init_image: Path | None
    strength: float | None
    out: Path | None
    grid: bool
    enlarge: int
    size: tuple[int, int] | None = None
    size_hints: "SizeHints | None" = None


@app.command(no_args_is_help=True)
def generate(
    bundle: Annotated[Path, typer.Argument(help="Folder that hypersd-export wrote.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; can be given several times.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with one prompt a line.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to steer away from (plans with CFG).")] = "",
    guidance: Annotated[float | None, typer.Option(help="Scale of u + w (c - u) (plans with CFG).")] = None,
    steps: Annotated[int | None, typer.Option(help="Which table of plan.json; the first if not given.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same picture everywhere.")] = 0,
    num_images: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Of bundles that draw a range of sizes (default: their own).")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures at once, of bundles that draw a range of them.")] = None,
    init_image: Annotated[Path | None, typer.Option(help="Start from this picture.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far to leave --init-image, 0 to 1; 0.6.")] = None,
    original_size: Annotated[
        str | None, typer.Option(metavar="WxH", help="SDXL is told that its picture was of this size once.")
    ] = None,
    crop: Annotated[
        str | None, typer.Option(metavar="LEFT,TOP", help="SDXL is told that its picture was cut off here.")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(metavar="WxH", help="SDXL is told that its picture is of this size.")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="onnx, tensorrt or coreml; the bundle's first target if not given.")
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="onnxruntime's: cpu (the default), cuda, tensorrt, coreml, directml, openvino, …")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; one per core if not given.")] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="With --provider cuda: capture the UNet's call and replay it.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A .png file (replaced if there), or a folder; the current one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    grid: Annotated[bool, typer.Option("--grid", help="One PNG, a row of pictures for each prompt.")] = False,
    enlarge: Annotated[int, typer.Option(help="Write each pixel as a square of so many.")] = 1,
    function: Annotated[
        str | None, typer.Option(help="Of Core ML packages with several functions: which one (default: the first).")
    ] = None,
    golden: Annotated[bool, typer.Option("--golden", help="Reproduce the bundle's golden picture.")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare sha256 of every file first.")] = True,
) -> None:
    """Make pictures from an exported bundle."""
    if golden == bool(prompt or prompt_file):
        raise typer.BadParameter("give --prompt or --prompt-file, or else --golden alone")
    try:
        began = time.perf_counter()
        if not golden:
            prompts = (*(prompt or ()), *(_read_prompts(prompt_file) if prompt_file else ()))
            request = Request(
                prompts=prompts, negative_prompt=negative_prompt, guidance=guidance, steps=steps, seed=seed,
                num_images=num_images, init_image=init_image, strength=strength, out=out, grid=grid, enlarge=enlarge,
                size=_pair("--size", size, "x"), size_hints=_size_hints(original_size, crop, target_size),
            )  # fmt: skip
            check_out(request)
        from hypersd_export.runtime.pipeline import Pipeline

        pipeline = Pipeline.from_bundle(
            bundle, runtime=runtime, provider=provider, check=check, threads=threads, function=function,
            cuda_graph=cuda_graph, batch=batch,
        )  # fmt: skip
        if batch is not None and pipeline.span is None:
            raise OptionError(
                f"--batch {batch}: this bundle draws as many at once as it was exported for; leave it away"
            )
        opened = time.perf_counter() - began
        if golden:
            _golden(pipeline, as_json)
        else:
            _generate(pipeline, request, as_json, opened)
    except HypersdError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("error: interrupted", err=True)
        raise typer.Exit(_INTERRUPTED) from None


def _read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read --prompt-file {path}: {str(error)[:80]}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise OptionError(f"--prompt-file {path} has no prompt: write one a line")
    return prompts


def _size_hints(original: str | None, crop: str | None, target: str | None) -> "SizeHints | None":
    """What SDXL is told, None where nothing is said."""
    if original is None and crop is None and target is None:
        return None
    from hypersd_export.runtime.text import SizeHints

    left, top = _pair("--crop", crop, ",") or (0, 0)
    sizes = {"original": _pair("--original-size", original, "x"), "target": _pair("--target-size", target, "x")}
    return SizeHints(crop=(left, top), **sizes)


def _pair(option: str, text: str | None, between: str) -> tuple[int, int] | None:
    """Two whole numbers of an option."""
    if text is None:
        return None
    first, _, second = text.lower().partition(between)
    try:
        return int(first), int(second)
    except ValueError:
        raise OptionError(f"{option} {text}: two whole numbers with {between!r} between them") from None


def _slug(prompt: str) -> str:
    """A file name's worth of the prompt."""
    words = "".join(c if c.isalnum() and c.isascii() else " " for c in prompt.lower()).split()
    return "-".join(words)[:40].rstrip("-") or "picture"


def out_files(request: Request) -> list[Path]:
    """The files that a request writes, prompt by prompt, or the one grid.

    A name that ends in .png is that file (numbered if there are several), anything else a folder.
    """
    prompts, count = request.prompts, request.num_images
    total = 1 if request.grid else len(prompts) * count
    out = request.out or Path()
    if out.suffix.lower() == ".png":
        return [out] if total == 1 else [out.with_name(f"{out.stem}-{n}{out.suffix}") for n in range(total)]
    if request.grid:
        return [out / f"{_slug(prompts[0])}-{request.seed}-grid.png"]
    return [
        out / (f"{number:03d}-" * (len(prompts) > 1) + f"{_slug(prompt)}-{request.seed}-{index}.png")
        for number, prompt in enumerate(prompts)
        for index in range(count)
    ]


def check_out(request: Request) -> None:
    """Refuse, before the work, an --out that cannot be written and options that contradict each other."""
    from hypersd_export.bundle.disk import existing_ancestor

    out = request.out
    if not 1 <= request.enlarge <= 64:
        raise OptionError(f"--enlarge {request.enlarge}: must be from 1 to 64")
    if request.strength is not None and request.init_image is None:
        raise OptionError("--strength needs --init-image")
    if request.num_images < 1:
        raise OptionError(f"--num-images {request.num_images}: must be at least 1")
    if out is not None and out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise OptionError(f"--out {out}: pictures are written as PNG; name a .png file or a folder")
    files = out_files(request)
    taken = next((path for path in files if path.is_dir()), None)
    if taken is not None:
        raise DestinationError(f"{taken} is a folder: choose another --out")
    ancestor = existing_ancestor(files[0].parent)
    if not ancestor.is_dir():
        raise DestinationError(f"cannot write to {files[0].parent}: {ancestor} is a file; choose another --out")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise DestinationError(f"cannot write to {files[0].parent}: {ancestor} is not writable; choose another --out")


@contextmanager
def _warnings_as_lines(collected: list[str]) -> Iterator[None]:
    """Print our own warnings as one line on stderr each, and collect them."""
    from hypersd_export.runtime.graph import Notice

    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, Notice):
                usual(message, category, filename, lineno, file, line)
                return
            collected.append(str(message))
            typer.echo(f"warning: {' '.join(str(message).split())}", err=True)

        warnings.showwarning = show
        yield


def _generate(pipeline: "Pipeline", request: Request, as_json: bool, opened: float) -> None:
    from hypersd_export.runtime.images import read_image

    began = time.perf_counter()
    init = None if request.init_image is None else read_image(request.init_image)
    collected: list[str] = []
    results = []
    with _warnings_as_lines(collected):
        for prompt in request.prompts:
            result = pipeline(
                prompt,
                negative_prompt=request.negative_prompt,
                guidance=request.guidance,
                steps=request.steps,
                seed=request.seed,
                num_images=request.num_images,
                init_image=init,
                strength=0.6 if request.strength is None else request.strength,
                size=request.size,
                size_hints=request.size_hints,
            )
            results.append(result)
    written = time.perf_counter()
    files = _write(request, results)
    seconds = {"open": opened}
    for result in results:
        for name, value in result.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
    seconds["write"] = time.perf_counter() - written
    seconds["total"] = opened + time.perf_counter() - began
    if as_json:
        typer.echo(json.dumps(_report(pipeline, request, results, files, seconds, collected), ensure_ascii=False))
        return
    for path in files:
        typer.echo(str(path))
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    plan = results[0].plan
    unit = "step" if plan.steps == 1 else "steps"
    typer.echo(f"{plan.steps} {unit} ({plan.source}), seed {request.seed}: {parts}", err=True)


def _write(request: Request, results: "Sequence[Result]") -> list[Path]:
    """Write the pictures, or their grid; creates the folder, and takes it back if nothing could be written."""
    from hypersd_export.bundle.disk import disk_full, is_disk_full, make_parents, reason, remove_empty
    from hypersd_export.runtime.images import enlarged, grid, save_png

    files = out_files(request)
    pictures: list[tuple[Image, dict[str, Any]]] = [
        (image, result.metadata(index)) for result in results for index, image in enumerate(result.images)
    ]
    if request.grid:
        metadata = {**pictures[0][1], "prompt": json.dumps(request.prompts, ensure_ascii=False)}
        metadata.pop("index")
        pictures = [(grid([image for image, _ in pictures], request.num_images), metadata)]
    try:
        created = make_parents(files[0].parent)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(files[0].parent, "free some, or choose another --out") from error
        raise DestinationError(f"cannot create {files[0].parent}: {reason(error)}; choose another --out") from error
    try:
        for path, (image, metadata) in zip(files, pictures, strict=True):
            save_png(enlarged(image, request.enlarge), path, metadata)
    except BaseException:
        remove_empty(created)
        raise
    return files


def _report(
    pipeline: "Pipeline",
    request: Request,
    results: "Sequence[Result]",
    files: Sequence[Path],
    seconds: dict[str, float],
    collected: Sequence[str],
) -> dict[str, Any]:
    """What --json prints."""
    return {
        "bundle": str(pipeline.path),
        "bundle_digest": pipeline.digest,
        "runtime": pipeline.runtime.name,
        "provider": pipeline.provider,
        "prompts": list(request.prompts),
        "negative_prompt": request.negative_prompt,
        "steps": results[0].plan.steps,
        "guidance": results[0].guidance,
        "seed": request.seed,
        "num_images": request.num_images,
        "files": [str(path) for path in files],
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "warnings": list(collected),
    }


def _golden(pipeline: "Pipeline", as_json: bool) -> None:
    """Print how close this machine comes to golden/; exit code 1 if that is not close enough."""
    import math

    report = pipeline.golden()
    if as_json:
        data = {
            "psnr_db": None if math.isinf(report.psnr_db) else report.psnr_db,
            "equal": report.psnr_db == math.inf,
            "min_psnr_db": report.min_psnr_db,
            "latents_max_abs": report.latents_max_abs,
            "noise_max_abs": report.noise_max_abs,
            "ids_equal": report.ids_equal,
            "passed": report.passed,
        }
        typer.echo(json.dumps(data))
    else:
        typer.echo(report.line())
    if not report.passed:
        typer.echo(
            "error: the golden picture is not reproduced: use another --runtime or --provider, or export again",
            err=True,
        )
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    tolerate_any_text()
    app()


if __name__ == "__main__":
    main()

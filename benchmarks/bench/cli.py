"""`hypersd-bench`: latency, quality, report, gate; the last line of standard output is one JSON object.

Nothing heavy is imported at module level: `--help` must not wait for torch.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hypersd_export.console import one_line_errors
from hypersd_export.errors import OptionError, tolerate_any_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

Bundles = Annotated[list[Path], typer.Argument(help="Folders that hypersd-export wrote; the first is the reference.")]
Out = Annotated[Path | None, typer.Option(help="A folder for the report's parts.")]
Versus = Annotated[
    list[str] | None, typer.Option(help="Compare with these too: torch, compile, teacher, optimum, openvino.")
]
Steps = Annotated[int | None, typer.Option(help="Which plan of the bundles; the first if not given.")]
RuntimeName = Annotated[str | None, typer.Option(help="onnx, tensorrt or coreml; each bundle's first target.")]
Provider = Annotated[str | None, typer.Option(help="onnxruntime's: cpu (the default), cuda, …")]
CacheDir = Annotated[Path | None, typer.Option(help="Where finished work is kept (default: the XDG cache).")]
Base = Annotated[str | None, typer.Option(help="Where the bundle's base is now, for --vs.")]
Unet = Annotated[str | None, typer.Option(help="Where its other UNet is now.")]
Vae = Annotated[str | None, typer.Option(help="Where its other VAE is now.")]
Lora = Annotated[list[str] | None, typer.Option(metavar="FILE", help="Where its LoRA is now; repeatable.")]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph", help="With --provider cuda: time each bundle with its UNet's call captured too.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads of everybody (default: all cores).")]


@app.callback()
def bench() -> None:
    """Measure exported bundles: how fast, how good, against what."""


@app.command()
def latency(
    bundle: Bundles,
    vs: Versus = None,
    steps: Steps = None,
    batch: Annotated[str | None, typer.Option(metavar="N[,N…]", help="Pictures at once, beside one.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed pictures of each; p99 wants a hundred.")] = 100,
    sessions: Annotated[int, typer.Option(help="How often everybody is started anew.")] = 5,
    warmup: Annotated[int, typer.Option(help="Pictures for nothing in each session.")] = 3,
    prompt: Annotated[str | None, typer.Option(help="What is drawn (default: the golden picture's).")] = None,
    runtime: RuntimeName = None,
    provider: Provider = None,
    cuda_graph: CudaGraph = False,
    threads: Threads = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one answer may take.")] = 1800.0,
    base: Base = None,
    unet: Unet = None,
    vae: Vae = None,
    lora: Lora = None,
    cache_dir: CacheDir = None,
    out: Out = None,
) -> None:
    """Time bundles, and what they are compared with, in turn: cold start, warm percentiles, throughput, memory."""
    with one_line_errors(out, cache_dir):
        check_out(out)
        from benchmarks.bench.commands import Selection, run_latency
        from benchmarks.bench.latency import Options
        from benchmarks.bench.machine import available_cores
        from benchmarks.bench.weights import Places
        from hypersd_export.spec import parse_ints

        options = Options(
            rounds=rounds, sessions=sessions, warmup=warmup, batches=parse_ints("--batch", batch) or (),
            threads=threads or available_cores(), timeout=timeout,
        )  # fmt: skip
        selection = Selection(
            bundles=tuple(bundle), versus=tuple(vs or ()), steps=steps, runtime=runtime, provider=provider,
            places=Places(base=base, unet=unet, vae=vae, loras=tuple(lora or ())), cache_dir=cache_dir,
            cuda_graph=cuda_graph,
        )  # fmt: skip
        report = run_latency(selection, options, prompt=prompt, out=out, command=command_line())
        finish(report)
        failed = [row["name"] for row in report["entrants"] if row["status"] == "failed"]
        if failed or not any(row["status"] == "measured" for row in report["entrants"]):
            raise typer.Exit(1)


@app.command()
def quality(
    bundle: Bundles,
    prompts: Annotated[Path | None, typer.Option(help=".txt, .tsv, .csv, .json or .jsonl (default: built-in).")] = None,
    count: Annotated[int | None, typer.Option(help="So many of the prompts, in a fixed random order.")] = None,
    vs: Annotated[list[str] | None, typer.Option(help="Measure these too: torch, teacher.")] = None,
    clip: Annotated[
        str, typer.Option(help="What looks: builtin, vit-b-32, vit-l-14, a CLIP's folder or hub id.")
    ] = "builtin",
    clip_prefix: Annotated[str, typer.Option(help="Before every caption, such as 'A photo depicts '.")] = "",
    reference: Annotated[
        str, typer.Option(help="Of FD-T and its kin: teacher, none, or the folder of a bundle.")
    ] = "teacher",
    teacher_steps: Annotated[int, typer.Option(help="Steps of the teacher.")] = 25,
    teacher_guidance: Annotated[float | None, typer.Option(help="Its guidance (built-in: its own; else 7.5).")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND[=MODEL]", help="clip, aesthetic, image_reward, pick_score, hps, preference."),
    ] = None,
    psnr: Annotated[bool, typer.Option("--psnr/--no-psnr", help="Draw everything in torch too, and compare.")] = True,
    varied: Annotated[int, typer.Option(help="Prompts for the diversity, four pictures each; 0 leaves it out.")] = 32,
    shown: Annotated[int, typer.Option(help="Pictures of everybody for the report.")] = 8,
    steps: Steps = None,
    runtime: RuntimeName = None,
    provider: Provider = None,
    base: Base = None,
    unet: Unet = None,
    vae: Vae = None,
    lora: Lora = None,
    cache_dir: CacheDir = None,
    out: Out = None,
) -> None:
    """Measure pictures of many prompts: CLIP score, FD-T and its kin, diversity, PSNR to torch."""
    # Before NumPy is imported: the bootstrap solves small eigenvalue problems by the thousand, and threads only wait.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with one_line_errors(out, cache_dir):
        check_out(out)
        from benchmarks.bench.commands import Selection
        from benchmarks.bench.examine import Asked, run_quality
        from benchmarks.bench.weights import Places

        selection = Selection(
            bundles=tuple(bundle), versus=tuple(vs or ()), steps=steps, runtime=runtime, provider=provider,
            places=Places(base=base, unet=unet, vae=vae, loras=tuple(lora or ())), cache_dir=cache_dir,
        )  # fmt: skip
        asked = Asked(
            prompts=prompts, count=count, clip=clip, clip_prefix=clip_prefix, reference=reference,
            teacher_steps=teacher_steps, teacher_guidance=teacher_guidance, psnr=psnr, shown=shown,
            rewards=tuple(reward or ()), varied=varied,
        )  # fmt: skip
        report = run_quality(selection, asked, out=out, command=command_line())
        if report is None:
            return
        finish(report)
        if not any(row["status"] == "measured" for row in report["candidates"]):
            raise typer.Exit(1)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="The --out of latency and quality.")]) -> None:
    """Write report.html (one file, no network), report.md and report.json of what was measured."""
    with one_line_errors(folder):
        from benchmarks.bench.report import write_report

        write_report(folder)
        typer.echo(json.dumps({"report": str(folder / "report.html")}))


@app.command()
def gate(
    folder: Annotated[Path, typer.Argument(help="The --out of latency and quality.")],
    baseline: Annotated[Path, typer.Option(help="A report.json of before.")],
) -> None:
    """Fail if quality, or the ratio to a peer, has become worse by more than its noise."""
    with one_line_errors(folder):
        from benchmarks.bench.gate import run_gate

        verdict = run_gate(folder, baseline)
        for line in verdict.left_out:
            typer.echo(f"not compared: {line}", err=True)
        for line in verdict.falls:
            typer.echo(f"worse: {line}", err=True)
        data = {"passed": verdict.passed, "compared": verdict.compared, "worse": verdict.falls}
        finish({**data, "not_compared": verdict.left_out})
        if not verdict.passed:
            raise typer.Exit(1)


@app.command("all")
def everything(
    out: Annotated[Path, typer.Option(help="A folder for the bundles and the report.")],
    steps: Annotated[
        str, typer.Option(metavar="N[,N…]", help="Step counts; the first one's peers are timed.")
    ] = "4,1,2,8",
    form: Annotated[
        list[str] | None,
        typer.Option(help="onnx-fp32, onnx-fp16, onnx-single, coreml, tensorrt; repeatable (default: all)."),
    ] = None,
    vs: Versus = None,
    count: Annotated[int, typer.Option(help="Held-out prompts of the quality.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Timed pictures of each.")] = 100,
    sessions: Annotated[int, typer.Option(help="How often everybody is started anew.")] = 5,
    batch: Annotated[str | None, typer.Option(metavar="N[,N…]", help="Pictures at once, beside one.")] = None,
    threads: Threads = None,
    cache_dir: CacheDir = None,
) -> None:
    """The whole report of the built-in model: export, time, examine, write; a run that was stopped is gone on with."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in `quality`
    with one_line_errors(out, cache_dir):
        check_out(out)
        from benchmarks.bench.everything import Everything, run_all
        from benchmarks.bench.latency import Options
        from benchmarks.bench.machine import available_cores
        from hypersd_export.spec import parse_ints

        options = Options(
            rounds=rounds, sessions=sessions, batches=parse_ints("--batch", batch) or (),
            threads=threads or available_cores(),
        )  # fmt: skip
        asked = Everything(
            steps=parse_ints("--steps", steps) or (), forms=tuple(form) if form else None,
            versus=tuple(vs) if vs else None, count=count, options=options, cache_dir=cache_dir,
        )  # fmt: skip
        run_all(asked, out, command=command_line())
        typer.echo(json.dumps({"report": str(out / "report.html")}))


def finish(report: dict[str, Any]) -> None:
    """The last line of standard output."""
    typer.echo(json.dumps(report, ensure_ascii=False, allow_nan=False))


def command_line() -> list[str]:
    """What was called, for the report: with the folders of this machine's paths left out."""
    return ["hypersd-bench", *(shortened(argument) for argument in sys.argv[1:])]


def shortened(argument: str) -> str:
    """An absolute path is its last part; all else is itself."""
    return Path(argument).name if argument.startswith(("/", "~")) else argument


def check_out(out: Path | None) -> None:
    """`OptionError` for an --out that is a file."""
    if out is not None and out.exists() and not out.is_dir():
        raise OptionError(f"--out {out}: is a file; name a folder")


def main() -> None:
    """Entry point of the console script."""
    tolerate_any_text()
    app()


if __name__ == "__main__":
    main()

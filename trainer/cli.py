"""`hypersd-train`: the command line of the trainer. Parses, prints, and turns errors into one line."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hypersd_export.errors import HypersdError, MissingBackend, OptionError, tolerate_any_text

if TYPE_CHECKING:
    from trainer.distill.config import DistillConfig
    from trainer.distill.run import Progress

app = typer.Typer(
    name="hypersd-train", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Train the built-in model, and distil few-step LoRAs from a teacher.",
)  # fmt: skip


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the run: states, finished parts, and model/.")],
    recipe: Annotated[str, typer.Option(help="builtin, or smoke (two steps of everything).")] = "builtin",
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. unet.steps=30000.")] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Train only this stage: vae, clip or unet (repeatable).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
    resume: Annotated[
        str, typer.Option(help="latest: go on from --out; never: refuse a folder that has a run.")
    ] = "latest",
) -> None:
    """Train tokenizer, VAE, CLIP and UNet on the drawings and write a diffusers folder to OUT/model."""
    _require("torch", "diffusers", "transformers", "safetensors")
    from trainer.config import as_json, override
    from trainer.pretrain.recipe import recipe as named

    config = override(named(recipe), assignments or [])
    typer.echo(json.dumps(as_json(config)))
    if not dry_run:
        _pretrain(config, out, tuple(stage or ()), resume)


@app.command()
def preference(
    out: Annotated[Path, typer.Option(help="Folder of the run: pairs, state, and preference.safetensors.")],
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. schedule.steps=4000.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train the built-in model's preference reward on pairs that needed no human, and measure it on held-out ones."""
    _require("torch", "diffusers", "transformers", "peft", "safetensors")
    from trainer.config import override
    from trainer.pretrain.preference import NAME, PreferenceConfig, PreferenceTraining

    config = override(PreferenceConfig(), assignments or [])
    _measured(config, PreferenceTraining, out, NAME, "held-out pairs, {}: {:.1%} right", dry_run=dry_run)


@app.command()
def segmenter(
    out: Annotated[Path, typer.Option(help="Folder of the run: state, and segmenter/, a folder of transformers.")],
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. schedule.steps=4000.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train the built-in model's instance segmenter on canvases of drawings, and measure it on held-out ones."""
    _require("torch", "diffusers", "transformers", "peft", "safetensors", "scipy")
    from trainer.config import override
    from trainer.pretrain.segmenter import FOLDER, SegmenterConfig, SegmenterTraining

    config = override(SegmenterConfig(), assignments or [])
    _measured(config, SegmenterTraining, out, FOLDER, "held out, {}: {:g}", dry_run=dry_run)


def _measured(config: Any, kind: Any, out: Path, name: str, line: str, *, dry_run: bool) -> None:
    """A training that is measured on held-out data: print its configuration, run it, print `line` for each figure."""
    from trainer.config import as_json

    typer.echo(json.dumps(as_json(config)))
    if dry_run:
        return
    training = kind(config, out, say=typer.echo)
    _in_fifties(training.run(), config.schedule.steps)
    for figure, value in training.figures.items():
        typer.echo(line.format(figure, value))
    typer.echo(f"wrote {out / name}")


def _in_fifties(run: Any, of_steps: int) -> None:
    """A line every 50 steps of a training that is no distillation."""
    for result in run:
        if result.step % 50 == 49:
            figures = " ".join(f"{name} {value:.4f}" for name, value in result.losses.items())
            typer.echo(f"{result.step + 1}/{of_steps} {figures} {result.seconds:.0f} s")


_Out = Annotated[Path | None, typer.Option(help="Folder of the run: LoRAs, checkpoints, log. Not for --dry-run.")]
_Recipe = Annotated[str, typer.Option(help="builtin, sd15 or sdxl: the settings that --set changes.")]
_Base = Annotated[str, typer.Option(help="builtin, a diffusers folder, a single file or a hub id; default: recipe's.")]
_Data = Annotated[str, typer.Option(help="builtin, an image folder, a dataset or a pattern of shards.")]
_Set = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, e.g. stages.0.steps=100 or guidance=[3,5] (repeatable).")
]
_Resume = Annotated[
    str, typer.Option(help="latest: go on, or begin; never: refuse a folder with a run; or a checkpoint's path.")
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print configuration, parameters, passes and memory as JSON, and stop.")
]


@app.command()
def distill(
    method: Annotated[str, typer.Option(help="tscd, tcd, lcm or pcm.")] = "tscd", recipe: _Recipe = "builtin",
    base: _Base = "", data: _Data = "", assignments: _Set = None, out: _Out = None,
    resume: _Resume = "latest", dry_run: _DryRun = False,
) -> None:  # fmt: skip
    """Distil a base model into few-step LoRAs; one for each stage of the method."""
    _require("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
    config = _distill_config(method, recipe, base, data, assignments or [])
    if dry_run:
        from trainer.distill.memory import dry_run as rehearse

        typer.echo(json.dumps(rehearse(config), indent=1))
        return
    if out is None:
        raise OptionError("--out is missing: name the folder of the run (only --dry-run goes without)")
    _distill(config, out, resume)


@app.command()
def tscd(
    recipe: _Recipe = "builtin", base: _Base = "", data: _Data = "", assignments: _Set = None,
    out: _Out = None, resume: _Resume = "latest", dry_run: _DryRun = False,
) -> None:  # fmt: skip
    """Short for `distill --method tscd`: stages of 8, 4, 2 and 1 segments, a LoRA each."""
    distill("tscd", recipe, base, data, assignments, out, resume, dry_run)


@app.command()
def score(
    init_lora: Annotated[Path | None, typer.Option(help="The few-step LoRA that the student starts from.")] = None,
    recipe: _Recipe = "builtin", base: _Base = "", data: _Data = "", assignments: _Set = None, out: _Out = None,
    resume: _Resume = "latest", dry_run: _DryRun = False,
) -> None:  # fmt: skip
    """Score distillation: make a few-step LoRA's pictures as likely as the teacher's, at one step or several."""
    given = [] if init_lora is None else [f"init_lora={init_lora}"]
    distill("score", recipe, base, data, [*given, *(assignments or [])], out, resume, dry_run)


@app.command()
def feedback(
    init_lora: Annotated[Path | None, typer.Option(help="The few-step LoRA that the new one stands on.")] = None,
    recipe: _Recipe = "builtin", base: _Base = "", data: _Data = "", assignments: _Set = None, out: _Out = None,
    resume: _Resume = "latest", dry_run: _DryRun = False,
) -> None:  # fmt: skip
    """Human feedback: a LoRA on top of a few-step LoRA, whose pictures the rewards prefer; `merge` joins the two."""
    given = [] if init_lora is None else [f"init_lora={init_lora}"]
    distill("feedback", recipe, base, data, [*given, *(assignments or [])], out, resume, dry_run)


@app.command(name="all")
def whole(
    recipe: _Recipe = "builtin", base: _Base = "", data: _Data = "", assignments: _Set = None, out: _Out = None,
    dry_run: _DryRun = False,
) -> None:  # fmt: skip
    """The whole method: TSCD, feedback, both merged, score distillation; run it again to go on where it was killed.

    --set is for every part, or for one if it begins with its name: tscd.batch=32, feedback.…, score.…
    """
    _require("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
    from trainer.whole import configurations, run_all

    configs = configurations(recipe, assignments or [], base=base, data=data)
    if dry_run:
        from trainer.distill.memory import dry_run as rehearse

        typer.echo(json.dumps({part: rehearse(config) for part, config in configs.items()}, indent=1))
        return
    if out is None:
        raise OptionError("--out is missing: name the folder of the run (only --dry-run goes without)")
    run_all(configs, out, lambda config, folder: _distill(config, folder, "latest"), say=typer.echo)


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(help="The LoRA files, e.g. a few-step one and a feedback one.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    rank: Annotated[int, typer.Option(help="0: exact, ranks added; else the nearest LoRA of this rank (SVD).")] = 0,
) -> None:
    """Join LoRAs into one that does what all of them do together; plans, base and recipes stay in its metadata."""
    _require("torch", "safetensors")
    from trainer.merge import describe
    from trainer.merge import merge as join

    merged = join(parts, out, rank=rank)
    for note in merged.notes:
        typer.echo(f"note: {note}")
    typer.echo(describe(merged, out))


def _distill_config(method: str, recipe: str, base: str, data: str, assignments: list[str]) -> "DistillConfig":
    """The recipe by this method, then --set, then --base and --data."""
    from dataclasses import replace

    from trainer.config import override
    from trainer.distill.recipes import recipe_by

    if any(assignment.partition("=")[0] == "method" for assignment in assignments):
        raise OptionError("--set method=…: only names the method and does not set its losses; use --method")
    config = override(recipe_by(recipe, method), assignments)
    if base:
        config = replace(config, base=base)
    return replace(config, data=replace(config.data, source=data)) if data else config


def _distill(config: "DistillConfig", out: Path, resume: str) -> None:
    from trainer.config import as_json
    from trainer.distill.run import Distillation

    distillation = Distillation(config, out, resume=resume, say=typer.echo)
    if not distillation.is_main:
        for _ in distillation.run():
            pass
        return
    typer.echo(json.dumps(as_json(config)))
    if sys.stdout.isatty():
        _with_bar(distillation.run())
    else:
        _in_lines(distillation.run())
    typer.echo(f"done: the LoRAs are in {out}")


def _in_lines(run: Any) -> None:
    """A line every 50 steps, at each stage's end and for each validation: for logs and pipes."""
    for progress in run:
        last = progress.result.step + 1 == progress.of_steps
        if last or progress.result.step % 50 == 49 or progress.figures:
            typer.echo(f"{_place(progress)} lr {progress.result.lr:.2e} {_figures(progress)} {_seconds(progress)}")
        if progress.wrote:
            typer.echo(f"wrote {progress.wrote}")


def _with_bar(run: Any) -> None:
    """The same on a terminal: a bar for the stage at work."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}", markup=False),
    )  # fmt: skip
    with Progress(*columns) as bar:
        task, stage = None, 0
        for progress in run:
            if task is None or progress.number != stage:
                stage, name = progress.number, f"stage {progress.number}/{progress.stages} k={progress.segments}"
                task = bar.add_task(name, total=progress.of_steps, completed=progress.result.step, figures="")
            bar.update(task, completed=progress.result.step + 1, figures=_figures(progress))
            if progress.wrote:
                bar.console.print(f"wrote {progress.wrote}", markup=False, highlight=False)


def _place(progress: "Progress") -> str:
    return (
        f"stage {progress.number}/{progress.stages} k={progress.segments} "
        f"step {progress.result.step + 1}/{progress.of_steps}"
    )


def _figures(progress: "Progress") -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in {**progress.result.logs, **progress.figures}.items())


def _seconds(progress: "Progress") -> str:
    return f"{progress.result.seconds:.0f} s"


def _require(*packages: str) -> None:
    """MissingBackend, naming the extra, for the first package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingBackend(package, "train", "hypersd-train")


def _pretrain(config: object, out: Path, stages: tuple[str, ...], resume: str) -> None:
    from trainer.pretrain.recipe import PretrainConfig
    from trainer.pretrain.stages import STAGES, Pretraining

    unknown = set(stages) - set(STAGES)
    if unknown:
        raise OptionError(f"--stage {sorted(unknown)[0]!r} is not a stage; there are: {', '.join(STAGES)}")
    if resume not in ("latest", "never"):
        raise OptionError(f"--resume {resume!r} is neither 'latest' nor 'never'")
    if resume == "never" and out.exists() and any(out.iterdir()):
        raise OptionError(f"--out {out} has a run already; take --resume latest, or another folder")
    assert isinstance(config, PretrainConfig)
    smooth: dict[str, float] = {}
    for progress in Pretraining(config, out).run(stages or STAGES):
        result = progress.result
        for name, value in result.losses.items():
            key = f"{progress.stage}.{name}"
            smooth[key] = 0.98 * smooth.get(key, value) + 0.02 * value
        if result.step % 50 == 49:
            figures = " ".join(f"{name} {smooth[f'{progress.stage}.{name}']:.5f}" for name in result.losses)
            where = f"{progress.stage} {result.step + 1}/{progress.of_steps}"
            typer.echo(f"{where} lr {result.lr:.2e} {figures} {result.seconds:.0f} s")
    typer.echo(f"wrote {out / 'model'}" if (out / "model").exists() else f"stages done: {', '.join(stages)}")


def main() -> None:
    """Entry point: one line and exit code 1 for every error that is the user's to mend."""
    tolerate_any_text()
    try:
        app()
    except HypersdError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to go on", err=True)
        sys.exit(130)


if __name__ == "__main__":  # accelerate launch -m trainer.cli
    main()

"""`hypersd-train`: the command line of the trainer. Parses, prints, and turns errors into one line."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hypersd_export.errors import HypersdError, MissingBackend, tolerate_any_text

app = typer.Typer(
    name="hypersd-train", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Train the built-in model, and distil few-step LoRAs from a teacher.",
)  # fmt: skip


@app.callback()
def _root() -> None:
    """Keeps `pretrain` a subcommand while it is the only one."""


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


def _require(*packages: str) -> None:
    """MissingBackend, naming the extra, for the first package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingBackend(package, "train", "hypersd-train")


def _pretrain(config: object, out: Path, stages: tuple[str, ...], resume: str) -> None:
    from hypersd_export.errors import OptionError
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

"""`optimum-cli export hypersd`: found by Optimum, with the options of `hypersd-export` and nothing lost on the way."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from hypersd_export import cli
from hypersd_export.optimum_command import HypersdExportCommand, add_options, arguments_of, export_options

OPTIMUM = Path(sys.executable).with_name("optimum-cli")


@pytest.fixture
def parser():
    made = ArgumentParser()
    add_options(made)
    return made


def test_every_option_is_there(parser):
    said = parser.format_help()
    names = [name for option in export_options() for name in option.opts]
    assert {"--target", "--lora", "--steps", "--single-graph", "--size-budget", "--dry-run"} <= set(names)
    assert all(name in said for name in names)


def test_the_command_line_comes_out_as_it_went_in(parser):
    given = [
        "--target", "onnx", "--target", "coreml", "--base", "x", "--lora", "a.safetensors:0.7", "--lora", "b",
        "--steps", "1,2", "--eta", "0.3", "--single-graph", "--no-verify",
    ]  # fmt: skip
    assert sorted(arguments_of(parser.parse_args(given))) == sorted(given)
    assert arguments_of(parser.parse_args([])) == []


def test_it_runs_hypersd_export(parser, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hypersd_export.optimum_command.app", lambda arguments, *, prog_name: seen.append((arguments, prog_name))
    )
    command = HypersdExportCommand.__new__(HypersdExportCommand)
    command.args = type("Namespace", (), {})()
    monkeypatch.setattr("hypersd_export.optimum_command.export_options", lambda: [])
    command.run()
    assert seen == [([], "optimum-cli export hypersd")]


def test_optimum_finds_it():
    """The same answer through both doors, and the same error."""
    done, other = (
        subprocess.run([*start, "--steps", "1", "--dry-run"], capture_output=True, text=True, check=True)
        for start in ([OPTIMUM, "export", "hypersd"], [sys.executable, "-m", cli.__name__])
    )
    assert json.loads(done.stdout) == json.loads(other.stdout)
    failed = subprocess.run([OPTIMUM, "export", "hypersd", "--steps", "0"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr) == (1, "error: --steps 0: a plan has from 1 to 1000 steps\n")


def test_this_distribution_is_not_taken_for_optimum():
    """diffusers asks which distributions a package is of, and takes the first one's version."""
    assert "hypersd" not in packages_distributions()["optimum"]

"""`optimum-cli export hypersd …`: `hypersd-export` by Optimum's own door, with the same options.

The options are read off the command itself, so that there is one list of them. Optimum loads this at every start of
its command line: nothing heavy is imported here.
"""

from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from typing import Any

import typer
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from hypersd_export.cli import app


def export_options() -> list[Any]:
    """The options of `hypersd-export` (click's), but for --help, which argparse has itself."""
    return [each for each in typer.main.get_command(app).params if each.opts and each.opts[0].startswith("--")]


def add_options(parser: ArgumentParser) -> None:
    """Give an argparse parser the same options; what is not said stays out of the namespace's values (None)."""
    for option in export_options():
        if option.name == "help":
            continue
        wanted: dict[str, Any] = {"dest": option.name, "help": (option.help or "").replace("%", "%%"), "default": None}
        if option.is_flag:
            wanted["action"] = "store_true"
        else:
            wanted["metavar"] = option.metavar or option.name.upper()
            wanted["action"] = "append" if option.multiple else "store"
        parser.add_argument(*option.opts, **wanted)


def arguments_of(values: Namespace) -> list[str]:
    """The command line of `hypersd-export` that says the same."""
    said: list[str] = []
    for option in export_options():
        value = getattr(values, option.name, None)
        if value is True:
            said.append(option.opts[0])
        elif value is not None and value is not False:
            for each in value if isinstance(value, list) else [value]:
                said += [option.opts[0], str(each)]
    return said


class HypersdExportCommand(BaseOptimumCLICommand):
    """Fuse a few-step LoRA into a diffusion pipeline and export it with its schedule fixed inside."""

    COMMAND = CommandInfo(
        name="hypersd",
        help="Few-step diffusion pipelines to ONNX, TensorRT and Core ML, the schedule inside.",
        formatter_class=RawTextHelpFormatter,
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The options."""
        add_options(parser)

    def run(self) -> None:
        """Export; ends with the exit code of `hypersd-export`."""
        app(arguments_of(self.args), prog_name="optimum-cli export hypersd")

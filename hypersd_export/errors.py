"""Every error that a user can cause, each one line: the value, the limit, the way out.

The CLIs turn a `HypersdError` into that one line and exit code 1; anything else that escapes is a bug.

    HypersdError
      OptionError          an option's value, alone or together with others
      PlanError            a schedule that cannot be a table, or a row that cannot be computed
      ModelError           a base model that is missing, damaged or of another kind
      LoraError            a LoRA that does not fully land
      MissingBackend       a package or provider that is not installed
      BuildError           a graph that a target's library refuses, or a build that came to nothing
      DestinationError     `--out` and the disk under it
      ParityError          an artifact that does not reproduce torch
      BundleError          a bundle that is damaged, tampered with or of another version
      DataError            training data or a checkpoint that cannot be read
"""

import sys


class HypersdError(Exception):
    """Base of all errors that are the caller's to mend; `str(error)` is one line."""


class OptionError(HypersdError):
    """An option has a value that cannot be used."""


class PlanError(HypersdError):
    """A plan that is not linear, not computable, or contradicts itself."""


class ModelError(HypersdError):
    """A base model that is missing, damaged, or of a kind that is not supported."""


class LoraError(HypersdError):
    """A LoRA that does not fully land in the model."""


class MissingBackend(HypersdError):  # noqa: N818 (says what is wrong, as the others do)
    """A package or execution provider that the command needs is not installed."""

    def __init__(self, package: str, extra: str, need: str) -> None:
        super().__init__(f"{need} needs {package}, which is not installed: pip install 'hypersd[{extra}]'")
        self.package = package
        self.extra = extra


class BuildError(HypersdError):
    """A graph that a target's library refuses, or a build that came to nothing."""


class DestinationError(HypersdError):
    """The place to write to is not usable."""


class ParityError(HypersdError):
    """One or more artifacts differ from torch by more than the gate allows."""


class BundleError(HypersdError):
    """A bundle that is damaged, was changed after export, or is of another version."""


class DataError(HypersdError):
    """Training data, or a training checkpoint, that cannot be read."""


def tolerate_any_text() -> None:
    """Bytes of a command line that are not UTF-8 must not break the one line that says so. For the CLIs' `main`."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")

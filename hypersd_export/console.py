"""What `hypersd-export` says on standard error: the stages as they end, and errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import typer

from hypersd_export.errors import DestinationError, HypersdError

if TYPE_CHECKING:
    from hypersd_export.clock import StageRecord

INTERRUPTED = 130


class Spinner:
    """A spinner on standard error where there is a terminal; notes are printed in any case, unless `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self.status = self.console.status("")

    def __enter__(self) -> Self:
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def note(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, soft_wrap=True)


class Progress(Spinner):
    """Stages beside the spinner, and one line a stage in any case."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""

    def begin(self, stage: str) -> None:
        """Show the stage's name beside the spinner."""
        self.stage = stage
        self.status.update(f"[bold]{stage}[/]")

    def detail(self, text: str) -> None:
        """Show what the stage is at."""
        from rich.markup import escape

        self.status.update(f"[bold]{self.stage}[/] {escape(text)}")

    def end(self, record: "StageRecord") -> None:
        """Print what the stage took."""
        cached = " (cached)" if record.cached else ""
        self.note(f"{record.name:<20} {record.seconds:7.1f} s {record.peak_mb:8,.0f} MB{cached}")

    def table(self, records: "tuple[StageRecord, ...]") -> None:
        """Print the sums: the export proper, and the verification apart."""
        from hypersd_export.export import VERIFY

        own = [record for record in records if not record.name.startswith(VERIFY)]
        seconds, peak = sum(record.seconds for record in own), max(record.peak_mb for record in own)
        self.note(f"{'export in all':<20} {seconds:7.1f} s {peak:8,.0f} MB, verification apart")


@contextmanager
def one_line_errors(out: Path | None = None, cache_dir: Path | None = None) -> Iterator[None]:
    """What a user can cause becomes one line on standard error: exit code 1, or 130 for Ctrl-C."""
    try:
        yield
    except HypersdError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        kept = "" if out is None else f"; {out} was not touched, finished stages are kept for the next run"
        _fail(f"interrupted{kept}", INTERRUPTED)
    except OSError as error:
        from hypersd_export.bundle.disk import disk_full, is_disk_full, reason

        if is_disk_full(error):
            _fail(str(disk_full(out or cache_dir or Path(), "free some, or choose another --out or --cache-dir")), 1)
        _fail(str(DestinationError(f"{error.filename or 'the system'}: {reason(error)}")), 1)


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)

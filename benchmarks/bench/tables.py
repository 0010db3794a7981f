"""Tables on standard error, and one line of progress."""

from collections.abc import Mapping, Sequence
from typing import Any


class Progress:
    """A spinner with a line beside it where there is a terminal; notes are printed in any case, unless `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        if not self.console.is_terminal:  # a log file: rich's 80 columns are too few
            self.console.width = 140
        self._status = self.console.status("")

    def __enter__(self) -> "Progress":
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def tell(self, text: str) -> None:
        """What is being done."""
        from rich.markup import escape

        self._status.update(escape(text))

    def note(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table, if it has rows; every column but the first is right-aligned."""
        from rich.table import Table

        if not rows:
            return

        table = Table(title=title, title_justify="left", title_style="bold")
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


LATENCY_HEAD = ("", "p50 ms", "p90", "p99", "times the first", "first image s", "images/s", "peak MB", "size MB",
                "of GEMM")  # fmt: skip


def latency_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """A row an entrant of a latency report that was measured, as text."""
    rows = []
    for entrant in report["entrants"]:
        if entrant["status"] != "measured":
            continue
        image, again = entrant["image_ms"], entrant.get("ratio")
        share = entrant.get("roofline", {}).get("of_gemm")
        rows.append(
            [
                entrant["name"], *(number(image.get(name)) for name in ("p50", "p90", "p99")), interval(again),
                number(entrant["cold_start_s"]["median"]), number(entrant["images_per_s"]["1"]["value"]),
                number(entrant["peak_mb"], 0), number(entrant.get("size_mb"), 1),
                "" if share is None else f"{100 * share:.0f} %",
            ]
        )  # fmt: skip
    return rows


def not_measured(report: Mapping[str, Any]) -> list[str]:
    """A line an entrant that was not measured, with the reason."""
    return [
        f"{row['name']}: {row['status']}: {row['why']}" for row in report["entrants"] if row["status"] != "measured"
    ]


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals and separated thousands; nothing for None."""
    return "" if value is None else f"{value:,.{digits}f}"


def interval(figure: Mapping[str, float] | None, digits: int = 2, factor: float = 1.0) -> str:
    """`1.05 [1.03, 1.07]`; nothing for None."""
    if figure is None:
        return ""
    value, low, high = (f"{factor * figure[key]:,.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"

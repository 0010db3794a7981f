"""Tables on standard error, and one line of progress."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hypersd_export.console import Spinner

if TYPE_CHECKING:
    from benchmarks.bench.layout import Table


class Progress(Spinner):
    """A spinner with a line beside it, and tables."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        if not self.console.is_terminal:  # a log file: rich's 80 columns are too few
            self.console.width = 140

    def tell(self, text: str) -> None:
        """What is being done."""
        from rich.markup import escape

        self.status.update(escape(text))

    def table(self, table: "Table") -> None:
        """Print a table, if it has rows; every column but the first is right-aligned."""
        from rich.table import Table as Grid

        from benchmarks.bench.layout import without_empty

        if not table.rows:
            return
        table = without_empty(table)
        grid = Grid(title=table.title, title_justify="left", title_style="bold")
        for number, name in enumerate(table.head):
            grid.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for row in table.rows:
            grid.add_row(*row)
        self.console.print(grid)

    def left_out(self, data: Mapping[str, Any]) -> None:
        """Print a line for whatever has no figures."""
        from benchmarks.bench.layout import not_run_table

        for name, what, why in not_run_table(data).rows:
            self.note(f"{name}: no {what}: {why}")


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals and separated thousands; nothing for None."""
    return "" if value is None else f"{round(value, digits) + 0.0:,.{digits}f}"  # no minus before a zero


def interval(figure: Mapping[str, float] | None, digits: int = 2, factor: float = 1.0) -> str:
    """`1.05 [1.03, 1.07]`; nothing for None."""
    if figure is None:
        return ""
    value, low, high = (number(factor * figure[key], digits) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"

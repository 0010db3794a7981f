"""Quality against latency as an SVG that takes its colours from the page: readable in light and dark, and small."""

import html
import math
from collections.abc import Sequence

from benchmarks.bench.layout import Point

COLOURS = 8
"""Groups have the classes g0 … g7, whose colours the page's style gives."""
MARGIN = (16, 16, 46, 52)
"""Top, right, bottom, left, in the picture's units."""
SHAPES = ("circle", "square", "diamond", "triangle", "cross")


def svg(points: Sequence[Point], *, width: int, height: int, title: str) -> str:
    """An <svg> of latency (logarithmic) and CLIP score, a line a group, each point with its step count and interval.

    Empty for no points. Hollow points are drawn without filling.
    """
    if not points:
        return ""
    frame = _Frame(points, width, height)
    groups = list(dict.fromkeys(point.group for point in points))
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}" class="plot">',
        *frame.axes(), *(part for i, name in enumerate(groups) for part in _group(frame, points, name, i)), "</svg>",
    ]  # fmt: skip
    return "".join(parts)


def legend(points: Sequence[Point]) -> list[tuple[str, str]]:
    """(svg of the mark, group) of each group in the plot."""
    groups = list(dict.fromkeys(point.group for point in points))
    return [
        (
            f'<svg viewBox="0 0 16 16" class="key g{i % COLOURS}" aria-hidden="true">'
            f"{_mark(8, 8, i, hollow=all(p.hollow for p in points if p.group == name))}</svg>",
            name,
        )
        for i, name in enumerate(groups)
    ]


class _Frame:
    """Where a value lies in the picture."""

    def __init__(self, points: Sequence[Point], width: int, height: int) -> None:
        self.top, right, bottom, self.left = MARGIN
        self.right, self.bottom = width - right, height - bottom
        low, high = min(p.ms for p in points), max(p.ms for p in points)
        self.x_low, self.x_high = math.log10(low / 1.35), math.log10(high * 1.35)
        scores = [value for p in points for value in (p.low, p.high)]
        room = max(max(scores) - min(scores), 1e-6) * 0.08
        self.y_low, self.y_high = min(scores) - room, max(scores) + room

    def x(self, ms: float) -> float:
        """Milliseconds, logarithmic."""
        return self.left + (math.log10(ms) - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, score: float) -> float:
        """CLIP score."""
        return self.bottom - (score - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)

    def axes(self) -> list[str]:
        """Grid lines with their numbers, and what the axes are."""
        parts = []
        for score in ticks(self.y_low, self.y_high):
            y = self.y(score)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{score:g}</text>')
        for ms in log_ticks(10**self.x_low, 10**self.x_high):
            x = self.x(ms)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top}" y2="{self.bottom}"/>')
            parts.append(f'<text x="{x:.1f}" y="{self.bottom + 16}" text-anchor="middle">{ms:g}</text>')
        middle = (self.left + self.right) / 2
        parts.append(f'<text x="{middle:.1f}" y="{self.bottom + 36}" text-anchor="middle">p50 of a picture, ms</text>')
        parts.append(f'<text x="{self.left + 6}" y="{self.top + 12}" class="axis">CLIP score</text>')
        return parts


def _group(frame: _Frame, points: Sequence[Point], name: str, number: int) -> list[str]:
    members = sorted((p for p in points if p.group == name), key=lambda p: p.ms)
    parts = [f'<g class="g{number % COLOURS}">']
    if len(members) > 1:
        path = " ".join(f"{frame.x(p.ms):.1f},{frame.y(p.score):.1f}" for p in members)
        parts.append(f'<polyline class="line" points="{path}"/>')
    for p in members:
        x, y = frame.x(p.ms), frame.y(p.score)
        parts.append(f"<g><title>{html.escape(describe(p))}</title>")
        if not p.hollow:
            low, high = frame.y(p.low), frame.y(p.high)
            parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        parts.append(_mark(x, y, number, hollow=p.hollow))
        if not p.hollow:
            parts.append(_label(p.label, x, y, number))
        parts.append("</g>")
    return [*parts, "</g>"]


def _label(text: str, x: float, y: float, number: int) -> str:
    """In another corner of the mark for each of four groups, which often lie on each other."""
    right, above = number % 4 < 2, number % 2 == 0
    dx, anchor, dy = (8, "start", -7) if right else (-8, "end", -7)
    return (
        f'<text class="steps" x="{x + dx:.1f}" y="{y + (dy if above else 16):.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )


def describe(point: Point) -> str:
    """What a pointer over the mark says."""
    where = f"{point.name}: {point.ms:.1f} ms"
    if point.hollow:
        return f"{where}; timed only, its picture is the first's"
    return f"{where}, CLIP score {point.score:.2f} [{point.low:.2f}, {point.high:.2f}]"


def _mark(x: float, y: float, number: int, *, hollow: bool) -> str:
    kind = "hollow" if hollow else "mark"
    shape, size = SHAPES[number % len(SHAPES)], 5.0
    if shape == "circle":
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    if shape == "square":
        return f'<rect class="{kind}" x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"/>'
    corners = {
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
        "triangle": ((0, -6), (6, 5), (-6, 5)),
        "cross": ((-6, -2), (-2, -2), (-2, -6), (2, -6), (2, -2), (6, -2), (6, 2), (2, 2), (2, 6), (-2, 6), (-2, 2),
                  (-6, 2)),
    }[shape]  # fmt: skip
    return f'<polygon class="{kind}" points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"/>'


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between low and high, about so many."""
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= wanted + 1)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between low and high; the powers alone where that is more than eight."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return fine if len(fine) <= 8 else [value for value in fine if math.log10(value).is_integer()]

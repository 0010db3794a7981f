"""`hypersd-bench report DIR`: latency.json and quality.json as one page that needs no network, as Markdown, as JSON."""

import base64
import io
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bench import layout, plot
from benchmarks.bench.parts import (
    LATENCY_FILE,
    LATENCY_FORMAT,
    QUALITY_FILE,
    QUALITY_FORMAT,
    REPORT_FILE,
    REPORT_FORMAT,
    now,
    read_part,
    write_part,
)
from benchmarks.gpu_report import table as markdown_table
from hypersd_export.bundle.disk import write_atomic
from hypersd_export.errors import DataError, MissingBackend

TITLE = "hypersd-bench"
WIDE, NARROW = (960, 420), (366, 340)
"""Of the plot, in CSS pixels: for a screen, and for a telephone."""
LARGEST_PX = 256
"""Larger pictures are made smaller for the page."""


def read_parts(folder: Path) -> dict[str, Any]:
    """The report as data: whichever of latency.json and quality.json there are. `DataError` for neither."""
    latency = read_part(folder / LATENCY_FILE, LATENCY_FORMAT)
    quality = read_part(folder / QUALITY_FILE, QUALITY_FORMAT)
    if latency is None and quality is None:
        raise DataError(
            f"{folder}: has neither {LATENCY_FILE} nor {QUALITY_FILE}; make them with hypersd-bench latency and "
            "quality, --out to this folder"
        )
    return {"format": REPORT_FORMAT, "created": now(), "latency": latency, "quality": quality}


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.html, report.md and report.json into the folder; returns the data."""
    data = read_parts(folder)
    page, text = html(data, folder), markdown(data)
    write_atomic(folder / "report.html", page.encode())
    write_atomic(folder / "report.md", text.encode())
    write_part(folder, REPORT_FILE, data)
    return data


def html(data: Mapping[str, Any], folder: Path) -> str:
    """The page; the pictures that quality.json names are read from `folder`. `MissingBackend` without jinja2."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise MissingBackend(str(error.name), "bench", "the report") from error
    loader = PackageLoader("benchmarks.bench", "templates")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html.j2")
    points = layout.points(data)
    title = "CLIP score against milliseconds of a picture"
    drawn = [plot.svg(points, width=width, height=height, title=title) for width, height in (WIDE, NARROW)]
    wide, narrow = (
        Markup(svg.replace('class="plot"', f'class="plot {kind}"', 1))
        for svg, kind in zip(drawn, ("wide-plot", "narrow"), strict=True)
    )
    return template.render(
        title=TITLE, subtitle=subtitle(data), cards=layout.cards(data), plot_wide=wide, plot_narrow=narrow,
        legend=[(Markup(mark), name) for mark, name in plot.legend(points)], hollow=any(p.hollow for p in points),
        shown=pictures(data, folder), tables=layout.all_tables(data), environment=environment(data),
        commands=commands(data),
    )  # fmt: skip


def markdown(data: Mapping[str, Any]) -> str:
    """The same without the plot; pictures by their files."""
    parts = [f"# {TITLE}\n\n{subtitle(data)}\n"]
    parts += [f"- {card.label}: **{card.value}** ({card.note})\n" for card in layout.cards(data)]
    quality = data.get("quality") or {}
    shown = quality.get("shown")
    if shown:
        rows = [[name, *(f"![]({file})" for file in files)] for name, files in shown["files"].items()]
        parts.append("\n## Pictures\n\n" + markdown_table(["", *shown["prompts"]], rows))
    for table in layout.all_tables(data):
        note = f"{table.note}\n\n" if table.note else ""
        parts.append(f"\n## {table.title}\n\n{note}" + markdown_table(table.head, table.rows))
    parts.append("\n## Environment\n\n" + markdown_table(["", ""], environment(data)))
    parts.append("\n## Commands\n\n" + "".join(f"    {command}\n" for command in commands(data)))
    return "".join(parts)


def subtitle(data: Mapping[str, Any]) -> str:
    """When, and on what."""
    part = data["latency"] or data["quality"]
    machine = part["machine"]
    return f"{part['created']}; {machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores"


def environment(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The machine, the versions, and how it was measured."""
    latency, quality = data["latency"] or {}, data["quality"] or {}
    machine = (latency or quality)["machine"]
    versions = dict(machine["versions"])
    for row in latency.get("entrants", ()):
        if row.get("kind") not in ("bundle", "torch", "compile", "teacher") and row.get("versions"):
            versions |= {f"{row['name']}: {name}": value for name, value in row["versions"].items()}
    mhz = machine["clocks"]["mhz"]
    rows = [
        ("processor", f"{machine['cpu']}, {machine['architecture']}, {machine['cores']} cores"),
        ("memory", f"{machine['memory_gb']} GB"), ("system", machine["system"]),
        ("clocks", "not told" if mhz is None else f"{min(mhz)} to {max(mhz)} MHz"),
        ("governor", machine["clocks"]["governor"] or "not told"),
        ("load before and after", f"{machine['load']}, {machine.get('load_after', 'not told')}"),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
    ]  # fmt: skip
    if latency:
        peak, options = latency["peak"], latency["options"]
        if peak is not None:
            rows.append(("measured peak", f"{peak['gemm_gflop_per_s']:.1f} GFLOP/s, {peak['copy_gb_per_s']:.1f} GB/s"))
        rows.append(
            ("rounds", f"{options['rounds']} in {options['sessions']} sessions, {options['warmup']} for warming")
        )
        rows.append(("prompt of the latency", latency["prompt"]))
    return rows


def commands(data: Mapping[str, Any]) -> list[str]:
    """What was called."""
    return [shlex.join(part["command"]) for part in (data["latency"], data["quality"]) if part and part["command"]]


def pictures(data: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The pictures of everybody as data URIs; None where there are none."""
    shown = (data["quality"] or {}).get("shown")
    if not shown or not shown["files"]:
        return None
    rows = [{"name": name, "pictures": [_inlined(folder / f) for f in files]} for name, files in shown["files"].items()]
    return {"prompts": shown["prompts"], "rows": rows}


def _inlined(path: Path) -> dict[str, Any]:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read ({str(error)[:80]}); run hypersd-bench quality again") from None
    small = picture.width <= 64
    picture.thumbnail((LARGEST_PX, LARGEST_PX))
    stream = io.BytesIO()
    picture.save(stream, "PNG" if small else "WEBP", **({"optimize": True} if small else {"quality": 88}))
    kind = "png" if small else "webp"
    encoded = base64.b64encode(stream.getvalue()).decode()
    return {"data": f"data:image/{kind};base64,{encoded}", "width": picture.width, "height": picture.height}

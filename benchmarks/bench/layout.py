"""What the report says, apart from how it looks: cards, tables and points from the JSON of latency and quality."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.bench.quality import METRICS
from benchmarks.bench.tables import interval, number

SAME_DB = 40.0
"""From here on two pictures of one seed are taken for the same: 8-bit values then differ by 2.5 in the mean square."""
TARGETS = {"onnx": "ONNX", "tensorrt": "TensorRT", "coreml": "Core ML"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One figure that sums up."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Head and rows of text; every column but the first is a number's."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One contestant in the plot. hollow: its quality is another's, whose picture it draws."""

    group: str
    label: str
    name: str
    ms: float
    score: float
    low: float
    high: float
    hollow: bool = False


def group_of(row: Mapping[str, Any]) -> str:
    """What belongs together across step counts, such as ONNX fp16."""
    if row["kind"] != "bundle":
        return str(row["name"])
    target = TARGETS.get(str(row.get("target")), str(row.get("target")))
    stored = row.get("quantize") or row.get("precision", "")
    return f"{target} {stored}".strip() + (", one graph" if row.get("single_graph") else "")


def measured(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The rows of a part that have figures."""
    return [] if part is None else [row for row in part[key] if row["status"] == "measured"]


def timed(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of latency."""
    return measured(data.get("latency"), "entrants")


def judged(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of quality."""
    return measured(data.get("quality"), "candidates")


def points(data: Mapping[str, Any]) -> list[Point]:
    """Everybody who was timed and whose pictures were judged, or are those of the first who was."""
    scores = {row["name"]: row["figures"]["clip_score"] for row in judged(data)}
    reference = (data.get("latency") or {}).get("reference")
    found = []
    for row in timed(data):
        same = float(row.get("picture_psnr_db", 0.0)) >= SAME_DB
        score = scores.get(row["name"], scores.get(reference) if same else None)
        if score is not None:
            found.append(
                Point(
                    group=group_of(row), label=str(row.get("steps", "")), name=row["name"], ms=row["image_ms"]["p50"],
                    score=score["value"], low=score["low"], high=score["high"], hollow=row["name"] not in scores,
                )
            )  # fmt: skip
    return found


def cards(data: Mapping[str, Any]) -> list[Card]:
    """What a reader wants first; nothing that was not measured."""
    return [card for card in (_best(data), _fastest(data), *_peers(data), _parity(data), _cold(data)) if card]


def _bundles(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["kind"] == "bundle"]


def _best(data: Mapping[str, Any]) -> Card | None:
    rows = _bundles(judged(data))
    if not rows:
        return None
    top = max(round(row["figures"]["clip_score"]["value"], 1) for row in rows)  # as it is shown: the first of equals
    best = next(row for row in rows if round(row["figures"]["clip_score"]["value"], 1) == top)
    teacher = next((row for row in judged(data) if row["kind"] == "teacher"), None)
    note = best["name"]
    if teacher is not None:
        note += f"; teacher, {teacher['steps']} steps: {teacher['figures']['clip_score']['value']:.1f}"
    return Card(label="Best CLIP score of a bundle", value=f"{best['figures']['clip_score']['value']:.1f}", note=note)


def _fastest(data: Mapping[str, Any]) -> Card | None:
    rows = _bundles(timed(data))
    if not rows:
        return None
    fastest = min(rows, key=lambda row: row["image_ms"]["p50"])
    teacher = next((row for row in timed(data) if row["kind"] == "teacher"), None)
    note = fastest["name"]
    if teacher is not None:
        note += f"; {teacher['image_ms']['p50'] / fastest['image_ms']['p50']:.0f} times as fast as the teacher in torch"
    return Card(label="Fastest bundle, p50", value=f"{fastest['image_ms']['p50']:.1f} ms", note=note)


def _peers(data: Mapping[str, Any]) -> Iterator[Card]:
    reference = (data.get("latency") or {}).get("reference")
    for row in timed(data):
        if row["kind"] in ("bundle", "teacher") or "ratio" not in row:
            continue
        yield Card(
            label=f"{row['name']}, time over ours", value=f"{row['ratio']['value']:.2f} ×",
            note=f"[{row['ratio']['low']:.2f}, {row['ratio']['high']:.2f}]; the same weights and plan as {reference}",
        )  # fmt: skip


def _parity(data: Mapping[str, Any]) -> Card | None:
    worst: tuple[float, str] | None = None
    for row in _bundles([*timed(data), *judged(data)]):
        for name, figures in (row.get("parity") or {}).items() if isinstance(row.get("parity"), Mapping) else ():
            if worst is None or figures["psnr_db"] < worst[0]:
                worst = float(figures["psnr_db"]), f"{name} of {row['name']}"
    return None if worst is None else Card(label="Least parity with torch", value=f"{worst[0]:.0f} dB", note=worst[1])


def _cold(data: Mapping[str, Any]) -> Card | None:
    rows = _bundles(timed(data))
    if not rows:
        return None
    row = min(rows, key=lambda row: row["cold_start_s"]["median"])
    memory = "" if row["peak_mb"] is None else f"; at most {row['peak_mb']:.0f} MB of memory"
    seconds = f"{row['cold_start_s']['median']:.2f} s"
    return Card(label="Process start to first picture", value=seconds, note=row["name"] + memory)


def all_tables(data: Mapping[str, Any]) -> list[Table]:
    """Every table that has rows, in the order of the report."""
    makers = (
        latency_table,
        components_table,
        throughput_table,
        quality_table,
        differences_table,
        categories_table,
        parities_table,
        not_run_table,
    )
    return [without_empty(table) for table in (make(data) for make in makers) if table.rows]


def without_empty(table: Table) -> Table:
    """Without the columns in which nobody has anything."""
    kept = [i for i in range(len(table.head)) if i == 0 or any(row[i] for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return replace(table, head=tuple(table.head[i] for i in kept), rows=rows)


def latency_table(data: Mapping[str, Any]) -> Table:
    """Warm percentiles, ratios, cold start, memory, size, share of the peak, energy."""
    head = ("", "p50 ms", "p90 ms", "p99 ms", "pictures", "time over the first's", "cold start s", "load s",
            "peak MB", "VRAM MB", "files MB", "of GEMM", "joule")  # fmt: skip
    rows = []
    for row in timed(data):
        image, share = row["image_ms"], row.get("roofline", {}).get("of_gemm")
        rows.append(
            (
                row["name"], *(number(image.get(name), 1) for name in ("p50", "p90", "p99")), str(image["count"]),
                interval(row.get("ratio")), number(row["cold_start_s"]["median"]), number(row["load_s"]["median"]),
                number(row["peak_mb"], 0), number(row.get("vram_mb"), 0), number(row.get("size_mb"), 1),
                "" if share is None else f"{100 * share:.0f} %", number(row.get("joules", {}).get("p50")),
            )
        )  # fmt: skip
    part = data.get("latency") or {}
    peak = part.get("peak")
    gemm = ""
    if peak is not None:
        gemm = (
            f" Of GEMM: the UNet's arithmetic a second over {peak['gemm_gflop_per_s']:.0f} GFLOP/s, the median of a "
            f"{peak.get('precision', 'fp32')} product of {peak['side']} x {peak['side']} in the same rounds."
        )
    note = (
        "Prompt to pixels, one picture at a time; everybody in turn in every round. A percentile stands where there "
        f"are enough pictures for it. In brackets 95 % bootstrap intervals over sessions and rounds.{gemm} "
        f"Energy: {part.get('energy', '')}."
    )
    return Table(title="Latency", head=head, rows=tuple(rows), note=note)


def components_table(data: Mapping[str, Any]) -> Table:
    """Warm percentiles of each component."""
    names = list(dict.fromkeys(name for row in timed(data) for name in row["components_ms"]))
    rows = tuple(
        (row["name"], *(_percentiles(row["components_ms"].get(name)) for name in names)) for row in timed(data)
    )
    note = "Milliseconds of a picture: p50, and in brackets p90 and p99 where there are enough pictures."
    return Table(title="Latency by component", head=("", *names), rows=rows, note=note)


def _percentiles(times: Mapping[str, float] | None) -> str:
    if times is None:
        return ""
    more = [number(times[name]) for name in ("p90", "p99") if name in times]
    return number(times["p50"]) + (f" ({', '.join(more)})" if more else "")


def throughput_table(data: Mapping[str, Any]) -> Table:
    """Pictures a second by how many are drawn at once; no rows where only one was."""
    batches = [str(batch) for batch in (data.get("latency") or {}).get("options", {}).get("batches", ())]
    rows = tuple(
        (row["name"], *(interval(row["images_per_s"].get(batch), 1) for batch in batches)) for row in timed(data)
    )
    head = ("", *(f"{batch} at once" for batch in batches))
    return Table(title="Pictures a second", head=head, rows=rows if len(batches) > 1 else ())


def quality_table(data: Mapping[str, Any]) -> Table:
    """Every figure with its interval."""
    rows = []
    for row in judged(data):
        cells = [row["name"]]
        for metric, (_, _, factor, digits) in METRICS.items():
            figure = row["figures"].get(metric)
            plain = figure is not None and "low" not in figure
            cells.append(number(factor * figure["value"], digits) if plain else interval(figure, digits, factor))
        rows.append(tuple(cells))
    part = data.get("quality") or {}
    if not rows:
        return Table(title="Quality", head=(), rows=())
    eye, prompts, reference = part["eye"], part["prompts"], part["reference"]
    note = (
        f"{prompts['count']:,} prompts ({prompts['file']}), a picture each. Eye: {eye['name']}, {eye['size_px']} px, "
        f"prefix {eye['prefix']!r}. -T: to pictures of {reference['name'] or 'nobody'} of the same prompts from other "
        "seeds. In brackets 95 % bootstrap intervals over prompts."
    )
    return Table(title="Quality", head=("", *(name for name, *_ in METRICS.values())), rows=tuple(rows), note=note)


def differences_table(data: Mapping[str, Any]) -> Table:
    """Paired differences to the first candidate."""
    names = [name for name in METRICS if any(name in row.get("differences", {}) for row in judged(data))]
    rows = []
    for row in judged(data):
        found = row.get("differences")
        if not found:
            continue
        cells = [row["name"]]
        for name in names:
            _, _, factor, digits = METRICS[name]
            cells.append(interval(found.get(name), digits, factor) + (" *" if found.get(name, {}).get("apart") else ""))
        rows.append(tuple(cells))
    first = (data.get("quality") or {}).get("first")
    note = f"Minus {first}, on the same prompts and seeds; *: 0 is not in the 95 % interval."
    return Table(
        title="Paired differences", head=("", *(METRICS[name][0] for name in names)), rows=tuple(rows), note=note
    )


def categories_table(data: Mapping[str, Any]) -> Table:
    """CLIP score by category of the prompts."""
    rows = [row for row in judged(data) if row.get("categories")]
    names = list(rows[0]["categories"]) if rows else []
    head = ("", *(f"{name} ({rows[0]['categories'][name]['count']})" for name in names))
    cells = tuple((row["name"], *(interval(row["categories"].get(name), 1) for name in names)) for row in rows)
    return Table(title="CLIP score by category", head=head, rows=cells, note="In brackets after a name: its prompts.")


def parities_table(data: Mapping[str, Any]) -> Table:
    """What the exports measured against torch."""
    bundles = {row["name"]: row for row in _bundles([*_all(data)]) if isinstance(row.get("parity"), Mapping)}
    names = list(dict.fromkeys(name for row in bundles.values() for name in row["parity"]))
    rows = tuple(
        (name, *(_decibel(row["parity"].get(component)) for component in names)) for name, row in bundles.items()
    )
    note = "PSNR against torch, as the export measured it at each of the plan's timesteps; the gate in brackets."
    return Table(title="Parity", head=("", *names), rows=rows, note=note)


def _decibel(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    value = "equal" if figures["psnr_db"] >= 200 else f"{figures['psnr_db']:.0f} dB"
    return f"{value} ({figures['least_db']:.0f})" if "least_db" in figures else value


def _all(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All rows of both parts, measured or not."""
    latency, quality = data.get("latency") or {}, data.get("quality") or {}
    return [*latency.get("entrants", ()), *quality.get("candidates", ())]


def not_run_table(data: Mapping[str, Any]) -> Table:
    """What has no figures, and why."""
    latency, quality = data.get("latency") or {}, data.get("quality") or {}
    rows = [
        (row["name"], what, row["why"])
        for what, listed in (("latency", latency.get("entrants", ())), ("quality", quality.get("candidates", ())))
        for row in listed
        if row["status"] != "measured"
    ]
    rows += [(row["name"], "PSNR to torch", row["psnr_why"]) for row in judged(data) if row.get("psnr_why")]
    if quality.get("reference", {}).get("why"):
        rows.append(("reference", "FD-T and its kin", quality["reference"]["why"]))
    return Table(title="Not measured", head=("", "what", "why"), rows=tuple(rows))

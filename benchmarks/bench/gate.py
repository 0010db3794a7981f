"""`hypersd-bench gate DIR --baseline FILE`: what has become worse by more than its noise, one line each.

Noise: the intervals of both runs together (the root of the sum of their squared half widths), as two runs are
independent; for the CLIP score the paired difference's own interval, which is far narrower.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench.parts import REPORT_FORMAT, read_part
from benchmarks.bench.quality import METRICS, mean_of_rows
from benchmarks.bench.report import read_parts
from hypersd_export.errors import DataError

UNSEEN_DB = 50.0
"""A PSNR to torch above this is rounding: whether it falls is no matter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """falls: what has become worse, a line each. left_out: what could not be compared, and why. compared: how many
    figures were."""

    falls: tuple[str, ...]
    left_out: tuple[str, ...]
    compared: int

    @property
    def passed(self) -> bool:
        """Whether nothing has become worse."""
        return not self.falls


def run_gate(folder: Path, baseline: Path) -> Verdict:
    """Compare what was measured into `folder` with a report.json of before.

    Raises:
        DataError: one of them cannot be read, or there is nothing that both have.
    """
    old = read_part(baseline, REPORT_FORMAT)
    if old is None:
        raise DataError(f"--baseline {baseline}: no such file; it is the report.json of hypersd-bench report")
    new = read_parts(folder)
    lines = [*_latency(new["latency"], old["latency"]), *_quality(new["quality"], old["quality"])]
    found = {kind: tuple(text for which, text in lines if which == kind) for kind in ("fall", "left out", "held")}
    compared = len(found["held"]) + len(found["fall"])
    if not compared:
        why = "; ".join(found["left out"]) or "they have no figure in common"
        raise DataError(f"{folder} and {baseline} cannot be compared: {why}")
    return Verdict(falls=found["fall"], left_out=found["left out"], compared=compared)


Line = tuple[str, str]
"""("fall", "left out" or "held", text)."""


def _latency(new: Mapping[str, Any] | None, old: Mapping[str, Any] | None) -> Iterator[Line]:
    """The ratios to the first contestant: of a peer it should not fall, of a bundle not rise."""
    if new is None or old is None:
        return
    for name, was, now in (("processor", old["machine"]["cpu"], new["machine"]["cpu"]),
                           ("threads", old["machine"]["threads"], new["machine"]["threads"]),
                           ("first contestant", old["reference"], new["reference"])):  # fmt: skip
        if was != now:
            yield "left out", f"latency: another {name} ({now}, before {was})"
            return
    rows = {row["name"]: row for row in new["entrants"]}
    for before in old["entrants"]:
        if before["status"] != "measured" or "ratio" not in before or before["name"] == old["reference"]:
            continue
        after = rows.get(before["name"])
        if after is None or "ratio" not in after:
            yield "fall", f"{before['name']}: was timed before, and is not now{_why(after)}"
            continue
        yield _ratio(before["name"], before["kind"], before["ratio"], after["ratio"])


def _ratio(name: str, kind: str, before: Mapping[str, float], after: Mapping[str, float]) -> Line:
    change = math.log(after["value"] / before["value"]) * (1 if kind == "bundle" else -1)
    noise = math.hypot(*(math.log(figure["high"] / figure["low"]) / 2 for figure in (before, after)))
    text = (
        f"{name}: time over the first's {after['value']:.2f}, before {before['value']:.2f} "
        f"({100 * abs(math.expm1(change)):.1f} %, noise {100 * math.expm1(noise):.1f} %)"
    )
    return ("fall" if change > noise else "held"), text


def _quality(new: Mapping[str, Any] | None, old: Mapping[str, Any] | None) -> Iterator[Line]:
    if new is None or old is None:
        return
    for name, was, now in (("eye", old["eye"], new["eye"]),
                           ("prompts", old["prompts"]["digest"], new["prompts"]["digest"]),
                           ("reference", old["reference"]["name"], new["reference"]["name"])):  # fmt: skip
        if was != now:
            yield "left out", f"quality: other {name} than before"
            return
    rows = {row["name"]: row for row in new["candidates"]}
    for before in old["candidates"]:
        if before["status"] != "measured" or before["kind"] != "bundle":
            continue
        after = rows.get(before["name"])
        if after is None or after["status"] != "measured":
            yield "fall", f"{before['name']}: its pictures were measured before, and are not now{_why(after)}"
            continue
        for metric in METRICS:
            line = _figure(before, after, metric)
            if line is not None:
                yield line


def _figure(before: Mapping[str, Any], after: Mapping[str, Any], metric: str) -> Line | None:
    was, now = (row["figures"].get(metric) for row in (before, after))
    if was is None or now is None or "low" not in was:
        return None
    name, higher, factor, digits = METRICS[metric]
    change = (was["value"] - now["value"]) * (1 if higher else -1)
    noise = math.hypot(*((figure["high"] - figure["low"]) / 2 for figure in (was, now)))
    if metric == "clip_score" and len(before.get("scores", ())) == len(after.get("scores", ())) > 1:
        low, high = mean_of_rows(np.subtract(before["scores"], after["scores"])).interval
        noise = (high - low) / 2
    unseen = metric == "psnr_db" and now["value"] >= UNSEEN_DB
    text = (
        f"{after['name']}: {name} {factor * now['value']:.{digits}f}, before {factor * was['value']:.{digits}f} "
        f"(noise {factor * noise:.{digits}f})"
    )
    return ("fall" if change > noise and not unseen else "held"), text


def _why(row: Mapping[str, Any] | None) -> str:
    return f": {row['why']}" if row and row.get("why") else ""

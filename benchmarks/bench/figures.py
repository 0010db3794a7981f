"""From measured times to the latency report: plain JSON, of `benchmarks.bench.parts`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.bench.entrants import Entrant
from benchmarks.bench.latency import Options, Times
from benchmarks.bench.machine import Energy
from benchmarks.bench.parts import LATENCY_FORMAT, now
from benchmarks.bench.work import roofline
from benchmarks.stats import LEAST, Estimate, estimate, ratio, summary
from hypersd_export.runtime.golden import psnr

PSNR_CAP_DB = 200.0
"""Stands for equal pictures: JSON has no infinity."""
BYTES = {"fp32": 4, "fp16": 2}


def report(
    entrants: Sequence[Entrant], times: Mapping[str, Times], options: Options, *, speed: Times | None,
    work: Mapping[str, Mapping[str, Any]], energy: Energy, machine: Mapping[str, Any], prompt: str,
    command: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Everything that was measured; the first entrant is what the others are compared with.

    work: `benchmarks.bench.work.unet_work` of each bundle's name, and of "" for everybody else.
    """
    reference = entrants[0].name
    base = times.get(reference)
    peak = peak_of(speed, options)
    rows = []
    for entrant in entrants:
        row: dict[str, Any] = {"name": entrant.name, "kind": entrant.kind, **entrant.facts}
        measured = times.get(entrant.name)
        if measured is None or measured.failed:
            failed = "" if measured is None else measured.failed
            row |= {"status": "failed" if measured and measured.cold_s else "not run", "why": failed or entrant.missing}
        else:
            row |= {"status": "measured", **measured_figures(measured, options)}
            if base is not None and not base.failed:
                row |= compared(measured, base, options)
            row |= _roofline(row, measured, work.get(entrant.name, work.get("", {})), peak)
        rows.append(row)
    return {
        "format": LATENCY_FORMAT, "created": now(), "command": list(command), "machine": dict(machine),
        "prompt": prompt,
        "options": {
            "rounds": options.rounds, "sessions": options.sessions, "warmup": options.warmup,
            "batches": sorted({1, *options.batches}), "threads": options.threads,
        },
        "reference": reference, "peak": peak, "energy": energy.reason or "RAPL, all processes of the machine together",
        "entrants": rows,
    }  # fmt: skip


def measured_figures(times: Times, options: Options) -> dict[str, Any]:
    """Cold start, warm latency, throughput, memory and energy of one entrant."""
    figures: dict[str, Any] = {
        "cold_start_s": spread(times.cold_s), "load_s": spread(times.load_s), "first_image_s": spread(times.first_s),
        "image_ms": summary(milliseconds(times.whole_s[1]), least=LEAST),
        "components_ms": {name: summary(milliseconds(values), least=LEAST) for name, values in times.parts_s.items()},
        "images_per_s": {
            str(images): images_per_s(images, seconds, options).to_json() | {"count": len(seconds)}
            for images, seconds in times.whole_s.items()
        },
        "peak_mb": None if times.peak_mb is None else round(times.peak_mb, 1),
        "vram_mb": None if times.vram_mb is None else round(times.vram_mb, 1),
        **{name: value for name, value in times.facts.items() if name in ("provider", "versions")},
    }  # fmt: skip
    if times.joules:
        figures["joules"] = summary(times.joules, least=LEAST)
    return figures


def milliseconds(seconds: Sequence[float]) -> list[float]:
    """In ms."""
    return [1000 * value for value in seconds]


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Of a handful of values: the median, and all of them in order."""
    return {"median": round(float(np.median(seconds)), 4), "all": [round(value, 4) for value in seconds]}


def images_per_s(images: int, seconds: Sequence[float], options: Options) -> Estimate:
    """Pictures by the median time of a call."""
    values = np.asarray(seconds)
    groups = options.session_rounds(images)
    return estimate(
        lambda rows: images / float(np.median(values[rows])), len(values), centred=False, groups=groups
    )  # fmt: skip


def compared(times: Times, base: Times, options: Options) -> dict[str, Any]:
    """Median time over the first entrant's, with the interval of a second run (on the logarithm's scale); and the PSNR
    of their pictures of one seed, where they are of one size."""
    found = ratio(times.whole_s[1], base.whole_s[1], groups=options.session_rounds(1))
    low, high = np.exp(Estimate(float(np.log(found.value)), np.log(found.replicates)).again)
    figures: dict[str, Any] = {"ratio": {**found.to_json(), "again_low": float(low), "again_high": float(high)}}
    if times.pixels is not None and base.pixels is not None and times.pixels.shape == base.pixels.shape:
        figures["picture_psnr_db"] = round(min(psnr(times.pixels[0], base.pixels[0]), PSNR_CAP_DB), 2)
    return figures


def peak_of(speed: Times | None, options: Options) -> dict[str, Any] | None:
    """The machine's medians over the same rounds: matrix product and copy; None where it was not measured."""
    if speed is None or speed.failed or not speed.parts_s:
        return None
    gemm, copy = (float(np.median(speed.parts_s[name])) for name in ("gemm", "copy"))
    facts = speed.facts
    return {
        "gemm_gflop_per_s": facts["gemm_flop"] / gemm / 1e9, "copy_gb_per_s": facts["copy_bytes"] / copy / 1e9,
        "side": facts["side"], "threads": options.threads, "device": facts["device"], "precision": facts["precision"],
        "count": len(speed.parts_s["gemm"]),
        "best_gemm_gflop_per_s": facts["gemm_flop"] / min(speed.parts_s["gemm"]) / 1e9,
    }  # fmt: skip


def _roofline(
    row: Mapping[str, Any], times: Times, work: Mapping[str, Any], peak: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Share of the measured peak that the UNet reaches: nothing where one of the parts is not known."""
    seconds = times.parts_s.get("unet")
    if not seconds or peak is None or "flop" not in work:
        return {}
    figures = roofline(
        work, steps=row["steps"], rows=row["unet_rows"], unet_s=float(np.median(seconds)),
        flop_per_s=peak["gemm_gflop_per_s"] * 1e9, copy_bytes_per_s=peak["copy_gb_per_s"] * 1e9,
        bytes_each=BYTES.get(str(row.get("precision")), 4),
    )  # fmt: skip
    return {"roofline": {name: round(value, 4) for name, value in figures.items()}}

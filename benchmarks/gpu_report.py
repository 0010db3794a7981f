"""The acceptance report as Markdown, from its JSON."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report: the machine, what passed, latency by case, and by component."""
    device, machine = report["device"], report["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    failed = [step for step in report["steps"] if step["passed"] is False]
    left_out = [step for step in report["steps"] if step["passed"] is None]
    parts = [
        f"# GPU acceptance: {device['name']}, {'passed' if report['passed'] else 'FAILED'}\n",
        f"{report['created']}. Compute capability {device['capability']}, {device['memory_bytes'] / 1e9:.1f} GB; "
        f"driver {device['driver']}, CUDA runtime {device['cuda']}; TensorRT {device['flavour']} {device['library']}. "
        f"{machine['system']}, Python {machine['python']}; {packages}.\n",
        f"{report['options']['runs']} timed images after {report['options']['warmup']} for warming up, one at a time; "
        "a latency is from the prompt's text to pixels on the host.\n",
        f"{len(report['steps'])} steps, {len(failed)} failed, {len(left_out)} left out.\n",
    ]
    parts += [f"- FAILED {step['name']}: {step['note']}\n" for step in failed]
    parts += [f"- left out {step['name']}: {step['note']}\n" for step in left_out]
    parts += ["\n## Latency of an image\n", _latency(report), "\n## By component\n", _components(report)]
    return "\n".join(part.rstrip("\n") for part in parts) + "\n"


def _measured(report: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(case, runtime, figures) of what was measured, failed golden pictures included."""
    found = []
    for step in report["steps"]:
        case, what = step["name"].rsplit(" ", 1)
        if what in ("tensorrt", "onnx") and step["figures"]:
            found.append((case, what, step["figures"]))
    return found


def _latency(report: Mapping[str, Any]) -> str:
    measured = _measured(report)
    p50 = {(case, runtime): figures["image_ms"]["p50"] for case, runtime, figures in measured}
    rows = []
    for case, runtime, figures in measured:
        image, golden = figures["image_ms"], figures["golden"]
        against = p50.get((case, "onnx")) if runtime == "tensorrt" else None
        picture = "equal" if golden["equal"] else f"{golden['psnr_db']:.1f} dB"
        rows.append(
            [
                f"{case}, {runtime} {figures['precision']}",
                picture if golden["passed"] else f"{picture}, FAILED",
                f"{figures['open_s']:.2f}", f"{figures['first_image_s']:.2f}",
                f"{image['p50']:.2f}", f"{image['p90']:.2f}", f"{image['p99']:.2f}", str(image["count"]),
                f"{figures['images_per_s']:.1f}", _captured(figures),
                "" if against is None else f"{against / image['p50']:.2f}",
            ]
        )  # fmt: skip
    head = ["bundle", "golden", "open s", "first image s", "p50 ms", "p90 ms", "p99 ms", "images", "images/s",
            "CUDA graph", "times onnx"]  # fmt: skip
    return table(head, rows) if rows else "Nothing was measured.\n"


def _captured(figures: Mapping[str, Any]) -> str:
    """Whether the engines are replayed as CUDA graphs; by name where they differ."""
    captured = figures.get("cuda_graph")
    if captured is None:
        return ""
    if len(set(captured.values())) == 1:
        return {True: "yes", False: "no", None: "not tried"}[next(iter(captured.values()))]
    return ", ".join(name for name, value in captured.items() if value) + " only"


def _components(report: Mapping[str, Any]) -> str:
    rows = []
    for case, runtime, figures in _measured(report):
        for name, wall in figures["components_ms"].items():
            device = figures.get("device_ms", {}).get(name)
            of_device = ["", "", "", ""]
            if device is not None:
                compute = device["compute"]
                of_device = [f"{compute['p50']:.3f}", f"{compute['p90']:.3f}", f"{compute['p99']:.3f}",
                             str(compute["count"])]  # fmt: skip
                copies = f"{device['copy_in']['p50']:.3f} + {device['copy_out']['p50']:.3f}"
            else:
                copies = ""
            rows.append([f"{case}, {runtime}: {name}", f"{wall['p50']:.3f}", f"{wall['p90']:.3f}",
                         f"{wall['p99']:.3f}", str(wall["count"]), *of_device, copies])  # fmt: skip
    head = ["component", "p50 ms an image", "p90", "p99", "images", "p50 ms a call, on the device", "p90", "p99",
            "calls", "copies in + out, p50 ms"]  # fmt: skip
    return table(head, rows) if rows else "Nothing was measured.\n"

"""What precision, forms of weights, attention cost in Core ML packages: `python -m benchmarks.coreml_table --out DIR`

Exports the built-in model in every combination, and lets `hypersd-bench quality` draw the same prompts and seeds with
each, by the MIL interpreter: size, PSNR to torch, and the CLIP score's difference to the first one's, paired. Writes
coreml.json and coreml.md. Whole bundles in --out and drawn pictures are kept, so that a second run goes on.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import table
from benchmarks.results import one_line_error, run_module, write_result
from hypersd_export.bundle.manifest import read_manifest, verify_files
from hypersd_export.errors import BundleError

QUALITY = "quality.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One combination; `grouped` palettes (iOS 18) are one for 16 output channels, others one for a weight.

    At most one of `bits` (palettes), `integers` (int8, int4) and `budget` (palettes of mixed widths, as a share of the
    UNet's size) is given.
    """

    precision: str = "fp16"
    attention: str = "original"
    bits: int | None = None
    grouped: bool = False
    integers: str | None = None
    budget: float | None = None

    @property
    def weights(self) -> str | None:
        """How they are stored, in a word; None for as they are."""
        if self.budget is not None:
            return f"mixed {self.budget:g}"
        return self.integers if self.bits is None else str(self.bits)

    @property
    def name(self) -> str:
        """Such as fp16-split-einsum-6, the name of its bundle."""
        parts = [self.precision, self.attention, *([] if self.weights is None else self.weights.split())]
        return "-".join([*parts, *(["grouped"] if self.grouped else [])])

    def command(self, out: Path, steps: int) -> list[str]:
        """The arguments of `hypersd-export`."""
        target = "iOS18" if self.grouped or self.integers == "int4" else "iOS17"
        command = ["--target", "coreml", "--precision", self.precision, "--attention", self.attention,
                   "--deployment-target", target, "--steps", str(steps), "--out", str(out), "--overwrite",
                   "--no-verify"]  # fmt: skip
        stored = (("--palettize", self.bits), ("--quantize", self.integers), ("--size-budget", self.budget))
        return command + [text for option, value in stored if value is not None for text in (option, str(value))]


FORMS = (
    *(Form(bits=bits) for bits in (None, 8, 6, 4, 2)),
    *(Form(bits=bits, grouped=True) for bits in (6, 4, 3, 2)),
    *(Form(integers=integers) for integers in ("int8", "int4")),
    *(Form(budget=budget) for budget in (0.35, 0.25)),
    *(Form(budget=budget, grouped=True) for budget in (0.35, 0.25)),
    *(Form(attention="split-einsum", bits=bits) for bits in (None, 8, 6, 4, 2)),
    *(Form(precision="fp32", bits=bits) for bits in (None, 8, 6, 4, 2)),
    Form(precision="fp32", attention="split-einsum"),
)
"""The first is what the others are compared with. `split-einsum-v2` is `split-einsum` here: it cuts rows of more than
512 queries, and the built-in model has 64."""


def rows(bundles: Mapping[Form, Path], quality: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of figures for each form, from its manifest and from quality.json."""
    found = {candidate["name"]: candidate for candidate in quality["candidates"]}
    result = []
    for form, bundle in bundles.items():
        components = read_manifest(bundle).targets["coreml"]["components"]
        measured = found[form.name]
        result.append(
            {
                "name": form.name, "precision": form.precision, "attention": form.attention, "bits": form.bits,
                "grouped": form.grouped, "weights": form.weights,
                "packages_mb": round(sum(each["bytes"] for each in components.values()) / 1e6, 2),
                "unet_mb": round(components["unet"]["bytes"] / 1e6, 2),
                "psnr_db": measured["figures"]["psnr_db"], "clip_score": measured["figures"]["clip_score"],
                "clip_difference": measured.get("differences", {}).get("clip_score"),
            }
        )  # fmt: skip
    return result


def markdown(found: Sequence[Mapping[str, Any]], steps: int, count: int) -> str:
    """The table, and what it is of."""
    lines = [
        [
            f"{row['precision']}, {row['attention']}",
            "–" if row["weights"] is None else f"{row['weights']}{' grouped' if row['grouped'] else ''}",
            f"{row['packages_mb']:.1f}", f"{row['unet_mb']:.1f}", _figure(row["psnr_db"]), _figure(row["clip_score"]),
            "–" if row["clip_difference"] is None else _figure(row["clip_difference"], sign="+"),
        ]
        for row in found
    ]  # fmt: skip
    head = ["precision, attention", "weights (palettes: bits)", "packages, MB", "UNet, MB", "PSNR to torch, dB",
            "CLIP score of the judge", "its difference to the first row"]  # fmt: skip
    return (
        f"# Core ML packages of the built-in model, {steps} steps\n\n{count} held-out prompts, the same seeds for all; "
        "evaluated by the MIL interpreter, with 95 % intervals over the prompts (the difference is paired).\n\n"
        + table(head, lines)
    )


def _figure(figure: Mapping[str, float], sign: str = "") -> str:
    return f"{figure['value']:{sign}.1f} [{figure['low']:{sign}.1f}, {figure['high']:{sign}.1f}]"


def is_whole(bundle: Path) -> bool:
    """Whether a bundle stands there as it was exported: then it is kept, and with it the pictures drawn of it."""
    try:
        verify_files(bundle)
    except BundleError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the table, and the bundles under it")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--count", type=int, default=100, help="prompts")
    options = parser.parse_args(arguments)
    with one_line_error() as ended:
        bundles = {form: options.out / "bundles" / form.name for form in FORMS}
        for form, bundle in bundles.items():
            if not is_whole(bundle):
                run_module(["hypersd_export.cli", *form.command(bundle, options.steps)])
            print(form.name, flush=True)
        asked = ["--reference", "none", "--varied", "0", "--count", str(options.count), "--out", str(options.out)]
        run_module(["benchmarks.bench.cli", "quality", *map(str, bundles.values()), *asked])
        quality = json.loads((options.out / QUALITY).read_text(encoding="utf-8"))
        found = rows(bundles, quality)
        result = {"machine": quality["machine"], "steps": options.steps, "count": options.count, "rows": found}
        write_result(options.out, "coreml", result, markdown(found, options.steps, options.count))
    return ended.code


if __name__ == "__main__":
    sys.exit(main())

"""Every family, plan and precision against torch: `python -m benchmarks.parity_matrix --out DIR`

Small pipelines with random weights of each family (`benchmarks.random_pipeline`), and the built-in model, are exported
to ONNX by every plan and in every form, with the gates that any export has. A cell is the worst component's PSNR and
the picture's, in dB; or the one line that refused it, which the command ends with. Writes parity.json and parity.md.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import table
from benchmarks.random_pipeline import write
from benchmarks.results import one_line_error, write_result
from hypersd_export.errors import HypersdError
from hypersd_export.spec import BUILTIN, ExportSpec, PlanFlags

FAMILIES = (BUILTIN, "sd15", "sd21", "sdxl", "lcm")
PLANS: Mapping[str, PlanFlags] = {
    "tcd, one step at 800": PlanFlags(timesteps=(800,), scheduler="tcd", eta=1.0, guidance=1.0),
    "ddim, 2 steps": PlanFlags(steps=(2,), scheduler="ddim", guidance=1.0),
    "ddim, 3 steps, guidance 5": PlanFlags(steps=(3,), scheduler="ddim", guidance=5.0),
    "tcd, 4 steps, eta 0.3": PlanFlags(steps=(4,), scheduler="tcd", eta=0.3, guidance=1.0),
    "euler, 3 steps, guidance 5": PlanFlags(steps=(3,), scheduler="euler", guidance=5.0),
    "euler_ancestral, 3 steps": PlanFlags(steps=(3,), scheduler="euler_ancestral", guidance=1.0),
    "apple-dpmpp, 3 steps, guidance 5": PlanFlags(steps=(3,), scheduler="apple-dpmpp", guidance=5.0),
    "lcm, 4 steps": PlanFlags(steps=(4,), scheduler="lcm", guidance=1.0),
}
EMBEDDED: Mapping[str, PlanFlags] = {
    "lcm, 4 steps, guidance 8 embedded": PlanFlags(steps=(4,), scheduler="lcm", guidance=8.0)
}
"""What a UNet with an embedded guidance can play."""
EQUAL_DB = 200.0
_ABOUT = """\
# Parity with torch

Written by `python -m benchmarks.parity_matrix`. PSNR in dB against torch in float32: the worst component over all
timesteps of the plan, and the picture (8 bits). The gates are 90 and 50 in fp32, 40 and 35 in fp16, and 15 for a
network whose weights are integers, whose loss was asked for.
Families other than the built-in model are small and have random weights: sd21 predicts v, sdxl has two text encoders,
lcm embeds its guidance.

{count} exports, {failed} refused.

"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How the graphs are made: the options of `ExportSpec` that it sets."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


FORMS = (
    Form(name="fp32"),
    Form(name="fp32, one graph", options={"single_graph": True}),
    Form(name="fp16", options={"precision": "fp16"}),
    Form(name="fp16, one graph", options={"precision": "fp16", "single_graph": True}),
    Form(name="int8", options={"quantize": "int8"}),
)


def specs(bases: Mapping[str, str], cache: Path, out: Path) -> Iterator[tuple[str, str, Form, ExportSpec]]:
    """All cells: family, plan, form, and what is exported."""
    for family, base in bases.items():
        for plan, flags in (EMBEDDED if family == "lcm" else PLANS).items():
            for form in FORMS:
                yield (
                    family,
                    plan,
                    form,
                    ExportSpec(
                        base=base, loras=(), plan=flags, cache_dir=cache, out=out, overwrite=True, **form.options
                    ),
                )


def cell(spec: ExportSpec) -> dict[str, Any]:
    """The figures of one export: dB of the worst component (of what is published) and of the picture, or an error."""
    from hypersd_export.export import export

    try:
        parity = export(spec).manifest.parity
    except HypersdError as error:
        return {"error": str(error)}
    assert not isinstance(parity, str), "it was verified"
    published = {name: float(figures["psnr_db"]) for name, figures in parity.items() if " " not in name}
    image = published.pop("image")
    worst = min(published, key=published.__getitem__)
    return {"worst": worst, "worst_db": published[worst], "image_db": image}


def page(rows: Sequence[Mapping[str, Any]], versions: Mapping[str, str], machine: str) -> str:
    """The table: a row a plan of a family, a column a form."""
    names = [form.name for form in FORMS]
    found = {(row["family"], row["plan"], row["form"]): row for row in rows}
    plans = list(dict.fromkeys((row["family"], row["plan"]) for row in rows))
    lines = [
        [f"{family}: {plan}", *(_said(found.get((family, plan, name))) for name in names)] for family, plan in plans
    ]
    failed = sum("error" in row for row in rows)
    made = ", ".join(f"{name} {each}" for name, each in versions.items())
    text = _ABOUT.format(count=len(rows), failed=failed)
    return text + table(["family: plan", *names], lines) + f"\n{machine}; {made}\n"


def _said(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "REFUSED"
    image = "equal" if row["image_db"] >= EQUAL_DB else f"{row['image_db']:.0f}"
    return f"{row['worst_db']:.0f}, {image}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Export all, write the table: 0 if every export held its gates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for parity.json and parity.md")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with one_line_error(options.out) as ended, tempfile.TemporaryDirectory() as scratch:
        options.out.mkdir(parents=True, exist_ok=True)
        root = Path(scratch)
        bases = {
            family: BUILTIN if family == BUILTIN else str(write(family, root / family, tiny=True))
            for family in options.only
        }
        for family, plan, form, spec in specs(bases, root / "cache", root / "bundle"):
            rows.append({"family": family, "plan": plan, "form": form.name, **cell(spec)})
            print(f"{family}: {plan}: {form.name}: {rows[-1].get('error', _said(rows[-1]))}", flush=True)
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "onnx", "onnxruntime")}
        machine = f"{platform.machine()}, {platform.system()}"
        data = {"machine": machine, "versions": versions, "rows": rows}
        write_result(options.out, "parity", data, page(rows, versions, machine))
        ended.code = int(any("error" in row for row in rows))
    return ended.code


if __name__ == "__main__":
    sys.exit(main())

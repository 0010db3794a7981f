"""`python -m hypersd_export.coreml_worker request.json`: one Core ML package, made in a process of its own.

A conversion holds the torch module, its weights in coremltools' program and their halves; all of it is given back when
the process ends, and what coremltools prints stays here. Writes the package beside the request's other files, and
`report.json`; lines on standard output say how far it is.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hypersd_export.errors import BuildError
from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.verify.source import SourceRequest, open_source
from hypersd_export.worker import reported_error, run_worker, serve, why_died

MODULE = "hypersd_export.coreml_worker"
REPORT, REQUEST = "report.json", "request.json"
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """One component, from its weights to a package `COMPONENT.mlpackage` and a `config.json` in a folder.

    deployment_target, attention, layout: see `targets.coreml`; attention is the UNet's.
    """

    source: SourceRequest
    component: Component
    shapes: Shapes
    precision: str
    deployment_target: str
    attention: str
    layout: str
    embedded_guidance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "source": self.source.to_json(),
                "shapes": asdict(self.shapes)}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Conversion":
        """Read what `to_json` wrote."""
        read = {
            "source": SourceRequest.from_json(data["source"]),
            "shapes": Shapes(**data["shapes"]),
            "component": Component(data["component"]),
        }
        return cls(**{**data, **read})

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Load → fuse → graph → package; returns what build.json says: the package's figures, and the fusion's proof.

        Raises `HypersdError`.
        """
        import torch

        from hypersd_export.graphs.attention import use_attention
        from hypersd_export.graphs.components import build_graph, component_config
        from hypersd_export.targets.coreml import convert

        progress(f"loading {self.component}")
        module, fused = open_source(self.source).load(self.component.source, torch.float32)
        config = component_config(self.component, module, self.shapes)
        use_attention(module, self.attention)
        graph = build_graph(self.component, module, self.shapes, embedded_guidance=self.embedded_guidance)
        progress(f"converting {self.component}")
        built = convert.build(
            convert.plain(graph), folder / f"{self.component}.mlpackage", precision=self.precision,
            deployment_target=self.deployment_target,
        )  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return {"built": built, "fused": fused}


def run_apart(conversion: Conversion, folder: Path, *, progress: Progress) -> dict[str, Any]:
    """`conversion.run(folder)` in a process of its own.

    Raises what that raises, or `BuildError` for a process that ended without a report.
    """
    request, report = folder / REQUEST, folder / REPORT
    request.write_text(json.dumps(conversion.to_json()), encoding="utf-8")
    what = f"the package of {conversion.component}"

    def failure(code: int, log: str) -> BuildError:
        said = "\n".join(line for line in log.splitlines() if "passes/s]" not in line and "ops/s]" not in line)
        return BuildError(why_died(what, code, said, way_out="try --target onnx, and report this with the options"))

    found = run_worker(MODULE, request, report, progress=progress, failure=failure)
    request.unlink()
    report.unlink()
    if "error" in found:
        raise reported_error(found["error"])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Read the request, convert beside it, write the report."""
    path = Path((sys.argv[1:] if arguments is None else arguments)[0])
    conversion = Conversion.from_json(json.loads(path.read_text(encoding="utf-8")))
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what the libraries print is no progress
        return serve(
            lambda: conversion.run(path.parent, lambda text: print(text, file=out, flush=True)), path.parent / REPORT
        )


if __name__ == "__main__":
    sys.exit(main())

"""What the verification is asked to do, as plain JSON: it runs in a process of its own."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.runtime.ports import Port, Ports
from hypersd_export.targets import Target
from hypersd_export.verify.source import SourceRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyRequest:
    """One verification.

    source, digests: what was exported, opened again, and the digests that it must still have.
    bundle: a folder with the tokenizer, plan.json and what draws pictures; components: the folder of each component's
    graph, wherever it lies. out: a folder for golden/ and report.json.
    target: what kind of graph that is; Core ML's packages have `ports` by component where their layout is not ours.
    whole: a package that is the whole pipeline, where there are none of its components.
    lossy: the weights were compressed, so that their gates are low (`gates.LOSSY_DB`).
    compare: False makes the golden files (by torch) and compares nothing.
    golden_db: least PSNR in dB of the golden picture, for every runtime of everything that is published.
    corners: other shapes that the graphs take, at which each is compared too.
    """

    source: SourceRequest
    digests: Mapping[str, Any]
    bundle: Path
    components: Mapping[Component, Path]
    out: Path
    shapes: Shapes
    precision: str
    provider: str
    prompt: str
    negative_prompt: str
    seed: int
    compare: bool
    golden_db: float
    target: Target = Target.ONNX
    ports: Mapping[str, Ports] = field(default_factory=dict)
    lossy: bool = False
    whole: Path | None = None
    corners: tuple[Shapes, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "source": self.source.to_json(),
            "digests": dict(self.digests),
            "bundle": str(self.bundle),
            "components": {component.value: str(folder) for component, folder in self.components.items()},
            "out": str(self.out),
            "shapes": self.shapes.to_json(),
            "corners": [shapes.to_json() for shapes in self.corners],
            "precision": self.precision,
            "provider": self.provider,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "compare": self.compare,
            "golden_db": self.golden_db,
            "target": self.target.value,
            "lossy": self.lossy,
            "whole": None if self.whole is None else str(self.whole),
            "ports": {
                component: {name: port.to_json() for name, port in ports.items()}
                for component, ports in self.ports.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "VerifyRequest":
        """Read what `to_json` wrote."""
        return cls(
            **{
                **data,
                "source": SourceRequest.from_json(data["source"]),
                "bundle": Path(data["bundle"]),
                "components": {Component(name): Path(folder) for name, folder in data["components"].items()},
                "out": Path(data["out"]),
                "whole": None if data["whole"] is None else Path(data["whole"]),
                "shapes": Shapes(**data["shapes"]),
                "corners": tuple(Shapes(**shapes) for shapes in data["corners"]),
                "target": Target(data["target"]),
                "ports": {
                    component: {name: Port.from_json(port) for name, port in ports.items()}
                    for component, ports in data["ports"].items()
                },
            }
        )

    def write(self, path: Path) -> None:
        """Write the request where the worker reads it."""
        path.write_text(json.dumps(self.to_json()), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "VerifyRequest":
        """Read a request that `write` wrote."""
        return cls.from_json(json.loads(path.read_text(encoding="utf-8")))

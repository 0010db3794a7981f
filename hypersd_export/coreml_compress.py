"""What the Core ML target's processes do with the weights of finished packages; `coreml_worker` runs these tasks.

`Compressing` stores them in one form throughout. `Rating` measures what each layer's palettes would cost, `Mixing`
chooses by that and stores them. `Merging` makes one package of several, which share their weights.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_export.diffusion import PlanFile
from hypersd_export.graphs.spec import Shapes
from hypersd_export.runtime.ports import Port, Ports
from hypersd_export.targets.coreml import QUANTIZED
from hypersd_export.verify.source import SourceRequest, open_source

RATED, CALLS = "rated.json", "calls.npz"
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressing:
    """A package `name` of the folder `source` with its weights as palettes or integers, as `name` in another folder.

    form: a key of `QUANTIZED`, or the bits of a palette's index.
    """

    source: Path
    name: str
    form: str
    deployment_target: str

    @property
    def what(self) -> str:
        """See `coreml_worker.Task`."""
        return f"the compressed weights of {self.name}"

    def to_json(self) -> dict[str, Any]:
        """See `coreml_worker.Task`."""
        return {**asdict(self), "source": str(self.source)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Compressing":
        """See `coreml_worker.Task`."""
        return cls(**{**data, "source": Path(data["source"])})

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """See `coreml_worker.Task`; the package's figures."""
        from hypersd_export.targets.coreml import palettize, quantize

        source, path = self.source / self.name, folder / self.name
        if self.form in QUANTIZED:
            progress(f"weights of {self.name} as {self.form}")
            return quantize.build(source, path, form=self.form, deployment_target=self.deployment_target)
        progress(f"palettes of {self.form} bits for {self.name}")
        return palettize.build(source, path, bits=int(self.form), deployment_target=self.deployment_target)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rating:
    """What the output of the UNet's package loses where a layer has palettes, on what the default plan feeds it.

    ports: of the package. Writes the calls beside what it returns, see `coreml_mixed.rate`.
    """

    source: SourceRequest
    package: Path
    plans: PlanFile
    shapes: Shapes
    ports: Ports
    deployment_target: str

    @property
    def what(self) -> str:
        """See `coreml_worker.Task`."""
        return "what palettes cost the UNet"

    def to_json(self) -> dict[str, Any]:
        """See `coreml_worker.Task`."""
        return {
            "source": self.source.to_json(),
            "package": str(self.package),
            "plans": self.plans.to_json(),
            "shapes": asdict(self.shapes),
            "ports": {name: port.to_json() for name, port in self.ports.items()},
            "deployment_target": self.deployment_target,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Rating":
        """See `coreml_worker.Task`."""
        return cls(
            source=SourceRequest.from_json(data["source"]),
            package=Path(data["package"]),
            plans=PlanFile.from_json(data["plans"]),
            shapes=Shapes(**data["shapes"]),
            ports={name: Port.from_json(port) for name, port in data["ports"].items()},
            deployment_target=data["deployment_target"],
        )

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """See `coreml_worker.Task`; the rating."""
        from hypersd_export.coreml_mixed import rate
        from hypersd_export.verify.mil import open_package
        from hypersd_export.verify.sensitivity import calls_of, fed

        progress("drawing to see what the UNet is fed")
        drawn = calls_of(open_source(self.source), self.plans.default, self.shapes)
        calls = fed(open_package(self.package), drawn, self.ports)
        write_calls(folder / CALLS, calls)
        return rate(self.package, calls, deployment_target=self.deployment_target, progress=progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """A package `name` of the folder `source` with palettes of mixed widths, as `name` in another folder.

    rated: the folder of a `Rating`. budget: the most that it may have of its bytes, as a share of them.
    """

    source: Path
    name: str
    rated: Path
    budget: float
    deployment_target: str

    @property
    def what(self) -> str:
        """See `coreml_worker.Task`."""
        return f"the mixed palettes of {self.name}"

    def to_json(self) -> dict[str, Any]:
        """See `coreml_worker.Task`."""
        return {**asdict(self), "source": str(self.source), "rated": str(self.rated)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Mixing":
        """See `coreml_worker.Task`."""
        return cls(**{**data, "source": Path(data["source"]), "rated": Path(data["rated"])})

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """See `coreml_worker.Task`; the package's figures."""
        from hypersd_export.coreml_mixed import build

        progress(f"mixed palettes for {self.name}")
        return build(
            self.source / self.name, folder / self.name, budget=self.budget,
            rated=json.loads((self.rated / RATED).read_text(encoding="utf-8")),
            calls=read_calls(self.rated / CALLS), deployment_target=self.deployment_target,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Merging:
    """Packages, by the name of the function that each becomes, as the one package `name`; the first is the default."""

    sources: Mapping[str, Path]
    name: str

    @property
    def what(self) -> str:
        """See `coreml_worker.Task`."""
        return f"{self.name} with several functions"

    def to_json(self) -> dict[str, Any]:
        """See `coreml_worker.Task`."""
        return {"sources": [[name, str(path)] for name, path in self.sources.items()], "name": self.name}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Merging":
        """See `coreml_worker.Task`."""
        return cls(sources={name: Path(path) for name, path in data["sources"]}, name=data["name"])

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """See `coreml_worker.Task`; the package's figures."""
        from hypersd_export.targets.coreml import merge

        progress(f"merging {len(self.sources)} packages into {self.name}")
        return merge.build(self.sources, folder / self.name)


def write_calls(path: Path, calls: Iterable[Mapping[str, Any]]) -> None:
    """Write the inputs of calls, by number and name."""
    np.savez(path, **{f"{number} {name}": value for number, call in enumerate(calls) for name, value in call.items()})


def read_calls(path: Path) -> list[dict[str, Any]]:
    """Read what `write_calls` wrote."""
    calls: list[dict[str, Any]] = []
    with np.load(path) as stored:
        for key in stored.files:
            number, _, name = key.partition(" ")
            if int(number) == len(calls):
                calls.append({})
            calls[int(number)][name] = stored[key]
    return calls

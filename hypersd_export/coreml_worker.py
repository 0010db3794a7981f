"""`python -m hypersd_export.coreml_worker request.json`: what the Core ML target does in processes of their own.

A conversion holds the torch module, its weights in coremltools' program and their halves; all of it is given back when
the process ends, and what coremltools prints stays here. Results are written beside the request, and `report.json`;
lines on standard output say how far it is.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self

from hypersd_export.coreml_compress import Compressing, Merging, Mixing, Rating
from hypersd_export.diffusion import Guidance, PlanFile, StepTable
from hypersd_export.errors import BuildError
from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.verify.source import SourceRequest, open_source
from hypersd_export.worker import reported_error, run_worker, serve, why_died

MODULE = "hypersd_export.coreml_worker"
REPORT, REQUEST = "report.json", "request.json"
PIPELINE_FILE = "pipeline.mlpackage"
Progress = Callable[[str], None]


class Task(Protocol):
    """Plain data that travels as JSON, and what is done with it."""

    @property
    def what(self) -> str:
        """What comes of it, in words."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Do it, writing files into `folder`; returns figures as plain JSON. Raises `HypersdError`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """One component, from its weights to a package `COMPONENT.mlpackage` and a `config.json` in a folder.

    deployment_target, attention, layout: see `targets.coreml`; attention is the UNet's. scales: of its group norms, by
    their names in the pipeline's component, see `graphs.half_safe`. lora_apart: LoRAs beside the weights, not in them.
    """

    source: SourceRequest
    component: Component
    shapes: Shapes
    precision: str
    deployment_target: str
    attention: str
    layout: str
    embedded_guidance: float | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    lora_apart: bool = False

    @property
    def what(self) -> str:
        """See `Task`."""
        return f"the package of {self.component}"

    def to_json(self) -> dict[str, Any]:
        """See `Task`."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "source": self.source.to_json(),
                "shapes": asdict(self.shapes)}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Conversion":
        """See `Task`."""
        read = {
            "source": SourceRequest.from_json(data["source"]),
            "shapes": Shapes(**data["shapes"]),
            "component": Component(data["component"]),
        }
        return cls(**{**data, **read})

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Load → fuse → graph → package; returns what build.json says: the package's figures, the fusion's proof."""
        import torch

        from hypersd_export.graphs.apple import as_apple, two_outputs
        from hypersd_export.graphs.attention import use_attention
        from hypersd_export.graphs.components import build_graph, component_config
        from hypersd_export.graphs.half_safe import scale_norms
        from hypersd_export.graphs.kept_apart import keep_apart
        from hypersd_export.targets.coreml import convert

        progress(f"loading {self.component}")
        source, part = open_source(self.source), self.component.source
        module, fused = source.load(part, torch.float32)
        if self.lora_apart and source.loras_of(part):  # that it would land was proven by fusing it
            del module
            module, _ = replace(source, loras=()).load(part, torch.float32)
            loras = [(lora.components[part], scale) for lora, scale in source.loras_of(part)]
            keep_apart(module, loras, component=part)
        config = component_config(self.component, module, self.shapes) | source.base.marks(self.component.source)
        use_attention(module, self.attention)
        scale_norms(module, self.scales)
        graph = two_outputs(build_graph(self.component, module, self.shapes, embedded_guidance=self.embedded_guidance))
        graph = as_apple(graph) if self.layout == "apple" else convert.plain(graph)
        progress(f"converting {self.component}")
        built = convert.build(
            graph, folder / f"{self.component}.mlpackage", precision=self.precision,
            deployment_target=self.deployment_target,
        )  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return {"built": built, "fused": fused}


@dataclass(frozen=True, kw_only=True, slots=True)
class Joining:
    """The whole pipeline as the package `pipeline.mlpackage`, and each part's config.json in a folder of its name.

    scales: of the group norms, by component of the pipeline (unet, vae). empty: see `graphs.pipeline`.
    """

    source: SourceRequest
    shapes: Shapes
    precision: str
    deployment_target: str
    attention: str
    table: StepTable
    guidance: Guidance
    scaling_factor: float
    shift_factor: float
    empty: Sequence[Sequence[int]] = ()
    scales: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """See `Task`."""
        return "the package of the whole pipeline"

    def to_json(self) -> dict[str, Any]:
        """See `Task`."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "source": self.source.to_json(),
                "shapes": asdict(self.shapes), "table": self.table.to_json(),
                "guidance": self.guidance.to_json()}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Joining":
        """See `Task`."""
        read = {
            "source": SourceRequest.from_json(data["source"]),
            "shapes": Shapes(**data["shapes"]),
            "table": StepTable.from_json(data["table"]),
            "guidance": Guidance.from_json(data["guidance"]),
            "empty": tuple(tuple(ids) for ids in data["empty"]),
        }
        return cls(**{**data, **read})

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """See `Conversion.run`."""
        import torch

        from hypersd_export.graphs.attention import use_attention
        from hypersd_export.graphs.components import build_graph, component_config
        from hypersd_export.graphs.half_safe import scale_norms
        from hypersd_export.graphs.pipeline import pipeline_graph
        from hypersd_export.targets.coreml import convert

        source, fused, graphs = open_source(self.source), [], {}
        embedded = self.guidance.embedded
        for part in (c for c in Component if c is not Component.VAE_ENCODER and c.source in source.base.parts):
            progress(f"loading {part}")
            module, reports = source.load(part.source, torch.float32)
            fused += reports
            config = component_config(part, module, self.shapes) | source.base.marks(part.source)
            (folder / part).mkdir()
            (folder / part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if part is Component.UNET:
                use_attention(module, self.attention)
            scale_norms(module, self.scales.get(part.source, {}))
            guidance = embedded if part is Component.UNET else None
            graphs[part] = build_graph(part, module, self.shapes, embedded_guidance=guidance)
        texts = [graph for part, graph in graphs.items() if part.startswith(Component.TEXT_ENCODER)]
        joined = pipeline_graph(
            texts, graphs[Component.UNET], graphs[Component.VAE_DECODER], table=self.table, guidance=self.guidance,
            scaling_factor=self.scaling_factor, shift_factor=self.shift_factor, empty=self.empty,
        )  # fmt: skip
        progress("converting the pipeline")
        built = convert.build(
            joined, folder / PIPELINE_FILE, precision=self.precision, deployment_target=self.deployment_target,
            picture="image",
        )  # fmt: skip
        return {"built": built, "fused": fused}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutting:
    """A package `name` of the folder `source` as two of these names in another folder."""

    source: Path
    name: str
    pieces: tuple[str, str]

    @property
    def what(self) -> str:
        """See `Task`."""
        return f"the pieces of {self.name}"

    def to_json(self) -> dict[str, Any]:
        """See `Task`."""
        return {**asdict(self), "source": str(self.source)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Cutting":
        """See `Task`."""
        first, second = data["pieces"]
        return cls(source=Path(data["source"]), name=data["name"], pieces=(first, second))

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """See `Task`; the figures of the pieces."""
        from hypersd_export.targets.coreml import chunk

        progress(f"cutting {self.name}")
        first, second = (folder / name for name in self.pieces)
        return chunk.build(self.source / self.name, first, second)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawing:
    """What the tasks that draw pictures by torch are given."""

    source: SourceRequest
    plans: PlanFile
    shapes: Shapes
    prompt: str

    def to_json(self) -> dict[str, Any]:
        """See `Task`."""
        return {**{each.name: getattr(self, each.name) for each in fields(self)}, "source": self.source.to_json(),
                "plans": self.plans.to_json(), "shapes": asdict(self.shapes)}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """See `Task`."""
        read = {
            "source": SourceRequest.from_json(data["source"]),
            "plans": PlanFile.from_json(data["plans"]),
            "shapes": Shapes(**data["shapes"]),
        }
        return cls(**{**data, **read})


@dataclass(frozen=True, kw_only=True, slots=True)
class Measuring(_Drawing):
    """Which group norms of UNet and VAE square what half cannot hold."""

    @property
    def what(self) -> str:
        """See `Task`."""
        return "the range of the group norms"

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """See `Task`; `verify.norms.norm_report` by component of the pipeline."""
        del folder
        from hypersd_export.verify.norms import norm_report, norm_spreads

        found = norm_spreads(open_source(self.source), self.plans, self.shapes, prompt=self.prompt, progress=progress)
        return {part: norm_report(spreads) for part, spreads in found.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Playing(_Drawing):
    """How far the plans' pictures are from what Apple's scheduler makes of them, where it only comes near."""

    seed: int

    @property
    def what(self) -> str:
        """See `Task`."""
        return "the plans as Apple's scheduler plays them"

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """See `Task`; PSNR in dB by step count."""
        del folder
        from hypersd_export.verify.apple import psnr_as_played

        progress("drawing as Apple's scheduler does")
        found = psnr_as_played(open_source(self.source), self.plans, self.shapes, prompt=self.prompt, seed=self.seed)
        return {str(steps): db for steps, db in found.items()}


TASKS: Mapping[str, type[Task]] = {
    task.__name__: task
    for task in (Conversion, Joining, Compressing, Rating, Mixing, Merging, Cutting, Measuring, Playing)
}


def run_apart(task: Task, folder: Path, *, progress: Progress) -> dict[str, Any]:
    """`task.run(folder)` in a process of its own.

    Raises what that raises, or `BuildError` for a process that ended without a report.
    """
    request, report = folder / REQUEST, folder / REPORT
    request.write_text(json.dumps({"task": type(task).__name__, "asked": task.to_json()}), encoding="utf-8")

    def failure(code: int, log: str) -> BuildError:
        said = "\n".join(line for line in log.splitlines() if "passes/s]" not in line and "ops/s]" not in line)
        way_out = "try --target onnx, and report this with the options"
        return BuildError(why_died(task.what, code, said, way_out=way_out))

    found = run_worker(MODULE, request, report, progress=progress, failure=failure)
    request.unlink()
    report.unlink()
    if "error" in found:
        raise reported_error(found["error"])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Read the request, do it, write the report."""
    path = Path((sys.argv[1:] if arguments is None else arguments)[0])
    request = json.loads(path.read_text(encoding="utf-8"))
    task, out = TASKS[request["task"]].from_json(request["asked"]), sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what the libraries print is no progress
        return serve(
            lambda: task.run(path.parent, lambda text: print(text, file=out, flush=True)), path.parent / REPORT
        )


if __name__ == "__main__":
    sys.exit(main())

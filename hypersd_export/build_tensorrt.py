"""The TensorRT target: an engine of each fp16 ONNX graph of the workshop, each a stage of its own in the cache."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hypersd_export.build import Built, OnnxGraphs, Workshop, build_notes, onnx_record
from hypersd_export.bundle.cache import Stage
from hypersd_export.bundle.engines import PIPELINE, EngineRecord, engine_records
from hypersd_export.bundle.manifest import read_manifest
from hypersd_export.errors import BundleError
from hypersd_export.graphs.spec import Component
from hypersd_export.job import code_digests
from hypersd_export.targets import Target, tensorrt
from hypersd_export.targets.onnx import MODEL_FILE
from hypersd_export.targets.onnx_pipeline import PIPELINE_FILE
from hypersd_export.targets.tensorrt import EngineOptions
from hypersd_export.targets.tensorrt_checks import read_onnx
from hypersd_export.targets.tensorrt_vendor import installed_version

RECORD_FILE = "engine.json"
Former = Mapping[str, tuple[EngineRecord, Path]]
"""The engines of another bundle by name, each with its file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A graph that becomes an engine: its stage and file, the nodes that are float32 and those that may be."""

    name: str
    stage: Stage
    file: str
    fp32_nodes: Collection[str]
    glue_nodes: Collection[str] = ()


def tensorrt_target(workshop: Workshop) -> Built:
    """Engines of the components, or with `--single-graph` one of the whole; the configs beside them."""
    job = workshop.job
    assert job.engines is not None, "open_job resolves them for this target"
    options, said = job.engines
    workshop.clock.reporter.note(said)
    precision = job.spec.precision_of(Target.TENSORRT)
    graphs = workshop.onnx(precision)
    former = former_engines(job.spec.refit_from)
    stages = {source.name: engine_stage(workshop, source, options, precision, former) for source in sources(graphs)}
    records = {name: read_record(stage) for name, stage in stages.items()}
    first = next(iter(records.values()))
    files = {record.file: stages[name].path / Path(record.file).name for name, record in records.items()}
    configs = {f"{name}/config.json": stage.path / "config.json" for name, stage in graphs.components.items()}
    return Built(
        target=Target.TENSORRT,
        precision=precision,
        files=files | configs,
        record={
            "precision": precision,
            "opset": job.spec.opset,
            "flavour": options.flavour,
            "version": first.version,
            "capabilities": list(options.capabilities),
            "weights": first.weights,  # a stripped engine that was refitted holds weights
            "engines": {name: record.to_json() for name, record in records.items()},
            "onnx": onnx_record(graphs, job.spec.opset),
        },
        artifacts=(graphs.artifacts(published=False),),
    )


def sources(graphs: OnnxGraphs) -> list[Source]:
    """What becomes engines of these graphs."""
    blocked = {component: float32_nodes(stage) for component, stage in graphs.components.items()}
    if graphs.whole is None:
        return [
            Source(name=component.value, stage=stage, file=MODEL_FILE, fp32_nodes=blocked[component])
            for component, stage in graphs.components.items()
        ]
    names = list(read_onnx(graphs.whole.path / PIPELINE_FILE).ops)
    fp32, glue = list(in_pipeline(names, blocked)), list(between_parts(names))
    return [Source(name=PIPELINE, stage=graphs.whole, file=PIPELINE_FILE, fp32_nodes=fp32, glue_nodes=glue)]


def engine_stage(
    workshop: Workshop, source: Source, options: EngineOptions, precision: str, former: Former | None
) -> Stage:
    """The stage of one engine: the file under its own name, and its record; `former` are those to refit, if any."""
    old = None
    if former is not None:
        if source.name not in former:
            raise BundleError(f"{workshop.job.spec.refit_from} has no engine of {source.name} to refit: export again")
        old = former[source.name]

    def build(folder: Path) -> None:
        onnx = source.stage.path / source.file
        progress = workshop.clock.reporter.detail
        if old is not None:
            record = tensorrt.refit(*old, onnx, folder, fp32_nodes=source.fp32_nodes, progress=progress)
        else:
            record = make(onnx, folder, progress)
        (folder / RECORD_FILE).write_text(json.dumps(record.to_json()), encoding="utf-8")

    def make(onnx: Path, folder: Path, progress: Callable[[str], None]) -> EngineRecord:
        return tensorrt.build(
            onnx,
            folder,
            component=source.name,
            options=options,
            precision=precision,
            fp32_nodes=source.fp32_nodes,
            glue_nodes=source.glue_nodes,
            progress=progress,
        )

    depends = {
        "refitted": None if old is None else old[0].sha256,
        "onnx": source.stage.key,
        "flavour": options.flavour,
        "version": installed_version(options.flavour),
        "capabilities": options.capabilities,
        "options": options.to_json(),
        "precision": precision,
        "fp32_nodes": sorted(source.fp32_nodes),
        "code": code_digests(("targets", "bundle/engines.py")),
    }
    return workshop.stage(f"tensorrt-{source.name}", depends, build)


def former_engines(bundle: Path | None) -> Former | None:
    """The engines of the bundle that is refitted; None without such a bundle."""
    if bundle is None:
        return None
    records = engine_records(read_manifest(bundle).targets[Target.TENSORRT.value], bundle)
    return {name: (record, bundle / record.file) for name, record in records.items()}


def read_record(stage: Stage) -> EngineRecord:
    """The record of a stage's engine."""
    path = stage.path / RECORD_FILE
    return EngineRecord.from_json(json.loads(path.read_text(encoding="utf-8")), str(path))


def float32_nodes(stage: Stage) -> list[str]:
    """The nodes of an fp16 ONNX stage that the range scan keeps in float32."""
    return [str(name) for name in build_notes(stage)["fp32_nodes"]]


def in_pipeline(names: Collection[str], blocked: Mapping[Component, Collection[str]]) -> Iterator[str]:
    """Of the nodes of a single graph, those that are the `blocked` ones of its parts, wherever a part stands."""
    wanted = {part.value: set(found) for part, found in blocked.items()}
    for name in names:
        part, _, rest = name.partition(".")
        if part.startswith(Component.TEXT_ENCODER):  # text_encoder.prompt.NODE
            _, _, rest = rest.partition(".")
        number = rest.rpartition(".")  # a part that stands there again has .2 behind each name
        original = number[0] if number[2].isdecimal() and rest not in wanted.get(part, ()) else rest
        if original in wanted.get(part, ()):
            yield name


def between_parts(names: Collection[str]) -> Iterator[str]:
    """Of the nodes of a single graph, those of none of its parts: the table's arithmetic, guidance, the pixels."""
    parts = {component.value for component in Component}
    return (name for name in names if name.partition(".")[0] not in parts)

"""What is built for each target: load → fuse → graphs → target, component by component, or out of the cache.

`BUILDERS` has one function a target, which says with a `Built` what the bundle gets. A target that starts from ONNX
asks the `Workshop` for the graphs of its precision; whether those are published too is not its business.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypersd_export.bundle.cache import Build, Stage
from hypersd_export.bundle.texts import encoders_of
from hypersd_export.clock import Clock
from hypersd_export.component import Former, import_unet
from hypersd_export.graphs.spec import COMPRESSIBLE, Component
from hypersd_export.helper import Helper, pays
from hypersd_export.job import Job, code_digests, tool_versions
from hypersd_export.model.pages import trim
from hypersd_export.refit import former_of
from hypersd_export.runtime.ports import Ports
from hypersd_export.targets import Target
from hypersd_export.targets.onnx import DATA_FILE, MODEL_FILE
from hypersd_export.targets.onnx_pipeline import PIPELINE_DATA_FILE, PIPELINE_FILE
from hypersd_export.verify import range_scan
from hypersd_export.verify.range_scan import Drawing, Ranges

COMPOSE = "onnx-pipeline"
IMPORT = "import"
"""The stage in which torch and diffusers are imported and the base is hashed, while a helper imports them too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxGraphs:
    """The ONNX graphs of one precision: a stage per component (`model.onnx`, `config.json`, `build.json`), and under
    `--single-graph` the `whole` (`pipeline.onnx`, `build.json`).

    A component's build.json has `built` (the manifest's figures), `fused` (the proof of each LoRA), `layout` (what was
    laid out for processors, by its kind) and `fp32_nodes`: the names of the nodes that the range scan keeps in float32.
    """

    precision: str
    components: Mapping[Component, Stage]
    whole: Stage | None = None
    ranges: Mapping[Component, Ranges] = field(default_factory=dict)
    """fp16 alone: what the range scan found."""
    quantized: str | None = None
    """How the weights are stored, where not as they are."""

    def keys(self) -> dict[str, str]:
        """The cache keys of all of them, by name."""
        keys = {component.value: stage.key for component, stage in self.components.items()}
        return keys if self.whole is None else keys | {COMPOSE: self.whole.key}

    def artifacts(self, *, published: bool) -> "Artifacts":
        """As what is held against torch."""
        return Artifacts(
            target=Target.ONNX,
            precision=self.precision,
            published=published,
            components={component: stage.path for component, stage in self.components.items()},
            keys=self.keys(),
            files=self.files(),
            compression=self.quantized,
        )

    def files(self) -> dict[str, Path]:
        """What a bundle that publishes them gets, by its name there: of the parts of a single graph, the configs."""
        names = ("config.json",) if self.whole is not None else (MODEL_FILE, DATA_FILE, "config.json")
        found = {f"{component}/{name}": s.path / name for component, s in self.components.items() for name in names}
        if self.whole is not None:
            found |= {name: self.whole.path / name for name in (PIPELINE_FILE, PIPELINE_DATA_FILE)}
        return {name: path for name, path in found.items() if path.is_file()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifacts:
    """Graphs of one kind and precision, as they are held against torch.

    components: the folder of each one's graph; whole: the package that is all of them. keys: the cache keys of all.
    files: what a bundle gets that draws with them. ports: by component, for packages whose layout is not ours.
    """

    target: Target
    precision: str
    published: bool
    components: Mapping[Component, Path] = field(default_factory=dict)
    whole: Path | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    ports: Mapping[str, Ports] = field(default_factory=dict)
    compression: str | None = None
    """How the weights are stored that are compressed: such as 6bit, int8 or mixed."""

    @property
    def label(self) -> str:
        """What tells them from others of the same export."""
        if self.target is Target.ONNX:
            return self.precision if self.compression is None else f"{self.precision}-{self.compression}"
        return self.target.value if self.compression is None else f"{self.target}-{self.compression}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """One target, built. `files`: by their name in the bundle, the files (or folders) that go there; `record`: what
    the manifest says about it; `artifacts`: what it is, or was made from, which is held against torch."""

    target: Target
    precision: str
    files: Mapping[str, Path]
    record: Mapping[str, Any]
    artifacts: tuple[Artifacts, ...] = ()


class Workshop:
    """Builds the stages of one export; what several targets start from is built once.

    `bundle` is where the export will be assembled: weights that are written for the cache are written there too.
    `delivered`: by their names there, the stages' files that they are.
    """

    def __init__(self, job: Job, clock: Clock, bundle: Path) -> None:
        self.job, self.clock, self.bundle = job, clock, bundle
        self.delivered: dict[str, Path] = {}
        self._onnx: dict[str, OnnxGraphs] = {}
        self.check_loras = functools.cache(job.source.check_loras)  # once, before anything is built for nothing

    def build(self, target: Target) -> Built:
        """Everything of one target."""
        return BUILDERS[target](self)

    def onnx(self, precision: str) -> OnnxGraphs:
        """The ONNX graphs of this precision."""
        if precision not in self._onnx:
            self._onnx[precision] = self._graphs(precision)
        return self._onnx[precision]

    def quantized(self, precision: str, kind: str) -> OnnxGraphs:
        """The same with integer weights in text encoders and UNet."""
        raw = self.onnx(precision)
        components = {
            component: self._integers(component, stage, precision, kind) if component in COMPRESSIBLE else stage
            for component, stage in raw.components.items()
        }
        whole = self._compose(precision, components, kind) if self.job.spec.single_graph else None
        return dataclasses.replace(raw, components=components, whole=whole, quantized=kind)

    def _integers(self, component: Component, raw: Stage, precision: str, kind: str) -> Stage:
        depends = {"graph": raw.key, "kind": kind, "versions": tool_versions(), "code": code_digests(("targets",))}
        name = _name(precision, f"{component}-{kind}")
        return self.stage(name, depends, functools.partial(store_integers, raw.path, kind, precision))

    def stage(self, name: str, depends: Mapping[str, Any], build: Build) -> Stage:
        """A timed stage, out of the cache or built by `build(folder)`."""
        with self.clock.stage(name) as record:
            stage = self.job.cache.get(name, depends, build)
            record.cached = stage.cached
        if not stage.cached:
            trim()
        return stage

    def _graphs(self, precision: str) -> OnnxGraphs:
        components, ranges = self._components(precision), {}
        if precision == "fp16" and self.job.spec.scan:
            ranges = self._scan(components)
            components = {c: self._keep(c, stage, ranges[c]) for c, stage in components.items()}
        whole = self._compose(precision, components) if self.job.spec.single_graph else None
        return OnnxGraphs(precision=precision, components=components, whole=whole, ranges=ranges)

    def _components(self, precision: str) -> dict[Component, Stage]:
        """One after the other, and where that pays, some in a helper meanwhile (see `hypersd_export.helper`)."""
        job, cache = self.job, self.job.cache
        task = job.component_task(precision)
        depends = functools.cache(lambda component: job.component_depends(Target.ONNX, component, precision))
        names = {component: _name(precision, component) for component in job.components}
        absent = [c for c, name in names.items() if cache.absent(name, functools.partial(depends, c))]
        order = self._shared(absent)
        with contextlib.ExitStack() as end:
            helper = None
            if order:
                scratch = end.enter_context(cache.scratch("helper"))
                helper = end.enter_context(Helper(task, order[:0:-1], scratch))
                with self.clock.stage(IMPORT), ThreadPoolExecutor(1) as aside:
                    digest = aside.submit(lambda: job.source.base.digest)  # of gigabytes, and other Python runs
                    import_unet()
                    digest.result()

            def build(component: Component, folder: Path) -> dict[str, str]:
                self.check_loras()
                if helper is not None and helper.took(component, folder):
                    return {}
                also = [self.bundle / component / DATA_FILE] if self._publishes(precision) else []
                return task.build(job.source, component, folder, also, former(component))

            def former(component: Component) -> Former | None:
                bundle, look_up = job.spec.refit_from, functools.partial(cache.lookup, names[component])
                return None if bundle is None else former_of(bundle, depends(component), look_up)

            built: dict[Component, Stage] = {}
            for component in dict.fromkeys((*order, *job.components)):
                stage = self.stage(names[component], depends(component), functools.partial(build, component))
                built[component] = stage
                if (self.bundle / component / DATA_FILE).is_file():
                    self.delivered[f"{component}/{DATA_FILE}"] = stage.path / DATA_FILE
        return {component: built[component] for component in job.components}

    def _publishes(self, precision: str) -> bool:
        """Whether the graphs of this precision are published as they are built (but for what a range scan keeps)."""
        spec = self.job.spec
        return (
            Target.ONNX in spec.targets and precision == spec.precision_of(Target.ONNX)
            and not spec.single_graph and spec.quantize is None
        )  # fmt: skip

    def _shared(self, absent: Sequence[Component]) -> tuple[Component, ...]:
        """The components that are built by two processes, in this one's order; () where one is to build them all."""
        others = [component for component in absent if component is not Component.UNET]
        jobs, parts = self.job.spec.jobs, self.job.source.base.parts
        if jobs == 1 or not others or Component.UNET not in absent:
            return ()
        if jobs is None and not pays([path for component in others for path in parts[component.source].files]):
            return ()
        return (Component.UNET, *reversed(others))

    def _scan(self, components: Mapping[Component, Stage]) -> dict[Component, Ranges]:
        """The range scan of fp16 graphs, and what it found in one line a component."""

        def build(folder: Path) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                graphs = {component: stage.path / MODEL_FILE for component, stage in components.items()}
                drawing = _drawing(self.job, Path(scratch))
                found = range_scan.scan(graphs, drawing, Path(scratch), self.clock.reporter.detail)
            _write_json(folder / "ranges.json", {name: ranges.to_json() for name, ranges in found.items()})

        keys = {component.value: stage.key for component, stage in components.items()}
        stage = self.stage(_name("fp16", "scan"), self.job.scan_depends(keys), build)
        data = json.loads((stage.path / "ranges.json").read_text(encoding="utf-8"))
        found = {component: range_scan.Ranges.from_json(data[component]) for component in components}
        for component, ranges in found.items():
            self.clock.reporter.note(f"fp16 {component}: {ranges.line()}")
        return found

    def _keep(self, component: Component, raw: Stage, ranges: Ranges) -> Stage:
        """The component with its kept ops in float32; itself where there are none."""
        if not ranges.kept:
            return raw
        names = [op.node for op in ranges.kept]
        depends = {"graph": raw.key, "kept": names, "versions": tool_versions(), "code": code_digests(("targets",))}
        return self.stage(_name("fp16", f"{component}-kept"), depends, functools.partial(keep_ops, raw.path, names))

    def _compose(self, precision: str, parts: Mapping[Component, Stage], kind: str | None = None) -> Stage:
        """The single graph of these components."""
        from hypersd_export.targets.onnx_pipeline import compose

        def build(folder: Path) -> None:
            graphs = {component: stage.path / MODEL_FILE for component, stage in parts.items()}
            _write_json(folder / "build.json", compose(graphs, self.job.wiring, folder))

        name = _name(precision, "pipeline" if kind is None else f"pipeline-{kind}")
        return self.stage(name, self.job.compose_depends({c: stage.key for c, stage in parts.items()}), build)


def _name(precision: str, what: str) -> str:
    """A stage's name: onnx-unet, and with the precision where it is another one."""
    return f"onnx-{what}" if precision == "fp32" else f"onnx-{precision}-{what}"


def keep_ops(raw: Path, names: Sequence[str], folder: Path) -> dict[str, str]:
    """A component's fp16 stage `raw` with the nodes of these names in float32, as another stage."""
    from hypersd_export.targets import onnx, onnx_fp16

    model = onnx_fp16.read(raw / MODEL_FILE)
    onnx_fp16.keep_float32(model, names)
    built = onnx.write(model, folder, precision="fp16")
    digests = onnx.digests(built)
    shutil.copyfile(raw / "config.json", folder / "config.json")
    wanted = set(names)
    there = [node.name for node in model.graph if node.name in wanted]  # the cleaning may have merged equal ones
    notes = json.loads((raw / "build.json").read_text(encoding="utf-8"))
    _write_json(folder / "build.json", notes | {"built": built, "fp32_nodes": there})
    return digests


def store_integers(raw: Path, kind: str, precision: str, folder: Path) -> dict[str, str]:
    """A component's stage `raw` with integer weights, as another stage."""
    from hypersd_export.targets import onnx, onnx_fp16, onnx_quantize

    model = onnx_fp16.read(raw / MODEL_FILE)
    stored = onnx_quantize.quantize(model, kind)
    built = onnx.write(model, folder, precision=precision)
    digests = onnx.digests(built)
    shutil.copyfile(raw / "config.json", folder / "config.json")
    notes = json.loads((raw / "build.json").read_text(encoding="utf-8"))
    _write_json(folder / "build.json", notes | {"built": built | {"quantized": stored}})
    return digests


def _drawing(job: Job, scratch: Path) -> Drawing:
    """What the range scan draws: the export's prompt and others, by the bundle's own tokenizers."""
    from hypersd_export.runtime.tokenizer import load_tokenizer

    job.source.base.write_tokenizers(scratch)
    texts, encoders = (*range_scan.scan_prompts(job.prompt), ""), encoders_of(job.source.configs)
    tokenizers = [load_tokenizer(scratch / encoder.tokenizer, length=job.shapes.tokens) for encoder in encoders]
    wiring = job.wiring
    return Drawing(
        encoders=encoders,
        ids=tuple(range_scan.encode_prompts(tokenizer.encode, texts) for tokenizer in tokenizers),
        zero_empty=job.source.base.zero_empty,
        plans=job.plans,
        shapes=job.shapes,
        scaling_factor=wiring.scaling_factor,
        shift_factor=wiring.shift_factor,
    )


def onnx_target(workshop: Workshop) -> Built:
    """ONNX: the graphs themselves."""
    spec = workshop.job.spec
    precision = spec.precision_of(Target.ONNX)
    raw = workshop.onnx(precision)
    graphs = raw if spec.quantize is None else workshop.quantized(precision, spec.quantize)
    return Built(
        target=Target.ONNX,
        precision=precision,
        files=graphs.files(),
        record=onnx_record(graphs, spec.opset),
        artifacts=tuple(
            each.artifacts(published=each is graphs) for each in ((graphs,) if graphs is raw else (graphs, raw))
        ),
    )


def onnx_record(graphs: OnnxGraphs, opset: int) -> dict[str, Any]:
    """What the manifest says about ONNX graphs: options, each graph's figures, and the proof of every fusion."""
    notes = {component: build_notes(stage) for component, stage in graphs.components.items()}
    single = {} if graphs.whole is None else {"single_graph": build_notes(graphs.whole)}
    return {
        **single,
        "precision": graphs.precision,
        **({} if graphs.quantized is None else {"quantize": graphs.quantized}),
        "opset": opset,
        "components": {
            component.value: note["built"] | _range_record(graphs, component, note)
                | ({"layout": note["layout"]} if note.get("layout") else {})
            for component, note in notes.items()
        },
        "fused": [report for component, note in notes.items() if component is not Component.VAE_ENCODER
                  for report in note["fused"]],
    }  # fmt: skip


def _range_record(graphs: OnnxGraphs, component: Component, notes: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says about a component's range scan: the ops in float32, the margin, the largest value."""
    if component not in graphs.ranges:
        return {"scan": "not run"} if graphs.precision == "fp16" else {}
    top = float(f"{graphs.ranges[component].top:.4g}")
    return {"fp32_nodes": notes["fp32_nodes"], "margin": range_scan.MARGIN, "largest": top}


def tensorrt_target(workshop: Workshop) -> Built:
    """TensorRT: see `hypersd_export.build_tensorrt`."""
    from hypersd_export.build_tensorrt import tensorrt_target as build

    return build(workshop)


def coreml_target(workshop: Workshop) -> Built:
    """Core ML: see `hypersd_export.coreml_target`."""
    from hypersd_export.coreml_target import coreml_target as build

    return build(workshop)


def build_notes(stage: Stage) -> dict[str, Any]:
    """What a stage's build.json says."""
    notes: dict[str, Any] = json.loads((stage.path / "build.json").read_text(encoding="utf-8"))
    return notes


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


BUILDERS: Mapping[Target, Callable[[Workshop], Built]] = {
    Target.ONNX: onnx_target,
    Target.TENSORRT: tensorrt_target,
    Target.COREML: coreml_target,
}

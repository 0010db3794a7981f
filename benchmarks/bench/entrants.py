"""Who is measured: bundles on their runtimes, the same weights in torch, the teacher, and other projects' pipelines.

The ones named with `--vs` are made of the first bundle: its base, LoRAs, plan and size.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.bench import peers
from benchmarks.bench.peers import PEERS
from benchmarks.bench.weights import Places, plan_of, source_of, teacher_plan, weights_mb
from hypersd_export.bundle.cache import StageCache
from hypersd_export.bundle.manifest import Manifest, bundle_digest, verify_files
from hypersd_export.diffusion import FewStepPlan, GuidanceKind, diffusers_scheduler
from hypersd_export.errors import HypersdError, OptionError
from hypersd_export.runtime.folder import read_object
from hypersd_export.runtime.runtimes import resolve_runtime
from hypersd_export.verify.source import Source

TORCH, TEACHER, COMPILE = "torch", "teacher", "compile"
VERSUS = (TORCH, COMPILE, TEACHER, *PEERS)
WORKER = (sys.executable, "-m", "benchmarks.bench.worker")
TEACHER_STEPS = 25
PROMPT = "a photo of a cat"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrant:
    """One contestant: what starts its painter (`command`, empty where that cannot be), and facts for the report.

    missing: why it cannot be measured here, with the command that changes it.
    """

    name: str
    kind: str
    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class OpenBundle:
    """A bundle whose files are as they were exported, and how it is run: `steps` None is its first plan."""

    path: Path
    name: str
    manifest: Manifest
    runtime: str
    provider: str | None = None
    steps: int | None = None

    @property
    def device(self) -> str:
        """Where its UNet runs, in torch's words: cpu, or cuda for whatever needs an NVIDIA GPU."""
        return "cuda" if self.runtime == "tensorrt" or self.provider in ("cuda", "tensorrt") else "cpu"

    @cached_property
    def plan(self) -> FewStepPlan:
        """What it draws by."""
        return plan_of(self.path, self.steps).plan

    @cached_property
    def digest(self) -> str:
        """Of the bundle as a whole."""
        return bundle_digest(self.path)

    @property
    def precision(self) -> str:
        """Of the graphs that are run."""
        return str(self.manifest.targets.get(self.runtime, {}).get("precision", "not stated"))

    @property
    def torch_precision(self) -> str:
        """What the same weights are measured in with torch: the graphs' own on a GPU, float32 on a CPU, whose fp16
        products are emulated."""
        return "fp16" if self.device == "cuda" and self.precision == "fp16" else "fp32"

    @property
    def is_single_graph(self) -> bool:
        """Whether the pipeline is one graph."""
        return bool(self.manifest.options.get("single_graph"))

    @property
    def size_mb(self) -> float:
        """The graphs of its runtime on disk, in MB."""
        suffixes = {"onnx": (".onnx", ".onnx_data", ".onnx.data"), "tensorrt": (".engine",)}
        entries = self.manifest.files.items()
        if self.runtime == "coreml":
            return sum(entry.bytes for name, entry in entries if ".mlpackage/" in name) / 1e6
        return sum(entry.bytes for name, entry in entries if name.endswith(suffixes[self.runtime])) / 1e6

    def facts(self) -> dict[str, Any]:
        """What the report says of it."""
        shapes, facts = self.manifest.options.get("shapes", {}), plan_facts(self.plan)
        facts["unet_rows"] = shapes.get("unet_batch", facts["unet_rows"])
        return {
            "bundle": self.path.name, "digest": self.digest, "target": self.runtime, "precision": self.precision,
            "quantize": self.manifest.targets.get(self.runtime, {}).get("quantize"),
            "single_graph": self.is_single_graph, "size_mb": round(self.size_mb, 2),
            "graph_batch": self.manifest.options.get("batch"), "parity": self.manifest.parity, **facts,
        }  # fmt: skip


def plan_facts(plan: FewStepPlan) -> dict[str, Any]:
    """Steps, guidance, rows of the UNet in one call, and rows in all behind a picture."""
    branches = 2 if plan.guidance.kind is GuidanceKind.CFG else 1
    return {
        "steps": plan.num_steps, "solver": str(plan.solver), "guidance": plan.guidance.scale,
        "unet_rows": branches, "passes": plan.num_steps * branches,
    }  # fmt: skip


def open_bundles(
    paths: Sequence[Path], *, runtime: str | None = None, provider: str | None = None, steps: int | None = None
) -> list[OpenBundle]:
    """Check every file of every bundle against its manifest, and that it has the plan and the target.

    Names are the folders', with the folder above where two are alike. Raises `BundleError`, `OptionError`.
    """
    if not paths:
        raise OptionError("no bundle: name at least one folder that hypersd-export wrote")
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) != len(resolved):
        raise OptionError("a bundle is named twice: name each once")
    folders = [path.name for path in resolved]
    opened = []
    for path, full in zip(paths, resolved, strict=True):
        manifest = verify_files(path)
        name = full.name if folders.count(full.name) == 1 else f"{full.parent.name}/{full.name}"
        found = resolve_target(runtime, manifest)
        bundle = OpenBundle(
            path=path, name=name, manifest=manifest, runtime=found, provider=provider if found == "onnx" else None,
            steps=steps,
        )  # fmt: skip
        assert bundle.plan  # a step count that is not there is said before anything is started
        opened.append(bundle)
    return opened


def resolve_target(name: str | None, manifest: Manifest) -> str:
    """As the runtime resolves it; a Core ML package is named although nothing runs it here but the interpreter."""
    wanted = name or next(iter(manifest.targets), "onnx")
    if wanted == "coreml" and wanted in manifest.targets:
        return wanted
    return resolve_runtime(wanted, manifest)


def golden_prompt(bundle: OpenBundle) -> str:
    """The prompt of the bundle's golden picture, if it has one."""
    golden = bundle.path / "golden" / "golden.json"
    return str(read_object(golden).get("prompt") or PROMPT) if golden.is_file() else PROMPT


def bundle_entrant(bundle: OpenBundle, *, prompt: str, threads: int, cuda_graph: bool = False) -> Entrant:
    """A bundle in this project's runtime; `cuda_graph`: with its UNet's call captured."""
    request = {
        "kind": "bundle", "bundle": str(bundle.path), "runtime": bundle.runtime, "provider": bundle.provider,
        "steps": bundle.steps, "threads": threads, "prompt": prompt, "cuda_graph": cuda_graph,
    }  # fmt: skip
    facts, name = bundle.facts(), captured(bundle.name) if cuda_graph else bundle.name
    if bundle.runtime == "coreml":
        missing = "a Core ML package is timed on a Mac; here only the interpreter reads it (hypersd-bench quality)"
        return Entrant(name=name, kind="bundle", facts=facts, missing=missing)
    return Entrant(
        name=name, kind="bundle", command=(*WORKER, json.dumps(request)), environment=threads_of(threads),
        facts=facts,
    )  # fmt: skip


def captured(name: str) -> str:
    """The entrant's name of a bundle whose UNet's call is captured."""
    return f"{name}, CUDA graph"


def threads_of(count: int) -> dict[str, str]:
    """Environment variables for so many threads, before a library reads them."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(count))


def speed_entrant(threads: int, *, device: str = "cpu", precision: str = "fp32") -> Entrant:
    """The machine's own speed, on this device and in this precision."""
    request = {"kind": "speed", "threads": threads, "device": device, "precision": precision}
    command = (*WORKER, json.dumps(request))
    return Entrant(name="machine", kind="speed", command=command, environment=threads_of(threads))


@dataclass(frozen=True, kw_only=True, slots=True)
class Versus:
    """Makes the entrants of `--vs` from the first bundle; places: where its weights are."""

    first: OpenBundle
    prompt: str
    threads: int
    places: Places
    cache: StageCache
    tell: Any = print

    def entrant(self, kind: str) -> Entrant:
        """One of `VERSUS`; what cannot be made is an entrant that says why."""
        if kind not in VERSUS:
            raise OptionError(f"--vs {kind}: choose from {', '.join(VERSUS)}")
        if kind in PEERS and peers.python_of(kind) is None:
            return Entrant(name=kind, kind=kind, missing=f"not installed: {PEERS[kind]}")
        try:
            source = source_of(self.first.path, self.places, loras=kind != TEACHER)
            plan = teacher_plan(source, steps=TEACHER_STEPS, guidance=None) if kind == TEACHER else self.first.plan
            return self._peer(kind, source, plan) if kind in PEERS else self._torch(kind, source, plan)
        except HypersdError as error:
            return Entrant(name=kind, kind=kind, missing=str(error))

    def _torch(self, kind: str, source: Source, plan: FewStepPlan) -> Entrant:
        request = {
            "kind": COMPILE if kind == COMPILE else TORCH, "bundle": str(self.first.path), "plan": plan.to_json(),
            "places": self.places.to_json(), "loras": kind != TEACHER, "threads": self.threads, "prompt": self.prompt,
            "device": self.first.device, "precision": self.first.torch_precision,
        }  # fmt: skip
        facts = {
            "target": kind, "precision": self.first.torch_precision, "size_mb": round(weights_mb(source), 2),
            **plan_facts(plan),
        }  # fmt: skip
        return Entrant(
            name=kind, kind=kind, command=(*WORKER, json.dumps(request)), environment=threads_of(self.threads),
            facts=facts,
        )  # fmt: skip

    def _peer(self, kind: str, source: Source, plan: FewStepPlan) -> Entrant:
        fused = peers.fused_pipeline(source, self.cache)
        stage = peers.converted(kind, fused, self.cache, tell=self.tell)
        call, shapes = diffusers_scheduler(plan), self.first.manifest.options["shapes"]
        request = {
            "folder": str(stage.path), "scheduler": call.class_name, "config": call.config, "call": call.call,
            "latents": [shapes["channels"], shapes["latent_height"], shapes["latent_width"]], "prompt": self.prompt,
            "threads": self.threads, "size": [shapes["latent_width"], shapes["latent_height"]],
        }  # fmt: skip
        size = sum(path.stat().st_size for path in stage.path.rglob("*") if path.is_file()) / 1e6
        command = (str(peers.python_of(kind)), str(peers.painter_of(kind)), json.dumps(request))
        facts = {"target": kind, "precision": "fp32", "size_mb": round(size, 2), **plan_facts(plan)}
        if not call.exact:
            facts["note"] = call.note
        environment = {**peers.peer_environment(), **threads_of(self.threads)}
        return Entrant(name=kind, kind=kind, command=command, environment=environment, facts=facts)

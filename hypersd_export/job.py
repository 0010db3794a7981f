"""A resolved export: the spec, the opened base and LoRAs, the plans, the shapes; and what each stage depends on."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_export import __version__
from hypersd_export.bundle.cache import StageCache, default_cache_dir
from hypersd_export.bundle.digest import digest_tree, sha256_file
from hypersd_export.bundle.span import Span
from hypersd_export.bundle.texts import encoders_of
from hypersd_export.component import ComponentTask
from hypersd_export.diffusion import LORA_METADATA_KEY, GuidanceKind, PlanFile
from hypersd_export.diffusion.apple import APPLE_DPMPP, MAX_EXACT_STEPS, apple_timesteps, plays_exactly
from hypersd_export.errors import MissingBackend, OptionError, PlanError
from hypersd_export.graphs.spec import DRAWING, Component, Shapes, resolve_shapes, size_unit
from hypersd_export.model.files import public_name
from hypersd_export.model.tokenizer import empty_prompt
from hypersd_export.plan_choice import BaseClue, LoraClue, choose_plans, describe, lora_origin
from hypersd_export.refit import check_same_base
from hypersd_export.spec import BUILTIN, DynamicFlags, ExportSpec, PlanFlags
from hypersd_export.targets import Target
from hypersd_export.verify.source import Source, SourceRequest, open_source

if TYPE_CHECKING:
    from hypersd_export.targets.onnx_pipeline import Wiring
    from hypersd_export.targets.tensorrt import EngineOptions

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "psutil")
TOOLS = ("torch", "diffusers", "transformers", "safetensors", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")
"""Packages whose versions are part of every cache key and stand in the manifest."""
PROMPT = "a photo of a cat"
GOLDEN_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything that is decided before the first graph is built."""

    spec: ExportSpec
    request: SourceRequest
    source: Source
    plans: PlanFile
    shapes: Shapes
    span: Span | None
    """The range of shapes that the graphs take; None where they take `shapes` alone."""
    prompt: str
    cache: StageCache
    engines: "tuple[EngineOptions, str] | None" = None
    """How TensorRT engines are built on this machine, and in a line why; None where none are."""

    @property
    def embedded_guidance(self) -> float | None:
        """The guidance that is a constant of the UNet, or None."""
        return self.plans.default.plan.guidance.embedded

    @property
    def for_cpu(self) -> bool:
        """Whether the ONNX graphs are for processors; engines are built from whole attention."""
        return self.spec.provider == "cpu" and Target.TENSORRT not in self.spec.targets

    @property
    def components(self) -> tuple[Component, ...]:
        """What is built: a single graph starts from noise, so that it has no use for the VAE's encoder."""
        there = (c for c in Component if c.source in self.source.base.parts)
        return tuple(c for c in there if not (self.spec.single_graph and c is Component.VAE_ENCODER))

    @property
    def wiring(self) -> "Wiring":
        """How the single graph joins its parts."""
        from hypersd_export.targets.onnx_pipeline import Wiring

        entry, vae = self.plans.default, self.source.base.component_config("vae")
        return Wiring(
            table=entry.table, guidance=entry.plan.guidance, shapes=self.shapes, unroll=self.spec.unroll,
            scaling_factor=self.source.base.scaling_factor, shift_factor=float(vae.get("shift_factor") or 0.0),
            encoders=encoders_of(self.source.configs), empty=self._empty(),
        )  # fmt: skip

    def _empty(self) -> tuple[tuple[int, ...], ...]:
        """The ids of an empty prompt for each text encoder, where they mean zeros."""
        if not self.source.base.zero_empty:
            return ()
        tokenizers = self.source.base.tokenizers.values()
        return tuple(tuple(empty_prompt(each, self.shapes.tokens)) for each in tokenizers)

    def compose_depends(self, parts: Mapping[Component, str]) -> dict[str, Any]:
        """All that the single graph depends on; `parts` are the cache keys of its components."""
        return {
            "parts": {component.value: key for component, key in parts.items()},
            "wiring": self.wiring.to_json(),
            "versions": tool_versions(),
            "code": code_digests(("targets",)),
        }

    def scan_depends(self, components: Mapping[str, str]) -> dict[str, Any]:
        """All that the range scan of fp16 graphs depends on; `components` are their cache keys."""
        return {
            "components": dict(components),
            "plans": self.plans.to_json(),
            "shapes": self.shapes.to_json(),
            "scaling": [self.wiring.scaling_factor, self.wiring.shift_factor],
            "prompt": self.prompt,
            "base": self.source.base.digest,
            "machine": platform.machine(),
            "versions": tool_versions(),
            "code": code_digests(("diffusion", "runtime", "targets", "verify/range_scan.py")),
        }

    def component_depends(self, target: Target, component: Component, precision: str | None = None) -> dict[str, Any]:
        """All that one exported component depends on; `precision` None is the target's."""
        shapes = self.shapes.to_json()
        no_picture = ("unet_batch", "channels", "latent_height", "latent_width", "vae_scale")
        no_text = ("unet_batch", "tokens", "text_width", "pooled")
        unused = {
            Component.TEXT_ENCODER: no_picture,
            Component.TEXT_ENCODER_2: no_picture,
            Component.UNET: ("batch", "vae_scale"),
            Component.VAE_DECODER: no_text,
            Component.VAE_ENCODER: no_text,
        }[component]
        loras = self.source.loras_of(component.source)
        return {
            "target": target.value,
            "component": component.value,
            "base": self.source.base.digest,
            "loras": [{"digest": lora.digest, "scale": scale} for lora, scale in loras],
            "shapes": {name: value for name, value in shapes.items() if name not in unused},
            "span": None if self.span is None else self.span.to_json(),
            "embedded_guidance": self.embedded_guidance if component is Component.UNET else None,
            "precision": precision or self.spec.precision_of(target),
            "opset": self.spec.opset,
            "for_cpu": self.for_cpu and target is Target.ONNX and component in DRAWING,
            "versions": tool_versions(),
            "code": code_digests(("graphs", "targets", "model", "verify/source.py")),
        }

    def component_task(self, precision: str) -> ComponentTask:
        """How the ONNX graphs of this precision are built."""
        return ComponentTask(
            source=self.request, shapes=self.shapes, span=self.span, embedded_guidance=self.embedded_guidance,
            precision=precision, opset=self.spec.opset, for_cpu=self.for_cpu,
        )  # fmt: skip

    def verify_depends(self, components: Mapping[str, str], precision: str, golden_db: float) -> dict[str, Any]:
        """All that golden files and parity figures of graphs of this precision depend on; `components` are their
        cache keys, `golden_db` the golden picture's bound."""
        return {
            "components": dict(components),
            "source": self.source.digests,
            "plans": self.plans.to_json(),
            "shapes": self.shapes.to_json(),
            "span": None if self.span is None else self.span.to_json(),
            "prompt": self.prompt,
            "seed": GOLDEN_SEED,
            "precision": precision,
            "provider": self.spec.provider,
            "compare": self.spec.verify,
            "golden_db": golden_db,
            "machine": platform.machine(),
            "versions": tool_versions(),
            "code": code_digests(("graphs", "model", "diffusion", "runtime", "verify", "targets/onnx_fp16.py")),
        }

    def lora_records(self) -> list[dict[str, Any]]:
        """What the manifest says about each LoRA."""
        records = []
        for lora, scale in self.source.loras:
            origin = lora_origin(_clue(lora), str(self.source.base.family))
            records.append(
                {
                    "file": lora.path.name,
                    "digest": lora.digest,
                    "scale": scale,
                    "format": str(lora.format),
                    "plan_source": None if origin is None else origin.reason,
                }
            )
        return records

    def options(self) -> dict[str, Any]:
        """The resolved options for the manifest: no paths of this machine, only file names."""
        options = self.spec.to_json()
        for name in ("out", "cache_dir", "overwrite", "jobs"):
            del options[name]
        options |= {name: public_name(options[name]) for name in ("base", "unet", "vae")}
        options["precision"] = {target.value: self.spec.precision_of(target) for target in self.spec.targets}
        options["loras"] = [f"{lora.path.name}:{scale:g}" for lora, scale in self.source.loras]
        options |= {"width": self.shapes.width, "height": self.shapes.height, "shapes": self.shapes.to_json()}
        options["span"] = None if self.span is None else self.span.to_json()
        return options


def open_job(spec: ExportSpec) -> Job:
    """Open base and LoRAs and resolve what the spec leaves open; loads no weights. Raises `HypersdError`."""
    check_backends(spec)
    engines = resolve_engines(spec) if Target.TENSORRT in spec.targets else None
    from hypersd_export.model.lora import parse_lora

    texts = default_loras(spec) if spec.loras is None else spec.loras
    loras = tuple((str(path), scale) for path, scale in map(parse_lora, texts))
    request = SourceRequest(
        base=spec.base,
        unet=spec.unet,
        vae=spec.vae,
        variant=spec.variant,
        revision=spec.revision,
        loras=loras,
        allow_pickle=spec.allow_pickle,
    )
    source = open_source(request)
    base = source.base
    if spec.refit_from is not None:
        check_same_base(spec.refit_from, base.digest)
    configs = source.configs
    card = _card() if spec.base == BUILTIN else None
    clue = BaseClue(
        family=str(base.family),
        names=tuple(name for name in (spec.unet, spec.base) if name is not None),
        scheduler_config=base.scheduler_config,
        embeds_guidance=configs["unet"].get("time_cond_proj_dim") is not None,
        card=card if spec.unet is None else None,
    )
    plans = choose_plans(spec.plan, base=clue, loras=[_clue(lora) for lora, _ in source.loras])
    if spec.single_graph:
        plans = PlanFile(entries=plans.entries[:1])
    check_one_unet(plans)
    if spec.coreml.layout == "apple":
        check_apple_plays(plans, approximate=spec.coreml.approximate)
    cfg = any(entry.plan.guidance.kind is GuidanceKind.CFG for entry in plans.entries)
    shapes = resolve_shapes(configs, tokens=base.tokenizer.max_length, batch=spec.batch, cfg=cfg, size=spec.size)
    return Job(
        spec=spec,
        request=request,
        source=source,
        plans=plans,
        shapes=shapes,
        span=resolve_span(spec.dynamic, shapes, size_unit(configs["unet"], configs["vae"])),
        prompt=str((card or {}).get("prompt", PROMPT)),
        cache=StageCache(spec.cache_dir or default_cache_dir()),
        engines=engines,
    )


def resolve_span(flags: DynamicFlags, shapes: Shapes, unit: int) -> Span | None:
    """The range that was asked for around the `shapes` of the export; None where nothing was.

    Raises `OptionError` for a size that VAE and UNet cannot divide (`unit`), or a range that does not hold `shapes`.
    """
    if flags == DynamicFlags():
        return None
    least, most = flags.size or ((shapes.width, shapes.height),) * 2
    for width, height in (least, most):
        if width % unit or height % unit:
            raise OptionError(f"--dynamic size: {width}x{height} is not a multiple of {unit} pixels on both sides")
    span = Span(
        batch=flags.batch or (shapes.batch,) * 2, width=(least[0], most[0]), height=(least[1], most[1]), unit=unit
    )  # fmt: skip
    for name, option in (("batch", "batch"), ("width", "size"), ("height", "size")):
        value, (low, high) = getattr(shapes, name), getattr(span, name)
        if not low <= value <= high:
            raise OptionError(
                f"--dynamic {option}: {name} from {low} to {high} does not hold the export's own {value}: give "
                f"--{option} inside it"
            )
    return span


def check_backends(spec: ExportSpec) -> None:
    """`MissingBackend` naming the extra, before anything is opened; the provider too, if it will be verified on."""
    from_onnx = bool({Target.ONNX, Target.TENSORRT} & set(spec.targets))
    needed = NEEDED + (("onnx", "onnxscript") if from_onnx else ())
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise MissingBackend(package, "export", "hypersd-export")
    if Target.COREML in spec.targets:
        from hypersd_export.targets.coreml import vendor

        vendor.version()
    if spec.verify and from_onnx:
        from hypersd_export.runtime.onnx import resolve_provider

        resolve_provider(spec.provider)


def resolve_engines(spec: ExportSpec) -> "tuple[EngineOptions, str]":
    """How TensorRT engines are built on this machine, and in a line why; raises as `targets.tensorrt.resolve`."""
    from hypersd_export.targets import tensorrt

    flags = spec.engines
    return tensorrt.resolve(
        flavour=flags.flavour,
        capabilities=flags.capabilities,
        weights=flags.weights,
        optimization_level=flags.level,
    )


def default_loras(spec: ExportSpec) -> tuple[str, ...]:
    """The built-in base's own LoRA for the steps that are asked for; () for every other base.

    The card's `lora` says which file is for how many steps, the first one listed being the default, and `unified` which
    one serves them all. Raises `OptionError` for step counts that none of them, or no single one, is for.
    """
    if spec.base != BUILTIN or spec.unet is not None:
        return ()
    files = {int(steps): str(file) for steps, file in _card().get("lora", {}).items()}
    if not files:
        return ()
    counts = _asked_steps(spec.plan) or (next(iter(files)),)
    found = {files.get(count) for count in counts}
    listed = ",".join(map(str, counts))
    if None in found:
        raise OptionError(
            f"--steps {listed}: the built-in LoRAs are for {', '.join(map(str, files))} steps; "
            "pass --lora none for the teacher"
        )
    if len(found) > 1 and "unified" in _card():
        found = {str(_card()["unified"])}
    if len(found) > 1:
        raise OptionError(
            f"--steps {listed}: each built-in LoRA is for its own step count; export them one by one, or name one "
            "with --lora"
        )
    from hypersd_export import builtin

    return (str(builtin.model_dir().parent / str(found.pop())),)


def _asked_steps(flags: PlanFlags) -> tuple[int, ...] | None:
    return flags.steps or (None if flags.timesteps is None else (len(flags.timesteps),))


def _card() -> dict[str, Any]:
    """The built-in model's card; {} where this installation has no built-in model (`open_base` then says so)."""
    from hypersd_export import builtin

    try:
        return builtin.card()
    except FileNotFoundError:
        return {}


def _clue(lora: Any) -> LoraClue:
    """What a LoRA says about its plan; the folders above its file matter where the file's own name is generic."""
    return LoraClue(name=lora.path.name, path=str(lora.path.resolve()), plan_json=lora.metadata.get(LORA_METADATA_KEY))


def check_apple_plays(plans: PlanFile, *, approximate: bool) -> None:
    """`OptionError` for a plan that Apple's scheduler cannot play, or only comes near where that is not `approximate`
    enough."""
    for entry in plans.entries:
        said = f"--layout apple with {describe(entry.plan)}"
        try:
            exact = plays_exactly(entry.plan)
        except PlanError as error:
            raise OptionError(f"{said}: {error}") from None
        if not exact and not approximate:
            times = ", ".join(map(str, apple_timesteps(entry.steps)))
            raise OptionError(
                f"{said}: Apple's scheduler only comes near it (at {times}); use --scheduler {APPLE_DPMPP} with 1 to "
                f"{MAX_EXACT_STEPS} steps, or --allow-approximate-schedule"
            )


def check_one_unet(plans: PlanFile) -> None:
    """`OptionError` unless all entries can share one UNet: embedded guidance is a constant of it."""
    scales = {entry.plan.guidance.embedded for entry in plans.entries}
    if len(scales) > 1:
        raise OptionError("the plans embed different guidance scales in the one UNet: export them apart")


@cache
def tool_versions() -> dict[str, str]:
    """Versions of what takes part, without importing any of it."""
    versions = {"hypersd": __version__, "python": platform.python_version()}
    for package in TOOLS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@cache
def code_digests(names: tuple[str, ...]) -> dict[str, str]:
    """sha256 of our own sources: a stage made by other code is another stage."""
    root = Path(__file__).parent
    return {
        name: digest_tree(root / name, "*.py") if (root / name).is_dir() else sha256_file(root / name) for name in names
    }

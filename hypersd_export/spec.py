"""`ExportSpec`: what one export was asked for, parsed and checked before anything heavy is imported.

The spec holds what the user said; what it leaves open (plan, size, LoRA of the built-in base) is resolved in
`hypersd_export.plan_choice` and `hypersd_export.export`, once the base is known, and recorded in the manifest.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_export.errors import OptionError
from hypersd_export.targets import Target, precision_of, resolve_targets

MAX_STEPS = 1000
"""Diffusion models of this field are trained on 1000 timesteps: a plan cannot have more steps."""
MAX_BATCH = 64
MAX_SIDE = 8192
SCANNED = frozenset({Target.ONNX, Target.TENSORRT})
"""Targets whose fp16 graphs are searched for what overflows; Core ML's are tried by its gates."""
BUILTIN = "builtin"
DEFAULT_OUT = "bundle"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFlags:
    """The options that shape the plan; None means "not said"."""

    steps: tuple[int, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    scheduler: str | None = None
    eta: float | None = None
    guidance: float | None = None
    prediction_type: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFlags:
    """The options of TensorRT engines; `capabilities` None means all that the library builds for."""

    flavour: str = "auto"
    capabilities: tuple[str, ...] | None = None
    weights: str = "full"
    level: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreMLFlags:
    """The options of Core ML packages; see `targets.coreml` for the choices.

    `lora_apart` keeps LoRAs beside the weights. At most one of `palettize` (bits a weight), `quantize` (integers) and
    `size_budget` (palettes of mixed widths; a share of the UNet package's bytes) is given. `approximate` lets Apple's
    runtime play a schedule that is only near the plan's.
    """

    deployment_target: str = "iOS17"
    attention: str = "original"
    lora_apart: bool = False
    palettize: int | None = None
    quantize: str | None = None
    size_budget: float | None = None
    chunk_unet: bool = False
    compute_units: str = "all"
    layout: str = "plain"
    approximate: bool = False

    @property
    def compression(self) -> str | None:
        """How the weights are stored, in a word: such as 6bit, int8 or mixed; None for as they are."""
        if self.size_budget is not None:
            return "mixed"
        return self.quantize if self.palettize is None else f"{self.palettize}bit"


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicFlags:
    """Which shapes of the ONNX graphs are free: images at once (least, most), and sizes in pixels ((width, height) of
    the least, of the most); None for what is fixed."""

    batch: tuple[int, int] | None = None
    size: tuple[tuple[int, int], tuple[int, int]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSpec:
    """Every option of `hypersd-export`, parsed. `loras` None means the base's own default, () means none.

    `precision` None means each target's own default.
    """

    targets: tuple[Target, ...] = (Target.ONNX,)
    base: str = BUILTIN
    unet: str | None = None
    vae: str | None = None
    variant: str | None = None
    revision: str | None = None
    loras: tuple[str, ...] | None = None
    plan: PlanFlags = dataclasses.field(default_factory=PlanFlags)
    precision: str | None = None
    batch: int = 1
    size: tuple[int, int] | None = None
    dynamic: DynamicFlags = dataclasses.field(default_factory=DynamicFlags)
    provider: str = "cpu"
    single_graph: bool = False
    unroll: bool = False
    opset: int = 20
    quantize: str | None = None
    """How the ONNX graphs store their weights: int8 or int4, None for as they are. Core ML's is in its own flags."""
    engines: EngineFlags = dataclasses.field(default_factory=EngineFlags)
    coreml: CoreMLFlags = dataclasses.field(default_factory=CoreMLFlags)
    out: Path = Path(DEFAULT_OUT)
    overwrite: bool = False
    cache_dir: Path | None = None
    verify: bool = True
    golden: bool = True
    """Whether torch draws the golden picture; it may be left away only where nothing is compared anyway."""
    scan: bool = True
    """Whether fp16 graphs are searched for ops that overflow; without it none is kept in float32."""
    jobs: int | None = None
    """How many processes build ONNX graphs: 1 or 2; None for 2 where that pays and there is the memory."""
    allow_pickle: bool = False
    refit_from: Path | None = None
    """The bundle that this one is with another LoRA: its TensorRT engines are refitted, not built."""

    def __post_init__(self) -> None:
        from hypersd_export.targets import onnx, onnx_quantize, tensorrt

        if not 1 <= self.batch <= MAX_BATCH:
            raise OptionError(f"--batch {self.batch}: from 1 to {MAX_BATCH}")
        if self.size is not None and not all(0 < side <= MAX_SIDE for side in self.size):
            raise OptionError(f"--size {self.size[0]}x{self.size[1]}: each side from 1 to {MAX_SIDE} pixels")
        if self.jobs not in (None, 1, 2):
            raise OptionError(f"--jobs {self.jobs}: 1 or 2 processes build the graphs")
        _check_dynamic(self)
        if self.single_graph and len(self.plan.steps or ()) > 1:
            listed = ",".join(map(str, self.plan.steps or ()))
            raise OptionError(f"--single-graph with --steps {listed}: a graph holds one schedule; give one count")
        _check_proof(self)
        if self.unroll and not self.single_graph:
            raise OptionError("--unroll: it is about --single-graph; give both, or leave it away")
        _check_plan_flags(self.plan)
        onnx.check_options(opset=self.opset)
        if self.quantize is not None and Target.ONNX not in self.targets:
            raise OptionError(f"--quantize {self.quantize}: it is about --target onnx and coreml: add one, or leave it")
        onnx_quantize.check_options(self.quantize, opset=self.opset)
        if Target.TENSORRT in self.targets:
            flags = self.engines
            tensorrt.check_options(flags.flavour, flags.capabilities, flags.weights, flags.level)
        elif self.engines != EngineFlags():
            raise OptionError(
                "--trt-flavour, --compute-capability, --weights and --trt-level are about --target tensorrt: "
                "add it, or leave them away"
            )
        if Target.COREML in self.targets:
            _check_coreml(self)
        elif self.coreml != CoreMLFlags():
            raise OptionError(
                "--deployment-target, --attention, --lora-apart, --palettize, --size-budget, --chunk-unet, "
                "--compute-units, --layout and --allow-approximate-schedule are about --target coreml: add it, or "
                "leave them away"
            )
        for target in self.targets:
            precision_of(target, self.precision)

    def precision_of(self, target: Target) -> str:
        """The precision of one of the targets."""
        return precision_of(target, self.precision)

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values, for `--dry-run` and the manifest."""
        values = dataclasses.asdict(self)
        values["out"] = str(self.out)
        values["refit_from"] = None if self.refit_from is None else self.refit_from.name
        values["cache_dir"] = None if self.cache_dir is None else str(self.cache_dir)
        values["targets"] = [target.value for target in self.targets]
        return values


def _check_coreml(spec: ExportSpec) -> None:
    from hypersd_export.targets import coreml

    flags = spec.coreml
    coreml.check_options(
        deployment_target=flags.deployment_target, attention=flags.attention, palettize=flags.palettize,
        quantize=flags.quantize, size_budget=flags.size_budget, chunk_unet=flags.chunk_unet,
        compute_units=flags.compute_units, layout=flags.layout,
        single_graph=spec.single_graph, batch=spec.batch,
    )  # fmt: skip
    if flags.lora_apart and spec.single_graph:
        raise OptionError("--single-graph with --lora-apart: that is about packages of the components; give one")
    if flags.approximate and flags.layout != "apple":
        raise OptionError("--allow-approximate-schedule: it is about --layout apple; give both, or leave it away")


def _check_proof(spec: ExportSpec) -> None:
    if spec.verify and not spec.golden:
        raise OptionError("--no-golden: the comparison with torch draws that picture; give --no-verify too")
    if not spec.scan and not any(spec.precision_of(target) == "fp16" for target in SCANNED & set(spec.targets)):
        raise OptionError("--no-scan: it is about the fp16 graphs of ONNX and TensorRT; leave it away")


def _check_dynamic(spec: ExportSpec) -> None:
    if spec.dynamic == DynamicFlags():
        return
    if spec.targets != (Target.ONNX,):
        raise OptionError("--dynamic: engines and Core ML packages are of one shape; give it with --target onnx alone")
    if spec.single_graph:
        raise OptionError("--dynamic with --single-graph: the graph of a loop is of one shape; give one of both")
    batch, size = spec.dynamic.batch, spec.dynamic.size
    if batch is not None and not 1 <= batch[0] <= batch[1] <= MAX_BATCH:
        raise OptionError(f"--dynamic batch={batch[0]}:{batch[1]}: the least first, from 1 to {MAX_BATCH}")
    if size is None:
        return
    (width, height), (most_width, most_height) = size
    if not (0 < width <= most_width <= MAX_SIDE and 0 < height <= most_height <= MAX_SIDE):
        raise OptionError(
            f"--dynamic size={width}x{height}:{most_width}x{most_height}: the least first, each side from 1 to "
            f"{MAX_SIDE} pixels"
        )


def _check_plan_flags(plan: PlanFlags) -> None:
    for steps in plan.steps or ():
        if not 1 <= steps <= MAX_STEPS:
            raise OptionError(f"--steps {steps}: a plan has from 1 to {MAX_STEPS} steps")
    if plan.timesteps is not None:
        if plan.steps is not None and plan.steps != (len(plan.timesteps),):
            said = ",".join(map(str, plan.steps))
            raise OptionError(
                f"--steps {said} with {len(plan.timesteps)} --timesteps: leave --steps away, or give as many timesteps"
            )
        if not all(0 <= t < MAX_STEPS for t in plan.timesteps):
            raise OptionError(f"--timesteps {','.join(map(str, plan.timesteps))}: each from 0 to {MAX_STEPS - 1}")
    if plan.eta is not None and not 0.0 <= plan.eta <= 1.0:
        raise OptionError(f"--eta {plan.eta:g}: from 0 (no fresh noise) to 1")
    if plan.guidance is not None and (not math.isfinite(plan.guidance) or plan.guidance < 0.0):
        raise OptionError(f"--guidance {plan.guidance:g}: a number from 0 (or 1, no guidance) upwards")


def parse_ints(option: str, text: str | None) -> tuple[int, ...] | None:
    """Parse `1,2,4` of an option; None stays None. Raises `OptionError` for anything but distinct whole numbers."""
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"{option} {text}: whole numbers with commas between them, such as 4 or 1,2,4") from None
    if len(set(numbers)) != len(numbers):
        raise OptionError(f"{option} {text}: a number is there twice")
    return numbers


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse `WxH` in pixels to (width, height); None stays None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", text.strip())
    if match is None:
        raise OptionError(f"--size {text}: give WIDTHxHEIGHT in pixels, such as 512x512")
    return int(match[1]), int(match[2])


def parse_dynamic(texts: list[str] | None) -> DynamicFlags:
    """The `--dynamic` values: batch=LEAST:MOST and size=WxH:WxH, each at most once."""
    found: dict[str, Any] = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        least, _, most = value.partition(":")
        if name in found:
            raise OptionError(f"--dynamic {text}: {name} is there twice")
        try:
            if name == "batch":
                found[name] = int(least), int(most)
            elif name == "size":
                found[name] = parse_size(least), parse_size(most)
        except (ValueError, OptionError):
            name = ""
        if name not in found:
            raise OptionError(f"--dynamic {text}: give batch=LEAST:MOST or size=WxH:WxH, such as size=256x256:768x768")
    return DynamicFlags(**found)


def parse_loras(texts: list[str] | None) -> tuple[str, ...] | None:
    """The `--lora` values: None when none was given, () for the single value `none`."""
    if not texts:
        return None
    if "none" in texts:
        if len(texts) > 1:
            raise OptionError("--lora none: it cannot stand beside another --lora")
        return ()
    return tuple(texts)


def parse_targets(names: list[str] | None) -> tuple[Target, ...]:
    """The `--target` values; onnx when none was given."""
    return resolve_targets(tuple(names)) if names else (Target.ONNX,)

"""Put LoRAs into a module's weights, summed in float32, with a proof for each module that they landed.

    W ← W + scale · alpha / rank · up @ down

The same arithmetic as peft's `merge` (`lora.Linear.get_delta_weight`, `lora.Conv2d`), which diffusers' `fuse_lora`
calls. Deviations: everything that does not land is an error, where diffusers logs a warning or says nothing; the sum
is formed in float32 for half-precision weights too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import LoraError
from hypersd_export.model.families import Family, family_of_lora
from hypersd_export.model.ldm_names import unet_ldm_names
from hypersd_export.model.lora import Delta, check_scale, cross_attention_width, first
from hypersd_export.model.pages import Relief

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 18  # elements of a weight at once: the float32 copies stay in the cache and cost no memory
MOST_THREADS = 8  # more would wait for Python's lock, and memory is as fast as it is
LOST_WARNING = 0.1  # of the delta's norm, rounded away by half-precision weights
SUMS = ("delta", "weight", "landed", "lost")
"""What is squared and summed: the delta, the weights before, what they gained, and the difference to the delta."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fusion:
    """What is to be added to a component: `LoraFile.components[component]`, by `scale`; `source` is the file's name."""

    deltas: Mapping[str, Delta]
    scale: float
    source: str = "LoRA"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleProof:
    """What was fused into one module: `relative` is |delta| / |weight| (Frobenius), `error` the largest difference
    between what the weight gained and the delta, both read back in float32."""

    rank: int
    alpha: float | None
    relative: float
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FuseReport:
    """The proof of one `fuse`: per module, and over all of them. `lost` is the share rounded away by the dtype."""

    component: str
    scale: float
    modules: Mapping[str, ModuleProof]
    relative: float
    error: float
    lost: float
    warnings: tuple[str, ...] = ()

    @property
    def zero(self) -> int:
        """How many modules got a delta of exactly zero."""
        return sum(proof.relative == 0 for proof in self.modules.values())

    def to_json(self) -> dict[str, Any]:
        """For the manifest: the totals, and each module's relative norm in three digits."""
        return {
            "component": self.component,
            "scale": self.scale,
            "modules": len(self.modules),
            "zero_modules": self.zero,
            "ranks": sorted({proof.rank for proof in self.modules.values()}),
            "relative_norm": _digits(self.relative),
            "max_error": _digits(self.error),
            "lost_to_rounding": _digits(self.lost),
            "warnings": list(self.warnings),
            "relative_norms": {name: _digits(proof.relative) for name, proof in self.modules.items()},
        }


def _digits(value: float) -> float | None:
    """Three digits; None for what JSON has no number for (a delta on a weight of zeros has no relative norm)."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def module_names(module: "torch.nn.Module", component: str) -> dict[str, str]:
    """{any spelling with underscores: module name} for every linear and convolution of a module.

    A UNet answers to diffusers' and to the original names, a CLIP text encoder with and without `text_model`
    (transformers 5.6 dropped that level).
    """
    import torch

    names = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    spellings = [(name, name) for name in names]
    if component == "unet":
        config: Any = module.config
        layers = config.layers_per_block
        spellings += [(original, name) for name, original in unet_ldm_names(names, layers).items()]
    elif component.startswith("text_encoder"):
        bare = [(name.removeprefix("text_model."), name) for name in names]
        spellings += bare + [(f"text_model.{short}", name) for short, name in bare]
    table: dict[str, str] = {}
    for spelling, name in spellings:
        if table.setdefault(spelling.replace(".", "_"), name) != name:
            raise LoraError(
                f"{component}: {name} and {table[spelling.replace('.', '_')]} cannot be told apart in a LoRA"
            )
    return table


def match(
    module: "torch.nn.Module", deltas: Mapping[str, Delta], *, component: str, source: str = "LoRA"
) -> dict[str, Delta]:
    """{module name: delta}, once every delta has its module and its shape; works on a module without memory too.

    LoraError names the first few keys that do not fit, and the family that the LoRA looks like.
    """
    if not deltas:
        raise LoraError(f"{source}: no keys for the {component}; use a LoRA for this base")
    table = module_names(module, component)
    matched: dict[str, Delta] = {}
    unmatched: list[str] = []
    wrong: list[str] = []
    for path, delta in deltas.items():
        name = table.get(path.replace(".", "_"))
        if name is None:
            unmatched.append(delta.keys[0] if delta.keys else path)
            continue
        if name in matched:
            raise LoraError(f"{source}: two deltas for {component}.{name} ({path}); save the LoRA in one format")
        matched[name] = delta
        target: Any = module.get_submodule(name)
        problem = _shape_problem(tuple(target.weight.shape), int(getattr(target, "groups", 1)), delta)
        if problem:
            wrong.append(f"{delta.keys[0] if delta.keys else path}: {problem}")
    hint = _family_hint(module, deltas, component) if unmatched or wrong else ""
    if unmatched:
        raise LoraError(
            f"{source}: {len(unmatched)} of {len(deltas)} modules are not in this {component} "
            f"({first(unmatched)}){hint}; use a LoRA for this base"
        )
    if wrong:
        raise LoraError(
            f"{source}: {len(wrong)} of {len(deltas)} modules have another shape in this {component} "
            f"({first(wrong, 2)}){hint}; use a LoRA for this base"
        )
    return matched


def _shape_problem(weight: tuple[int, ...], groups: int, delta: Delta) -> str | None:
    """Why a delta cannot be added to a weight, or None. A linear and a 1x1 convolution take each other's shapes."""
    down, up = tuple(delta.down.shape), tuple(delta.up.shape)
    if groups != 1:
        return f"the convolution has {groups} groups"
    if len(down) not in {2, 4} or len(up) not in {2, 4} or math.prod(up[2:]) != 1:
        return f"down {list(down)} and up {list(up)} are no low-rank pair"
    made = (up[0], down[1], *down[2:])
    same = made == weight or (math.prod(made[2:]) == 1 == math.prod(weight[2:]) and made[:2] == weight[:2])
    if up[1] != down[0] or down[0] < 1:
        return f"down {list(down)} and up {list(up)} differ in rank"
    return None if same else f"gives {list(made)} where the weight is {list(weight)}"


def _family_hint(module: "torch.nn.Module", deltas: Mapping[str, Delta], component: str) -> str:
    """`; it looks like a LoRA for SDXL …`, if that can be told."""
    width = cross_attention_width(deltas) if component == "unet" else None
    family = family_of_lora([key for delta in deltas.values() for key in delta.keys], width)
    own = getattr(module.config, "cross_attention_dim", None) if component == "unet" else None
    sizes = f" (cross-attention {width} wide, here {own})" if width is not None and own not in {None, width} else ""
    if family is not None and (sizes or family in {Family.sdxl, Family.sd3, Family.flux}):
        return f"; it looks like a LoRA for {family.label}{sizes}"
    return f"; it is for another architecture{sizes}" if sizes else ""


def fuse(
    module: "torch.nn.Module", deltas: Mapping[str, Delta], *, scale: float, component: str, source: str = "LoRA"
) -> FuseReport:
    """Add the deltas to the module's weights in place; returns the proof that all of them landed.

    `module` is a component as `BaseModel` loads it, `deltas` is `LoraFile.components[component]`, `source` the file's
    name for messages. LoraError, before anything is changed, for a scale of zero and for what `match` refuses; after
    it (the module is to be thrown away then) for a delta that is zero throughout, is rounded away, or overflows.
    """
    return fuse_all(module, [Fusion(deltas=deltas, scale=scale, source=source)], component=component)[0]


def fuse_all(
    module: "torch.nn.Module", fusions: Sequence[Fusion], *, component: str, dtype: "torch.dtype | None" = None
) -> list[FuseReport]:
    """As `fuse`, several LoRAs in their order and one weight after the other; returns a report for each.

    With a `dtype` each weight that changes becomes a new one: all deltas are added to it in float32, and it is rounded
    to `dtype` once. Weights that no LoRA changes are left alone, and so are mapped files. Needs no memory beyond the
    new weights.
    """
    import torch

    for fusion in fusions:
        check_scale(fusion.scale, fusion.source)
    gains = [
        {
            name: _Gain(delta=delta, scale=each.scale, what=f"{each.source}: {component}.{name}")
            for name, delta in match(module, each.deltas, component=component, source=each.source).items()
        }
        for each in fusions
    ]
    relief = Relief()

    @torch.no_grad()
    def add(name: str) -> None:
        target: Any = module.get_submodule(name)
        old = target.weight
        relief(old)
        if dtype is not None:  # put in place first: what is proven is what the module has
            target.weight = torch.nn.Parameter(torch.empty_like(old, dtype=dtype), requires_grad=False)
        _add(old, [each[name] for each in gains if name in each], None if dtype is None else target.weight)

    names = list(dict.fromkeys(name for each in gains for name in each))
    if dtype is not None:
        _side_by_side(add, names)
    else:  # one after the other: mapped memory may not be given back while another thread writes to it
        for name in names:
            add(name)
    summed = next(module.parameters()).dtype if dtype is None else torch.float32
    return [_report(*each, component=component, dtype=summed) for each in zip(fusions, gains, strict=True)]


def _side_by_side(function: Callable[[str], None], names: Sequence[str]) -> None:
    """Call it with each, in one thread each. Ops that are shared out among threads wait for the slowest at the end of
    each, which is long where another process has one of the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, MOST_THREADS)) as pool:
            list(pool.map(function, names))
    finally:
        torch.set_num_threads(threads)


@dataclass(kw_only=True, slots=True)
class _Gain:
    """One delta, and what its weight has gained of it: the sums of squares of `SUMS`, the largest error."""

    delta: Delta
    scale: float
    what: str
    squares: list[float] = field(default_factory=lambda: [0.0] * len(SUMS))
    error: float = 0.0

    @property
    def proof(self) -> ModuleProof:
        """When all of the delta is added."""
        size, own = math.sqrt(self.squares[0]), math.sqrt(self.squares[1])
        relative = size / own if own else (math.inf if size else 0.0)
        return ModuleProof(rank=self.delta.rank, alpha=self.delta.alpha, relative=relative, error=self.error)


def _add(weight: "torch.Tensor", gains: Sequence[_Gain], new: "torch.Tensor | None") -> None:
    """Add the deltas, some rows at a time, to the weight or to a float32 copy of the rows, which goes into `new`; read
    back, and compare what was gained with the delta."""
    import torch

    rows = max(1, CHUNK // weight[0].numel())
    downs = [gain.delta.down.float().flatten(1) for gain in gains]
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        if new is not None:
            part = part.to(torch.float32, copy=True)
        for gain, down in zip(gains, downs, strict=True):
            up = gain.delta.up[start : start + rows].float().flatten(1)
            change = (up @ down).mul_(gain.scale * gain.delta.multiplier).reshape(part.shape)
            before = part.to(torch.float32, copy=True)
            part.copy_(before + change)
            gained, error = _prove(before, change, part, gain.what)
            gain.error = max(gain.error, *(abs(float(end)) for end in torch.aminmax(error)))
            for number, tensor in enumerate((change, before, gained, error)):
                flat = tensor.flatten()
                gain.squares[number] += float(torch.dot(flat, flat))
        if new is not None:
            new[start : start + rows].copy_(part)
            _check_kept(new[start : start + rows], part, gains[-1].what)


def _report(fusion: Fusion, gains: dict[str, _Gain], *, component: str, dtype: "torch.dtype") -> FuseReport:
    """The proof of one LoRA over all modules; LoraError if there is nothing of it in weights of `dtype`."""
    source, kind = fusion.source, str(dtype).removeprefix("torch.")
    size, own, landed, missing = (
        math.fsum(each) for each in zip(*(gain.squares for gain in gains.values()), strict=True)
    )
    if size == 0:
        raise LoraError(
            f"{source}: its {component} part is zero in all {len(gains)} modules (untrained?); use --lora none"
        )
    if landed == 0:
        raise LoraError(f"{source}: its {component} part is rounded away in {kind}; load the base in float32")
    lost = math.sqrt(missing / size)
    warnings = [f"{source}: {lost:.0%} of its {component} part is lost to rounding in {kind}"] * (lost > LOST_WARNING)
    return FuseReport(
        component=component, scale=fusion.scale, modules={name: gain.proof for name, gain in gains.items()}, lost=lost,
        relative=math.sqrt(size / own) if own else math.inf, error=max(gain.error for gain in gains.values()),
        warnings=tuple(warnings),
    )  # fmt: skip


def _prove(
    before: "torch.Tensor", change: "torch.Tensor", weight: "torch.Tensor", what: str
) -> "tuple[torch.Tensor, torch.Tensor]":
    """What each element gained, and that less the delta; LoraError unless the weight is their sum, rounded once."""
    _check_kept(weight, before + change, what)
    gained = weight.float() - before
    return gained, gained - change


def _check_kept(weight: "torch.Tensor", expected: "torch.Tensor", what: str) -> None:
    """LoraError unless the weight is what was expected of it in float32, rounded to its dtype, and finite."""
    import torch

    if not all(end.isfinite() for end in torch.aminmax(weight)):  # either end is NaN if any weight is
        kind = str(weight.dtype).removeprefix("torch.")
        raise LoraError(f"{what}: overflows {kind} with this LoRA; use float32 (--precision fp32) or a lower scale")
    if not torch.equal(weight, expected.to(weight.dtype)):
        off = float((weight.float() - expected).abs().max())
        raise LoraError(f"{what}: did not land, off by {off:.3g}; the weights changed under the fusion")

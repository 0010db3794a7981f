"""Put a LoRA into a module's weights, in place and in float32, with a proof for each module that it landed.

    W ← W + scale · alpha / rank · up @ down

The same arithmetic as peft's `merge` (`lora.Linear.get_delta_weight`, `lora.Conv2d`), which diffusers' `fuse_lora`
calls. Deviations: everything that does not land is an error, where diffusers logs a warning or says nothing; the sum
is formed in float32 for half-precision weights too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import LoraError
from hypersd_export.model.families import Family, family_of_lora
from hypersd_export.model.ldm_names import unet_ldm_names
from hypersd_export.model.lora import Delta, check_scale, cross_attention_width, first

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 18  # elements of a weight at once: the float32 copies stay in the cache and cost no memory
LOST_WARNING = 0.1  # of the delta's norm, rounded away by half-precision weights


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
    import torch

    check_scale(scale, source)
    matched = match(module, deltas, component=component, source=source)
    proofs: dict[str, ModuleProof] = {}
    squares = dict.fromkeys(("delta", "weight", "landed", "lost"), 0.0)
    with torch.no_grad():
        for name, delta in matched.items():
            target: Any = module.get_submodule(name)
            proofs[name] = _fuse_one(target.weight, delta, scale, squares, f"{source}: {component}.{name}")
    if squares["delta"] == 0:
        raise LoraError(
            f"{source}: its {component} part is zero in all {len(proofs)} modules (untrained?); use --lora none"
        )
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    if squares["landed"] == 0:
        raise LoraError(f"{source}: its {component} part is rounded away in {dtype}; load the base in float32")
    lost = math.sqrt(squares["lost"] / squares["delta"])
    warnings = [f"{source}: {lost:.0%} of its {component} part is lost to rounding in {dtype}"] * (lost > LOST_WARNING)
    return FuseReport(
        component=component, scale=scale, modules=proofs, lost=lost, warnings=tuple(warnings),
        relative=math.sqrt(squares["delta"] / squares["weight"]) if squares["weight"] else math.inf,
        error=max(proof.error for proof in proofs.values()),
    )  # fmt: skip


def _fuse_one(weight: "torch.Tensor", delta: Delta, scale: float, squares: dict[str, float], what: str) -> ModuleProof:
    """One module, some rows at a time: add, read back, and compare what the weight gained with the delta."""
    import torch

    down = delta.down.float().flatten(1)
    sums = dict.fromkeys(squares, 0.0)
    worst = 0.0
    rows = max(1, CHUNK // weight[0].numel())
    for start in range(0, weight.shape[0], rows):
        part, up = weight[start : start + rows], delta.up[start : start + rows].float().flatten(1)
        change = ((up @ down) * (scale * delta.multiplier)).reshape(part.shape)
        before = part.float().clone()
        part.copy_(before + change)
        error = _prove(before, change, part, what)
        worst = max(worst, float(error.max()))
        for key, tensor in (("delta", change), ("weight", before), ("landed", part.float() - before), ("lost", error)):
            sums[key] += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
    for key, value in sums.items():
        squares[key] += value
    size, own = math.sqrt(sums["delta"]), math.sqrt(sums["weight"])
    relative = size / own if own else (math.inf if size else 0.0)
    return ModuleProof(rank=delta.rank, alpha=delta.alpha, relative=relative, error=worst)


def _prove(before: "torch.Tensor", change: "torch.Tensor", weight: "torch.Tensor", what: str) -> "torch.Tensor":
    """|gain - delta| per element; LoraError where it is more than the rounding of the weight's dtype explains."""
    import torch

    after = weight.float()
    if not bool(after.isfinite().all()):
        raise LoraError(f"{what}: overflows {weight.dtype} with this LoRA; load the base in float32 or lower the scale")
    error = (after - before).sub_(change).abs_()
    info = torch.finfo(weight.dtype)
    allowed = torch.maximum(before.abs(), after.abs()).mul_(info.eps).add_(info.smallest_normal * info.eps)
    allowed.add_(change.abs(), alpha=4 * torch.finfo(torch.float32).eps)
    if bool((error > allowed).any()):
        raise LoraError(f"{what}: did not land, off by {float(error.max()):.3g}; the weights changed under the fusion")
    return error

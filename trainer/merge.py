"""`hypersd-train merge`: two LoRAs as one, so that what was learned on top of a few-step LoRA ships with it.

Exact: the ranks side by side, ΔW = m_A·B_A·A_A + m_B·B_B·A_B = [B_A  B_B]·[A_A; A_B]. Or the nearest of a given rank
(truncated SVD, the best in the Frobenius norm), with its error said.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hypersd_export.diffusion import LORA_METADATA_KEY, plans_from_metadata
from hypersd_export.errors import LoraError, OptionError
from hypersd_export.model.lora import BASE_KEY, Delta, LoraFile, read_lora, save_kohya
from trainer.distill.lora_file import BASE_NAME_KEY, OVER_KEY, RECIPE_KEY, STEPS_KEY, updates_of
from trainer.distill.snapshot import disk

MERGED_KEY = "hypersd.merged"
"""Metadata of a merged LoRA: the sha256 of each of its parts, as JSON."""
OTHER_NAMES = ("input_blocks", "middle_block", "output_blocks")
"""How the original UNet's module names begin; diffusers' names for the same modules are others."""
Components = Mapping[str, Mapping[str, Delta]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What was written: how many modules, their ranks, and the error ‖ΔW − ΔW'‖ / ‖ΔW‖ over all (0 where exact, up to
    rounding); notes: what a user should know, a line each."""

    modules: int
    ranks: tuple[int, ...]
    error: float
    notes: tuple[str, ...] = field(default=())


def merge(parts: Sequence[str | Path], out: Path, *, rank: int = 0, dtype: torch.dtype = torch.float16) -> Merged:
    """Write the sum of LoRA files as one, in kohya's form; rank 0 keeps it exact, any other is an SVD's.

    Plans, base and recipes stay in its metadata; the updates are the most that a part tells, because a LoRA that was
    trained on top of another counts that one's too. LoraError if the parts are for different bases, are sampled
    differently, or spell their modules differently; DestinationError if `out` cannot be written.
    """
    if len(parts) < 2 or rank < 0:
        raise OptionError(f"merge of {len(parts)} LoRAs to rank {rank}: needs at least two, and a rank of 0 or more")
    files = [read_lora(part) for part in parts]
    metadata, notes = merged_metadata(files)
    exact = joined([file.components for file in files])
    made, error = (exact, 0.0) if rank == 0 else truncated(exact, rank)
    with disk(out):
        save_kohya(out, made, metadata, dtype=dtype)
    deltas = [delta for part in made.values() for delta in part.values()]
    return Merged(
        modules=len(deltas), ranks=tuple(sorted({delta.rank for delta in deltas})), error=error, notes=tuple(notes)
    )


def joined(parts: Sequence[Components]) -> dict[str, dict[str, Delta]]:
    """The sum of LoRAs, {component: {module with underscores: Delta}}: ranks side by side.

    Where all scales are equal the weights are the parts' own, bit for bit; else they are folded into the up weights in
    float32. LoraError if only some of the parts have the original UNet's names, or two shapes of a module differ.
    """
    others = [any(path.startswith(OTHER_NAMES) for path in part.get("unet", ())) for part in parts]
    if any(others) and not all(others):
        raise LoraError("one LoRA has the original UNet's module names and another diffusers': save both in one form")
    together: dict[str, dict[str, list[Delta]]] = {}
    for part in parts:
        for component, deltas in part.items():
            for path, delta in deltas.items():
                together.setdefault(component, {}).setdefault(path.replace(".", "_"), []).append(delta)
    return {c: {name: _side_by_side(name, deltas) for name, deltas in ds.items()} for c, ds in together.items()}


def _side_by_side(name: str, deltas: Sequence[Delta]) -> Delta:
    shapes = {(delta.up.shape[0], *delta.down.shape[1:]) for delta in deltas}
    if len(shapes) > 1:
        raise LoraError(f"{name}: {' and '.join(map(str, sorted(shapes)))} in two of the LoRAs: not for the same model")
    scale, ranks = deltas[0].multiplier, sum(delta.rank for delta in deltas)
    ups = [delta.up for delta in deltas]
    if any(delta.multiplier != scale for delta in deltas):
        ups, scale = [delta.up.float() * delta.multiplier for delta in deltas], 1.0
    return Delta(down=torch.cat([delta.down for delta in deltas]), up=torch.cat(ups, dim=1), alpha=scale * ranks)


def truncated(components: Components, rank: int) -> tuple[dict[str, dict[str, Delta]], float]:
    """The nearest LoRA of at most this rank, float32, with the error ‖ΔW − ΔW'‖ / ‖ΔW‖ over all modules.

    The product is never formed: with the QR factors of both sides, its SVD is that of a square of the rank.
    """
    whole, lost, made = 0.0, 0.0, dict[str, dict[str, Delta]]()
    for component, deltas in components.items():
        made[component] = {}
        for name, delta in deltas.items():
            made[component][name], kept, dropped = _nearest(delta, rank)
            whole, lost = whole + kept + dropped, lost + dropped
    return made, math.sqrt(lost / whole) if whole else 0.0


def _nearest(delta: Delta, rank: int) -> tuple[Delta, float, float]:
    """(the delta of this rank, the squares that are kept, those that are dropped)."""
    left, inner_left = torch.linalg.qr(delta.up.flatten(1).double() * delta.multiplier)
    right, inner_right = torch.linalg.qr(delta.down.flatten(1).double().T)
    u, values, v = torch.linalg.svd(inner_left @ inner_right.T)
    keep = min(rank, len(values))
    root = values[:keep].sqrt()
    up, down = left @ u[:, :keep] * root, (right @ v[:keep].T * root).T
    nearest = Delta(
        up=up.float().reshape(-1, keep, *delta.up.shape[2:]), alpha=float(keep),
        down=down.float().reshape(keep, *delta.down.shape[1:]),
    )  # fmt: skip
    squares = values.square()
    return nearest, float(squares[:keep].sum()), float(squares[keep:].sum())


def merged_metadata(files: Sequence[LoraFile]) -> tuple[dict[str, str], list[str]]:
    """The merged file's metadata, and notes. LoraError for two bases, or two ways of sampling."""
    notes = []
    metadata = {MERGED_KEY: json.dumps([file.digest for file in files])}
    for key, what in ((BASE_KEY, "base"), (BASE_NAME_KEY, "base's name"), (LORA_METADATA_KEY, "plan")):
        values = {_comparable(key, file.metadata[key]): file for file in files if key in file.metadata}
        if len(values) > 1 and key != BASE_NAME_KEY:
            names = " and ".join(file.path.name for file in values.values())
            raise LoraError(f"{names} have different {what}s: they are not for the same model and sampler")
        if values:
            metadata[key] = next(iter(values.values())).metadata[key]
    recipes = [json.loads(file.metadata[RECIPE_KEY]) for file in files if file.metadata.get(RECIPE_KEY)]
    if recipes:
        metadata[RECIPE_KEY] = json.dumps({"merged": recipes})
    updates = max(updates_of(file.path) for file in files)
    if updates:
        metadata[STEPS_KEY] = str(updates)
    digests = {file.digest for file in files}
    for file in files:
        below = file.metadata.get(OVER_KEY, "")
        if below and below not in digests:
            notes.append(f"{file.path.name} was trained on top of another LoRA ({below[:12]}) than those given here")
    return metadata, notes


def _comparable(key: str, text: str) -> str:
    """Plans by what they say, not by how their JSON is written."""
    return repr(plans_from_metadata(text)) if key == LORA_METADATA_KEY else text


def describe(merged: Merged, out: Path) -> str:
    """One line for the command line."""
    ranks = ", ".join(map(str, merged.ranks))
    kept = "exact" if merged.error == 0 else f"relative error {merged.error:.2%}"
    return f"wrote {out}: {merged.modules} modules of rank {ranks}, {kept}"

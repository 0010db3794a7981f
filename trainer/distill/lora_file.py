"""The LoRA files of a distillation: what `hypersd-export --lora FILE` needs is in the file, and nothing else is asked.

Two forms of the same weights: kohya's (with alpha), as the released Hyper-SD files have, and diffusers' (peft names and
adapter metadata). Both carry plans, base, recipe and steps in the safetensors metadata, which is authoritative: several
LoRAs may share a folder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hypersd_export.diffusion import (
    LORA_METADATA_KEY,
    FewStepPlan,
    match_file_name,
    plans_from_metadata,
    plans_to_metadata,
)
from hypersd_export.errors import LoraError
from hypersd_export.model.files import public_name, read_header, write_tensors
from hypersd_export.model.lora import ADAPTER_METADATA, BASE_KEY, Delta, LoraFile, first, read_lora, save_kohya
from trainer.config import as_json
from trainer.distill.config import DistillConfig, LoraConfig
from trainer.distill.networks import Networks, Role
from trainer.distill.snapshot import writing

BASE_NAME_KEY = "hypersd.base_name"
RECIPE_KEY = "hypersd.recipe"
STEPS_KEY = "hypersd.steps"
OVER_KEY = "hypersd.over"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a LoRA comes from: its sampling plans (the default first), the base's name and digest, the recipe as JSON
    data, and how many student updates lie behind it, earlier stages included. over: digest of the LoRA that this one
    was trained on top of, and is of no use without."""

    plans: Sequence[FewStepPlan]
    base_name: str
    base_digest: str
    steps: int
    recipe: Mapping[str, Any] = field(default_factory=dict)
    over: str = ""

    def metadata(self) -> dict[str, str]:
        """The safetensors metadata."""
        return {
            LORA_METADATA_KEY: plans_to_metadata(self.plans),
            BASE_KEY: self.base_digest,
            BASE_NAME_KEY: self.base_name,
            RECIPE_KEY: json.dumps(self.recipe),
            STEPS_KEY: str(self.steps),
            **({OVER_KEY: self.over} if self.over else {}),
        }


def save_student(
    path: Path, networks: Networks, lora: LoraConfig, origin: Origin, *, dtype: torch.dtype = torch.float16
) -> None:
    """Write the student: kohya's form at `path`, diffusers' at `path`'s folder/diffusers/ under the same name.

    LoraError, and no file, if a weight is not finite (float16 overflows at 65504).
    """
    deltas = {
        name: Delta(down=down, up=up, alpha=lora.alpha) for name, (down, up) in networks.adapter(Role.STUDENT).items()
    }
    save_kohya(path, {"unet": deltas}, origin.metadata(), dtype=dtype)
    _save_diffusers(path.parent / "diffusers" / path.name, deltas, lora, origin, dtype)


def _save_diffusers(
    path: Path, deltas: Mapping[str, Delta], lora: LoraConfig, origin: Origin, dtype: torch.dtype
) -> None:
    """As StableDiffusionPipeline.save_lora_weights writes it; it has no `.alpha`, so the adapter metadata says it."""
    tensors = {}
    for name, delta in deltas.items():
        for end, tensor in (("lora_A", delta.down), ("lora_B", delta.up)):
            tensors[f"unet.{name}.{end}.weight"] = tensor.to("cpu", dtype, copy=True).contiguous()
    adapter = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.modules), "peft_type": "LORA"}
    stated = json.dumps({f"unet.{key}": value for key, value in adapter.items()})
    with writing(path) as partial:
        write_tensors(partial, tensors, {"format": "pt", ADAPTER_METADATA: stated, **origin.metadata()})


def updates_of(path: Path) -> int:
    """The student updates that a LoRA's metadata tells; 0 where it tells none."""
    text = read_header(path, LoraError).metadata.get(STEPS_KEY, "")
    return int(text) if text.isdecimal() else 0


def public_recipe(config: DistillConfig) -> dict[str, Any]:
    """The configuration as JSON data, for a file that goes around: of paths on this machine the last part alone."""

    def told(text: str) -> str:
        return public_name(text) or ""

    feedback = config.feedback
    rewards = [
        replace(term, model=told(term.model), head=told(term.head), tokenizer=told(term.tokenizer))
        for term in feedback.rewards
    ]
    guard = replace(feedback.guard, clip=told(feedback.guard.clip))
    structure = feedback.structure
    structure = replace(structure, model=told(structure.model), annotations=told(structure.annotations))
    recipe: dict[str, Any] = as_json(
        replace(
            config, base=told(config.base), init_lora=told(config.init_lora),
            data=replace(config.data, cache="", source=told(config.data.source)),
            feedback=replace(feedback, rewards=tuple(rewards), guard=guard, structure=structure),
        )
    )  # fmt: skip
    return recipe


def plans_of(file: LoraFile, steps: Sequence[int] = ()) -> list[FewStepPlan]:
    """How a LoRA is meant to be sampled: its metadata's plans, or those of the published file of its name; of them the
    ones with so many `steps`, if any are given. LoraError if the file tells none, or not these."""
    preset = match_file_name(file.path.name)
    if LORA_METADATA_KEY in file.metadata:
        plans = list(plans_from_metadata(file.metadata[LORA_METADATA_KEY]))
    elif preset is not None:
        plans = [preset.plan_for(count) for count in preset.steps]
    else:
        raise LoraError(
            f"{file.path}: does not say how it is sampled; take a LoRA of hypersd-train, or a published one"
        )
    known = {plan.num_steps: plan for plan in plans}
    missing = [count for count in steps if count not in known]
    if missing:
        listed = ", ".join(map(str, known))
        raise LoraError(f"{file.path}: has plans for {listed} steps and none for {missing[0]}; set feedback.steps")
    return [known[count] for count in steps] if steps else plans


@torch.no_grad()
def load_student(path: Path, networks: Networks) -> None:
    """Start the student from a LoRA file (either form, or any other that `read_lora` knows).

    LoraError unless the file has exactly the adapter's modules, with the adapter's shapes and no text encoder part.
    The file's alpha is folded into the up weights, so its own scale is kept whatever the adapter's alpha is.
    """
    file = read_lora(path)
    mine = networks.adapter(Role.STUDENT)
    paths = {name.replace(".", "_"): name for name in mine}
    given = {paths.get(name.replace(".", "_"), name): delta for name, delta in file.components.get("unet", {}).items()}
    odd = sorted(set(mine) ^ set(given)) + [f"{name} (component)" for name in file.components if name != "unet"]
    odd = odd or [name for name, (down, _) in mine.items() if down.shape != given[name].down.shape]
    if odd:
        raise LoraError(f"{path}: does not fit the student's adapter ({first(odd)}); set lora.rank and lora.modules")
    for name, (down, up) in mine.items():
        down.copy_(given[name].down)
        up.copy_(given[name].up * (given[name].multiplier / networks.multiplier))

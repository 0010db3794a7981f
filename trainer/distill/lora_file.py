"""The LoRA files of a distillation: what `hypersd-export --lora FILE` needs is in the file, and nothing else is asked.

Two forms of the same weights: kohya's (with alpha), as the released Hyper-SD files have, and diffusers' (peft names and
adapter metadata). Both carry plans, base, recipe and steps in the safetensors metadata, which is authoritative: several
LoRAs may share a folder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hypersd_export.diffusion import LORA_METADATA_KEY, FewStepPlan, plans_to_metadata
from hypersd_export.errors import LoraError
from hypersd_export.model.files import read_header, write_tensors
from hypersd_export.model.lora import ADAPTER_METADATA, BASE_KEY, Delta, first, read_lora, save_kohya
from trainer.distill.config import LoraConfig
from trainer.distill.networks import Networks, Role
from trainer.distill.snapshot import writing

BASE_NAME_KEY = "hypersd.base_name"
RECIPE_KEY = "hypersd.recipe"
STEPS_KEY = "hypersd.steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a LoRA comes from: its sampling plans (the default first), the base's name and digest, the recipe as JSON
    data, and how many student updates lie behind it, earlier stages included."""

    plans: Sequence[FewStepPlan]
    base_name: str
    base_digest: str
    steps: int
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """The safetensors metadata."""
        return {
            LORA_METADATA_KEY: plans_to_metadata(self.plans),
            BASE_KEY: self.base_digest,
            BASE_NAME_KEY: self.base_name,
            RECIPE_KEY: json.dumps(self.recipe),
            STEPS_KEY: str(self.steps),
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

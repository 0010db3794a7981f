"""LoRA files of random values in every key format, made from the same deltas."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module name: (down, up)

# The modules that Hyper-SD's and LCM's LoRAs train (reference: diffusers' train_lcm_distill_lora_sd_wds.py).
LCM_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
TEXT_ATTENTION = TEXT_TARGETS[:4]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for each other, and for whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def targets(module: torch.nn.Module, ends: tuple[str, ...]) -> list[str]:
    """The linear and convolution modules whose names end so."""
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.Linear | torch.nn.Conv2d) and any(f".{name}".endswith(f".{e}") for e in ends)
    ]


def random_pairs(module: torch.nn.Module, ends: tuple[str, ...], *, rank: int = 4, seed: int = 0) -> Pairs:
    """Random down and up for each target, in the shapes that peft and kohya use, of a size that is seen."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in targets(module, ends):
        weight = module.get_submodule(name).weight
        out, rest = weight.shape[0], tuple(weight.shape[1:])
        down = torch.randn(rank, *rest, generator=generator) * 0.2
        up = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator) * 0.2
        pairs[name] = (down, up)
    return pairs


def change_of(pair: tuple[torch.Tensor, torch.Tensor], scale: float) -> torch.Tensor:
    """scale * up @ down, summed over the rank by einsum: the definition, without a reshape."""
    down, up = pair
    return scale * torch.einsum("or,r...->o...", up.flatten(1), down)


def peft(pairs: Pairs, component: str, prefix: str = "", adapter: str = "") -> dict[str, torch.Tensor]:
    """`unet.….lora_A.weight`, with `base_model.model.` in front or an adapter's name inside if wanted."""
    middle = f".{adapter}" if adapter else ""
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors[f"{prefix}{component}.{name}.lora_A{middle}.weight"] = down
        tensors[f"{prefix}{component}.{name}.lora_B{middle}.weight"] = up
    return tensors


def diffusers(pairs: Pairs, component: str) -> dict[str, torch.Tensor]:
    """`unet.….lora.down.weight`; `text_encoder.text_model.….lora_linear_layer.down.weight`."""
    inner, level = ("lora", "") if component == "unet" else ("lora_linear_layer", "text_model.")
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors[f"{component}.{level}{name}.{inner}.down.weight"] = down
        tensors[f"{component}.{level}{name}.{inner}.up.weight"] = up
    return tensors


def diffusers_old(pairs: Pairs, component: str, bare: bool = False) -> dict[str, torch.Tensor]:
    """`unet.….attn1.processor.to_q_lora.down.weight`; `bare` is `save_attn_procs`, without the `unet.`."""
    tensors = {}
    for name, (down, up) in pairs.items():
        if component == "unet":
            head, _, last = name.removesuffix(".0").rpartition(".")
            key = f"{'' if bare else 'unet.'}{head}.processor.{last}_lora"
        else:
            head, _, last = name.rpartition(".")
            key = f"text_encoder.text_model.{head}.to_{last.removesuffix('_proj')}_lora"
        tensors[f"{key}.down.weight"], tensors[f"{key}.up.weight"] = down, up
    return tensors


def kohya(
    pairs: Pairs,
    component: str,
    alpha: float | None = None,
    *,
    te: str = "lora_te",
    rename: dict[str, str] | None = None,
) -> dict[str, torch.Tensor]:
    """`lora_unet_….lora_down.weight` and `.alpha`; `rename` gives other module names (the original ones for SGM)."""
    tensors = {}
    for name, (down, up) in pairs.items():
        path = (rename or {}).get(name, name)
        key = f"lora_unet_{path}" if component == "unet" else f"{te}_text_model_{path}"
        key = key.replace(".", "_")
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Save as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path, metadata=metadata or {"format": "pt"})
    return path


def one_line(message: object) -> str:
    """The text of an error, checked to be one line without a class name."""
    text = str(message)
    assert "\n" not in text
    assert not re.search(r"Traceback|Error\(", text)
    assert len(text) < 600
    return text

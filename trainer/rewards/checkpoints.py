"""Published reward checkpoints as transformers models: names of one layout become those of the other, strictly."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hypersd_export.errors import ModelError
from hypersd_export.model.files import check_weights, exists, read_tensors, user_path

Rules = Sequence[tuple[str, str]]
"""(regular expression, replacement), applied one after the other."""


def read_weights(path: str | Path, *, allow_pickle: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint by name, float32: safetensors, or with `allow_pickle` a .pth or .pt that is read with
    `weights_only`. ModelError in one line for everything else."""
    file = user_path(path)
    if not exists(file):
        raise ModelError(f"{file}: no such file; a reward's weights are not fetched, download them and give the path")
    check_weights(file, allow_pickle=allow_pickle)
    tensors = read_tensors(file)
    return file, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def renamed(tensors: Mapping[str, torch.Tensor], rules: Rules) -> dict[str, torch.Tensor]:
    """The same tensors under the names that the rules give them."""

    def name_of(name: str) -> str:
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return {name_of(name): tensor for name, tensor in tensors.items()}


def count_layers(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many numbered parts there are under `prefix`."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def load_strictly(model: Any, tensors: Mapping[str, torch.Tensor], path: Path, kind: str) -> None:
    """Load weights into `model`; ModelError for one that is missing, of another shape, or has no place in it."""
    try:
        found = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        wrong = str(error).strip().splitlines()[-1].strip()[:160]
        raise ModelError(f"{path}: not the weights of {kind} ({wrong}); download it again") from error
    wanting = [name for name in found.missing_keys if not name.endswith("position_ids")]
    odd = [name for name in found.unexpected_keys if not name.endswith("position_ids")]
    if wanting or odd:
        what = f"{wanting[0]} is missing" if wanting else f"{odd[0]} has no place there"
        raise ModelError(f"{path}: not the weights of {kind} ({what}, of {len(wanting) + len(odd)}); download it again")


def shape_of(tensors: Mapping[str, torch.Tensor], name: str, path: Path, kind: str) -> tuple[int, ...]:
    """The shape of the tensor by which sizes are told; ModelError if it is not there."""
    if name not in tensors:
        raise ModelError(f"{path}: not the weights of {kind} ({name} is missing); download it again")
    return tuple(tensors[name].shape)

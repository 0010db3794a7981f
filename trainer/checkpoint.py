"""Resume state as safetensors and JSON: weights, EMA, optimiser moments and the step, never a pickle."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hypersd_export.errors import DataError
from hypersd_export.model.files import write_tensors
from trainer.ema import Ema


def save_state(
    path: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None, meta: dict[str, Any]
) -> None:
    """Write one .safetensors with everything that a run needs to go on; replaces `path` atomically."""
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{k}": v for k, v in ema.module.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
    meta = {**meta, "ema_updates": ema.updates if ema else 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    write_tensors(
        partial, {k: v.detach().contiguous().clone() for k, v in tensors.items()}, {"state": json.dumps(meta)}
    )
    partial.replace(path)


def load_state(path: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Any]:
    """Load what `save_state` wrote into the given objects, return its `meta`; DataError if it does not fit."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            meta: dict[str, Any] = json.loads(file.metadata()["state"])
        module.load_state_dict(_under(tensors, "module."))
        if ema is not None:
            ema.module.load_state_dict(_under(tensors, "ema."))
            ema.updates = meta["ema_updates"]
    except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: cannot resume from it ({str(error).splitlines()[0]}); delete it to start anew"
        ) from error
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in _under(tensors, "optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta


def saved_step(path: Path) -> int:
    """The step that a saved state goes on from; 0 when there is none."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int(json.loads(file.metadata()["state"])["step"])


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

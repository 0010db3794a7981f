"""All that changes while a stage trains, as tensors by name and JSON data, and back: the content of a checkpoint.

Under FSDP every process calls both functions, because the pieces of a tensor are brought together and dealt out again.
"""

from collections.abc import Mapping
from typing import Any

import torch

from hypersd_export.errors import DataError, HypersdError
from trainer.discriminator import Discriminator
from trainer.distill.engine import Engine, bare, whole
from trainer.distill.networks import Networks, Role

Tensors = dict[str, torch.Tensor]


def collect(engine: Engine, networks: Networks, discriminator: Discriminator | None) -> tuple[Tensors, dict[str, Any]]:
    """Adapters, moments, discriminator, loss scales: (tensors, JSON data). The base's weights are not among them."""
    tensors = {f"adapters.{name}": whole(tensor) for name, tensor in networks.state().items()}
    extra: dict[str, Any] = {"scalers": [engine.scaler.state_dict(), engine.critic_scaler.state_dict()]}
    if engine.kind == "DEEPSPEED":
        _add_partitions(engine, tensors, extra)
    else:
        _add_moments("optimizer", bare(engine.optimizer), tensors, extra)
    if discriminator is not None and engine.critic_optimizer is not None:
        tensors |= {f"critic.{name}": tensor for name, tensor in discriminator.state().items()}
        _add_moments("critic_optimizer", engine.critic_optimizer, tensors, extra)
    return tensors, extra


def restore(
    tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any], engine: Engine, networks: Networks,
    discriminator: Discriminator | None,
) -> None:  # fmt: skip
    """Take over what `collect` gave; DataError if it is of other networks. After `engine.start_stage`."""
    try:
        restore_networks(tensors, networks)
        engine.scaler.load_state_dict(extra["scalers"][0])
        engine.critic_scaler.load_state_dict(extra["scalers"][1])
        mine = engine.accelerator.num_processes if engine.kind == "DEEPSPEED" else 0
        if mine != (theirs := extra.get("partitions", 0)):
            raise DataError(
                f"the checkpoint's moments are divided among {theirs} DeepSpeed processes (0: whole), and this run's "
                f"among {mine}: resume with as many"
            )
        if engine.kind == "DEEPSPEED":
            _load_partitions(engine, tensors, extra)
        else:
            _load_moments("optimizer", bare(engine.optimizer), tensors, extra)
        if discriminator is not None and engine.critic_optimizer is not None:
            discriminator.load_state(_under(tensors, "critic."))
            _load_moments("critic_optimizer", engine.critic_optimizer, tensors, extra)
    except HypersdError:
        raise
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:
        raise DataError(f"the checkpoint does not fit this run ({str(error).splitlines()[0]})") from error


def restore_networks(tensors: Mapping[str, torch.Tensor], networks: Networks) -> None:
    """The adapters alone: where a finished stage's checkpoint begins the next one."""
    mine = networks.state()
    networks.load_state({n: _like(t, mine.get(n)) for n, t in _under(tensors, "adapters.").items()})


class Gathered:
    """The student's weights, whole: what `save_student` needs of `Networks`. Made by every process, used by one."""

    def __init__(self, networks: Networks) -> None:
        self._student = {name: (whole(a), whole(b)) for name, (a, b) in networks.adapter(Role.STUDENT).items()}

    def adapter(self, role: Role) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """{module path: (down, up)}."""
        assert role is Role.STUDENT
        return self._student


def _add_moments(prefix: str, optimizer: torch.optim.Optimizer, tensors: Tensors, extra: dict[str, Any]) -> None:
    plain: dict[str, Any] = {}
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}.{index}.{name}"] = whole(value)
            else:
                plain[f"{index}.{name}"] = value
    extra[prefix] = plain


def _load_moments(
    prefix: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any]
) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**_under(tensors, f"{prefix}."), **extra[prefix]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = _like(value, parameters[int(index)])
    odd = [i for i, moments in state.items() if getattr(moments.get("exp_avg"), "shape", None) not in
           (None, parameters[i].shape)]  # fmt: skip
    if odd:
        raise ValueError(f"moments of weight {odd[0]} have another shape")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _add_partitions(engine: Engine, tensors: Tensors, extra: dict[str, Any]) -> None:
    """ZeRO flattens the weights and gives each process a piece: the pieces of all, side by side."""
    zero: Any = bare(engine.optimizer)
    extra |= {"optimizer": {}, "partitions": engine.accelerator.num_processes}
    for group, partition in enumerate(zero.single_partition_of_fp32_groups):
        for name, value in zero.optimizer.state[partition].items():
            tensors[f"optimizer.{group}.{name}"] = value if value.ndim == 0 else engine.accelerator.gather(value)


def _load_partitions(engine: Engine, tensors: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> None:
    zero: Any = bare(engine.optimizer)
    rank, count = engine.accelerator.process_index, int(extra["partitions"])
    zero.refresh_fp32_params()  # its own copy of the weights, from those that were just loaded
    for group, partition in enumerate(zero.single_partition_of_fp32_groups):
        moments = _under(tensors, f"optimizer.{group}.")
        if any(value.ndim and value.numel() != count * partition.numel() for value in moments.values()):
            raise ValueError(f"moments of group {group} have another size")
        zero.optimizer.state[partition] = {
            name: value.clone() if value.ndim == 0 else value.chunk(count)[rank].clone().to(partition.device)
            for name, value in moments.items()
        }


def _like(value: Any, mine: Any) -> Any:
    """`value`, cut up as `mine` is if FSDP shards it."""
    if not hasattr(mine, "device_mesh") or not isinstance(value, torch.Tensor) or value.shape != mine.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(mine.device), mine.device_mesh, mine.placements)


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

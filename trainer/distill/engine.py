"""What a distillation needs of accelerate: processes, wrappers, precision, the two optimisers, and their state.

Made once per process. `accelerate launch` decides between one process, DDP, FSDP2 and DeepSpeed ZeRO-2 (the files in
`trainer/accelerate`); nothing else in the trainer knows which it is. Mixed precision is autocast here and not
accelerate's own, which would cast the frozen weights to float32 under FSDP and the LoRA to bfloat16 under DeepSpeed.

The discriminator is not wrapped: its gradients are averaged by hand after the last micro-batch. DDP would want a
forward pass of the wrapper before each backward, but the student's loss goes through the bare module too, and FSDP2 and
DeepSpeed take one model only.
"""

import importlib.util
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from hypersd_export.errors import MissingBackend, OptionError
from trainer.discriminator import Discriminator
from trainer.distill.config import DistillConfig
from trainer.distill.networks import Networks

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CACHE_TIMEOUT = timedelta(hours=24)
"""How long the other processes wait for the first one to fill the caches."""


@dataclass(frozen=True, slots=True)
class Share:
    """The rows of the global batch that this process computes, as `count` micro-batches of `micro` rows each."""

    start: int
    micro: int
    count: int

    @classmethod
    def of(cls, batch: int, micro_batch: int, *, rank: int, processes: int) -> "Share":
        """OptionError unless the batch divides evenly: only then is the mean over processes the batch's mean."""
        rows, rest = divmod(batch, processes)
        if rest or rows == 0:
            raise OptionError(f"batch {batch}: must be a multiple of the {processes} processes")
        micro = micro_batch or rows
        if rows % micro:
            raise OptionError(
                f"micro_batch {micro}: must divide the {rows} samples that each of {processes} processes has "
                f"of batch {batch}"
            )
        return cls(rank * rows, micro, rows // micro)

    def slices(self) -> list[slice]:
        """Each micro-batch's rows within the global batch."""
        return [slice(self.start + i * self.micro, self.start + (i + 1) * self.micro) for i in range(self.count)]


def make_optimizer(name: str, parameters: list[Any], **settings: Any) -> torch.optim.Optimizer:
    """adamw, or adamw8bit (bitsandbytes: two bytes of moments a weight); MissingBackend if that is not installed."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, foreach=True, **settings)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingBackend("bitsandbytes", "train-8bit", "optimizer adamw8bit (or take --set optimizer=adamw)")
    eight_bit: torch.optim.Optimizer = importlib.import_module("bitsandbytes.optim").AdamW8bit(parameters, **settings)
    return eight_bit


class Engine:
    """One process's part of a distillation: construct, `prepare` the networks, then train stage after stage."""

    def __init__(self, config: DistillConfig) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        self.config = config
        handlers = [
            InitProcessGroupKwargs(timeout=CACHE_TIMEOUT),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ]
        self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers)
        self.device: torch.device = self.accelerator.device
        self.kind = str(self.accelerator.distributed_type).rpartition(".")[2]
        if self.kind in ("FSDP", "DEEPSPEED") and config.mixed_precision == "fp16":
            raise OptionError(f"mixed_precision fp16 with {self.kind}: not supported; take --set mixed_precision=bf16")
        if self.kind == "FSDP" and not self.accelerator.is_fsdp2:
            raise OptionError("FSDP version 1 cannot hold frozen and trained weights in one unit; set fsdp_version: 2")
        self.share = Share.of(
            config.batch, config.micro_batch, rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )  # fmt: skip
        self.accelerator.gradient_accumulation_steps = self.share.count
        scaled = config.mixed_precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.critic_scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.critic_optimizer: torch.optim.Optimizer | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return bool(self.accelerator.is_main_process)

    def prepare(self, networks: Networks) -> Networks:
        """Move to the device, wrap for the processes, make the student's optimiser. Use what this returns: FSDP puts
        sharded weights in the place of the old ones."""
        unet, config = networks.unet, self.config
        unet.to(self.device)
        if self.kind in ("FSDP", "DEEPSPEED"):
            unet.to(memory_format=torch.contiguous_format)  # neither takes weights that are channels-last
        if self.kind == "DEEPSPEED":
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            settings |= {
                "train_micro_batch_size_per_gpu": self.share.micro, "gradient_accumulation_steps": self.share.count,
                "gradient_clipping": config.clip, "zero_allow_untested_optimizer": True,
            }  # fmt: skip
        parameters = networks.student_parameters()
        optimizer = make_optimizer(
            config.optimizer, parameters, lr=config.stages[0].lr, betas=config.betas, weight_decay=config.weight_decay
        )
        call, self.optimizer = self.accelerator.prepare(unet, optimizer)
        if self.kind == "FSDP":
            multiplier = networks.multiplier
            networks = Networks(unet, alphas_cumprod=networks.alphas_cumprod, prediction_type=networks.prediction_type)
            networks.multiplier = multiplier
        networks.call = call
        return networks

    def start_stage(self, discriminator: Discriminator | None) -> None:
        """Forget the moments of the stage before; the discriminator gets an optimiser of its own."""
        optimizer = bare(self.optimizer)
        (optimizer.optimizer if self.kind == "DEEPSPEED" else optimizer).state.clear()
        self.critic_optimizer = None
        if discriminator is not None:
            groups = discriminator.groups(self.config)
            self.critic_optimizer = make_optimizer(self.config.optimizer, groups, weight_decay=0.0)

    def autocast(self) -> AbstractContextManager[Any]:
        """The configured mixed precision."""
        dtype = DTYPES[self.config.mixed_precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)

    def backward(self, loss: torch.Tensor) -> None:
        """The student's gradients of one micro-batch, added to those before it; DDP averages them at the last one."""
        self.accelerator.backward(self.scaler.scale(loss))

    def critic_backward(self, loss: torch.Tensor) -> None:
        """The discriminator's."""
        scaled: Any = self.critic_scaler.scale(loss / self.share.count)
        scaled.backward()

    def mean(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Means over micro-batches and processes, from the sums over this process's micro-batches."""
        stacked = torch.stack([value.double() for value in sums.values()]) / self.share.count
        stacked = self.accelerator.reduce(stacked, reduction="mean")
        return dict(zip(sums, stacked.tolist(), strict=True))

    def finite_everywhere(self, loss: torch.Tensor) -> bool:
        """Whether every process's loss is finite."""
        return bool(
            self.accelerator.reduce(loss.detach().isfinite().float(), reduction="sum") == self.accelerator.num_processes
        )

    def gradient_norms(self, *, student: bool = True) -> dict[str, float]:
        """Unscale, average the discriminator's gradients over the processes, and clip both: the norms before that."""
        norms = {}
        if student and self.kind == "DEEPSPEED":
            norms["grad_norm"] = float(self.accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm() or 0.0)
        elif student:
            norms["grad_norm"] = self._clipped(self.scaler, bare(self.optimizer))
        if self.critic_optimizer is not None:
            self._average(self.critic_optimizer)
            norms["critic_grad_norm"] = self._clipped(self.critic_scaler, self.critic_optimizer)
        return norms

    def set_lr(self, lr: float) -> None:
        """The student's learning rate from here on."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def update(self, *, student: bool = True) -> None:
        """One step of both optimisers (or of the critic's alone) with the gradients at hand; a float16 overflow skips
        its step."""
        if student and self.kind != "DEEPSPEED":  # whose engine has done it in `backward`
            self.scaler.step(bare(self.optimizer))
            self.scaler.update()
        if self.critic_optimizer is not None:
            self.critic_scaler.step(self.critic_optimizer)
            self.critic_scaler.update()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Drop all gradients without using them."""
        if self.kind != "DEEPSPEED":
            bare(self.optimizer).zero_grad(set_to_none=True)
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad(set_to_none=True)

    def overflowed(self, norms: Mapping[str, float]) -> bool:
        """Is a non-finite gradient norm just float16 running over, which a smaller loss scale mends?"""
        scales = [s.get_scale() for s in (self.scaler, self.critic_scaler) if s.is_enabled()]
        return bool(scales) and min(scales) > 1 and not all(map(math.isfinite, norms.values()))

    def _clipped(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> float:
        if scaler.is_enabled():
            scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return float(whole(nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf)))

    def _average(self, optimizer: torch.optim.Optimizer) -> None:
        if self.accelerator.num_processes > 1:
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")


def bare(optimizer: Any) -> Any:
    """The torch optimiser inside accelerate's wrapper, which would count micro-batches a second time."""
    return getattr(optimizer, "optimizer", optimizer)


def whole(tensor: Any) -> torch.Tensor:
    """All of a tensor that FSDP shards (every process has to ask at once), or the tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

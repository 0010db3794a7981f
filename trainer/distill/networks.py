"""The networks of a distillation on one frozen UNet: student, target and teacher are LoRA adapters (peft) on it.

The original teacher is the UNet with its adapters switched off, so a distillation holds the base weights once.
Switching sets two fields of peft's layers; peft's own `set_adapter` also flips `requires_grad` on every weight, which
costs 30 ms a switch on a small model and is not wanted here: the student's weights alone ever require gradients.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from hypersd_export.diffusion import PredictionType
from hypersd_export.errors import ModelError
from hypersd_export.model.fuse import match
from hypersd_export.model.lora import Delta
from trainer.batch import Conditioning, cat
from trainer.distill.config import LoraConfig, Teacher

PLAIN_ATTENTION_TOKENS = 256
"""Up to so many latent tokens the plain attention is faster on a CPU: torch's fused one has a slow backward there."""


class Role(StrEnum):
    """Which network a pass is of: an adapter, or BASE, the original model."""

    STUDENT = "student"
    TARGET = "target"
    TEACHER = "teacher"
    BASE = "base"


ADAPTERS = (Role.STUDENT, Role.TARGET, Role.TEACHER)


class Networks:
    """`unet` carries the adapters; the student is called through `call`, which is `unet` or a wrapper of it (DDP)."""

    def __init__(self, unet: Any, *, alphas_cumprod: torch.Tensor, prediction_type: PredictionType) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.unet, self.call = unet, unet
        self._dtype: torch.dtype = unet.dtype  # diffusers looks at every module for it: 9 ms a pass on a small model
        self.alphas_cumprod, self.prediction_type = alphas_cumprod, prediction_type
        self.multiplier = 1.0  # alpha / rank, which `build` sets
        self.stacked = False  # whether student and target stand on the teacher's adapter and not on the base
        self._layers: list[Any] = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        self._weights = {role: self._adapter(role) for role in ADAPTERS}
        for role, weights in self._weights.items():
            for weight in weights.values():
                weight.requires_grad_(role is Role.STUDENT)
        self._activate(Role.STUDENT)

    @classmethod
    def build(
        cls, unet: Any, lora: LoraConfig, *, alphas_cumprod: torch.Tensor, prediction_type: PredictionType,
        under: Mapping[str, Delta] | None = None,
    ) -> "Networks":  # fmt: skip
        """Freeze `unet` and put the adapters on it: down Gaussian / rank (torch's generator), up zero, all float32.

        alphas_cumprod: float64 [T]. under: a LoRA that becomes the teacher's adapter, whatever its modules and ranks;
        student and target then stand on it. ModelError if no module's name ends as `lora.modules` says, LoraError if
        `under` does not fit.
        """
        from diffusers.models.attention_processor import AttnProcessor
        from peft import LoraConfig as PeftConfig

        unet.requires_grad_(False).eval()
        matched = [name for name, _ in unet.named_modules() if name.endswith(lora.modules)]
        if not matched:
            raise ModelError(f"no module of the UNet ends in one of {', '.join(lora.modules)}; set lora.modules")
        base = {} if under is None else match(unet, under, component="unet")
        peft = PeftConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.modules), init_lora_weights="gaussian"
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we want
            for role in ADAPTERS:
                own = _as_they_are(base) if base and role is Role.TEACHER else peft
                unet.add_adapter(own, adapter_name=role.value)
        if unet.device.type == "cpu" and unet.config.sample_size**2 <= PLAIN_ATTENTION_TOKENS:
            unet.set_attn_processor(AttnProcessor())
        unet.to(memory_format=torch.channels_last)
        networks = cls(unet, alphas_cumprod=alphas_cumprod, prediction_type=prediction_type)
        networks.multiplier = lora.alpha / lora.rank
        for weights in networks._weights.values():
            for weight in weights.values():
                weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
        for layer in networks._layers:
            layer.cast_input_dtype_enabled = False  # autocast casts; peft's own cast would go to float32 and back
        networks.start_stage(Teacher.ORIGINAL if base else Teacher.PREVIOUS)
        networks._stand_on(base)
        return networks

    def student_parameters(self) -> list[nn.Parameter]:
        """What is trained: the student adapter's weights, float32."""
        return list(self._weights[Role.STUDENT].values())

    def fake_parameters(self) -> list[nn.Parameter]:
        """The weights of the adapter that `fake` runs, float32."""
        return list(self._weights[Role.TEACHER].values())

    def student(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The student's output for x [b, C, h, w] at timesteps t [b], float32, with gradient if grad mode is on.

        Leaves the student active, as gradient checkpointing needs for its second forward pass.
        """
        self._activate(Role.STUDENT)
        return self._run(self.call, x, t, conditioning)

    def fake(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The fake score's output, as `student`'s: the teacher's adapter, whose weights a score distillation trains.

        Leaves that adapter active; `student` and `frozen` set what they need themselves.
        """
        self._activate(Role.TEACHER)
        return self._run(self.unet, x, t, conditioning)

    @torch.no_grad()
    def frozen(
        self, role: Role, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, *,
        guidance: torch.Tensor | None = None, empty: Conditioning | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The output of `role` without gradient, float32; the student is active again afterwards.

        With guidance w [b] and the empty prompt's conditioning [1 or b rows]: u + w (c − u), in one pass of 2b rows.
        """
        with self._as(role):
            if guidance is None or empty is None:
                return self._run(self.unet, x, t, conditioning)
            none = empty.expand(len(x)) if len(empty) == 1 else empty
            if none.time_ids is not None:
                none = Conditioning(states=none.states, pooled=none.pooled, time_ids=conditioning.time_ids)
            both = self._run(self.unet, torch.cat([x, x]), torch.cat([t, t]), cat([none, conditioning]))
        unconditional, conditional = both.chunk(2)
        return unconditional + guidance.view(-1, *[1] * (x.ndim - 1)) * (conditional - unconditional)

    @torch.no_grad()
    def update_target(self, decay: float) -> None:
        """target ← decay·target + (1 − decay)·student; decay 0 copies."""
        target: list[torch.Tensor] = list(self._weights[Role.TARGET].values())
        torch._foreach_lerp_(target, [p.detach() for p in self._weights[Role.STUDENT].values()], 1 - decay)

    def start_stage(self, teacher: Teacher) -> None:
        """The target starts as the student, and with PREVIOUS the teacher is the student as it is now."""
        self._copy(Role.TARGET)
        if teacher is Teacher.PREVIOUS:
            self._copy(Role.TEACHER)

    @torch.no_grad()
    def back_to_target(self) -> None:
        """student ← target: what `update_target(0)` kept."""
        self._copy(Role.STUDENT, of=Role.TARGET)

    def adapter(self, role: Role) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """{module path: (down, up)} of one adapter, detached, where it lives."""
        down = {name: w.detach() for name, w in self._weights[role].items() if ".lora_A." in name}
        return {
            name.removesuffix(".lora_A.weight"): (w, self._weights[role][name.replace(".lora_A.", ".lora_B.")].detach())
            for name, w in down.items()
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Every adapter's weights, as "student.<module>.lora_A.weight"."""
        return {f"{role}.{name}": w.detach() for role in ADAPTERS for name, w in self._weights[role].items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` gave; ModelError if a name or a shape differs."""
        mine = self.state()
        wrong = sorted(set(mine) ^ set(tensors)) or [n for n in mine if mine[n].shape != tensors[n].shape]
        if wrong:
            raise ModelError(f"adapter weights do not fit this UNet and rank: {wrong[0]} (of {len(wrong)})")
        for name, weight in mine.items():
            weight.copy_(tensors[name])

    def _run(self, network: Any, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        x = x.to(self._dtype).contiguous(memory_format=torch.channels_last)
        out: torch.Tensor = network(x, t, **conditioning.unet_kwargs(), return_dict=False)[0]
        return out if out.dtype == torch.float64 else out.float()

    def _activate(self, role: Role) -> None:
        beneath = [Role.TEACHER.value] if self.stacked and role in (Role.STUDENT, Role.TARGET) else []
        active = [role.value, *beneath]
        for layer in self._layers:
            layer._disable_adapters = role is Role.BASE
            if role is not Role.BASE:
                layer._active_adapter = active

    @contextmanager
    def _as(self, role: Role) -> Iterator[None]:
        self._activate(role)
        try:
            yield
        finally:
            self._activate(Role.STUDENT)

    def _adapter(self, role: Role) -> dict[str, nn.Parameter]:
        mark = f".{role.value}."
        return {name.replace(mark, "."): p for name, p in self.unet.named_parameters() if mark in name}

    @torch.no_grad()
    def _copy(self, to: Role, *, of: Role = Role.STUDENT) -> None:
        for name, weight in self._weights[to].items():
            weight.copy_(self._weights[of][name])

    @torch.no_grad()
    def _stand_on(self, deltas: Mapping[str, Delta]) -> None:
        """The teacher's adapter becomes these deltas, with their own scale; nothing without any."""
        for name, weight in self._weights[Role.TEACHER].items() if deltas else ():
            module, _, end = name.partition(".lora_")
            delta = deltas[module]
            given = delta.down if end.startswith("A") else delta.up.float() * delta.multiplier
            weight.copy_(given.reshape(weight.shape))
        self.stacked = bool(deltas)
        self._activate(Role.STUDENT)


def _as_they_are(deltas: Mapping[str, Delta]) -> Any:
    """peft's configuration for an adapter on exactly these modules, each of its own rank and unscaled."""
    from peft import LoraConfig as PeftConfig

    ranks = {name: delta.rank for name, delta in deltas.items()}
    most = max(ranks.values())
    return PeftConfig(r=most, lora_alpha=most, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)

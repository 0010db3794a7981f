"""How much memory the passes of a step take, measured without any memory: on torch's meta device.

The UNet is built on the meta device, where tensors have shapes and no content, and one micro-batch goes forward and
backward through it. Every storage that an operation makes is counted while it lives, weights apart, and the highest
sum is what the pass needs. Mixed precision is played by a function mode with the choices of CUDA's autocast (matrix
products and convolutions low, norms float32), because autocast has no meta device; attention is the fused kind, which
keeps no scores. What this leaves out: the workspaces of cuDNN and cuBLAS, fragmentation, and the CUDA context.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hypersd_export.diffusion import PredictionType
from trainer.batch import Conditioning
from trainer.discriminator import Discriminator
from trainer.distill.config import Backend, DistillConfig
from trainer.distill.networks import Networks, Role
from trainer.distill.validate import decode

LOW = {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm}
HIGH = {F.group_norm, F.layer_norm}


def _norm(x: torch.Tensor, statistics: list[int]) -> tuple[torch.Tensor, ...]:
    mean = torch.empty(statistics, device=x.device)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _norm_backward(x: torch.Tensor, weight: torch.Tensor, mask: list[bool]) -> tuple[torch.Tensor | None, ...]:
    likes = zip((x, weight, weight), mask, strict=True)
    return tuple(torch.empty_like(like) if wanted else None for like, wanted in likes)


NORMS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_group_norm.default: lambda x, _w, _b, n, _c, _s, groups, _eps: _norm(x, [n, groups]),
    torch.ops.aten.native_group_norm_backward.default:
        lambda _grad, x, _mean, _rstd, weight, _n, _c, _s, _groups, mask: _norm_backward(x, weight, mask),
    torch.ops.aten.native_layer_norm.default: lambda x, shape, _w, _b, _eps: _norm(x, [*x.shape[: -len(shape)], 1]),
    torch.ops.aten.native_layer_norm_backward.default:
        lambda _grad, x, _shape, _mean, _rstd, weight, _bias, mask: _norm_backward(x, weight, mask),
}  # fmt: skip
"""What the norms' fused kernels make; torch takes their meta versions apart, which is slow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What goes into the UNet: latents (C, h, w), text tokens and their width, pooled width of SDXL (0: none)."""

    latents: tuple[int, int, int]
    tokens: int
    width: int
    pooled: int = 0


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, while they live; those of `known` are not counted."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = NORMS.get(func)
        out = func(*args, **(kwargs or {})) if known is None else known(*args)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class Precision(TorchFunctionMode):
    """CUDA's autocast to `dtype` for the operations that a UNet has; off where `enabled` is False."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.enabled = dtype, dtype is not torch.float32

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._cast(tensor, self.dtype) for tensor in args[:3])
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        if self.enabled and (func in LOW or func in HIGH):
            dtype = self.dtype if func in LOW else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    @contextmanager
    def set(self, enabled: bool) -> Iterator[None]:
        """On or off for a while."""
        before, self.enabled = self.enabled, enabled and self.dtype is not torch.float32
        try:
            yield
        finally:
            self.enabled = before

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating and self.enabled else value


class Rehearsal:
    """The networks of a distillation on the meta device, and the passes of a step on them.

    vae_config: of a VAE through which the student's prediction is decoded with gradient, in float32; None without one.
    """

    def __init__(
        self, unet_config: Mapping[str, Any], config: DistillConfig, dtype: torch.dtype,
        vae_config: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        with torch.device("meta"):
            self.unet = empty_model("UNet2DConditionModel", unet_config, dtype)
            self.vae = None if vae_config is None else empty_model("AutoencoderKL", vae_config)
            # its adapters are made of meta tensors only here, so nothing is drawn
            self.networks = Networks.build(
                self.unet, config.lora, alphas_cumprod=torch.ones(1, dtype=torch.float64, device="cpu"),
                prediction_type=PredictionType.EPSILON,
            )  # fmt: skip
            adversarial = any(stage.w_adv for stage in config.stages)
            self.critic = Discriminator(self.unet, config.adversarial) if adversarial else None

    def peak_bytes(self, shapes: Shapes, rows: int, precision: torch.dtype, *, checkpointing: bool) -> int:
        """The most that a step's passes hold at once beside weights, moments and the sum of the gradients."""
        policy = Precision(precision)
        if checkpointing:
            self.unet.enable_gradient_checkpointing(_checkpoint_with(policy))
            if self.critic is not None:
                self.critic.encoder.enable_gradient_checkpointing(_checkpoint_with(policy))
            if self.vae is not None:
                self.vae.requires_grad_(False).enable_gradient_checkpointing(_checkpoint_with(policy))
        x, t, conditioning = _inputs(shapes, rows)
        for parameter in self._trained():
            parameter.grad = torch.empty_like(parameter)  # as in all micro-batches but the first
        peaks = [self._teacher(policy, x, t, conditioning), self._student(policy, x, t, conditioning)]
        if self.critic is not None:
            peaks.append(self._critic(policy, x, t, conditioning))
        for parameter in self._trained():
            parameter.grad = None
        return max(peaks)

    def _trained(self) -> list[nn.Parameter]:
        critic = [] if self.critic is None else self.critic.trainable_parameters()
        return [*self.networks.student_parameters(), *critic]

    @contextmanager
    def _watch(self, policy: Precision) -> Iterator[Live]:
        critic = [] if self.critic is None else [*self.critic.parameters(), *self.critic.buffers()]
        vae = [] if self.vae is None else [*self.vae.parameters()]
        weights = [*self.unet.parameters(), *self.unet.buffers(), *critic, *vae]
        with Live([*weights, *(w.grad for w in weights if w.grad is not None)]) as live, policy, _autocast(policy):
            yield live

    def _teacher(self, policy: Precision, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> int:
        """One pass of 2b rows: with and without the prompt."""
        with self._watch(policy) as live:
            empty, guidance = conditioning.rows(slice(0, 1)), torch.ones(len(x), device="meta")
            self.networks.frozen(Role.BASE, x, t, conditioning, guidance=guidance, empty=empty)
        return live.peak

    def _student(self, policy: Precision, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> int:
        """Forward and backward, through the discriminator where there is one."""
        with self._watch(policy) as live:
            out = self.networks.student(x, t, conditioning)
            loss = (out if self.vae is None else decode(self.vae, out)).square().mean()
            if self.critic is not None:
                self.critic.learn(False)
                loss = loss + sum(logits.mean() for logits in self._judge(out, t, conditioning, x))
            loss.backward()  # type: ignore[no-untyped-call]
        return live.peak

    def _critic(self, policy: Precision, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> int:
        """Forward and backward of the discriminator on real and fake; a frozen encoder has seen the fake already."""
        critic = self.critic
        assert critic is not None
        critic.learn(True)
        twice = torch.cat([torch.arange(len(x), device="meta")] * 2)
        with self._watch(policy) as live:
            if critic.backend is Backend.FROZEN:
                maps = critic.features(x, t, conditioning)
                logits = critic.logits(tuple(torch.cat([m, m]) for m in maps), maps if critic.conditional else None)
            else:
                both = torch.cat([x, x])
                logits = self._judge(both, t[twice], conditioning.rows(twice), x)
            torch.stack([each.mean() for each in logits]).sum().backward()  # type: ignore[no-untyped-call]
        return live.peak

    def _judge(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, start: torch.Tensor) -> Any:
        assert self.critic is not None
        return self.critic(
            x, t, conditioning, (start, t[: len(start)]) if self.config.adversarial.conditional else None
        )


def empty_model(name: str, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers model of this class and config on torch's meta device."""
    import diffusers

    known = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key[0] != "_"}
    with torch.device("meta"):
        model = getattr(diffusers, name)(**known)
    return nn.Module.to(model, dtype)  # diffusers' own `to` warns of parts that a UNet does not have


def _inputs(shapes: Shapes, rows: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    with torch.device("meta"):
        pooled = torch.empty(rows, shapes.pooled) if shapes.pooled else None
        conditioning = Conditioning(
            states=torch.empty(rows, shapes.tokens, shapes.width), pooled=pooled,
            time_ids=None if pooled is None else torch.empty(rows, 6),
        )  # fmt: skip
        return torch.empty(rows, *shapes.latents), torch.empty(rows, dtype=torch.long), conditioning


def _checkpoint_with(policy: Precision) -> Callable[..., Any]:
    """torch's checkpointing; function modes are off in a backward pass, so the second forward turns `policy` on."""

    def run(module: Any, *arguments: Any) -> Any:
        enabled = policy.enabled

        def again(*inputs: Any) -> Any:
            with policy.set(enabled), policy:
                return module(*inputs)

        return checkpoint(again, *arguments, use_reentrant=False)

    return run


@contextmanager
def _autocast(policy: Precision) -> Iterator[None]:
    """`torch.autocast` refuses the meta device; the discriminator's use of it turns `policy` on and off instead."""

    def stand_in(_device: str, _dtype: Any = None, enabled: bool = True, **_: Any) -> Any:
        return policy.set(enabled)

    real: Any = torch.autocast
    torch.autocast = stand_in  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.autocast = real  # type: ignore[misc]

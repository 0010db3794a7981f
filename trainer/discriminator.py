"""The discriminator: a copy of the teacher's encoder half and small heads that judge its features.

    back end     encoder              reads                                  after
    frozen       frozen, eval         every down block and the mid block     PCM (arXiv 2405.18407), its public code
    trainable    trained, float32     the mid block                          SDXL-Lightning (arXiv 2402.13929)

PCM also reads the up blocks and has four heads a map. The encoder half with one head a map is ours: it has 41 % of the
weights of SD 1.5's UNet and 33 % of its operations (SDXL: 48 % and 43 %), and so fits beside SDXL on one GPU.
"""

from collections.abc import Mapping
from itertools import pairwise
from math import log2
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hypersd_export.errors import DataError, ModelError, OptionError
from trainer.batch import Conditioning
from trainer.distill.config import AdversarialConfig, Backend, DistillConfig

GROUP = 16
"""The least channels of a normalisation group: a 1x1 map has no more values to normalise over (PCM has 10 to 40)."""


class Discriminator(nn.Module):
    """D(x, t, c) → logits of "real"; with `config.conditional` it also sees the point that the jump began at.

    `unet`: any UNet2DConditionModel, with or without peft adapters; the copy takes its base weights alone and shares
    nothing with it. The encoder computes in the dtype of those weights (a trained copy is float32 and under autocast),
    the heads in float32. Gradient checkpointing is taken over from `unet`.

    The heads draw from torch's global generator: call `torch.manual_seed` first. Their last layer is zero, so every
    logit begins at 0 and the student's first adversarial gradients are 0 and grow as the critic learns, rather than
    being those of a random function (ours: a stage begins with a new discriminator, and with a student to protect).
    """

    def __init__(self, unet: Any, config: AdversarialConfig) -> None:
        super().__init__()
        if config.head_channels < GROUP:
            raise OptionError(f"adversarial.head_channels {config.head_channels}: must be at least {GROUP}")
        self.backend, self.conditional = config.backend, config.conditional
        weights = base_weights(unet)
        self._dtype = weights["conv_in.weight"].dtype
        trained = self.backend is Backend.TRAINABLE
        self.encoder = encoder_copy(unet, weights, torch.float32 if trained else self._dtype)
        channels = list(unet.config.block_out_channels)
        views = 2 if self.conditional else 1
        if trained:
            head = ScalarHead(views * channels[-1], config.head_channels, _halvings(unet.config))
            self.heads = nn.ModuleList([head])
        else:
            channels += channels[-1:] if self.encoder.mid_block is not None else []
            self.heads = nn.ModuleList(MapHead(views * count, config.head_channels) for count in channels)
            self.encoder.requires_grad_(False)
        self.heads.to(weights["conv_in.weight"].device)
        self.train()

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning,
        origin: tuple[torch.Tensor, torch.Tensor] | None = None, *, seen: tuple[torch.Tensor, ...] | None = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """Logits float32 for samples x [B, C, h, w] at timesteps t int64 [B], one tensor per head: maps [B, 1, h', w']
        of the frozen back end, one [B, 1] of the trainable one.

        origin: (x_start, t_start) if conditional, else None (ValueError); B rows, or B/n, which then serve n parts of
        the batch in turn (real and fake of the same jumps). seen: what `features(x, t, conditioning)` gave, if it was
        asked before; spares the encoder pass over x.
        """
        begun = None
        if origin is not None:
            begun = self.features(*origin, conditioning.rows(slice(len(origin[0]))))
        return self.logits(self.features(x, t, conditioning) if seen is None else seen, begun)

    def features(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, ...]:
        """The maps that the heads judge, in the encoder's dtype: one encoder pass.

        With a frozen encoder the student's loss and the critic's read the same ones of the fake sample: take them once,
        and hand the critic a detached copy (`forward`'s `seen`).
        """
        maps: list[torch.Tensor] = []
        blocks = self.encoder.down_blocks if self.backend is Backend.FROZEN else ()
        hooks = [block.register_forward_hook(lambda _module, _in, out: maps.append(out[0])) for block in blocks]
        kwargs = _cast(conditioning, self.encoder.conv_in.weight.dtype).unet_kwargs()
        try:
            # No cache: it would keep casts that were made while the weights took no gradient.
            with torch.autocast(x.device.type, self._dtype, self._autocast, cache_enabled=False):
                last = self.encoder(x.to(self.encoder.conv_in.weight.dtype), t, **kwargs, return_dict=False)[0]
        finally:
            for hook in hooks:
                hook.remove()
        # A UNet may have no mid block (mid_block_type None): the last map is then the last down block's, read once.
        return (*maps, last) if len(maps) < len(self.heads) else tuple(maps)

    def logits(
        self, features: tuple[torch.Tensor, ...], origin: tuple[torch.Tensor, ...] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The heads' judgement of `features`, beside the features of the jump's origin if conditional."""
        if (origin is not None) != self.conditional:
            raise ValueError(f"conditional is {self.conditional}: features of the origin go with it, and only with it")
        if origin is not None:
            parts = len(features[0]) // len(origin[0])
            whole = (map_.repeat(parts, 1, 1, 1) for map_ in origin)
            features = tuple(torch.cat(pair, dim=1) for pair in zip(features, whole, strict=True))
        with torch.autocast(features[0].device.type, enabled=False):
            return tuple(head(map_.float()) for head, map_ in zip(self.heads, features, strict=True))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The heads', and the encoder's if it is trained; float32."""
        return list((self if self.backend is Backend.TRAINABLE else self.heads).parameters())

    def groups(self, config: DistillConfig) -> list[dict[str, Any]]:
        """`trainable_parameters` for an optimiser, with their rate and betas."""
        settings = config.adversarial
        return [{"params": self.trainable_parameters(), "lr": settings.lr, "betas": settings.betas}]

    def learn(self, on: bool) -> None:
        """Whether `trainable_parameters` take gradients: off while the student's loss goes forward and backward, on for
        the critic's. Off saves the weights' gradients; x gets its gradient either way."""
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(on)

    def train(self, mode: bool = True) -> "Discriminator":
        """As nn.Module's, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.backend is Backend.FROZEN:
            self.encoder.eval()
        return self

    def state(self) -> dict[str, torch.Tensor]:
        """What training changes, by name: all that a checkpoint needs beside the base model."""
        kept = "heads." if self.backend is Backend.FROZEN else ""
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith(kept)}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take `state()` back; DataError unless names and shapes are those of this discriminator."""
        mine = self.state()
        odd = [n for n in {*mine, *tensors} if n not in mine or n not in tensors or mine[n].shape != tensors[n].shape]
        if odd:
            raise DataError(
                f"discriminator state: {len(odd)} tensors are of another model or configuration, as {min(odd)}; "
                "resume with the same adversarial settings, or start the stage anew"
            )
        self.load_state_dict(dict(tensors), strict=False)

    @property
    def _autocast(self) -> bool:
        return self.encoder.conv_in.weight.dtype != self._dtype


class MapHead(nn.Module):
    """[B, C, h, w] → logits [B, 1, h, w]: twice [3x3 conv, GroupNorm, LeakyReLU], the second residual, and a 1x1 conv.

    PCM's head, but `width` channels wide where PCM's has the map's own 320 to 1280 (ours: two cores, or one GPU).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lift = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), _norm(width), nn.LeakyReLU())
        self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), _norm(width), nn.LeakyReLU())
        self.out = _zero(nn.Conv2d(width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any map from 1x1 up."""
        x = self.lift(x)
        return self.out(self.mix(x) + x)


class ScalarHead(nn.Module):
    """[B, C, h, w] → logits [B, 1]: `halvings` times [4x4 conv of stride 2, GroupNorm, SiLU], and a linear layer.

    SDXL-Lightning's head, of which neither count nor width is told: here as many as bring the mid block's map at the
    model's own size to 1x1 (ours), the last without a norm: on one pixel it leaves the features' direction alone and
    flattens the gradient (built-in model, 100 steps: critic's loss 1.14 with it, 0.76 without). What is left of a
    larger map is averaged; a side of 1 is doubled before the conv.
    """

    def __init__(self, channels: int, width: int, halvings: int) -> None:
        super().__init__()
        widths = [channels, *[width] * halvings]
        self.blocks = nn.ModuleList()
        for before, after in pairwise(widths):
            norm = [_norm(after)] if len(self.blocks) < halvings - 1 else []
            self.blocks.append(nn.Sequential(nn.Conv2d(before, after, 4, stride=2, padding=1), *norm, nn.SiLU()))
        self.out = _zero(nn.Linear(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any map from 1x1 up."""
        for block in self.blocks:
            height, width = x.shape[2:]
            x = block(F.pad(x, (0, max(0, 2 - width), 0, max(0, 2 - height)), mode="replicate"))
        return self.out(x.mean((2, 3)))


def base_weights(unet: Any) -> dict[str, torch.Tensor]:
    """The weights of a UNet2DConditionModel by their own names, without those of peft adapters; nothing is copied."""
    return {
        name.replace(".base_layer.", "."): tensor for name, tensor in unet.state_dict().items() if ".lora_" not in name
    }


def encoder_copy(unet: Any, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """conv_in, embeddings, down blocks and mid block of `unet` as a UNet2DConditionModel that returns the mid block's
    output; its weights are copies of `weights` in `dtype`, its attention processors those of `unet`."""
    with torch.device("meta"):
        encoder = type(unet).from_config(unet.config)
    encoder.up_blocks, encoder.conv_norm_out, encoder.conv_out = nn.ModuleList(), None, nn.Identity()
    missing = sorted(set(encoder.state_dict()) - set(weights))
    if missing:
        raise ModelError(f"the UNet has no weight {missing[0]} ({len(missing)} are missing): load it unquantised")
    encoder.load_state_dict({name: weights[name].to(dtype, copy=True) for name in encoder.state_dict()}, assign=True)
    names = encoder.attn_processors
    encoder.set_attn_processor({name: each for name, each in unet.attn_processors.items() if name in names})
    if unet.is_gradient_checkpointing:
        encoder.enable_gradient_checkpointing()
    return encoder.requires_grad_(True)


def _cast(conditioning: Conditioning, dtype: torch.dtype) -> Conditioning:
    """Text conditions in the encoder's dtype; time_ids are embedded in float32 by the UNet itself."""
    pooled = conditioning.pooled
    return Conditioning(
        states=conditioning.states.to(dtype), pooled=None if pooled is None else pooled.to(dtype),
        time_ids=conditioning.time_ids,
    )  # fmt: skip


def _halvings(config: Any) -> int:
    """How often the mid block's map can be halved at the model's own size (64 latents where it names none)."""
    size = config.sample_size or 64
    side = max(size) if isinstance(size, tuple | list) else size
    return max(1, round(log2(side)) - len(config.block_out_channels) + 1)


def _norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least `GROUP` channels each."""
    return nn.GroupNorm(next(g for g in range(32, 0, -1) if channels % g == 0 and channels // g >= GROUP), channels)


def _zero(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    assert layer.bias is not None
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

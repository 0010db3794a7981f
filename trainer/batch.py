"""What flows through a distillation: conditioning, samples, and the source that both are read from."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

Map = Callable[[torch.Tensor], torch.Tensor]


class PerSample:
    """Tensors with a row per sample; a subclass says with `_map` what they are."""

    __slots__ = ()

    def _map(self, function: Map) -> Self:
        raise NotImplementedError

    def rows(self, index: Any) -> Self:
        """The rows that `index` (slice, bool mask or int tensor) picks."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditioning(PerSample):
    """What a UNet is conditioned on, one row per sample.

    states: text encoder hidden states [B, S, D] (SDXL: both encoders', D = 2048); pooled [B, P] and time_ids [B, 6]
    are SDXL's added conditions, None elsewhere.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def expand(self, count: int) -> "Conditioning":
        """A single row repeated `count` times, without a copy."""
        return self._map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def where(self, mask: torch.Tensor, other: "Conditioning") -> "Conditioning":
        """`other`'s row where `mask` [B] is True, this one's elsewhere; time_ids stay as they are."""

        def pick(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            return torch.where(mask.view(-1, *[1] * (mine.ndim - 1)), theirs, mine)

        pooled = None if self.pooled is None or other.pooled is None else pick(self.pooled, other.pooled)
        return Conditioning(states=pick(self.states, other.states), pooled=pooled, time_ids=self.time_ids)

    def unet_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of a diffusers UNet2DConditionModel."""
        kwargs: dict[str, Any] = {"encoder_hidden_states": self.states}
        if self.pooled is not None:
            kwargs["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        return kwargs

    def _map(self, function: Map) -> "Conditioning":
        return Conditioning(
            states=function(self.states),
            pooled=None if self.pooled is None else function(self.pooled),
            time_ids=None if self.time_ids is None else function(self.time_ids),
        )


def keyed_generator(key: str) -> torch.Generator:
    """A generator on the CPU whose draws are a function of `key` alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def cat(parts: Sequence[Conditioning]) -> Conditioning:
    """Rows of several conditionings, one after another."""

    def joined(name: str) -> torch.Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    states = joined("states")
    assert states is not None
    return Conditioning(states=states, pooled=joined("pooled"), time_ids=joined("time_ids"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Samples: latents float32 [B, C, h, w], already times the VAE's scaling factor; names for error messages."""

    latents: torch.Tensor
    conditioning: Conditioning
    captions: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str) -> "Batch":
        """The same on another device."""
        return Batch(
            latents=self.latents.to(device), conditioning=self.conditioning.to(device),
            captions=self.captions, names=self.names,
        )  # fmt: skip


class Source(Protocol):
    """An endless, shuffled stream of samples that can be read at any position.

    Position p is a pure function of the seed, so that a resumed run, and a run on another number of processes, sees
    the same samples at the same step without any state: step s of a global batch B reads positions s·B … s·B + B − 1.
    """

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of every sample."""
        ...

    @property
    def empty(self) -> Conditioning:
        """The conditioning of the empty prompt: one row."""
        ...

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions of the stream."""
        ...

"""What a graph is: a module, seeded sample inputs and output names; and the shapes of a pipeline. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import ModelError, OptionError

if TYPE_CHECKING:
    import torch


class Component(StrEnum):
    """The component folders of a bundle, in the order in which they are built."""

    TEXT_ENCODER = "text_encoder"
    TEXT_ENCODER_2 = "text_encoder_2"
    UNET = "unet"
    VAE_DECODER = "vae_decoder"
    VAE_ENCODER = "vae_encoder"

    @property
    def source(self) -> str:
        """The component of the diffusers pipeline that it comes from (the VAE gives two graphs)."""
        return "vae" if self in (Component.VAE_DECODER, Component.VAE_ENCODER) else self.value


COMPRESSIBLE = (Component.TEXT_ENCODER, Component.TEXT_ENCODER_2, Component.UNET)
"""Whose weights are compressed, for ONNX and Core ML; not the VAE's, which is small, and the first to show it."""
DRAWING = (Component.UNET, Component.VAE_DECODER, Component.VAE_ENCODER)
"""Whose work grows with the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A free axis of a graph's input: `multiple` times a whole number from `low` to `high`; axes of one name go
    together."""

    name: str
    low: int
    high: int
    multiple: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """A module to export, the seeded sample inputs by name in call order, and the names of its outputs.

    `axes`: the free ones by input and number; all others are fixed.
    """

    name: str
    module: "torch.nn.Module"
    inputs: "Mapping[str, torch.Tensor]"
    output_names: tuple[str, ...]
    axes: Mapping[str, Mapping[int, Axis]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """The shapes of one export: of all its calls, or of its own pictures where `hypersd_export.graphs.span` has more.

    `batch` images; `unet_batch` rows in one UNet call (2 x batch with CFG: unconditional rows first, then conditional
    ones); latents [channels, latent_height, latent_width] under a VAE of scale factor `vae_scale`; text states
    [tokens, text_width] and, where there is a second text encoder, its pooled state [pooled] (else 0); images of
    `width` x `height` pixels.
    """

    batch: int
    unet_batch: int
    channels: int
    latent_height: int
    latent_width: int
    vae_scale: int
    tokens: int
    text_width: int
    pooled: int = 0

    @property
    def height(self) -> int:
        """Image height in pixels."""
        return self.latent_height * self.vae_scale

    @property
    def width(self) -> int:
        """Image width in pixels."""
        return self.latent_width * self.vae_scale

    def to_json(self) -> dict[str, int]:
        """Plain integers, for cache keys and the manifest."""
        return {name: int(getattr(self, name)) for name in self.__slots__}


def vae_scale_factor(vae_config: Mapping[str, Any]) -> int:
    """Pixels per latent cell along one axis: 2^(blocks - 1), as diffusers computes it; 4, 8 and 16 all exist."""
    return 2 ** (len(vae_config.get("block_out_channels", (64,))) - 1)


def size_unit(unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> int:
    """Both sides of a picture are multiples of so many pixels."""
    return vae_scale_factor(vae_config) * unet_down_factor(unet_config)


def unet_down_factor(unet_config: Mapping[str, Any]) -> int:
    """How often the UNet halves its latents; a size that it does not divide would change the shapes inside."""
    return 2 ** (len(unet_config.get("block_out_channels", (320, 640, 1280, 1280))) - 1)


def resolve_shapes(
    configs: Mapping[str, Mapping[str, Any]], *, tokens: int, batch: int, cfg: bool, size: tuple[int, int] | None
) -> Shapes:
    """Shapes from the `config.json` of the text encoders, unet and vae by component, and the tokenizer's length.

    `size` is (width, height) in pixels, or None for the UNet's own. Absent keys have diffusers' defaults.

    Raises `OptionError` for a size that VAE and UNet cannot divide, `ModelError` for components that do not fit.
    """
    unet, vae = configs["unet"], configs["vae"]
    texts = [config for name, config in configs.items() if name.startswith("text_encoder")]
    scale, down = vae_scale_factor(vae), unet_down_factor(unet)
    channels, made = int(unet.get("in_channels", 4)), int(vae.get("latent_channels", 4))
    if channels != made:
        raise ModelError(
            f"the UNet takes {channels} latent channels and the VAE makes {made}: give a VAE of its kind with --vae"
        )
    states, text_width = int(unet.get("cross_attention_dim", 1280)), sum(int(t.get("hidden_size", 512)) for t in texts)
    if states != text_width:
        raise ModelError(
            f"the UNet attends to states of width {states} and the base makes ones of {text_width}: "
            "give a UNet of the base's kind with --unet"
        )
    latent_width, latent_height = _latent_size(unet) if size is None else _cells(size, scale, down)
    return Shapes(
        batch=batch,
        unet_batch=2 * batch if cfg else batch,
        channels=channels,
        latent_height=latent_height,
        latent_width=latent_width,
        vae_scale=scale,
        tokens=tokens,
        text_width=text_width,
        pooled=int(configs["text_encoder_2"].get("projection_dim", 512)) if "text_encoder_2" in configs else 0,
    )


def _latent_size(unet_config: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height) of the latents that the UNet was trained on."""
    sample_size = unet_config.get("sample_size") or 64
    if isinstance(sample_size, int):
        return sample_size, sample_size
    height, width = sample_size
    return int(width), int(height)


def _cells(size: tuple[int, int], scale: int, down: int) -> tuple[int, int]:
    width, height = size
    unit = scale * down
    if width % unit or height % unit or width <= 0 or height <= 0:
        near = "x".join(str(max(unit, round(side / unit) * unit)) for side in size)
        raise OptionError(
            f"--size {width}x{height}: both sides must be multiples of {unit} pixels "
            f"(VAE {scale} x UNet {down}); the nearest is {near}"
        )
    return width // scale, height // scale

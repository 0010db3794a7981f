"""The modules that are exported, each with exactly Optimum's inputs and outputs, and their seeded sample inputs.

| graph | inputs | outputs |
|---|---|---|
| text_encoder | `input_ids` int64 [B, S] | `last_hidden_state` [B, S, C], `pooler_output` [B, C] |
| text_encoder of SDXL | the same | the same, and `hidden_states.0` … `hidden_states.N` [B, S, C] of N layers |
| text_encoder_2 | `input_ids` int64 [B, S] | `text_embeds` [B, P], `last_hidden_state`, `hidden_states.0` … |
| unet | `sample` [U, 4, h, w], `timestep` float scalar, `encoder_hidden_states` [U, S, C] | `out_sample` |
| unet of SDXL | the same, `text_embeds` float32 [U, P], `time_ids` float32 [U, 6] | `out_sample` |
| vae_decoder | `latent_sample` [B, 4, h, w] (already divided by scaling_factor) | `sample` [B, 3, H, W] in [-1, 1] |
| vae_encoder | `sample` [B, 3, H, W] in [-1, 1] | `latent_parameters` [B, 8, h, w] = mean | log-variance |

The names are those of optimum-onnx's exporters (`optimum/exporters/onnx/model_configs.py`); U = 2 B under CFG. SDXL's
added inputs are float32 in every precision: they are laid beside the sinusoids of the ids, which are, before both are
rounded.
This file owns its torch import.
"""

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import torch

from hypersd_export.errors import OptionError
from hypersd_export.graphs.spec import Component, Graph, Shapes

Module = Any
"""A loaded diffusers or transformers module: third-party, without usable types."""


class TextEncoderGraph(torch.nn.Module):
    """CLIPTextModel without an attention mask, as StableDiffusionPipeline calls it."""

    def __init__(self, text_encoder: Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 [B, S] to the last layer's states (after the final norm) and the state at the end token."""
        out = self.text_encoder(input_ids=input_ids, return_dict=True)
        return out.last_hidden_state, out.pooler_output


class HiddenStatesGraph(torch.nn.Module):
    """One of SDXL's text encoders, without an attention mask, as StableDiffusionXLPipeline calls it: all its states."""

    def __init__(self, text_encoder: Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Token ids int64 [B, S] to the outputs of `hidden_outputs`, in their order."""
        out = self.text_encoder(input_ids=input_ids, output_hidden_states=True, return_dict=True)
        first = (out.text_embeds, out.last_hidden_state) if "text_embeds" in out else (out[0], out.pooler_output)
        return *first, *out.hidden_states


def hidden_outputs(text_encoder: Module) -> tuple[str, ...]:
    """The names of what `HiddenStatesGraph` gives."""
    projects = hasattr(text_encoder, "text_projection")
    first = ("text_embeds", "last_hidden_state") if projects else ("last_hidden_state", "pooler_output")
    return *first, *(f"hidden_states.{number}" for number in range(text_encoder.config.num_hidden_layers + 1))


class UNetGraph(torch.nn.Module):
    """UNet2DConditionModel; a guidance embedding (LCM's `timestep_cond`), [1, D], is a constant of the graph."""

    timestep_cond: torch.Tensor | None

    def __init__(self, unet: Module, timestep_cond: torch.Tensor | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("timestep_cond", timestep_cond)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The network's prediction [U, 4, h, w] at one timestep (a float scalar, the same for every row)."""
        out: torch.Tensor = self.unet(
            sample, timestep, encoder_hidden_states, timestep_cond=self.timestep_cond, return_dict=False
        )[0]
        return out


class UNetXLGraph(torch.nn.Module):
    """SDXL's UNet2DConditionModel, which is told of the text's pooled state and of the picture's size too."""

    def __init__(self, unet: Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        """As `UNetGraph`."""
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        out: torch.Tensor = self.unet(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )[0]
        return out


class VaeDecoderGraph(torch.nn.Module):
    """AutoencoderKL.decode, `post_quant_conv` included; or AutoencoderTiny's."""

    def __init__(self, vae: Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        """Latents (divided by scaling_factor) to an image in [-1, 1], not clamped."""
        image: torch.Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return image


class VaeEncoderGraph(torch.nn.Module):
    """AutoencoderKL's encoder with `quant_conv`; sampling and scaling are the caller's."""

    def __init__(self, vae: Module) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """An image in [-1, 1] to the Gaussian's parameters: mean and log-variance along the channel axis."""
        moments: torch.Tensor = self.encoder(sample)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments


class TinyVaeEncoderGraph(torch.nn.Module):
    """AutoencoderTiny.encode, whose latents are one point: a Gaussian that is as narrow as diffusers clamps it."""

    def __init__(self, vae: Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """As `VaeEncoderGraph`; the log-variance is -30 everywhere."""
        latents: torch.Tensor = self.vae.encode(sample, return_dict=False)[0]
        return torch.cat([latents, torch.full_like(latents, -30.0)], dim=1)


def guidance_embedding(scale: float, width: int) -> torch.Tensor:
    """LCM's embedding of a guidance scale, float32 [1, width], for `UNet2DConditionModel(time_cond_proj_dim=width)`.

    `scale` is w in u + w (c - u). LCM embeds w - 1 (LatentConsistencyModelPipeline.get_guidance_scale_embedding, after
    the sinusoidal embedding of VDM, times 1000).
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = torch.tensor([(scale - 1) * 1000.0], dtype=torch.float32)[:, None] * frequencies[None, :]
    embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return torch.nn.functional.pad(embedding, (0, width % 2))


def component_config(component: Component, module: Module, shapes: Shapes) -> dict[str, Any]:
    """The component's config.json with every default explicit, without local paths; the UNet's with this size."""
    if component in (Component.TEXT_ENCODER, Component.TEXT_ENCODER_2):
        text = module.config.to_json_string(use_diff=False)
    else:
        text = module.to_json_string()
    config: dict[str, Any] = json.loads(text)
    config.pop("_name_or_path", None)
    if component is Component.UNET:
        height, width = shapes.latent_height, shapes.latent_width
        config["sample_size"] = height if height == width else [height, width]
    return config


def check_unet(unet: Module, embedded_guidance: float | None) -> None:
    """`OptionError` unless UNet and plan agree on whether guidance is an input of the network (LCM) or not."""
    config = unet.config
    width = config.get("time_cond_proj_dim")
    if width is None and embedded_guidance is not None:
        raise OptionError(
            f"the plan embeds guidance {embedded_guidance:g}, but the UNet has no time_cond_proj_dim: "
            "use --guidance with a CFG plan, or the LCM UNet that the plan is for"
        )
    if width is not None and embedded_guidance is None:
        raise OptionError(
            f"the UNet embeds its guidance (time_cond_proj_dim {width}), but the plan does not: "
            "choose an LCM plan with --scheduler lcm and --guidance W"
        )


def _text_encoder(component: Component, module: Module, shapes: Shapes, generator: torch.Generator) -> Graph:
    ids = torch.randint(0, int(module.config.vocab_size), (shapes.batch, shapes.tokens), generator=generator)
    if shapes.pooled:
        inputs, outputs = {"input_ids": ids}, hidden_outputs(module)
        return Graph(name=component, module=HiddenStatesGraph(module), inputs=inputs, output_names=outputs)
    return Graph(
        name=Component.TEXT_ENCODER,
        module=TextEncoderGraph(module),
        inputs={"input_ids": ids},
        output_names=("last_hidden_state", "pooler_output"),
    )


def _unet(module: Module, shapes: Shapes, generator: torch.Generator, guidance: float | None) -> Graph:
    check_unet(module, guidance)
    dtype = next(module.parameters()).dtype
    rows = shapes.unet_batch
    width = module.config.get("time_cond_proj_dim")
    condition = None if guidance is None else guidance_embedding(guidance, int(width)).to(dtype)
    latents = torch.randn(
        (rows, shapes.channels, shapes.latent_height, shapes.latent_width), generator=generator, dtype=torch.float32
    )
    states = torch.randn((rows, shapes.tokens, shapes.text_width), generator=generator, dtype=torch.float32)
    inputs = {
        "sample": latents.to(dtype),
        "timestep": torch.tensor(999.0, dtype=dtype),
        "encoder_hidden_states": states.to(dtype),
    }
    if not shapes.pooled:
        graph: torch.nn.Module = UNetGraph(module, condition)
    else:
        graph = UNetXLGraph(module)
        size = [shapes.height, shapes.width]
        inputs["text_embeds"] = torch.randn((rows, shapes.pooled), generator=generator, dtype=torch.float32)
        inputs["time_ids"] = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).repeat(rows, 1)
    return Graph(name=Component.UNET, module=graph, inputs=inputs, output_names=("out_sample",))


def _vae_decoder(module: Module, shapes: Shapes, generator: torch.Generator) -> Graph:
    latents = torch.randn(
        (shapes.batch, shapes.channels, shapes.latent_height, shapes.latent_width), generator=generator
    )
    return Graph(
        name=Component.VAE_DECODER,
        module=VaeDecoderGraph(module),
        inputs={"latent_sample": latents.to(next(module.parameters()).dtype)},
        output_names=("sample",),
    )


def _vae_encoder(module: Module, shapes: Shapes, generator: torch.Generator) -> Graph:
    images = torch.rand((shapes.batch, 3, shapes.height, shapes.width), generator=generator) * 2 - 1
    return Graph(
        name=Component.VAE_ENCODER,
        module=VaeEncoderGraph(module) if hasattr(module, "quant_conv") else TinyVaeEncoderGraph(module),
        inputs={"sample": images.to(next(module.parameters()).dtype)},
        output_names=("latent_parameters",),
    )


def build_graph(
    component: Component, module: Module, shapes: Shapes, *, embedded_guidance: float | None = None, seed: int = 0
) -> Graph:
    """The graph of one component around a loaded diffusers or transformers module, with sample inputs of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    if component is Component.UNET:
        return _unet(module.eval(), shapes, generator, embedded_guidance)
    makers: dict[Component, Callable[[Module, Shapes, torch.Generator], Graph]] = {
        Component.TEXT_ENCODER: functools.partial(_text_encoder, component),
        Component.TEXT_ENCODER_2: functools.partial(_text_encoder, component),
        Component.VAE_DECODER: _vae_decoder,
        Component.VAE_ENCODER: _vae_encoder,
    }
    return makers[component](module.eval(), shapes, generator)

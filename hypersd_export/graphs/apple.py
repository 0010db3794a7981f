"""Our graphs with the names, shapes and types that Apple's Swift runtime for Stable Diffusion feeds and reads.

| graph | inputs | outputs |
|---|---|---|
| text_encoder | `input_ids` float32 [1, S] | `last_hidden_state` [1, S, C], `pooled_outputs` [1, C] |
| unet | `sample` [U, 4, h, w], `timestep` [U], `encoder_hidden_states` [U, C, 1, S] | `noise_pred` |
| SDXL's text encoders | `input_ids` float32 [1, S] | `hidden_embeds` [1, S, C], `pooled_outputs` [1, C or P] |
| SDXL's unet | the same, `time_ids` [U, 6], `text_embeds` [U, P] | `noise_pred` |
| vae_decoder | `z` [1, 4, h, w] | `image` [1, 3, H, W] |
| vae_encoder | `x` [1, 3, H, W] | `latent` [1, 8, h, w] |

U is 1 without guidance and 2 with it, unconditional row first. `hidden_embeds` is what goes into the last layer; plain
packages of SDXL's text encoders have these two outputs too, as Core ML has no dots in names. This file owns its torch
import.
"""

from collections.abc import Sequence

import torch

from hypersd_export.graphs.spec import Component, Graph

HIDDEN = ("hidden_embeds", "pooled_outputs")


class _Wrapped(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner  # `graph` is an attribute of torch.fx modules


class AppleTextEncoder(_Wrapped):
    """Swift has the ids in float32; they are below 2^16, so that none is rounded."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the table above."""
        states, pooled = self.inner(input_ids.to(torch.int32))
        return states, pooled


class HiddenEmbeds(_Wrapped):
    """Of all the states of one of SDXL's text encoders, those that the UNet is given, and the pooled one."""

    def __init__(self, inner: torch.nn.Module, outputs: Sequence[str]) -> None:
        super().__init__(inner)
        pooled = "text_embeds" if "text_embeds" in outputs else "pooler_output"
        self.wanted = (len(outputs) - 2, outputs.index(pooled))

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the table above."""
        found = self.inner(input_ids)
        hidden, pooled = self.wanted
        return found[hidden], found[pooled]


class AppleUNet(_Wrapped):
    """Channels first text states, and a timestep for each row."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """See the table above."""
        out: torch.Tensor = self.inner(sample, timestep, encoder_hidden_states.squeeze(2).transpose(1, 2))
        return out


class AppleUNetXL(_Wrapped):
    """The same, with the picture's size before the pooled state."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        time_ids: torch.Tensor,
        text_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """See the table above."""
        states = encoder_hidden_states.squeeze(2).transpose(1, 2)
        out: torch.Tensor = self.inner(sample, timestep, states, text_embeds, time_ids)
        return out


class AppleVaeDecoder(_Wrapped):
    """By another name."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """See the table above."""
        image: torch.Tensor = self.inner(z)
        return image


class AppleVaeEncoder(_Wrapped):
    """By another name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the table above."""
        latent: torch.Tensor = self.inner(x)
        return latent


def two_outputs(graph: Graph) -> Graph:
    """One of our graphs; of SDXL's text encoders with `hidden_embeds` and `pooled_outputs` alone."""
    if len(graph.output_names) <= len(HIDDEN):
        return graph
    module = HiddenEmbeds(graph.module, graph.output_names)
    return Graph(name=graph.name, module=module, inputs=graph.inputs, output_names=HIDDEN)


def as_apple(graph: Graph) -> Graph:
    """One of our graphs (`two_outputs`) as Apple's runtime wants it, sample inputs included."""
    component, given = Component(graph.name), dict(graph.inputs)
    if component in (Component.TEXT_ENCODER, Component.TEXT_ENCODER_2):
        inputs = {"input_ids": given["input_ids"].float()}
        outputs = HIDDEN if graph.output_names == HIDDEN else ("last_hidden_state", "pooled_outputs")
        return Graph(name=graph.name, module=AppleTextEncoder(graph.module), inputs=inputs, output_names=outputs)
    if component is Component.UNET:
        sample, states = given["sample"], given["encoder_hidden_states"]
        inputs = {
            "sample": sample,
            "timestep": given["timestep"].expand(len(sample)).clone(),
            "encoder_hidden_states": states.transpose(1, 2).unsqueeze(2).contiguous(),
        }
        module: torch.nn.Module = AppleUNet(graph.module)
        if "time_ids" in given:
            inputs |= {name: given[name] for name in ("time_ids", "text_embeds")}
            module = AppleUNetXL(graph.module)
        return Graph(name=graph.name, module=module, inputs=inputs, output_names=("noise_pred",))
    if component is Component.VAE_DECODER:
        inputs = {"z": given["latent_sample"]}
        return Graph(name=graph.name, module=AppleVaeDecoder(graph.module), inputs=inputs, output_names=("image",))
    inputs = {"x": given["sample"]}
    return Graph(name=graph.name, module=AppleVaeEncoder(graph.module), inputs=inputs, output_names=("latent",))

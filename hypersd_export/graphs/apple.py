"""Our graphs with the names, shapes and types that Apple's Swift runtime for Stable Diffusion feeds and reads.

| graph | inputs | outputs |
|---|---|---|
| text_encoder | `input_ids` float32 [1, S] | `last_hidden_state` [1, S, C], `pooled_outputs` [1, C] |
| unet | `sample` [U, 4, h, w], `timestep` [U], `encoder_hidden_states` [U, C, 1, S] | `noise_pred` |
| vae_decoder | `z` [1, 4, h, w] | `image` [1, 3, H, W] |
| vae_encoder | `x` [1, 3, H, W] | `latent` [1, 8, h, w] |

U is 1 without guidance and 2 with it, unconditional row first. This file owns its torch import.
"""

import torch

from hypersd_export.graphs.spec import Component, Graph


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


class AppleUNet(_Wrapped):
    """Channels first text states, and a timestep for each row."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """See the table above."""
        out: torch.Tensor = self.inner(sample, timestep, encoder_hidden_states.squeeze(2).transpose(1, 2))
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


def as_apple(graph: Graph) -> Graph:
    """One of our graphs as Apple's runtime wants it, sample inputs included."""
    component, given = Component(graph.name), dict(graph.inputs)
    if component is Component.TEXT_ENCODER:
        inputs = {"input_ids": given["input_ids"].float()}
        return Graph(name=graph.name, module=AppleTextEncoder(graph.module), inputs=inputs,
                     output_names=("last_hidden_state", "pooled_outputs"))  # fmt: skip
    if component is Component.UNET:
        sample, states = given["sample"], given["encoder_hidden_states"]
        inputs = {
            "sample": sample,
            "timestep": given["timestep"].expand(len(sample)).clone(),
            "encoder_hidden_states": states.transpose(1, 2).unsqueeze(2).contiguous(),
        }
        return Graph(name=graph.name, module=AppleUNet(graph.module), inputs=inputs, output_names=("noise_pred",))
    if component is Component.VAE_DECODER:
        inputs = {"z": given["latent_sample"]}
        return Graph(name=graph.name, module=AppleVaeDecoder(graph.module), inputs=inputs, output_names=("image",))
    inputs = {"x": given["sample"]}
    return Graph(name=graph.name, module=AppleVaeEncoder(graph.module), inputs=inputs, output_names=("latent",))

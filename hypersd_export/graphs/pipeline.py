"""The whole pipeline as one module: prompt ids and noise in, a picture out; its steps one after another.

    input_ids [1, S], negative_input_ids too under guidance, noise [1, C, h, w], step_noise [fresh ones, 1, C, h, w]
    → image [1, 3, H, W], whole numbers from 0 to 255 in float32, and latents [1, C, h, w]

The table's rows are constants, and so is guidance. The weights stand there once, however often the UNet is called. This
file owns its torch import.
"""

import torch

from hypersd_export.diffusion import Guidance, GuidanceKind, StepTable
from hypersd_export.graphs.spec import Graph


class PipelineGraph(torch.nn.Module):
    """Text encoder, UNet and decoder (the modules of `graphs.components`) joined by a table."""

    def __init__(
        self,
        text_encoder: torch.nn.Module,
        unet: torch.nn.Module,
        vae_decoder: torch.nn.Module,
        *,
        table: StepTable,
        guidance: Guidance,
        scaling_factor: float,
        shift_factor: float,
    ) -> None:
        super().__init__()
        self.text_encoder, self.unet, self.vae_decoder = text_encoder, unet, vae_decoder
        self.table = table
        self.weight = guidance.scale if guidance.kind is GuidanceKind.CFG else None
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor

    def draw(
        self, states: torch.Tensor, noise: torch.Tensor, step_noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Walk the table from noise, with text states [1 or 2, S, C], and decode."""
        sigma = self.table.init_noise_sigma
        x = noise if sigma == 1.0 else noise * sigma
        streams = self.table.noise_streams
        for number, row in enumerate(self.table.rows, start=1):
            scaled = x if row.k == 1.0 else x * row.k
            t = torch.tensor([row.t], dtype=torch.float32)
            if self.weight is None:
                out = self.unet(scaled, t, states)
            else:
                both = self.unet(torch.cat([scaled, scaled]), t, states)
                out = both[:1] + self.weight * (both[1:] - both[:1])
            x = x * row.a + out * row.b
            if row.c != 0.0:
                assert step_noise is not None
                x = x + step_noise[streams.index(number)] * row.c
        z = x / self.scaling_factor
        picture = self.vae_decoder(z + self.shift_factor if self.shift_factor else z)
        return ((picture * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round(), x


class _Plain(PipelineGraph):
    def forward(self, input_ids: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Without guidance, without fresh noise."""
        return self.draw(self.text_encoder(input_ids)[0], noise, None)


class _Noisy(PipelineGraph):
    def forward(
        self, input_ids: torch.Tensor, noise: torch.Tensor, step_noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Without guidance, with fresh noise."""
        return self.draw(self.text_encoder(input_ids)[0], noise, step_noise)


class _Guided(PipelineGraph):
    def forward(
        self, negative_input_ids: torch.Tensor, input_ids: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """With guidance, without fresh noise."""
        return self.draw(self.text_encoder(torch.cat([negative_input_ids, input_ids]))[0], noise, None)


class _GuidedNoisy(PipelineGraph):
    def forward(
        self,
        negative_input_ids: torch.Tensor,
        input_ids: torch.Tensor,
        noise: torch.Tensor,
        step_noise: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """With guidance and fresh noise."""
        return self.draw(self.text_encoder(torch.cat([negative_input_ids, input_ids]))[0], noise, step_noise)


_KINDS = {(False, False): _Plain, (False, True): _Noisy, (True, False): _Guided, (True, True): _GuidedNoisy}
"""By guidance and fresh noise: an exported program's inputs are the arguments of its module."""


def pipeline_graph(
    text_encoder: Graph, unet: Graph, vae_decoder: Graph, *, table: StepTable, guidance: Guidance,
    scaling_factor: float, shift_factor: float,
) -> Graph:  # fmt: skip
    """The graph of a pipeline of one picture, of the graphs of its parts; sample inputs are theirs."""
    guided, noisy = guidance.kind is GuidanceKind.CFG, bool(table.noise_streams)
    module = _KINDS[guided, noisy](
        text_encoder.module, unet.module, vae_decoder.module, table=table, guidance=guidance,
        scaling_factor=scaling_factor, shift_factor=shift_factor,
    )  # fmt: skip
    ids, latents = text_encoder.inputs["input_ids"][:1], vae_decoder.inputs["latent_sample"][:1]
    inputs = {"negative_input_ids": ids.clone()} if guided else {}
    inputs |= {"input_ids": ids, "noise": latents}
    if noisy:
        inputs["step_noise"] = latents.expand(len(table.noise_streams), *latents.shape).contiguous()
    return Graph(name="pipeline", module=module, inputs=inputs, output_names=("image", "latents"))

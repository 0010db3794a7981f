"""The whole pipeline as one module: prompt ids and noise in, a picture out; its steps one after another.

    input_ids [1, S], negative_input_ids too under guidance, noise [1, C, h, w], step_noise [fresh ones, 1, C, h, w]
    → image [1, 3, H, W], whole numbers from 0 to 255 in float32, and latents [1, C, h, w]

With SDXL there are the second tokenizer's ids too (input_ids_2, negative_input_ids_2), and time_ids [1, 6]. The table's
rows are constants, and so is guidance. The weights stand there once, however often the UNet is called. This file owns
its torch import.
"""

from collections.abc import Mapping, Sequence

import torch

from hypersd_export.diffusion import Guidance, GuidanceKind, StepTable
from hypersd_export.graphs.spec import Graph

Text = dict[str, torch.Tensor]
"""Texts as the UNet sees them, by its inputs' names."""


class PipelineGraph(torch.nn.Module):
    """Text encoders, UNet and decoder (the graphs of `graphs.components`) joined by a table.

    empty: for each text encoder the ids of an empty prompt where that, as what is steered away from, is zeros to the
    UNet (SDXL); else ().
    """

    def __init__(
        self,
        text_encoders: Sequence[Graph],
        unet: Graph,
        vae_decoder: Graph,
        *,
        table: StepTable,
        guidance: Guidance,
        scaling_factor: float,
        shift_factor: float,
        empty: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        self.text_encoders = torch.nn.ModuleList(graph.module for graph in text_encoders)
        self.unet, self.vae_decoder = unet.module, vae_decoder.module
        self.outputs = [graph.output_names for graph in text_encoders]
        self.table = table
        self.weight = guidance.scale if guidance.kind is GuidanceKind.CFG else None
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        self.empty = [list(ids) for ids in empty]

    def forward(self, **given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs by their names to image and latents; see the module's docstring."""
        text = self.text(given)
        return self.draw(text, given["noise"], given.get("step_noise"))

    def text(self, given: Mapping[str, torch.Tensor]) -> Text:
        """The rows of one call of the UNet: unconditional first, if there is guidance."""
        states, pooled, present = [], {}, None
        for number, (encoder, names) in enumerate(zip(self.text_encoders, self.outputs, strict=True)):
            suffix = "" if number == 0 else f"_{number + 1}"
            ids = given[f"input_ids{suffix}"]
            if self.weight is not None:
                negative = given[f"negative_input_ids{suffix}"]
                ids = torch.cat([negative, ids])
                if self.empty:
                    other = (negative - torch.tensor([self.empty[number]], dtype=negative.dtype)).abs().amax(1)
                    present = other if present is None else present + other
            outputs = dict(zip(names, encoder(ids), strict=True))
            states.append(outputs["last_hidden_state" if len(self.outputs) == 1 else names[-2]])
            if number == 1:
                pooled = {"text_embeds": outputs["text_embeds"]}
        text = {"encoder_hidden_states": torch.cat(states, dim=-1) if pooled else states[0], **pooled}
        if present is not None:
            keep = torch.cat([present.clamp(0, 1).float(), torch.ones(1)])
            text = {name: value * keep.reshape(-1, *[1] * (value.ndim - 1)) for name, value in text.items()}
        if pooled:
            text["time_ids"] = given["time_ids"].expand(len(pooled["text_embeds"]), -1)
        return text

    def draw(
        self, text: Text, noise: torch.Tensor, step_noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Walk the table from noise, and decode."""
        sigma = self.table.init_noise_sigma
        x = noise if sigma == 1.0 else noise * sigma
        streams = self.table.noise_streams
        for number, row in enumerate(self.table.rows, start=1):
            scaled = x if row.k == 1.0 else x * row.k
            t = torch.tensor([row.t], dtype=torch.float32)
            if self.weight is None:
                out = self.unet(scaled, t, *text.values())
            else:
                both = self.unet(torch.cat([scaled, scaled]), t, *text.values())
                out = both[:1] + self.weight * (both[1:] - both[:1])
            x = x * row.a + out * row.b
            if row.c != 0.0:
                assert step_noise is not None
                x = x + step_noise[streams.index(number)] * row.c
        z = x / self.scaling_factor
        picture = self.vae_decoder(z + self.shift_factor if self.shift_factor else z)
        return ((picture * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round(), x


def pipeline_graph(
    text_encoders: Sequence[Graph], unet: Graph, vae_decoder: Graph, *, table: StepTable, guidance: Guidance,
    scaling_factor: float, shift_factor: float, empty: Sequence[Sequence[int]] = (),
) -> Graph:  # fmt: skip
    """The graph of a pipeline of one picture, of the graphs of its parts; sample inputs are theirs."""
    module = PipelineGraph(
        text_encoders, unet, vae_decoder, table=table, guidance=guidance, scaling_factor=scaling_factor,
        shift_factor=shift_factor, empty=empty,
    )  # fmt: skip
    latents = vae_decoder.inputs["latent_sample"][:1]
    ids = {
        f"input_ids{'' if number == 1 else f'_{number}'}": graph.inputs["input_ids"][:1]
        for number, graph in enumerate(text_encoders, start=1)
    }
    inputs = {f"negative_{name}": row.clone() for name, row in ids.items()} if module.weight is not None else {}
    inputs |= ids
    if "time_ids" in unet.inputs:
        inputs["time_ids"] = unet.inputs["time_ids"][:1]
    inputs["noise"] = latents
    if table.noise_streams:
        inputs["step_noise"] = latents.expand(len(table.noise_streams), *latents.shape).contiguous()
    return Graph(name="pipeline", module=module, inputs=inputs, output_names=("image", "latents"))

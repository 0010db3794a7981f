"""A pipeline's parts, sampled by any few-step plan, and sheets of its pictures."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from hypersd_export.diffusion import FewStepPlan, GuidanceKind, initial_noise, run, step_noise
from hypersd_export.errors import PlanError
from hypersd_export.model.fuse import fuse
from hypersd_export.model.lora import LoraFile, check_components
from trainer.pretrain.clip import embed_captions
from trainer.pretrain.vae import to_uint8

ROWS = 128
"""Rows that the network sees at once: 128 pictures without guidance, 64 with it."""

SAMPLER = 1
"""Part of the key of every cached picture: raise it when `Parts.draw` gives other pictures."""


@dataclass(frozen=True, slots=True)
class Parts:
    """UNet, VAE, text encoder and tokenizer of a Stable Diffusion pipeline, on one device and in one dtype.

    Between the networks latents and the plan's arithmetic are float32, whatever the networks are. bf16: the UNet's
    matrix products and convolutions run in bfloat16 (autocast), twice as fast on many CPUs. latents: (height, width) in
    cells, where that is not the UNet's own size.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    bf16: bool = False
    latents: tuple[int, int] | None = None

    @classmethod
    def load(cls, folder: Path, *, bf16: bool = False) -> "Parts":
        """From a diffusers folder."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        kind = {"dtype": torch.float32}
        return cls(
            UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **kind).eval(),
            AutoencoderKL.from_pretrained(folder, subfolder="vae", **kind).eval(),
            CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", **kind).eval(),
            CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
            bf16,
        )

    def with_lora(self, lora: LoraFile) -> "Parts":
        """The same with a LoRA fused into a copy of the UNet; LoraError if any of it does not land."""
        check_components(lora, {"unet"})
        unet = copy.deepcopy(self.unet)
        fuse(unet, lora.components["unet"], scale=1.0, component="unet", source=lora.path.name)
        return replace(self, unet=unet)

    @torch.no_grad()
    def draw(self, captions: Sequence[str], plan: FewStepPlan, *, first_seed: int = 0) -> torch.Tensor:
        """Pictures in [-1, 1], float32 [N, 3, H, W], on the networks' device; picture i has seed first_seed + i
        (Philox, image 0).

        One pass of the network per step without guidance, both branches in one with it; `PlanError` for embedded
        guidance. A picture depends on how many are drawn with it only by rounding.
        """
        if plan.guidance.kind is GuidanceKind.EMBEDDED:
            raise PlanError(f"guidance embedded {plan.guidance.scale}: these networks have no input for it")
        size = self.unet.config.sample_size
        shape = (self.unet.config.in_channels, *(self.latents or (size, size)))
        guided = plan.guidance.kind is GuidanceKind.CFG
        empty = embed_captions(self.text_encoder, self.tokenizer, [""]) if guided else None
        batch, pictures = ROWS // 2 if guided else ROWS, []
        for start in range(0, len(captions), batch):
            part = list(captions[start : start + batch])
            states = embed_captions(self.text_encoder, self.tokenizer, part)
            seeds = range(first_seed + start, first_seed + start + len(part))
            latents = self._denoise(plan, states, empty, seeds, shape)
            scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            pictures.append(self.vae.decode(scaled).sample.float().clamp(-1, 1))
        return torch.cat(pictures)

    def _denoise(
        self, plan: FewStepPlan, states: torch.Tensor, empty: torch.Tensor | None, seeds: Sequence[int],
        shape: tuple[int, int, int],
    ) -> torch.Tensor:  # fmt: skip
        """Latents [b, C, h, w] by the plan's table; `empty` [1, S, D] where there is guidance."""
        table, device, dtype = plan.table(), self.unet.device, self.unet.dtype
        context = states if empty is None else torch.cat([empty.expand_as(states), states])

        def net(x: Any, t: float) -> Any:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
                rows = (x if empty is None else torch.cat([x, x])).to(dtype)
                out = self.unet(rows, torch.tensor(t, device=device), context).sample.float()
            if empty is None:
                return out
            uncond, cond = out.chunk(2)
            return uncond + plan.guidance.scale * (cond - uncond)

        def fresh(stream: int) -> Any:
            drawn = np.stack([step_noise(seed=s, index=0, step=stream, shape=shape) for s in seeds])
            return torch.from_numpy(drawn).to(device)

        noise = np.stack([initial_noise(seed=s, index=0, shape=shape) for s in seeds])
        start = torch.from_numpy(np.float32(table.init_noise_sigma) * noise).to(device)
        latents: torch.Tensor = run(table, net, start, step_noise=fresh)
        return latents


def grid(pictures: torch.Tensor, columns: int, scale: int = 3) -> Image.Image:
    """Pictures side by side, enlarged without smoothing."""
    pixels = to_uint8(pictures).permute(0, 2, 3, 1).numpy()
    rows = -(-len(pixels) // columns)
    edge = pixels.shape[1]
    sheet = np.full((rows * edge, columns * edge, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        y, x = i // columns * edge, i % columns * edge
        sheet[y : y + edge, x : x + edge] = picture
    return Image.fromarray(sheet).resize((columns * edge * scale, rows * edge * scale), Image.Resampling.NEAREST)


def labelled_grid(rows: Sequence[tuple[str, torch.Tensor]], scale: int = 3) -> Image.Image:
    """A row of pictures [N, 3, H, W] under each other, every one with its label at the left, black on white."""
    pictures = grid(torch.cat([row for _, row in rows]), len(rows[0][1]), scale)
    height = pictures.height // len(rows)
    font_px = max(12, height // 7)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = round(max(probe.textlength(label, font_size=font_px) for label, _ in rows)) + font_px
    sheet = Image.new("RGB", (margin + pictures.width, pictures.height), "white")
    sheet.paste(pictures, (margin, 0))
    draw = ImageDraw.Draw(sheet)
    for i, (label, _) in enumerate(rows):
        draw.text((margin - font_px // 2, (i + 0.5) * height), label, "black", anchor="rm", font_size=font_px)
    return sheet

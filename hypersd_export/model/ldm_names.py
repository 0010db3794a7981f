"""Module names of diffusers' UNet and VAE in the original ("LDM", "SGM") layout, as a table from the model itself.

Single-file checkpoints and the LoRAs of SGM-based trainers use the original names (`input_blocks.4.1.…`). Their block
numbers depend on the layers per block and on which blocks have attention, so the table is made forwards, from the
names of a real module, and read backwards: no name can be guessed wrong.

Sources: the layout of CompVis/latent-diffusion `openaimodel.py` and `model.py`; the inverse of diffusers'
`convert_ldm_unet_checkpoint` and `convert_ldm_vae_checkpoint`. Deviation from diffusers' LoRA loader
(`_maybe_map_sgm_blocks_to_diffusers`): it takes `output_blocks.i.1` for an attention always; in a block without
attention that is the upsampler (SD1.x: `output_blocks.2.1.conv`), and here it is found.
"""

from collections.abc import Iterable, Sequence

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_ldm_names(modules: Iterable[str], layers_per_block: int | Sequence[int]) -> dict[str, str]:
    """{diffusers module name: original name} for every module of `modules` that the original layout has.

    `layers_per_block` is the UNet's config entry; a list gives one number per block, downwards.
    """
    names = list(modules)
    levels = 1 + max((int(n.split(".")[1]) for n in names if n.startswith(("down_blocks.", "up_blocks."))), default=-1)
    layers = [layers_per_block] * levels if isinstance(layers_per_block, int) else list(layers_per_block)
    down_start = [1 + sum(n + 1 for n in layers[:block]) for block in range(levels)]
    upwards = layers[::-1]
    up_start = [sum(n + 1 for n in upwards[:block]) for block in range(levels)]
    attended = {tuple(n.split(".")[:2]) for n in names if ".attentions." in n}
    result = {}
    for name in names:
        original: str | None
        parts = name.split(".")
        if name in UNET_TOP:
            original = UNET_TOP[name]
        elif parts[0] == "mid_block" and len(parts) > 3:
            original = _inside(f"middle_block.{2 * int(parts[2]) + (parts[1] == 'attentions')}", parts[1], parts[3:])
        elif parts[0] == "down_blocks" and len(parts) > 4:
            block, kind, layer = int(parts[1]), parts[2], int(parts[3])
            if kind == "downsamplers":
                original = f"input_blocks.{down_start[block] + layers[block]}.0.op" if parts[4:] == ["conv"] else None
            else:
                original = _inside(
                    f"input_blocks.{down_start[block] + layer}.{int(kind == 'attentions')}", kind, parts[4:]
                )
        elif parts[0] == "up_blocks" and len(parts) > 4:
            block, kind, layer = int(parts[1]), parts[2], int(parts[3])
            if kind == "upsamplers":
                slot = 2 if ("up_blocks", parts[1]) in attended else 1
                original = f"output_blocks.{up_start[block] + upwards[block]}.{slot}.{'.'.join(parts[4:])}"
            else:
                original = _inside(
                    f"output_blocks.{up_start[block] + layer}.{int(kind == 'attentions')}", kind, parts[4:]
                )
        else:
            original = None
        if original is not None:
            result[name] = original
    return result


def _inside(place: str, kind: str, rest: list[str]) -> str | None:
    """A module inside a resnet (renamed) or inside an attention (the same name)."""
    if kind != "resnets":
        return f"{place}.{'.'.join(rest)}"
    inner = RESNET.get(".".join(rest))
    return None if inner is None else f"{place}.{inner}"


def vae_ldm_names(modules: Iterable[str], levels: int) -> dict[str, str]:
    """{diffusers module name: original name} for an AutoencoderKL with `levels` blocks on each side."""
    result = {}
    for name in modules:
        half, _, inner = name.partition(".")
        if half in {"quant_conv", "post_quant_conv"}:
            result[name] = name
            continue
        original = _vae_inside(inner.split("."), levels)
        if original is not None:
            result[name] = f"{half}.{original}"
    return result


def _vae_inside(parts: list[str], levels: int) -> str | None:
    """The original name of a module of the encoder or of the decoder."""
    tail = ".".join(parts[3:])
    if parts in (["conv_in"], ["conv_out"]):
        return parts[0]
    if parts == ["conv_norm_out"]:
        return "norm_out"
    if parts[0] == "mid_block" and len(parts) > 3:
        if parts[1] == "resnets":
            return f"mid.block_{int(parts[2]) + 1}.{tail.replace('conv_shortcut', 'nin_shortcut')}"
        return f"mid.attn_1.{VAE_ATTENTION[tail]}" if tail in VAE_ATTENTION else None
    if parts[0] not in {"down_blocks", "up_blocks"} or len(parts) < 5:
        return None
    side = "down" if parts[0] == "down_blocks" else "up"
    block = int(parts[1]) if side == "down" else levels - 1 - int(parts[1])
    tail = ".".join(parts[4:])
    if parts[2] == "resnets":
        return f"{side}.{block}.block.{parts[3]}.{tail.replace('conv_shortcut', 'nin_shortcut')}"
    return f"{side}.{block}.{side}sample.{tail}"

"""OpenCLIP's text tower under transformers' names: SDXL's second text encoder in a single file, and SD 2's only one.

    token_embedding, positional_embedding, ln_final          → embeddings.…, final_layer_norm
    transformer.resblocks.N.attn.in_proj_weight [3 C, C]      → q_proj, k_proj, v_proj, in that order
    transformer.resblocks.N.{ln_1, ln_2, mlp.c_fc, mlp.c_proj, attn.out_proj}
    text_projection [C, P], which multiplies from the right  → text_projection.weight [P, C]

Source: open_clip's `transformer.py`; the inverse of diffusers' `convert_open_clip_checkpoint`. SD 2's UNet was trained
on what leaves the last layer but one, behind the final norm: its diffusers files lack the last layer, and so does the
part here (`num_hidden_layers` of its config).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hypersd_export.errors import ModelError

if TYPE_CHECKING:
    import torch

LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
UNUSED = ("attn_mask", "logit_scale")
BLOCKS = "transformer.resblocks."
SDXL_PREFIX, SD2_PREFIX = "conditioner.embedders.1.model.", "cond_stage_model.model."


def open_clip_config(shapes: Mapping[str, tuple[int, ...]], *, layers: int, where: str) -> dict[str, Any]:
    """transformers' CLIPTextConfig of a tower with these shapes (names without prefix), of which `layers` are used.

    Heads have 64 channels, and the activation is GELU, as in every OpenCLIP of the field. ModelError in one line.
    """
    try:
        vocabulary, width = shapes["token_embedding.weight"]
        positions = shapes["positional_embedding"][0]
        inner = shapes[f"{BLOCKS}0.mlp.c_fc.weight"][0]
        projection = shapes.get("text_projection", (width, width))[1]
    except (KeyError, ValueError, IndexError) as e:
        raise ModelError(f"{where}: its text encoder is no OpenCLIP ({e} is missing); pass its diffusers folder") from e
    return {
        "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 2,  # as in the published configs: the pooled state is the highest id's
        "hidden_act": "gelu", "hidden_size": width, "intermediate_size": inner, "layer_norm_eps": 1e-5,
        "max_position_embeddings": positions, "model_type": "clip_text_model",
        "num_attention_heads": max(width // 64, 1), "num_hidden_layers": layers, "pad_token_id": 1,
        "projection_dim": projection, "vocab_size": vocabulary,
    }  # fmt: skip


def from_open_clip(state: "Mapping[str, torch.Tensor]", prefix: str, config: Mapping[str, Any]) -> "dict[str, Any]":
    """The tensors under `prefix` by transformers' names (without `text_model.`); what is not used is left out."""
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        own = name.removeprefix(prefix)
        if own == name or own in UNUSED:
            continue
        if own in TOP:
            found[TOP[own]] = tensor
        elif own == "text_projection":
            found["text_projection.weight"] = tensor.T.contiguous()
        elif own.startswith(BLOCKS):
            number, _, rest = own.removeprefix(BLOCKS).partition(".")
            if int(number) < int(config["num_hidden_layers"]):
                found |= {f"encoder.layers.{number}.{key}": value for key, value in _layer(rest, tensor).items()}
        else:
            found[name] = tensor  # told of as one too many
    return found


def _layer(name: str, tensor: "torch.Tensor") -> "dict[str, torch.Tensor]":
    module, _, leaf = name.rpartition(".")
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.removeprefix("attn.in_proj_")
        names = [f"self_attn.{each}_proj.{kind}" for each in "qkv"]
        return dict(zip(names, tensor.chunk(3), strict=True))
    return {f"{LAYER.get(module, module)}.{leaf}": tensor}

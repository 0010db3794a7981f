"""Attention as the Neural Engine wants it: channels first, a head at a time, projections as 1 x 1 convolutions.

The layout is that of "Deploying Transformers on the Apple Neural Engine" (machinelearning.apple.com): states are
[B, C, 1, S], so that the last axis is long and contiguous, and the matrix products of each head are einsums that need
no transposed copies. `split-einsum-v2` takes the queries in pieces, which keeps the scores of large pictures small.
The numbers are those of the original but for the order of summation. This file owns its torch import.
"""

from typing import Any

import torch
from torch.nn.functional import conv2d

from hypersd_export.errors import OptionError
from hypersd_export.graphs.kept_apart import WithLora

QUERY_PIECE = 512
"""Queries at once under `split-einsum-v2`; shorter rows are taken whole."""
_LEFT_OUT = {
    **dict.fromkeys(("norm_q", "norm_k", "spatial_norm", "group_norm", "norm_cross", "added_kv_proj_dim")),
    "residual_connection": False,
    "rescale_output_factor": 1.0,
}
"""What an attention layer of other networks may have and this rewriting does not, each with what is none of it."""


class SplitEinsum:
    """A diffusers attention processor; `piece` is the number of queries at once, None for all of them."""

    def __init__(self, piece: int | None = None) -> None:
        self.piece = piece

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Attend from states [B, S, C] to [B, T, D], or to themselves; returns [B, S, C]."""
        assert attention_mask is None, "an exported UNet masks nothing"
        x = _channels_first(hidden_states)
        context = x if encoder_hidden_states is None else _channels_first(encoder_hidden_states)
        queries = _project(x, attn.to_q)
        keys, values = _project(context, attn.to_k).transpose(1, 3), _project(context, attn.to_v)
        width = queries.shape[1] // attn.heads
        pieces = torch.split(queries, _sizes(queries.shape[3], self.piece), dim=3)
        parts = [
            torch.cat([_head(q, k, v, attn.scale) for q in heads], dim=3)
            for heads, k, v in zip(
                zip(*(torch.split(piece, width, dim=1) for piece in pieces), strict=True),
                torch.split(keys, width, dim=3),
                torch.split(values, width, dim=1),
                strict=True,
            )
        ]
        return _project(torch.cat(parts, dim=1), attn.to_out[0]).squeeze(2).transpose(1, 2)


def _head(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """One head: queries [B, c, 1, q], keys [B, k, 1, c], values [B, c, 1, k] to [B, c, 1, q].

    The scale goes onto the queries: the products before it can be more than half holds, those after it are scores.
    """
    scores = torch.einsum("bchq,bkhc->bkhq", queries * scale, keys)
    return torch.einsum("bkhq,bchk->bchq", scores.softmax(dim=1), values)


def _sizes(count: int, piece: int | None) -> list[int]:
    """The sizes of the pieces; said one by one, as Core ML's converter takes uneven ones only so."""
    size = piece or count
    return [min(size, count - start) for start in range(0, count, size)]


def _channels_first(states: torch.Tensor) -> torch.Tensor:
    """[B, S, C] to [B, C, 1, S]."""
    return states.transpose(1, 2).unsqueeze(2)


def _project(x: torch.Tensor, linear: Any) -> torch.Tensor:
    """A linear layer, or one with LoRAs beside it, over the channels of [B, C, 1, S]."""
    if isinstance(linear, WithLora):
        y = _project(x, linear.layer)
        for down, up in zip(linear.downs, linear.ups, strict=True):
            y = y + _project(_project(x, down), up)
        return y
    return conv2d(x, linear.weight[:, :, None, None], linear.bias)


def use_attention(unet: Any, kind: str) -> None:
    """Make every attention layer of a diffusers UNet one of `targets.coreml.ATTENTIONS`, in place.

    Raises `OptionError` for a UNet whose layers do more than queries, keys and values.
    """
    if kind == "original":
        return
    for name, layer in unet.named_modules():
        if not hasattr(layer, "set_processor"):
            continue
        found = [left for left, none in _LEFT_OUT.items() if getattr(layer, left, none) != none]
        if found:
            raise OptionError(f"--attention {kind}: {name} has {', '.join(found)}, which it lacks; use original")
    unet.set_attn_processor(SplitEinsum(QUERY_PIECE if kind == "split-einsum-v2" else None))

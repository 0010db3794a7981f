"""The text encoders of a bundle: one, or SDXL's two, whose states the UNet sees side by side.

| family | encoder | tokenizer | states | pooled |
|---|---|---|---|---|
| Stable Diffusion 1.x, 2.x | text_encoder | tokenizer | `last_hidden_state`, after the final norm | none |
| SDXL | text_encoder | tokenizer | `hidden_states.N`, the last layer but one, without the norm | none |
| | text_encoder_2 | tokenizer_2 | the same | `text_embeds` |

That is diffusers' `encode_prompt` of either pipeline (clip_skip None); output names are Optimum's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SECOND = "text_encoder_2"
ZERO_EMPTY = "force_zeros_for_empty_prompt"
"""In the config.json of SDXL's second text encoder: whether an empty negative prompt is all zeros to the UNet. It is a
key of diffusers' model_index.json, which only ONNX bundles have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """One text encoder: the folders of it and of its tokenizer, and which outputs of it the UNet is given."""

    component: str
    tokenizer: str
    states: str
    pooled: str | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Those that count."""
        return (self.states,) if self.pooled is None else (self.states, self.pooled)

    @property
    def suffix(self) -> str:
        """What stands behind the name of the first encoder's ids for this one's: nothing, or _2."""
        return self.tokenizer.removeprefix("tokenizer")


def encoders_of(configs: Mapping[str, Mapping[str, Any]]) -> tuple[Encoder, ...]:
    """The text encoders of a pipeline, from the config.json of its components by name."""
    if SECOND not in configs:
        return (Encoder(component="text_encoder", tokenizer="tokenizer", states="last_hidden_state"),)
    first, second = (hidden_output(configs[name]) for name in ("text_encoder", SECOND))
    return (
        Encoder(component="text_encoder", tokenizer="tokenizer", states=first),
        Encoder(component=SECOND, tokenizer="tokenizer_2", states=second, pooled="text_embeds"),
    )


def hidden_output(config: Mapping[str, Any]) -> str:
    """The output that is `hidden_states[-2]`: what goes into the last layer (0 is the embedding)."""
    return f"hidden_states.{int(config.get('num_hidden_layers', 12)) - 1}"

"""ImageReward (arXiv 2304.05977): BLIP reads the prompt while it looks at the picture, a linear head says how good.

The checkpoint (`ImageReward.pt`) has BLIP's own names; here transformers' BLIP has its weights. Text is cut off at 35
tokens and the reward normalised, as in the authors' code. Its head has no activations, so it is one linear map.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from hypersd_export.errors import ModelError
from trainer.base import one_line
from trainer.rewards.aesthetic import fold_linear
from trainer.rewards.checkpoints import count_layers, load_strictly, read_weights, renamed, shape_of
from trainer.rewards.clip import check_batch
from trainer.rewards.preprocess import CLIP_PREPROCESS, Preprocess

KIND = "ImageReward"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
HEAD_DIMS = (64, 64)
"""Width of an attention head in the picture and text towers (ViT-L/16, BERT base); no tensor tells it."""
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
)
"""From BLIP's names to transformers'; the text tower's are the same."""


class ImageReward:
    """ImageReward as a `Reward`: about −2 to 2, in float32 whatever autocast is on.

    checkpoint: the authors' file or its conversion to safetensors. tokenizer: a folder with bert-base-uncased's
    tokenizer, as the checkpoint has none. ModelError for a file that is something else.
    """

    def __init__(
        self, checkpoint: str | Path, *, tokenizer: str | Path, preprocess: Preprocess = CLIP_PREPROCESS,
        head_dims: tuple[int, int] = HEAD_DIMS, allow_pickle: bool = False, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        path, tensors = read_weights(checkpoint, allow_pickle=allow_pickle)
        self.name, self.preprocess = path.stem, preprocess
        self._vision, self._text = _blip(tensors, path, head_dims)
        self._weight, self._bias = fold_linear(_under(tensors, "mlp."), path)
        self._tokenizer = _bert_tokenizer(Path(tokenizer), self._text.config.vocab_size)
        self.to(device)

    def to(self, device: torch.device | str) -> Self:
        """Move the model; pictures must lie on the same device."""
        self._vision.to(device)
        self._text.to(device)
        self._weight, self._bias = self._weight.to(device), self._bias.to(device)
        return self

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The normalised reward of each picture with its prompt: float32 [B]."""
        check_batch(images, prompts)
        words = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            seen = self._vision(pixel_values=self.preprocess(images.float())).last_hidden_state
            read = self._text(
                input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen
            ).last_hidden_state
            return ((read[:, 0] @ self._weight.T + self._bias)[:, 0] - MEAN) / STD


def _blip(tensors: Mapping[str, torch.Tensor], path: Path, head_dims: tuple[int, int]) -> tuple[Any, Any]:
    """BLIP's picture tower and its text tower with cross-attention, frozen, with sizes read off the tensors."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    seen, read = _under(tensors, "blip.visual_encoder."), _under(tensors, "blip.text_encoder.")
    width, _, patch, _ = shape_of(seen, "patch_embed.proj.weight", path, KIND)
    positions = shape_of(seen, "pos_embed", path, KIND)[1]
    vocabulary, text_width = shape_of(read, "embeddings.word_embeddings.weight", path, KIND)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width, patch_size=patch, image_size=patch * math.isqrt(positions - 1), hidden_act="gelu",
            layer_norm_eps=1e-6, num_hidden_layers=count_layers(seen, "blocks."),
            num_attention_heads=width // head_dims[0],
            intermediate_size=shape_of(seen, "blocks.0.mlp.fc1.weight", path, KIND)[0],
        )
    )  # fmt: skip
    text = BlipTextModel(
        BlipTextConfig(
            hidden_size=text_width, vocab_size=vocabulary, encoder_hidden_size=width, hidden_act="gelu",
            layer_norm_eps=1e-12, num_hidden_layers=count_layers(read, "encoder.layer."), is_decoder=True,
            num_attention_heads=text_width // head_dims[1],
            max_position_embeddings=shape_of(read, "embeddings.position_embeddings.weight", path, KIND)[0],
            intermediate_size=shape_of(read, "encoder.layer.0.intermediate.dense.weight", path, KIND)[0],
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    load_strictly(vision, renamed(seen, VISION_NAMES), path, KIND)
    load_strictly(text, read, path, KIND)
    return vision.eval().requires_grad_(False), text.eval().requires_grad_(False)


def _bert_tokenizer(folder: Path, vocabulary: int) -> Any:
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{folder}: no BERT tokenizer ({one_line(error)}); pass tokenizer=FOLDER of bert-base-uncased"
        ) from error
    if len(tokenizer) > vocabulary:
        raise ModelError(f"{folder}: {len(tokenizer)} tokens where the text tower has {vocabulary}; pass its own")
    return tokenizer


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

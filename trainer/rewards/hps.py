"""HPSv2 and HPSv2.1 (arXiv 2306.09341): an OpenCLIP ViT-H/14 fine-tuned on human choices; the score is the cosine.

The checkpoints (`HPS_v2_compressed.pt`, `HPS_v2.1_compressed.pt`) have OpenCLIP's names. Scores of the two versions are
not comparable, nor are those of different prompts: say which file it was. Differences to the authors' code: no
rounding to 8 bits before resizing, antialiasing as in torchvision 0.17 and later, float32 where they use float16.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.rewards.checkpoints import count_layers, load_strictly, read_weights, renamed, shape_of
from trainer.rewards.clip import ClipTowers, clip_tokenizer
from trainer.rewards.preprocess import CLIP_PREPROCESS, Fit, Preprocess

KIND = "an OpenCLIP model"
HEAD_DIMS = (80, 64)
"""Width of an attention head in ViT-H/14's picture and text towers; no tensor tells it."""
HPS_PREPROCESS = replace(CLIP_PREPROCESS, fit=Fit.PAD)
NAMES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
)
"""From OpenCLIP's names to transformers'."""


class HpsReward(ClipTowers):
    """HPSv2 or 2.1 as a `Reward`: the cosine itself, about 0.2 to 0.35.

    checkpoint: the authors' file or its conversion to safetensors. tokenizer: a folder with CLIP's tokenizer, as the
    checkpoint has none. head_dims: of the picture and the text tower. ModelError for a file that is something else.
    """

    def __init__(
        self, checkpoint: str | Path, *, tokenizer: str | Path, preprocess: Preprocess = HPS_PREPROCESS,
        head_dims: tuple[int, int] = HEAD_DIMS, allow_pickle: bool = False, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        path, tensors = read_weights(checkpoint, allow_pickle=allow_pickle)
        self.name = path.stem
        model = from_open_clip(tensors, path, head_dims)
        words = clip_tokenizer(Path(tokenizer), model.config.text_config, path)
        super().__init__(model, words, preprocess, scale=1.0, device=device)


def from_open_clip(tensors: Mapping[str, torch.Tensor], path: Path, head_dims: tuple[int, int]) -> Any:
    """A transformers CLIPModel (GELU, as OpenCLIP's own models) with the weights of an OpenCLIP state dict.

    Sizes are read off the tensors; the last token of the vocabulary is the end token.
    """
    from transformers import CLIPConfig, CLIPModel

    width, _, patch, _ = shape_of(tensors, "visual.conv1.weight", path, KIND)
    positions = shape_of(tensors, "visual.positional_embedding", path, KIND)[0]
    vocabulary, text_width = shape_of(tensors, "token_embedding.weight", path, KIND)
    dim = shape_of(tensors, "text_projection", path, KIND)[1]
    common = {"hidden_act": "gelu", "projection_dim": dim, "layer_norm_eps": 1e-5}
    vision = {
        "hidden_size": width, "patch_size": patch, "image_size": patch * math.isqrt(positions - 1),
        "num_hidden_layers": count_layers(tensors, "visual.transformer.resblocks."),
        "num_attention_heads": width // head_dims[0],
        "intermediate_size": shape_of(tensors, "visual.transformer.resblocks.0.mlp.c_fc.weight", path, KIND)[0],
    }  # fmt: skip
    text = {
        "hidden_size": text_width, "vocab_size": vocabulary, "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2, "pad_token_id": 0,
        "max_position_embeddings": shape_of(tensors, "positional_embedding", path, KIND)[0],
        "num_hidden_layers": count_layers(tensors, "transformer.resblocks."),
        "num_attention_heads": text_width // head_dims[1],
        "intermediate_size": shape_of(tensors, "transformer.resblocks.0.mlp.c_fc.weight", path, KIND)[0],
    }  # fmt: skip
    model = CLIPModel(
        CLIPConfig(vision_config={**common, **vision}, text_config={**common, **text}, projection_dim=dim)
    )
    load_strictly(model, _split(renamed(tensors, NAMES)), path, KIND)
    return model


def _split(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OpenCLIP has query, key and value in one tensor, and its projections act from the right."""
    done: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".in_proj_" in name:
            stem, kind = name.split(".in_proj_")
            parts = zip("qkv", tensor.chunk(3), strict=True)
            done |= {f"{stem}.{letter}_proj.{kind}": part.contiguous() for letter, part in parts}
        else:
            done[name] = tensor.T.contiguous() if name.endswith("_projection.weight") else tensor
    return done

"""The contrastive model of the built-in pipeline: its text tower becomes the frozen text encoder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trainer.ema import Ema
from trainer.pretrain.loop import Schedule, StepResult, train
from trainer.pretrain.scenes import UNSAID, SceneRenderer, SceneSpec, scene_batches

BUILTIN_CLIP = Path(__file__).parent / "builtin_clip"
"""The whole CLIP (fp16) whose text tower is the built-in model's text encoder, for rewards and losses to look with."""
TEXT: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 32, "hidden_act": "quick_gelu", "projection_dim": 128,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu", "projection_dim": 128,
}  # fmt: skip


def new_clip(tokenizer: Any, *, text: dict[str, Any] = TEXT, vision: dict[str, Any] = VISION) -> Any:
    """A freshly initialised transformers CLIPModel whose text tower fits `tokenizer`."""
    from transformers import CLIPConfig, CLIPModel

    ends = {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    dim = text["projection_dim"]
    return CLIPModel(CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=dim))


def matches(spec: SceneSpec) -> torch.Tensor:
    """Which captions are true of which pictures: bool [B captions, B pictures].

    In a batch many captions describe several pictures (the style or background is often unsaid), so plain InfoNCE
    would punish right answers. Here every true pair is a positive (ours; as in supervised contrastive learning,
    Khosla et al. 2020, eq. 2).
    """
    concept = spec.concept[:, None] == spec.concept[None]
    style = (spec.named_style[:, None] == UNSAID) | (spec.named_style[:, None] == spec.style[None])
    background = (spec.named_background[:, None] == UNSAID) | (spec.named_background[:, None] == spec.background[None])
    return concept & style & background


def contrastive_loss(
    text: torch.Tensor, image: torch.Tensor, positive: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Symmetric cross-entropy against uniform targets over the positives; embeddings [B, D], unit length."""
    logits = scale * text.float() @ image.float().T
    target = positive.float()
    by_text = -(F.log_softmax(logits, 1) * target).sum(1) / target.sum(1)
    by_image = -(F.log_softmax(logits, 0) * target).sum(0) / target.sum(0)
    return (by_text.mean() + by_image.mean()) / 2


def train_clip(
    clip: Any, tokenizer: Any, renderer: SceneRenderer, allowed: np.ndarray, schedule: Schedule, *, batch: int,
    seed: int, state: Path, ema: Ema, concepts: int = 0,
) -> Iterator[StepResult]:  # fmt: skip
    """Train in place on scenes and their captions.

    Batches of few `concepts` (0: of all) hold many pictures of one concept in several styles: in a batch of 128 of all
    102 concepts hardly two are, and a text tower trained so says the style in a whisper that the UNet does not hear.
    """
    scenes = scene_batches(renderer, allowed, batch, seed, concepts=concepts)

    def losses(step: int) -> dict[str, torch.Tensor]:
        del step
        spec, pictures = next(scenes)
        # attention is causal and the summary stands at the end token: what is cut off here is padding without effect
        ids = tokenizer(spec.captions(), padding=True, return_tensors="pt").input_ids
        text = F.normalize(clip.get_text_features(input_ids=ids).pooler_output.float(), dim=1)
        image = F.normalize(clip.get_image_features(pixel_values=pictures).pooler_output.float(), dim=1)
        positive, scale = matches(spec), clip.logit_scale.exp().clamp(max=100)
        top = (text @ image.T).detach().argmax(1)
        right = positive.gather(1, top[:, None]).float().mean()
        return {"loss": contrastive_loss(text, image, positive, scale), "top1": right}

    return train(clip, losses, schedule, state=state, ema=ema)


def tokenize(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """int64 [B, max_length], padded with the end token as StableDiffusionPipeline does."""
    ids: torch.Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


@torch.no_grad()
def embed_captions(text_encoder: Any, tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """last_hidden_state of every caption: [N, max_length, hidden], on the encoder's device and in its dtype."""
    ids = tokenize(tokenizer, captions).to(text_encoder.device)
    return torch.cat([text_encoder(part)[0] for part in torch.split(ids, 256)])

"""Reward models in the layouts in which they are published, with small random towers."""

import torch

from tests.tiny import tiny_tokenizer
from trainer.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess

VOCABULARY, SIZE = 518, 24
SMALL = Preprocess(size_px=SIZE, mean=CLIP_MEAN, std=CLIP_STD)


def small_clip(folder, *, dim=8):
    """A CLIPModel folder as the hub has them: with a preprocessor and a tokenizer."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tiny_tokenizer(folder)
    ends = {"bos_token_id": 516, "eos_token_id": 517, "pad_token_id": 517}
    torch.manual_seed(0)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**common, **ends, "vocab_size": VOCABULARY, "max_position_embeddings": 12}
    vision = {**common, "image_size": SIZE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)).save_pretrained(folder)
    size, crop = {"shortest_edge": SIZE}, {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size=size, crop_size=crop, image_mean=CLIP_MEAN, image_std=CLIP_STD).save_pretrained(folder)
    return folder


def random_tensors(shapes, seed=0):
    """{name: values of deviation 0.2}; norms' weights are near 1."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    norms = ("ln_1", "ln_2", "ln_pre", "ln_post", "ln_final", "norm", "norm1", "norm2", "LayerNorm")
    return {n: t + (n.endswith(".weight") and n.split(".")[-2] in norms) for n, t in made.items()}


def open_clip_tensors(*, width=20, text_width=16, dim=6, layers=2):
    """An OpenCLIP state dict: ViT with patches of 8 on 24 px, text of 12 tokens."""

    def blocks(prefix, wide):
        for number in range(layers):
            name = f"{prefix}resblocks.{number}."
            yield from {
                f"{name}ln_1.weight": (wide,), f"{name}ln_1.bias": (wide,), f"{name}ln_2.weight": (wide,),
                f"{name}ln_2.bias": (wide,), f"{name}attn.in_proj_weight": (3 * wide, wide),
                f"{name}attn.in_proj_bias": (3 * wide,), f"{name}attn.out_proj.weight": (wide, wide),
                f"{name}attn.out_proj.bias": (wide,), f"{name}mlp.c_fc.weight": (2 * wide, wide),
                f"{name}mlp.c_fc.bias": (2 * wide,), f"{name}mlp.c_proj.weight": (wide, 2 * wide),
                f"{name}mlp.c_proj.bias": (wide,),
            }.items()  # fmt: skip

    norms = {f"visual.{n}.{k}": (width,) for n in ("ln_pre", "ln_post") for k in ("weight", "bias")}
    return random_tensors({
        "visual.class_embedding": (width,), "visual.positional_embedding": (10, width), "visual.proj": (width, dim),
        "visual.conv1.weight": (width, 3, 8, 8), **norms, **dict(blocks("visual.transformer.", width)),
        "token_embedding.weight": (VOCABULARY, text_width), "positional_embedding": (12, text_width),
        "ln_final.weight": (text_width,), "ln_final.bias": (text_width,), "text_projection": (text_width, dim),
        **dict(blocks("transformer.", text_width)), "logit_scale": (),
    })  # fmt: skip


def image_reward_tensors(*, width=20, text_width=16, layers=2, vocabulary=40):
    """ImageReward's state dict: BLIP's ViT with patches of 8 on 24 px, BERT with cross-attention, the head."""
    shapes = {
        "visual_encoder.cls_token": (1, 1, width), "visual_encoder.pos_embed": (1, 10, width),
        "visual_encoder.patch_embed.proj.weight": (width, 3, 8, 8), "visual_encoder.patch_embed.proj.bias": (width,),
        "visual_encoder.norm.weight": (width,), "visual_encoder.norm.bias": (width,),
        "text_encoder.embeddings.word_embeddings.weight": (vocabulary, text_width),
        "text_encoder.embeddings.position_embeddings.weight": (40, text_width),
        "text_encoder.embeddings.LayerNorm.weight": (text_width,),
        "text_encoder.embeddings.LayerNorm.bias": (text_width,),
        "vision_proj.weight": (4, width), "vision_proj.bias": (4,), "text_proj.weight": (4, text_width),
    }  # fmt: skip
    for number in range(layers):
        for part, (rows, columns) in {
            "attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (2 * width, width),
            "mlp.fc2": (width, 2 * width), "norm1": (width, None), "norm2": (width, None),
        }.items():  # fmt: skip
            name = f"visual_encoder.blocks.{number}.{part}."
            shapes |= {f"{name}weight": (rows, columns) if columns else (rows,), f"{name}bias": (rows,)}
        for kind, wide in (("attention", text_width), ("crossattention", width)):
            name = f"text_encoder.encoder.layer.{number}.{kind}."
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                columns = wide if part in ("self.key", "self.value") else text_width
                shapes |= {f"{name}{part}.weight": (text_width, columns), f"{name}{part}.bias": (text_width,)}
            shapes |= {f"{name}output.LayerNorm.{kind}": (text_width,) for kind in ("weight", "bias")}
        name = f"text_encoder.encoder.layer.{number}."
        shapes |= {
            f"{name}intermediate.dense.weight": (2 * text_width, text_width),
            f"{name}intermediate.dense.bias": (2 * text_width,),
            f"{name}output.dense.weight": (text_width, 2 * text_width), f"{name}output.dense.bias": (text_width,),
            f"{name}output.LayerNorm.weight": (text_width,), f"{name}output.LayerNorm.bias": (text_width,),
        }  # fmt: skip
    tensors = random_tensors({f"blip.{name}": shape for name, shape in shapes.items()})
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40).expand(1, -1)
    return tensors | {f"mlp.{name}": t for name, t in head_tensors(text_width).items()}


def head_tensors(width, *, places=(0, 2, 4, 6, 7)):
    """The five layers of the aesthetic predictor's and ImageReward's head, narrow."""
    sizes = (width, 12, 8, 6, 4, 1)
    shapes = {f"layers.{n}.weight": (b, a) for n, a, b in zip(places, sizes[:-1], sizes[1:], strict=True)}
    return random_tensors(shapes | {f"layers.{n}.bias": (b,) for n, b in zip(places, sizes[1:], strict=True)}, seed=7)


def bert_tokenizer(folder):
    """bert-base-uncased's kind of tokenizer, of 36 words and pieces."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "on", "##s", *"bcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder

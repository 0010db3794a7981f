"""A tiny random CLIP as a transformers folder, with OpenAI's preprocessing at 16 px."""

import json


def tiny_clip(folder, *, seed=0):
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    from tests.tiny import tiny_tokenizer

    tiny_tokenizer(folder)
    words = CLIPTokenizer.from_pretrained(folder)
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.eos_token_id}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 16, **ends}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    config = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 16}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 16, "width": 16}, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True, "rescale_factor": 1 / 255,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder

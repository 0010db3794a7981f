"""A tiny random StableDiffusionXLPipeline (16x16 px, f4 VAE) in the exact format of diffusers."""

from pathlib import Path

from tests.tiny import tiny_tokenizer

WIDTH, WIDTH_2, POOLED = 16, 24, 20


def tiny_sdxl(folder: Path, *, seed: int = 0, force_zeros: bool = True) -> Path:
    """Write the pipeline and return its folder; tokenizer_2 pads with "!", as SDXL's does."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tiny_tokenizer(folder / "tok")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tok")
    tokenizer_2 = CLIPTokenizer.from_pretrained(folder / "tok", pad_token="!")
    torch.manual_seed(seed)

    def config(width: int, layers: int, **more: object) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, **more,
        )  # fmt: skip

    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=WIDTH + WIDTH_2, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED, transformer_layers_per_block=(1, 1),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16, 16), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4, sample_size=16, scaling_factor=0.13025, force_upcast=True,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=vae, unet=unet, tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder=CLIPTextModel(config(WIDTH, 3)),
        text_encoder_2=CLIPTextModelWithProjection(config(WIDTH_2, 4, projection_dim=POOLED, hidden_act="gelu")),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        force_zeros_for_empty_prompt=force_zeros,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"

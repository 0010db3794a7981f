"""A small UNet with every kind of module that a LoRA may stand on, and conditioning for it."""

import torch

from hypersd_export.diffusion import NoiseSchedule, PredictionType
from trainer.batch import Batch, Conditioning
from trainer.distill.config import LoraConfig
from trainer.distill.networks import Networks

SHAPE = (4, 8, 8)


def small_unet(seed=0, **changes):
    """Two levels, attention in one, float32, random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "attention_head_dim": 4, "cross_attention_dim": 12, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**{**config, **changes}).eval()


def small_networks(*, rank=4, alpha=4.0, random=True, dtype=torch.float32, **changes):
    """Networks on `small_unet`; with `random`, three different adapters whose up weights are not zero."""
    alphas = torch.tensor(NoiseSchedule().alphas_cumprod())
    networks = Networks.build(
        small_unet(**changes).to(dtype), LoraConfig(rank=rank, alpha=alpha), alphas_cumprod=alphas,
        prediction_type=PredictionType.EPSILON,
    )  # fmt: skip
    if random:
        generator = torch.Generator().manual_seed(3)
        state = networks.state()
        networks.load_state({k: torch.randn(v.shape, generator=generator).to(v) * 0.2 for k, v in state.items()})
    return networks


def conditioning(count, seed=1, dtype=torch.float32):
    """Random text states of five tokens."""
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(states=torch.randn(count, 5, 12, generator=generator).to(dtype))


def batch(count, seed=2, dtype=torch.float32):
    """Random latents with captions."""
    generator = torch.Generator().manual_seed(seed)
    names = tuple(f"sample {i}" for i in range(count))
    latents = torch.randn(count, *SHAPE, generator=generator).to(dtype)
    return Batch(latents=latents, conditioning=conditioning(count, dtype=dtype), captions=names, names=names)

"""Pipelines with random weights: `python -m benchmarks.random_pipeline sd15|sd21|sdxl|lcm OUT [--tiny] [--lora FILE]`

In diffusers' format, without a network, to try and measure an export where no weights can be had. Sizes are those of
the published config.json files, weights are fp16 and normal with a deviation of 0.02 (biases too), so that pictures are
noise. SD 2.x is the 768-v one; lcm is SD 1.5 whose UNet embeds its guidance. `--tiny`: the same families at 32 px, in
float32 as torch initialises them, with CLIP's whole vocabulary (SD 2.x: 200 MB of it, as its states stay 1,024 wide).
`--lora`: a LoRA for its UNet beside it, with the rank and the modules of the recipe, in fp16.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.full_size import SD_VAE, random_weights
from benchmarks.results import one_line_error
from hypersd_export.model.tokenizer import clip_tokenizer, write_tokenizer

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "hidden_act": "quick_gelu", "projection_dim": 768}  # fmt: skip
OPEN_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
          "hidden_act": "gelu", "projection_dim": 512}  # fmt: skip
OPEN_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
              "hidden_act": "gelu", "projection_dim": 1280}  # fmt: skip
SCHEDULE = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}  # fmt: skip
FAMILIES = ("sd15", "sd21", "sdxl", "lcm")
TINY_WIDTH = {"sd15": 32, "lcm": 32, "sd21": 1024, "sdxl": 48}
"""Of the text states; a width of 1024 is what tells SD 2.x from 1.x."""
TINY_POOLED = 24


def unet_config(family: str) -> dict[str, Any]:
    """The UNet's published config."""
    from trainer.distill.config import recipe
    from trainer.distill.memory import unet_of

    config = dict(unet_of(recipe("sdxl" if family == "sdxl" else "sd15"))[0])
    if family == "lcm":
        config["time_cond_proj_dim"] = 256
    if family == "sd21":
        heads = [5, 10, 20, 20]
        config |= {"cross_attention_dim": 1024, "attention_head_dim": heads, "use_linear_projection": True}
        config["sample_size"] = 96
    return config


def parts_of(family: str) -> Mapping[str, Callable[[], Any]]:
    """The components with weights by name, each made when it is asked for."""
    vae = {**SD_VAE, **({"scaling_factor": 0.13025, "force_upcast": True} if family == "sdxl" else {})}
    first = OPEN_H if family == "sd21" else CLIP_L
    parts: dict[str, Callable[[], Any]] = {
        "unet": lambda: random_weights("UNet2DConditionModel", unet_config(family)),
        "vae": lambda: random_weights("AutoencoderKL", vae),
        "text_encoder": lambda: text_encoder("CLIPTextModel", first),
    }
    if family == "sdxl":
        parts["text_encoder_2"] = lambda: text_encoder("CLIPTextModelWithProjection", OPEN_BIG_G)
    return parts


def tiny_parts_of(family: str) -> Mapping[str, Callable[[], Any]]:
    """The same components at a size for tests."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    xl = family == "sdxl"
    widths = [20, 28] if xl else [TINY_WIDTH[family]]
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "vocab_size": 49408, "max_position_embeddings": 77}

    def text(width: int, **more: Any) -> Any:
        heads = 16 if width == TINY_WIDTH["sd21"] else 2
        return CLIPTextConfig(
            hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=heads, **ends, **more
        )

    added = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2),
        "projection_class_embeddings_input_dim": 6 * 8 + TINY_POOLED,
    }  # fmt: skip
    kinds = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    crossed = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    down, up = crossed if xl else kinds

    def seeded(make: Callable[[], Any]) -> Callable[[], Any]:
        def made() -> Any:
            torch.manual_seed(0)
            return make()

        return made

    parts: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
            cross_attention_dim=sum(widths), down_block_types=down, up_block_types=up,
            use_linear_projection=family in ("sd21", "sdxl"),
            time_cond_proj_dim=32 if family == "lcm" else None, **(added if xl else {}),
        ),
        "vae": lambda: AutoencoderKL(
            block_out_channels=(16, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            scaling_factor=0.13025 if xl else 0.18215, force_upcast=xl,
        ),
        "text_encoder": lambda: CLIPTextModel(text(widths[0])),
    }  # fmt: skip
    if xl:
        parts["text_encoder_2"] = lambda: CLIPTextModelWithProjection(
            text(widths[1], projection_dim=TINY_POOLED, hidden_act="gelu")
        )
    return {name: seeded(make) for name, make in parts.items()}


def text_encoder(kind: str, config: Mapping[str, Any]) -> Any:
    """A text encoder of transformers' class `kind` with random weights in half."""
    import torch
    import transformers
    from accelerate import init_empty_weights

    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1, "vocab_size": 49408}
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, kind)(transformers.CLIPTextConfig(**config, **ends, max_position_embeddings=77))
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            generator = torch.Generator().manual_seed(weight.numel())
            drawn = torch.empty(weight.shape, dtype=torch.float16).normal_(0.0, 0.02, generator=generator)
            setattr(module, name, torch.nn.Parameter(drawn, requires_grad=False))
    return model


def write_lora(folder: Path, path: Path) -> Path:
    """A random LoRA for the UNet of a pipeline folder, a twentieth of its weights or so; returns its path."""
    import torch

    from hypersd_export.model.base import open_base
    from hypersd_export.model.lora import Delta, save_kohya
    from trainer.distill.config import LoraConfig

    config, generator = LoraConfig(), torch.Generator().manual_seed(0)
    deltas = {}
    for name, module in open_base(folder).skeleton("unet").named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name.endswith(config.modules):
            out, *rest = module.weight.shape
            down = torch.randn(config.rank, *rest, generator=generator)
            up = torch.randn(out, config.rank, *(1 for _ in rest[1:]), generator=generator) * 1e-4
            deltas[name] = Delta(down=down, up=up, alpha=config.alpha)
    save_kohya(path, {"unet": deltas}, {}, dtype=torch.float16)
    return path


def write(family: str, folder: Path, *, tiny: bool = False, say: Callable[[str], object] = lambda _: None) -> Path:
    """The pipeline folder, one component in memory at a time; returns it."""
    clip = ["transformers", "CLIPTokenizer"]
    index: dict[str, Any] = {"scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": clip}
    for name, make in (tiny_parts_of if tiny else parts_of)(family).items():
        module = make()
        library = type(module).__module__.partition(".")[0]
        index[name] = [library, type(module).__name__]
        module.save_pretrained(folder / name, safe_serialization=True)
        del module
        say(name)
    write_tokenizer(clip_tokenizer(pad="!") if family == "sd21" else clip_tokenizer(), folder / "tokenizer")
    if family == "sdxl":
        write_tokenizer(clip_tokenizer(pad="!"), folder / "tokenizer_2")
        index |= {"tokenizer_2": clip, "force_zeros_for_empty_prompt": True}
    schedule = {**SCHEDULE, "prediction_type": "v_prediction" if family == "sd21" else "epsilon"}
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=1) + "\n")
    classes = {"sdxl": "StableDiffusionXLPipeline", "lcm": "LatentConsistencyModelPipeline"}
    index["_class_name"] = classes.get(family, "StableDiffusionPipeline")
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, write: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path, help="the pipeline's folder, made if missing")
    parser.add_argument("--tiny", action="store_true", help="a size for tests")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="a random LoRA for its UNet, of the recipe's size")
    options = parser.parse_args(arguments)
    with one_line_error() as ended:
        options.out.mkdir(parents=True, exist_ok=True)
        write(options.family, options.out, tiny=options.tiny, say=print)
        if options.lora is not None:
            print(write_lora(options.out, options.lora))
    return ended.code


if __name__ == "__main__":
    sys.exit(main())

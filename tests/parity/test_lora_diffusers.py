"""Fused weights against diffusers' own `load_lora_weights` + `fuse_lora`, for each key format (1e-6)."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hypersd_export.model.base import BaseModel, open_base
from hypersd_export.model.fuse import fuse
from hypersd_export.model.ldm_names import unet_ldm_names
from hypersd_export.model.lora import read_lora
from hypersd_export.model.lora_keys import LoraFormat
from tests import lora_files as files
from tests.lora_files import one_thread  # noqa: F401 - a fixture for the whole module

Weights = dict[str, dict[str, torch.Tensor]]
TOLERANCE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseModel:
    return open_base(tiny_base)


@pytest.fixture(scope="module")
def pairs(base: BaseModel) -> dict[str, files.Pairs]:
    unet, text = base.load_unet(torch.float32), base.load_text_encoder(torch.float32)
    return {
        "unet": files.random_pairs(unet, files.LCM_TARGETS, seed=1),
        "unet attention": files.random_pairs(unet, files.ATTENTION, seed=2),
        "text": files.random_pairs(text, files.TEXT_TARGETS, seed=3),
        "text attention": files.random_pairs(text, files.TEXT_ATTENTION, seed=4),
        "unet again": files.random_pairs(unet, files.LCM_TARGETS, seed=5, rank=2),
    }


@pytest.fixture(scope="module")
def sgm_names(base: BaseModel) -> dict[str, str]:
    unet = base.skeleton("unet")
    return unet_ldm_names([name for name, _ in unet.named_modules()], unet.config.layers_per_block)


def ours(base: BaseModel, loras: list[tuple[Path, float]]) -> Weights:
    """The weights of UNet and text encoder with the LoRAs fused by us."""
    modules = {"unet": base.load_unet(torch.float32), "text_encoder": base.load_text_encoder(torch.float32)}
    for path, scale in loras:
        lora = read_lora(path)
        for component, deltas in lora.components.items():
            report = fuse(modules[component], deltas, scale=scale, component=component)
            assert report.relative > 0.01
    return {name: module.state_dict() for name, module in modules.items()}


def theirs(folder: Path, loras: list[tuple[Path, float]], **kwargs: Any) -> Weights:
    """The same by diffusers."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (path, _) in enumerate(loras):
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"l{number}", **kwargs)
        names = [f"l{number}" for number in range(len(loras))]
        pipeline.set_adapters(names, [scale for _, scale in loras])
        pipeline.fuse_lora(adapter_names=names)
        pipeline.unload_lora_weights()
    return {"unet": pipeline.unet.state_dict(), "text_encoder": pipeline.text_encoder.state_dict()}


def worst_difference(left: Weights, right: Weights) -> float:
    worst = 0.0
    for component, weights in right.items():
        assert weights.keys() == left[component].keys()
        for name, weight in weights.items():
            torch.testing.assert_close(left[component][name], weight, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
            worst = max(worst, float((left[component][name] - weight).abs().max()))
    return worst


def reference(base: BaseModel, changes: dict[str, dict[str, torch.Tensor]]) -> Weights:
    """The base's weights plus known changes, for what diffusers cannot load."""
    weights = {"unet": base.load_unet(torch.float32), "text_encoder": base.load_text_encoder(torch.float32)}
    result = {name: dict(module.state_dict()) for name, module in weights.items()}
    for component, modules in changes.items():
        for name, change in modules.items():
            result[component][f"{name}.weight"] = result[component][f"{name}.weight"] + change
    return result


def with_metadata(alpha: dict[str, float]) -> dict[str, str]:
    """What diffusers' save_lora_weights writes: the peft config of each component, flat."""
    stated: dict[str, Any] = {}
    for component, value in alpha.items():
        stated |= {f"{component}.r": 4, f"{component}.lora_alpha": value}
        ends = files.TEXT_TARGETS if component == "text_encoder" else files.LCM_TARGETS
        stated[f"{component}.target_modules"] = list(ends)
    return {"format": "pt", "lora_adapter_metadata": json.dumps(stated)}


Maker = Callable[[dict[str, files.Pairs], dict[str, str]], dict[str, torch.Tensor]]
CASES: dict[str, tuple[LoraFormat, Maker, dict[str, str] | None]] = {
    "peft": (
        LoraFormat.peft,
        lambda p, _: files.peft(p["unet"], "unet") | files.peft(p["text"], "text_encoder"),
        None,
    ),
    "peft with alpha in the metadata": (
        LoraFormat.peft,
        lambda p, _: files.peft(p["unet"], "unet") | files.peft(p["text"], "text_encoder"),
        with_metadata({"unet": 2.0, "text_encoder": 12.0}),
    ),
    "diffusers": (
        LoraFormat.diffusers,
        lambda p, _: files.diffusers(p["unet"], "unet") | files.diffusers(p["text"], "text_encoder"),
        None,
    ),
    "old diffusers": (
        LoraFormat.diffusers_old,
        lambda p, _: files.diffusers_old(p["unet attention"], "unet")
        | files.diffusers_old(p["text attention"], "text_encoder"),
        None,
    ),
    "kohya with alpha": (
        LoraFormat.kohya,
        lambda p, _: files.kohya(p["unet"], "unet", 1.5) | files.kohya(p["text"], "text_encoder", 3.0),
        None,
    ),
    "kohya without alpha": (
        LoraFormat.kohya,
        lambda p, _: files.kohya(p["unet"], "unet") | files.kohya(p["text"], "text_encoder"),
        None,
    ),
    "kohya with te1": (
        LoraFormat.kohya,
        lambda p, _: files.kohya(p["unet attention"], "unet", 4.0)
        | files.kohya(p["text"], "text_encoder", 8.0, te="lora_te1"),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_format_is_fused_as_diffusers_does(
    case: str,
    tiny_base: Path,
    base: BaseModel,
    pairs: dict[str, files.Pairs],
    sgm_names: dict[str, str],
    tmp_path: Path,
) -> None:
    expected, make, metadata = CASES[case]
    path = files.write(tmp_path / "lora.safetensors", make(pairs, sgm_names), metadata)
    assert read_lora(path).format is expected
    worst = worst_difference(ours(base, [(path, 0.7)]), theirs(tiny_base, [(path, 0.7)]))
    print(f"{case}: {worst:.2e}")


def test_sgm_block_names_are_fused_as_diffusers_does(
    tiny_base: Path, base: BaseModel, pairs: dict[str, files.Pairs], sgm_names: dict[str, str], tmp_path: Path
) -> None:
    # diffusers takes every output_blocks.i.1 for an attention, so it loses the upsampler of a block without attention
    # (here output_blocks.1.1.conv, in SD1.5 output_blocks.2.1.conv): that one is compared in the next test.
    lost = "up_blocks.0.upsamplers.0.conv"
    unet = {name: pair for name, pair in pairs["unet"].items() if name != lost}
    tensors = files.kohya(unet, "unet", 6.0, rename=sgm_names) | files.kohya(pairs["text"], "text_encoder", 6.0)
    assert not [key for key in tensors if "down_blocks" in key]
    path = files.write(tmp_path / "sgm.safetensors", tensors)
    assert read_lora(path).format is LoraFormat.sgm
    config = base.skeleton("unet").config
    worst_difference(ours(base, [(path, 1.0)]), theirs(tiny_base, [(path, 1.0)], unet_config=config))


def test_sgm_block_names_equal_kohya_s_own(
    base: BaseModel, pairs: dict[str, files.Pairs], sgm_names: dict[str, str], tmp_path: Path
) -> None:
    sgm = files.write(tmp_path / "a.safetensors", files.kohya(pairs["unet"], "unet", 6.0, rename=sgm_names))
    plain = files.write(tmp_path / "b.safetensors", files.kohya(pairs["unet"], "unet", 6.0))
    assert worst_difference(ours(base, [(sgm, 1.0)]), ours(base, [(plain, 1.0)])) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda p: files.peft(p["unet"], "unet", prefix="base_model.model."),
        lambda p: files.peft(p["unet"], "unet", adapter="default"),
        lambda p: {k.removeprefix("unet."): v for k, v in files.peft(p["unet"], "unet", prefix="").items()},
        lambda p: {f"base_model.model.{k.removeprefix('unet.')}": v for k, v in files.peft(p["unet"], "unet").items()},
    ],
    ids=["base_model.model.unet", "adapter name", "no prefix", "base_model.model"],
)
def test_peft_spellings_that_diffusers_does_not_load_equal_the_one_it_does(
    make: Callable[[dict[str, files.Pairs]], dict[str, torch.Tensor]],
    base: BaseModel, pairs: dict[str, files.Pairs], tmp_path: Path,
) -> None:  # fmt: skip
    other = files.write(tmp_path / "a.safetensors", make(pairs))
    plain = files.write(tmp_path / "b.safetensors", files.peft(pairs["unet"], "unet"))
    assert read_lora(other).format is LoraFormat.peft
    assert worst_difference(ours(base, [(other, 1.0)]), ours(base, [(plain, 1.0)])) == 0


def test_attention_processors_without_a_prefix(base: BaseModel, pairs: dict[str, files.Pairs], tmp_path: Path) -> None:
    # diffusers' save_attn_procs files: its load_lora_weights no longer takes them, so they equal the prefixed ones
    bare = files.write(tmp_path / "a.safetensors", files.diffusers_old(pairs["unet attention"], "unet", bare=True))
    full = files.write(tmp_path / "b.safetensors", files.diffusers_old(pairs["unet attention"], "unet"))
    assert worst_difference(ours(base, [(bare, 1.0)]), ours(base, [(full, 1.0)])) == 0


def test_several_loras_with_scales(
    tiny_base: Path, base: BaseModel, pairs: dict[str, files.Pairs], tmp_path: Path
) -> None:
    first = files.kohya(pairs["unet"], "unet", 2.0) | files.kohya(pairs["text"], "text_encoder", 2.0)
    loras = [
        (files.write(tmp_path / "one.safetensors", first), 0.5),
        (files.write(tmp_path / "two.safetensors", files.peft(pairs["unet again"], "unet")), -0.25),
        (files.write(tmp_path / "three.safetensors", files.diffusers_old(pairs["unet attention"], "unet")), 1.3),
    ]
    ours_, theirs_ = ours(base, loras), theirs(tiny_base, loras[:1] + loras[1:])
    worst_difference(ours_, theirs_)


def test_alphas_that_differ_between_modules(base: BaseModel, pairs: dict[str, files.Pairs], tmp_path: Path) -> None:
    # diffusers gives the attention modules the most frequent alpha here (its alpha_pattern keeps the old processor
    # names, which match nothing), so this is compared with the definition, alpha / rank * up @ down.
    tensors, changes = {}, {}
    for number, (name, pair) in enumerate(pairs["unet"].items()):
        alpha = 1.0 + number % 5
        tensors |= files.kohya({name: pair}, "unet", alpha)
        changes[name] = files.change_of(pair, 0.9 * alpha / 4)
    path = files.write(tmp_path / "a.safetensors", tensors)
    worst_difference(ours(base, [(path, 0.9)]), reference(base, {"unet": changes}))


def test_half_precision_loras_and_other_ranks(
    tiny_base: Path, base: BaseModel, pairs: dict[str, files.Pairs], tmp_path: Path
) -> None:
    mixed = {name: pair for name, pair in pairs["unet"].items() if "attn1" not in name}
    mixed |= {name: pair for name, pair in pairs["unet again"].items() if "attn1" in name}
    tensors = {key: value.half() for key, value in files.peft(mixed, "unet").items()}
    path = files.write(tmp_path / "a.safetensors", tensors)
    assert read_lora(path).ranks == (2, 4)
    worst_difference(ours(base, [(path, 1.0)]), theirs(tiny_base, [(path, 1.0)]))


def test_what_diffusers_saves_itself(tiny_base: Path, base: BaseModel, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "conv1", "proj_in"], init_lora_weights=False,
        alpha_pattern={"attn2.to_q": 16, "^mid_block.resnets.0.conv1": 8},
    )  # fmt: skip
    torch.manual_seed(0)
    pipeline.unet.add_adapter(config)
    pipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet), unet_lora_adapter_metadata=config.to_dict()
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    lora = read_lora(tmp_path)
    assert lora.path == path
    assert {delta.alpha for delta in lora.components["unet"].values()} == {2.0, 16.0, 8.0}
    worst_difference(ours(base, [(path, 1.0)]), theirs(tiny_base, [(path, 1.0)]))


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_itself(rslora: bool, base: BaseModel, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=rslora, target_modules=["to_q", "conv2", "ff.net.2"], init_lora_weights=False,
        alpha_pattern={"attn2.to_q": 16},
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(base.load_unet(torch.float32), config)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    path = tmp_path / "adapter_model.safetensors"
    left = ours(base, [(path, 1.0)])
    worst_difference({"unet": left["unet"]}, {"unet": merged.state_dict()})

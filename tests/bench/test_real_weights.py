"""The official weights' command on stand-ins of the exact file layout; nothing of the hub is asked."""

import json
import struct
from math import prod

import pytest

from benchmarks import real_weights
from benchmarks.bench.scorers import parse
from hypersd_export.errors import OptionError
from trainer.distill.config import LoraConfig, recipe
from trainer.distill.measure import empty_model
from trainer.distill.memory import unet_of

RANK, BYTES = 64, 269_127_064
"""Of Hyper-SD15-1step-lora.safetensors, as it lies on the hub."""


def stand_in(path):
    """The released file's header; its weights are a hole in the file, which reads as zeros."""
    unet = empty_model("UNet2DConditionModel", unet_of(recipe("sd15"))[0])
    header, end = {}, 0
    places = {name.replace(".", "_"): module for name, module in unet.named_modules()
              if name.endswith(LoraConfig().modules)}  # fmt: skip
    for name, module in sorted(places.items()):  # as safetensors writes them
        out, into, *kernel = module.weight.shape
        up = [out, RANK, *[1] * len(kernel)]
        for part, shape in {"alpha": [], "lora_down.weight": [RANK, into, *kernel], "lora_up.weight": up}.items():
            key, size = f"lora_unet_{name}.{part}", 4 * prod(shape)
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.fixture
def place(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\na red house\na tree\n")
    return tmp_path


def run(place, capsys, *more):
    arguments = ["--prompts", str(place / "prompts.txt"), "--loras", str(place), "--out", str(place / "out"), *more]
    code = real_weights.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_dry_run_finds_all_of_the_released_lora_in_the_published_unet(place, capsys):
    file = stand_in(place / "Hyper-SD15-1step-lora.safetensors")
    assert file.stat().st_size == BYTES
    code, out, err = run(place, capsys, "--steps", "1", "--form", "onnx-fp16", "--form", "tensorrt", "--dry-run")
    assert code == 0, err
    said = json.loads(out)
    (lora,) = said["loras"]
    assert (lora["modules"], lora["ranks"], lora["format"], lora["components"]) == (278, [64], "kohya", ["unet"])
    assert lora["bytes"] == BYTES
    assert (lora["plan"]["solver"], lora["plan"]["num_steps"]) == ("tcd", 1)
    assert list(said["bundles"]) == ["onnx-fp16-1", "tensorrt-1"]
    assert said["bundles"]["onnx-fp16-1"]["base"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert said["prompts"] == 3
    assert said["paper"]["Hyper-SD15, 1 step"]["clip_score"] == 30.87
    assert not (place / "out").exists()


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_the_loras_are_those_that_were_released_without_guidance(model):
    loras = real_weights.official(model, [1, 2, 4, 8])
    names = [f"Hyper-{model.upper()}-{n}step{'s' * (n > 1)}-lora.safetensors" for n in (1, 2, 4, 8)]
    assert [lora.name for lora in loras] == names
    assert [lora.steps for lora in loras] == [1, 2, 4, 8]


def test_what_is_not_there_is_one_line(place, capsys):
    code, _, err = run(place, capsys, "--steps", "4", "--dry-run")
    assert code == 1
    assert err.startswith(f"error: --loras {place}: has no Hyper-SD15-4steps-lora.safetensors; leave")
    code, _, err = run(place, capsys, "--steps", "3", "--dry-run")
    assert (code, err) == (1, "error: --steps 3: sd15 has LoRAs for 1, 2, 4, 8\n")


def test_the_page_has_ours_and_the_papers():
    figure = {"value": 30.5, "low": 30.0, "high": 31.0}
    report = {
        "prompts": {"count": 5000}, "eye": {"name": "vit-b-32"},
        "candidates": [
            {"name": "onnx-fp32-1", "status": "measured", "figures": {"clip_score": figure}},
            {"name": "tensorrt-1", "status": "not run", "why": "no GPU"},
        ],
    }  # fmt: skip
    text = real_weights.page("sd15", report)
    assert "5,000 prompts; vit-b-32 looks." in text
    assert "| onnx-fp32-1 | 30.500 [30.000, 31.000] |  |  |  |" in text
    assert "| tensorrt-1 | not run: no GPU | | | |" in text
    assert "| Hyper-SD15, 1 step | 30.87 | 5.79 | 0.29 | 0.215 |" in text


def test_a_pickle_is_read_where_it_is_allowed_in_words():
    config = parse("image_reward=ImageReward.pt,bert,pickle")
    assert (config.model, config.tokenizer, config.allow_pickle) == ("ImageReward.pt", "bert", True)
    assert not parse("image_reward=ImageReward.pt,bert").allow_pickle
    with pytest.raises(OptionError, match=r"--reward hps=a,b,c: write KIND=MODEL,TOKENIZER, and ,pickle"):
        parse("hps=a,b,c")

"""verify/source.py: LoRAs are added as to the whole network in float32, rounded once, at a lower peak."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypersd_export.model.base import open_base
from hypersd_export.model.fuse import fuse
from hypersd_export.verify.source import Source, SourceRequest, open_source
from tests.lora_files import (
    ATTENTION,
    kohya,
    one_thread,  # noqa: F401 - a fixture for the whole module
    random_pairs,
    write,
)
from tests.unit.test_pages import mappings


@pytest.fixture(params=[torch.float32, torch.float16])
def source(request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path) -> Source:
    """A base whose UNet's file is in this dtype, with two LoRAs for it that share modules."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.to(request.param) for name, tensor in load_file(file).items()}, file)
    unet = open_base(base).load_unet(torch.float32)
    loras = []
    for seed, ends in enumerate((ATTENTION, ("to_q", "conv1"))):
        pairs = random_pairs(unet, ends, seed=seed)
        loras.append((str(write(tmp_path / f"{seed}.safetensors", kohya(pairs, "unet"))), 0.5 + seed))
    return open_source(SourceRequest(base=str(base), loras=tuple(loras)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loras_are_added_in_float32_and_rounded_once(source: Source, dtype: torch.dtype) -> None:
    expected = source.base.load_unet(torch.float32)
    for lora, scale in source.loras:
        fuse(expected, lora.components["unet"], scale=scale, component="unet")
    module, reports = source.load("unet", dtype)
    assert [(report["file"], report["scale"]) for report in reports] == [("0.safetensors", 0.5), ("1.safetensors", 1.5)]
    assert all(report["lost_to_rounding"] < 1e-5 for report in reports)
    found = module.state_dict()
    for name, tensor in expected.state_dict().items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name
    plain, none = replace(source, loras=()).load("unet", dtype)
    assert none == []
    assert any(not torch.equal(tensor, found[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_is_never_written_to(source: Source) -> None:
    module, _ = source.load("unet", torch.float16)
    held = mappings(source.base.parts["unet"].files[0])
    half = next(iter(load_file(source.base.parts["unet"].files[0]).values())).dtype == torch.float16
    assert bool(held) == half  # weights that no LoRA changes are still the file's
    assert all(anonymous == 0 for _, anonymous in held)
    assert not any(parameter.requires_grad for parameter in module.parameters())

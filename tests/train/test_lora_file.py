"""The files that a stage leaves: read back by diffusers, by hypersd-export and by the trainer, to the same network."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hypersd_export.diffusion import FewStepPlan, Solver
from hypersd_export.errors import LoraError
from hypersd_export.model.fuse import fuse
from hypersd_export.model.lora import read_lora
from tests.train.small_unet import SHAPE, conditioning, small_networks, small_unet
from trainer.distill.config import LoraConfig
from trainer.distill.lora_file import Origin, load_student, save_student

X = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
T = torch.tensor([999, 249])
LORA = LoraConfig(rank=4, alpha=2.0)
PLAN = FewStepPlan(solver=Solver.DDIM, num_steps=4)
ORIGIN = Origin(plans=[PLAN], base_name="tiny", base_digest="ab" * 32, steps=1500, recipe={"method": "tscd"})


@pytest.fixture(scope="module")
def networks():
    return small_networks(rank=4, alpha=2.0)


@pytest.fixture(scope="module")
def path(networks, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "stage2-k4-lora.safetensors"
    save_student(path, networks, LORA, ORIGIN, dtype=torch.float32)
    return path


@torch.no_grad()
def expected(networks):
    return networks.student(X, T, conditioning(2))


@torch.no_grad()
def forward(unet):
    unet = unet.to(memory_format=torch.channels_last)
    return unet(X.contiguous(memory_format=torch.channels_last), T, conditioning(2).states, return_dict=False)[0]


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_diffusers_loads_both_forms_to_the_same_network(networks, path, form):
    from diffusers import StableDiffusionPipeline

    file = path if form == "kohya" else path.parent / "diffusers" / path.name
    unet = small_unet()
    state, alphas, *rest = StableDiffusionPipeline.lora_state_dict(
        str(file), unet_config=unet.config, return_lora_metadata=True
    )
    metadata = rest[0] if rest else None
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    torch.testing.assert_close(forward(unet), expected(networks), rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_the_exporter_fuses_both_forms_to_the_same_network(networks, path, form):
    lora, unet = read_lora(path if form == "kohya" else path.parent / "diffusers" / path.name), small_unet()
    fuse(unet, lora.components["unet"], scale=1.0, component="unet")
    torch.testing.assert_close(forward(unet), expected(networks), rtol=0, atol=2e-5)
    assert lora.base_digest == ORIGIN.base_digest
    assert FewStepPlan.from_json(lora.plan_json) == PLAN


def test_metadata_says_base_plan_recipe_and_steps(path):
    for file in (path, path.parent / "diffusers" / path.name):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert (metadata["hypersd.base_name"], metadata["hypersd.steps"]) == ("tiny", "1500")
        assert json.loads(metadata["hypersd.recipe"]) == {"method": "tscd"}


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_student_goes_on_from_either_form_whatever_its_own_alpha(networks, path, form):
    other = small_networks(rank=4, alpha=4.0)
    load_student(path if form == "kohya" else path.parent / "diffusers" / path.name, other)
    torch.testing.assert_close(expected(other), expected(networks), rtol=0, atol=2e-5)


def test_what_does_not_fit_is_refused(path):
    with pytest.raises(LoraError, match=r"lora\.rank"):
        load_student(path, small_networks(rank=2))
    with pytest.raises(LoraError, match="does not fit"):
        load_student(path, small_networks(rank=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                          up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")))  # fmt: skip


def test_half_files_hold_float16_and_an_overflow_is_refused(networks, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_student(file, networks, LORA, ORIGIN)
    kinds = {k.rsplit(".", 1)[1]: v.dtype for k, v in load_file(file).items()}
    assert kinds == {"weight": torch.float16, "alpha": torch.float32}
    broken = small_networks(rank=4)
    state = broken.state()
    broken.load_state({k: v * 1e8 for k, v in state.items()})
    with pytest.raises(LoraError, match="nothing is written"):
        save_student(tmp_path / "no.safetensors", broken, LORA, ORIGIN)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("no")] == []

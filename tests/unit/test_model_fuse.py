"""Fusing: the proof for every module, and everything that does not land."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hypersd_export.errors import LoraError
from hypersd_export.model import fuse as fuse_module
from hypersd_export.model.base import open_base
from hypersd_export.model.fuse import Fusion, fuse, fuse_all, match, module_names
from hypersd_export.model.lora import Delta, read_lora, save_kohya
from tests.lora_files import (
    LCM_TARGETS,
    TEXT_TARGETS,
    change_of,
    one_line,
    one_thread,  # noqa: F401 - a fixture for the whole module
    peft,
    random_pairs,
    write,
)


def deltas_of(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], alpha: float | None = None) -> dict[str, Delta]:
    return {
        name: Delta(down=down, up=up, alpha=alpha, keys=(f"unet.{name}.key",)) for name, (down, up) in pairs.items()
    }


@pytest.fixture
def unet(tiny_base: Path) -> Any:
    return open_base(tiny_base).load_unet(torch.float32)


def refused(module: Any, deltas: dict[str, Delta], said: str, *, component: str = "unet", scale: float = 1.0) -> str:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(LoraError, match=said) as caught:
        fuse(module, deltas, scale=scale, component=component, source="my.safetensors")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    message = one_line(caught.value)
    assert "my.safetensors" in message
    return message


@pytest.mark.parametrize("chunk", [1 << 22, 100])
def test_each_module_gains_exactly_its_delta(unet: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_module, "CHUNK", chunk)
    pairs = random_pairs(unet, LCM_TARGETS, seed=7)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    report = fuse(unet, deltas_of(pairs, 2.0), scale=0.8, component="unet")
    for name, tensor in unet.state_dict().items():
        module = name.removesuffix(".weight")
        change = change_of(pairs[module], 0.8 * 2 / 4) if module in pairs else torch.zeros_like(tensor)
        torch.testing.assert_close(tensor - before[name], change, rtol=0, atol=1e-6)
        if module in pairs:
            proof = report.modules[module]
            expected = float(change.norm() / before[name].norm())
            assert proof.relative == pytest.approx(expected, rel=1e-4)
            assert (proof.rank, proof.alpha) == (4, 2.0)
            assert proof.error < 1e-6
    assert report.modules.keys() == pairs.keys()
    assert (report.zero, report.warnings) == (0, ())
    assert report.lost < 1e-6
    assert report.error == max(proof.error for proof in report.modules.values())


def test_report_for_the_manifest(unet: Any) -> None:
    pairs = random_pairs(unet, ("to_q",))
    content = fuse(unet, deltas_of(pairs), scale=0.5, component="unet").to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert (content["component"], content["scale"], content["modules"], content["ranks"]) == (
        "unet",
        0.5,
        len(pairs),
        [4],
    )
    assert content["relative_norms"].keys() == pairs.keys()
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    change = {"conv_in": Delta(down=torch.ones(1, 4, 3, 3), up=torch.ones(16, 1, 1, 1))}
    content = fuse(unet, change, scale=1.0, component="unet").to_json()
    assert content["relative_norms"] == {"conv_in": None}
    json.dumps(content, allow_nan=False)


def test_linear_and_pointwise_convolution_take_each_other_s_shapes(unet: Any) -> None:
    name = "mid_block.attentions.0.proj_in"
    torch.manual_seed(0)
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    weight = unet.get_submodule(name).weight
    before = weight.clone()
    fuse(unet, {name: Delta(down=down, up=up)}, scale=1.0, component="unet")
    torch.testing.assert_close(weight - before, (up @ down)[:, :, None, None], rtol=0, atol=1e-5)
    linear = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before = unet.get_submodule(linear).weight.clone()
    fuse(unet, {linear: Delta(down=down[:, :, None, None], up=up[:, :, None, None])}, scale=1.0, component="unet")
    torch.testing.assert_close(unet.get_submodule(linear).weight - before, up @ down, rtol=0, atol=1e-5)


def test_modules_of_zero_are_counted_and_a_lora_of_zeros_is_refused(unet: Any) -> None:
    pairs = random_pairs(unet, ("to_q", "to_k"))
    name = next(iter(pairs))
    some = pairs | {name: (pairs[name][0], torch.zeros_like(pairs[name][1]))}
    report = fuse(unet, deltas_of(some), scale=1.0, component="unet")
    assert report.zero == 1
    assert report.to_json()["zero_modules"] == 1
    zeros = {n: (down, torch.zeros_like(up)) for n, (down, up) in pairs.items()}
    refused(unet, deltas_of(zeros), f"its unet part is zero in all {len(pairs)} modules")


def test_scales(unet: Any) -> None:
    deltas = deltas_of(random_pairs(unet, ("to_q",)))
    assert "--lora none" in refused(unet, deltas, "scale 0 leaves the model as it is", scale=0.0)
    refused(unet, deltas, "is not finite", scale=float("nan"))
    refused(unet, {}, "no keys for the unet")


def test_keys_without_a_module_name_the_first_few(unet: Any) -> None:
    deltas = deltas_of(random_pairs(unet, ("to_q",)))
    pair = (torch.ones(1, 4), torch.ones(4, 1))
    deltas |= deltas_of({f"down_blocks.7.attentions.{n}.proj_in": pair for n in range(5)})
    message = refused(unet, deltas, "5 of .* modules are not in this unet")
    assert "unet.down_blocks.7.attentions.0.proj_in.key, " in message
    assert "…" in message
    refused(unet, {"conv_norm_out": Delta(down=pair[0], up=pair[1])}, "not in this unet")


def test_shapes_that_do_not_fit(unet: Any) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    conv = "mid_block.resnets.0.conv1"
    cases = {
        "gives .40, 32. where the weight is .32, 32.": (name, torch.ones(2, 32), torch.ones(40, 2)),
        "differ in rank": (name, torch.ones(2, 32), torch.ones(32, 3)),
        "are no low-rank pair": (name, torch.ones(2), torch.ones(32, 2)),
        "gives .32, 32, 1, 1. where": (conv, torch.ones(2, 32, 1, 1), torch.ones(32, 2, 1, 1)),
        r"up \[32, 2, 3, 3\] are no": (conv, torch.ones(2, 32, 3, 3), torch.ones(32, 2, 3, 3)),
    }
    for said, (module, down, up) in cases.items():
        message = refused(unet, {module: Delta(down=down, up=up, keys=("the key",))}, said)
        assert "the key" in message
    grouped = torch.nn.Module()
    grouped.add_module("a", torch.nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(LoraError, match="has 2 groups"):
        match(grouped, {"a": Delta(down=torch.ones(1, 2, 3, 3), up=torch.ones(4, 1))}, component="text_encoder")


def test_a_lora_of_another_family_is_called_by_its_name(unet: Any) -> None:
    pairs = {
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (torch.ones(4, 2048), torch.ones(32, 4)),
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k": (torch.ones(4, 2048), torch.ones(32, 4)),
    }
    message = refused(unet, deltas_of(pairs), "it looks like a LoRA for SDXL")
    assert "cross-attention 2048 wide, here 32" in message
    first = dict(list(pairs.items())[:1])
    refused(unet, deltas_of(first), "1 of 1 modules have another shape .* it looks like a LoRA for SDXL")
    odd = {n: (torch.ones(4, 99), up) for n, (_, up) in first.items()}
    refused(unet, deltas_of(odd), "it is for another architecture .cross-attention 99 wide, here 32")
    flux = {
        "double_blocks.0.img_attn.proj": Delta(
            down=torch.ones(1, 4), up=torch.ones(4, 1), keys=("lora_unet_double_blocks_0",)
        )
    }
    refused(unet, flux, "it looks like a LoRA for FLUX")
    # a LoRA of the same width whose keys are simply wrong gets no wrong advice
    assert "looks like" not in refused(
        unet, {"nowhere": Delta(down=torch.ones(1, 4), up=torch.ones(4, 1))}, "are not in"
    )


def test_two_spellings_of_one_module(unet: Any) -> None:
    pair = Delta(down=torch.ones(1, 32), up=torch.ones(32, 1))
    both = {"mid_block.attentions.0.proj_in": pair, "middle_block_1_proj_in": pair}
    refused(unet, both, r"two deltas for unet\.mid_block\.attentions\.0\.proj_in")


def test_names_that_cannot_be_told_apart() -> None:
    module = torch.nn.Module()
    inner = torch.nn.Module()
    inner.add_module("b", torch.nn.Linear(1, 1))
    module.add_module("a", inner)
    module.add_module("a_b", torch.nn.Linear(1, 1))
    with pytest.raises(LoraError, match="cannot be told apart"):
        module_names(module, "text_encoder")


def test_text_encoder_with_and_without_its_upper_level(tiny_base: Path) -> None:
    base = open_base(tiny_base)
    pairs = random_pairs(base.load_text_encoder(torch.float32), TEXT_TARGETS)
    results = []
    for level in ("", "text_model."):
        module = base.load_text_encoder(torch.float32)
        spelled = {f"{level}{name.removeprefix('text_model.')}": pair for name, pair in pairs.items()}
        fuse(module, deltas_of(spelled), scale=1.0, component="text_encoder")
        results.append(module.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name])


def test_a_lora_is_checked_without_loading_the_base(tiny_base: Path) -> None:
    base = open_base(tiny_base)
    skeleton = base.skeleton("unet")
    pairs = random_pairs(base.load_unet(torch.float32), ("to_q", "conv1"))
    assert match(skeleton, deltas_of(pairs), component="unet").keys() == pairs.keys()
    with pytest.raises(LoraError, match="not in this unet"):
        match(skeleton, deltas_of({"x": (torch.ones(1, 1), torch.ones(1, 1))}), component="unet")


def test_half_precision_weights(tiny_base: Path) -> None:
    base = open_base(tiny_base)
    pairs = random_pairs(base.load_unet(torch.float32), LCM_TARGETS, seed=3)
    half = base.load_unet(torch.float16)
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    report = fuse(half, deltas_of(pairs), scale=1.0, component="unet")
    for name, pair in pairs.items():
        exact = before[f"{name}.weight"].float() + change_of(pair, 1.0)
        assert torch.equal(half.state_dict()[f"{name}.weight"], exact.half()) or torch.allclose(
            half.state_dict()[f"{name}.weight"].float(), exact, rtol=1e-3, atol=1e-6
        )
    assert 0 < report.lost < 0.01
    small = {name: (down, up * 1e-4) for name, (down, up) in pairs.items()}
    report = fuse(base.load_unet(torch.bfloat16), deltas_of(small), scale=1.0, component="unet", source="my")
    assert report.lost > 0.1
    assert "lost to rounding in bfloat16" in one_line(report.warnings[0])
    tiny = {name: (down, up * 1e-9) for name, (down, up) in pairs.items() if "norm" not in name}
    bfloat = base.load_unet(torch.bfloat16)
    with torch.no_grad():
        for parameter in bfloat.parameters():
            parameter.fill_(1.0)
    refused(bfloat, deltas_of(tiny), "is rounded away in bfloat16")
    with pytest.raises(LoraError, match=r"overflows float16 .* use float32 \(--precision fp32\)"):
        fuse(base.load_unet(torch.float16), deltas_of(pairs), scale=1e8, component="unet")
    with pytest.raises(LoraError, match="overflows float16"):  # the sum is finite in float32, and not what is kept
        fuse_all(half, [Fusion(deltas=deltas_of(pairs), scale=1e8)], component="unet", dtype=torch.float16)


def test_weights_that_change_under_the_fusion_are_noticed(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(2, 2)
    with pytest.raises(LoraError, match=r"did not land, off by 0\.5"):
        fuse_module._prove(weight - 1, torch.full((2, 2), 0.5), weight, "x")
    deltas, given = deltas_of(random_pairs(unet, ("to_q",))), torch.Tensor.copy_

    def lost(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dtype == torch.float16 else given(tensor, source)

    monkeypatch.setattr(torch.Tensor, "copy_", lost)
    with pytest.raises(LoraError, match=r"did not land|overflows"):  # whatever was in the memory of the new weight
        fuse_all(unet, [Fusion(deltas=deltas, scale=1.0)], component="unet", dtype=torch.float16)


def test_several_in_a_row_add_up(unet: Any) -> None:
    one, two = random_pairs(unet, ("to_q", "conv2"), seed=1), random_pairs(unet, ("to_q", "to_v"), seed=2)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    fuse(unet, deltas_of(one), scale=0.5, component="unet")
    fuse(unet, deltas_of(two), scale=-2.0, component="unet")
    for name, tensor in unet.state_dict().items():
        module = name.removesuffix(".weight")
        expected = before[name].clone()
        for pairs, scale in ((one, 0.5), (two, -2.0)):
            if module in pairs:
                expected += change_of(pairs[module], scale)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16])
def test_one_weight_at_a_time_is_the_same_to_the_bit_as_one_lora_at_a_time(
    tiny_base: Path, dtype: torch.dtype, file_dtype: torch.dtype
) -> None:
    base = open_base(tiny_base)
    expected = base.load_unet(file_dtype).float()
    one, two = random_pairs(expected, ("to_q", "conv2"), seed=1), random_pairs(expected, ("to_v", "to_q"), seed=2)
    fusions = [Fusion(deltas=deltas_of(one), scale=0.5), Fusion(deltas=deltas_of(two, 3.0), scale=-2.0)]
    reports = [fuse(expected, each.deltas, scale=each.scale, component="unet") for each in fusions]
    found = base.load_unet(file_dtype)
    before = {name: (parameter.data, parameter.data.clone()) for name, parameter in found.named_parameters()}
    for mine, theirs in zip(fuse_all(found, fusions, component="unet", dtype=dtype), reports, strict=True):
        assert (mine.modules, mine.error) == (theirs.modules, theirs.error)
        assert (mine.relative, mine.lost) == pytest.approx((theirs.relative, theirs.lost))  # summed in another order
    touched = {f"{name}.weight" for name in (*one, *two)}
    for name, parameter in found.named_parameters():
        old, copy = before[name]
        assert torch.equal(old, copy)  # a mapped file that is written to stays in memory
        assert parameter.dtype == (dtype if name in touched else file_dtype)
        assert (parameter.data_ptr() == old.data_ptr()) == (name not in touched)
        assert torch.equal(parameter.to(dtype), expected.state_dict()[name].to(dtype))


def test_a_lora_that_does_not_fit_stops_all_before_anything_is_changed(unet: Any) -> None:
    good = Fusion(deltas=deltas_of(random_pairs(unet, ("to_q",))), scale=1.0)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    odd = Fusion(deltas=deltas_of({"nowhere": (torch.ones(1, 4), torch.ones(4, 1))}), scale=1.0, source="odd")
    for wrong, said in ((odd, "odd: 1 of 1 modules"), (Fusion(deltas=good.deltas, scale=0.0, source="no"), "no: ")):
        with pytest.raises(LoraError, match=said):
            fuse_all(unet, [good, wrong], component="unet")
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_what_the_trainer_saves_fuses_as_what_it_trained(unet: Any, tiny_base: Path, tmp_path: Path) -> None:
    pairs = random_pairs(unet, LCM_TARGETS, seed=9)
    save_kohya(tmp_path / "a.safetensors", {"unet": deltas_of(pairs, 3.0)}, {"hypersd.plan": "{}"})
    write(tmp_path / "b.safetensors", peft(pairs, "unet"))
    fuse(unet, read_lora(tmp_path / "a.safetensors").components["unet"], scale=1.0, component="unet")
    other = open_base(tiny_base).load_unet(torch.float32)
    fuse(other, read_lora(tmp_path / "b.safetensors").components["unet"], scale=0.75, component="unet")
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(unet.state_dict()[name], tensor, rtol=0, atol=1e-6)

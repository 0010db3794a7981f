"""LoRA files and their keys: what is understood, what is refused by name, what is saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hypersd_export.errors import LoraError
from hypersd_export.model import lora as lora_module
from hypersd_export.model.base import open_base
from hypersd_export.model.families import Family
from hypersd_export.model.lora import (
    AlphaSource,
    Delta,
    base_warning,
    check_components,
    parse_lora,
    read_lora,
    save_kohya,
)
from hypersd_export.model.lora_keys import LoraFormat, Role, parse_key
from tests.lora_files import kohya, one_line, peft, write

PAIR = {"mid_block.attentions.0.proj_in": (torch.ones(2, 8), torch.ones(6, 2))}
KEY = "lora_unet_mid_block_attentions_0_proj_in"


def refused(path: Path, match: str, **kwargs: Any) -> str:
    with pytest.raises(LoraError, match=match) as caught:
        read_lora(path, **kwargs)
    return one_line(caught.value)


@pytest.mark.parametrize(
    ("key", "component", "path", "role", "kind"),
    [
        ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "unet", "down_blocks.0.attn1.to_q", "down", "peft"),
        ("base_model.model.unet.conv_in.lora_B.weight", "unet", "conv_in", "up", "peft"),
        ("base_model.model.mid_block.x.lora_A.my-name.weight", "unet", "mid_block.x", "down", "peft"),
        ("base_model.model.text_model.x.fc1.lora_A.weight", "text_encoder", "text_model.x.fc1", "down", "peft"),
        ("encoder.layers.0.mlp.fc1.lora_A.weight", "text_encoder", "encoder.layers.0.mlp.fc1", "down", "peft"),
        ("unet.x.to_out.0.lora.up.weight", "unet", "x.to_out.0", "up", "diffusers"),
        ("text_encoder.x.q_proj.lora_linear_layer.down.weight", "text_encoder", "x.q_proj", "down", "diffusers"),
        ("unet.x.attn1.processor.to_out_lora.up.weight", "unet", "x.attn1.to_out.0", "up", "diffusers_old"),
        ("mid_block.x.processor.to_k_lora.down.weight", "unet", "mid_block.x.to_k", "down", "diffusers_old"),
        ("text_encoder.x.to_out_lora.down.weight", "text_encoder", "x.out_proj", "down", "diffusers_old"),
        ("unet.x.attn1.to_q.alpha", "unet", "x.attn1.to_q", "alpha", None),
        ("unet.x.attn1.processor.to_q_lora.alpha", "unet", "x.attn1.to_q", "alpha", None),
        ("lora_unet_down_blocks_0_conv.lora_down.weight", "unet", "down_blocks_0_conv", "down", "kohya"),
        ("lora_unet_down_blocks_0_conv.alpha", "unet", "down_blocks_0_conv", "alpha", None),
        ("lora_te_text_model_encoder_x.lora_up.weight", "text_encoder", "text_model_encoder_x", "up", "kohya"),
        ("lora_te1_x.lora_up.weight", "text_encoder", "x", "up", "kohya"),
        ("lora_te2_x.lora_up.weight", "text_encoder_2", "x", "up", "kohya"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_up.weight", "unet", "input_blocks_4_1_proj_in", "up", "sgm"),
        ("lora_unet_time_embed_0.lora_up.weight", "unet", "time_embed_0", "up", "sgm"),
        ("lora_unet_time_embedding_linear_1.lora_up.weight", "unet", "time_embedding_linear_1", "up", "kohya"),
        ("diffusion_model.output_blocks.3.1.proj_in.lora_up.weight", "unet", "output_blocks.3.1.proj_in", "up", "sgm"),
        ("transformer.transformer_blocks.0.x.lora_A.weight", "transformer", "transformer_blocks.0.x", "down", "peft"),
    ],
)  # fmt: skip
def test_keys(key: str, component: str, path: str, role: str, kind: str | None) -> None:
    parsed = parse_key(key)
    assert parsed is not None
    assert (parsed.component, parsed.path, parsed.role) == (component, path, Role(role))
    assert parsed.format == (None if kind is None else LoraFormat(kind))


@pytest.mark.parametrize("key", ["x.weight", "lora_unet_x.lora_sideways.weight", "unet.x.lora_C.weight"])
def test_keys_of_no_format(key: str) -> None:
    assert parse_key(key) is None


def test_read(tmp_path: Path) -> None:
    metadata = {"hypersd.plan": '{"solver": "ddim"}', "hypersd.base": "0" * 64}
    path = write(tmp_path / "a.safetensors", kohya(PAIR, "unet", 4.0), metadata)
    lora = read_lora(str(path))
    delta = lora.components["unet"]["mid_block_attentions_0_proj_in"]
    assert (delta.rank, delta.alpha, delta.multiplier) == (2, 4.0, 2.0)
    assert set(delta.keys) == {f"{KEY}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert (lora.format, lora.alpha_source, lora.ranks) == (LoraFormat.kohya, AlphaSource.tensors, (2,))
    assert lora.plan_json == {"solver": "ddim"}
    assert lora.base_digest == "0" * 64
    assert lora.family is None
    assert len(lora.digest) == 64
    assert read_lora(write(tmp_path / "b.safetensors", peft(PAIR, "unet"))).plan_json is None


@pytest.mark.parametrize("plan", ["{", "3"])
def test_a_damaged_plan(plan: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", peft(PAIR, "unet"), {"hypersd.plan": plan})
    with pytest.raises(LoraError, match=r"hypersd\.plan is not") as caught:
        _ = read_lora(path).plan_json
    one_line(caught.value)


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (f"{KEY}.dora_scale", "DoRA"),
        ("unet.x.lora_magnitude_vector", "DoRA"),
        (f"{KEY}.hada_w1_a", "LoHa"),
        (f"{KEY}.lokr_w1", "LoKr"),
        (f"{KEY}.lora_mid.weight", "Tucker"),
        (f"{KEY}.diff", "norm or full-weight deltas"),
        (f"{KEY}.diff_b", "norm or full-weight deltas"),
        ("lora_unet_x_norm1.w_norm", "norm or full-weight deltas"),
        (f"{KEY}.on_input", "IA3"),
        ("base_model.model.x.ia3_l.weight", "IA3"),
        (f"{KEY}.oft_blocks", "OFT"),
        ("lora_unet_x.a1.weight", "GLoRA"),
        ("unet.x.lora_B.bias", "a LoRA with biases"),
        ("base_model.model.x.lora_embedding_A", "a LoRA on an embedding"),
        ("bundle_emb.word.string_to_param.*", "an embedded textual inversion"),
        ("lora_controlnet", "a Control-LoRA"),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_other_kinds_are_refused_by_name(extra: str, name: str, alone: bool, tmp_path: Path) -> None:
    tensors = {extra: torch.ones(2, 2)} | ({} if alone else kohya(PAIR, "unet", 1.0))
    message = refused(write(tmp_path / "a.safetensors", tensors), match=name)
    assert extra in message
    assert "which cannot be fused here" in message


def test_unknown_keys_name_the_first_few(tmp_path: Path) -> None:
    tensors = kohya(PAIR, "unet") | {f"strange.{n}": torch.ones(1) for n in range(5)}
    message = refused(write(tmp_path / "a.safetensors", tensors), match="5 keys of no known LoRA format")
    assert "strange.0, strange.1, strange.2, …" in message


def test_halves_and_doubles(tmp_path: Path) -> None:
    whole = kohya(PAIR, "unet", 1.0)
    for gone in ("lora_down.weight", "lora_up.weight"):
        part = {k: v for k, v in whole.items() if not k.endswith(gone)}
        refused(write(tmp_path / "a.safetensors", part), match="2 keys without their other half")
    twice = {
        **peft(PAIR, "unet"),
        **{k.replace("unet.", "base_model.model.unet."): v for k, v in peft(PAIR, "unet").items()},
    }
    refused(write(tmp_path / "a.safetensors", twice), match="are for the same module")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    for ending in ("lora_down.weight", "lora_up.weight"):
        tensors = kohya(PAIR, "unet", 1.0)
        tensors[f"{KEY}.{ending}"] = torch.full_like(tensors[f"{KEY}.{ending}"], value)
        assert KEY in refused(write(tmp_path / "a.safetensors", tensors), match="NaN or infinite values in 1 modules")
    refused(write(tmp_path / "a.safetensors", kohya(PAIR, "unet", value)), match="is not one finite number")
    tensors = kohya(PAIR, "unet") | {f"{KEY}.alpha": torch.ones(3)}
    refused(write(tmp_path / "a.safetensors", tensors), match="is not one finite number")


def test_files_that_are_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    one = torch.ones(1)
    refused(
        write(path, {"model.diffusion_model.x.weight": one}),
        match=r"a whole checkpoint, not a LoRA; pass it as --base a\.s",
    )
    refused(
        write(path, {"down_blocks.0.resnets.0.conv1.weight": one}), match="a whole UNet, not a LoRA; pass it as --unet"
    )
    refused(write(path, {"some.weight": one}), match=r"holds no LoRA keys \(some\.weight\)")
    refused(write(path, {}), match="holds no LoRA keys")
    refused(write(path, {f"{KEY}.alpha": one}), match="holds no LoRA keys")
    refused(tmp_path / "none.safetensors", match="no such file")
    path.write_text("<html><body>Not found</body></html>")
    refused(path, match="an HTML page")
    write(path, peft(PAIR, "unet"))
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, match="truncated")


def test_a_folder_with_a_lora(tmp_path: Path) -> None:
    refused(tmp_path, match=r"a folder with 0 \.safetensors \(none\)")
    write(tmp_path / "x.safetensors", peft(PAIR, "unet"))
    assert read_lora(tmp_path).path.name == "x.safetensors"
    write(tmp_path / "y.safetensors", peft(PAIR, "unet"))
    refused(tmp_path, match=r"a folder with 2 \.safetensors \(x\.safetensors, y\.safetensors\)")
    write(tmp_path / "pytorch_lora_weights.safetensors", peft(PAIR, "unet"))
    assert read_lora(tmp_path).path.name == "pytorch_lora_weights.safetensors"


def test_a_pickled_lora(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.bin"
    torch.save(peft(PAIR, "unet"), path)
    assert "hypersd_export.model.convert" in refused(path, match="a pickle, which can run code")
    assert read_lora(path, allow_pickle=True).components["unet"].keys() == PAIR.keys()


def test_alpha_from_metadata_and_from_the_neighbour(tmp_path: Path) -> None:
    stated = {"unet.lora_alpha": 8, "unet.alpha_pattern": {r"attentions\.0\.proj_in": 3}, "text_encoder.lora_alpha": 5}

    def alphas(name: str, metadata: dict[str, str] | None = None) -> tuple[float | None, AlphaSource]:
        lora = read_lora(write(tmp_path / name, peft(PAIR, "unet"), metadata))
        return next(iter(lora.components["unet"].values())).alpha, lora.alpha_source

    assert alphas("a.safetensors", {"lora_adapter_metadata": json.dumps(stated)}) == (3, AlphaSource.metadata)
    plain = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})}
    assert alphas("a.safetensors", plain) == (8, AlphaSource.metadata)
    rslora = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.use_rslora": True})}
    assert alphas("a.safetensors", rslora)[0] == pytest.approx(8 * 2**0.5)
    assert alphas("a.safetensors", {"lora_adapter_metadata": json.dumps({"unet.r": 2})}) == (None, AlphaSource.rank)
    assert alphas("a.safetensors") == (None, AlphaSource.rank)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 7}))
    assert alphas("adapter_model.safetensors") == (7, AlphaSource.adapter_config)
    one = read_lora(tmp_path / "adapter_model.safetensors").digest
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 9}))
    assert read_lora(tmp_path / "adapter_model.safetensors").digest != one
    for config, match in (
        ({"lora_alpha": 7, "use_dora": True}, "DoRA"),
        ({"lora_alpha": "many"}, "its peft config is not readable"),
        ({"lora_alpha": 7, "alpha_pattern": {"(": 1}}, "its peft config is not readable"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        refused(tmp_path / "adapter_model.safetensors", match=match)
    for text in ("{", "[1]"):
        path = write(tmp_path / "a.safetensors", peft(PAIR, "unet"), {"lora_adapter_metadata": text})
        refused(path, match="its metadata lora_adapter_metadata is not readable")


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.125", "a.safetensors", 0.125),
        ("dir/a.safetensors:-1", "dir/a.safetensors", -1.0),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.5", r"C:\loras\a.safetensors", 0.5),
        ("C:/loras/a.safetensors", "C:/loras/a.safetensors", 1.0),
        ("odd:name.safetensors", "odd:name.safetensors", 1.0),
        ("odd:folder/a.safetensors:2", "odd:folder/a.safetensors", 2.0),
        ("odd:folder/a", "odd:folder/a", 1.0),
    ],
)
def test_parse_lora(text: str, path: str, scale: float) -> None:
    assert parse_lora(text) == (Path(path), scale)


def test_parse_lora_takes_what_exists(tmp_path: Path) -> None:
    odd = tmp_path / "style:0.5"
    odd.write_text("")
    assert parse_lora(str(odd)) == (odd, 1.0)
    assert parse_lora(f"{odd}:0.3") == (odd, 0.3)
    assert parse_lora("~/a.safetensors:2") == (Path.home() / "a.safetensors", 2.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no file"), (":0.5", "no file"), ("a.safetensors:", "the scale '' is not a number"),
        ("a.safetensors:much", "the scale 'much' is not a number"), ("a.safetensors:0", "use --lora none"),
        ("a.safetensors:nan", "is not finite"), ("a.safetensors:inf", "is not finite"),
    ],
)  # fmt: skip
def test_parse_lora_refuses(text: str, said: str) -> None:
    with pytest.raises(LoraError, match=said) as caught:
        parse_lora(text)
    one_line(caught.value)


def test_another_base_is_one_warning(tiny_base: Path, tmp_path: Path) -> None:
    base = open_base(tiny_base)
    for digest, warns in ((None, False), (base.digest, False), ("f" * 64, True)):
        metadata = {} if digest is None else {"hypersd.base": digest}
        lora = read_lora(write(tmp_path / "a.safetensors", peft(PAIR, "unet"), metadata))
        warning = base_warning(lora, base)
        assert (warning is not None) is warns
        if warning:
            assert "ffffffffffff" in one_line(warning)


def test_parts_for_components_that_the_base_lacks(tiny_base: Path, tmp_path: Path) -> None:
    base = open_base(tiny_base)
    check_components(read_lora(write(tmp_path / "a.safetensors", kohya(PAIR, "unet"))), base.parts)
    tensors = kohya(PAIR, "unet") | kohya(PAIR, "text_encoder_2", te="lora_te2")
    with pytest.raises(LoraError, match="1 modules for a text_encoder_2, which this base does not have") as caught:
        check_components(read_lora(write(tmp_path / "a.safetensors", tensors)), base.parts)
    assert "looks like a LoRA for SDXL" in one_line(caught.value)
    only_text = read_lora(write(tmp_path / "a.safetensors", kohya(PAIR, "text_encoder")))
    with pytest.raises(LoraError, match="1 modules for a text_encoder, which"):
        check_components(only_text, {"unet"})


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q", Family.flux),
        ("lora_unet_double_blocks_0_img_attn_qkv", Family.flux),
        ("transformer.transformer_blocks.0.attn.to_q", Family.sd3),
        ("lora_te3_x", Family.sd3),
        ("lora_unet_label_emb_0_0", Family.sdxl),
    ],
)
def test_families_of_loras_by_their_keys(key: str, family: Family, tmp_path: Path) -> None:
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 4), f"{key}.lora_up.weight": torch.ones(4, 2)}
    assert read_lora(write(tmp_path / "a.safetensors", tensors)).family is family


@pytest.mark.parametrize(
    ("width", "family"), [(768, Family.sd15), (1024, Family.sd21), (2048, Family.sdxl), (99, None)]
)
def test_families_of_loras_by_their_cross_attention(width: int, family: Family | None, tmp_path: Path) -> None:
    pairs = {"down_blocks.1.attn2.to_k": (torch.ones(2, width), torch.ones(8, 2))}
    assert read_lora(write(tmp_path / "a.safetensors", peft(pairs, "unet"))).family is family


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_save_kohya(dtype: torch.dtype | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv = Delta(down=torch.randn(2, 4, 3, 3), up=torch.randn(6, 2, 1, 1), alpha=1.0)
    linear = Delta(down=torch.randn(4, 8), up=torch.randn(6, 4))
    path = tmp_path / "new" / "a.safetensors"
    components = {"unet": {"mid_block.resnets.0.conv1": conv}, "text_encoder": {"encoder.layers.0.mlp.fc1": linear}}
    save_kohya(path, components, {"hypersd.base": "d" * 64}, dtype=dtype)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    lora = read_lora(path)
    assert lora.format is LoraFormat.kohya
    assert lora.metadata["ss_network_dim"] == "4"
    assert lora.base_digest == "d" * 64
    read = lora.components["unet"]["mid_block_resnets_0_conv1"]
    assert (read.alpha, read.down.dtype) == (1.0, dtype or torch.float32)
    torch.testing.assert_close(read.down.float(), conv.down, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(read.up.float(), conv.up, rtol=1e-3, atol=1e-3)
    assert lora.components["text_encoder"]["text_model_encoder_layers_0_mlp_fc1"].alpha == 4.0
    save_kohya(path, {"text_encoder": {"x": linear}, "text_encoder_2": {"x": linear}}, {})
    assert {k.split("_")[1] for c in read_lora(path).components.values() for d in c.values() for k in d.keys} == {
        "te1",
        "te2",
    }


def test_save_kohya_refuses(tmp_path: Path) -> None:
    bad = Delta(down=torch.full((1, 2), float("nan")), up=torch.ones(2, 1))
    for components, match in (
        ({"unet": {"a": bad}}, "NaN or infinite in lora_unet_a"),
        ({"unet": {}}, "no modules"),
        ({"vae": {"a": bad}}, "no component of a kohya file"),
    ):
        with pytest.raises(LoraError, match=match):
            save_kohya(tmp_path / "a.safetensors", components, {})
    assert not list(tmp_path.iterdir())
    assert lora_module.first(["a"]) == "a"

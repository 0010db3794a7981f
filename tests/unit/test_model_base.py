"""Pipeline folders: what is opened, what is loaded, what is refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypersd_export.errors import ModelError
from hypersd_export.model import base as base_module
from hypersd_export.model.base import BaseModel, open_base
from hypersd_export.model.families import PARTS, Family, family_of_pipeline
from hypersd_export.model.folder import folder_parts
from tests.lora_files import one_line, one_thread  # noqa: F401 - a fixture for the whole module

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "pipeline"))


def refused(*args: Any, match: str, **kwargs: Any) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        open_base(*args, **kwargs)
    return one_line(caught.value)


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, path)


def test_components_equal_from_pretrained(tiny_base: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    model = open_base(tiny_base)
    model.require_exportable()
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (2, 16))
    latents, states = torch.randn(2, 4, 4, 4), torch.randn(2, 16, 32)
    with torch.no_grad():
        text, text_ = model.load_text_encoder(torch.float32), CLIPTextModel.from_pretrained(tiny_base / "text_encoder")
        torch.testing.assert_close(text(ids).last_hidden_state, text_(ids).last_hidden_state, rtol=0, atol=1e-6)
        torch.testing.assert_close(text(ids).pooler_output, text_(ids).pooler_output, rtol=0, atol=1e-6)
        unet, unet_ = model.load_unet(torch.float32), UNet2DConditionModel.from_pretrained(tiny_base / "unet")
        torch.testing.assert_close(unet(latents, 7, states).sample, unet_(latents, 7, states).sample, rtol=0, atol=0)
        vae, vae_ = model.load_vae(torch.float32), AutoencoderKL.from_pretrained(tiny_base / "vae")
        torch.testing.assert_close(vae.decode(latents).sample, vae_.decode(latents).sample, rtol=0, atol=0)
    for module in (text, unet, vae):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
        assert all(p.device.type == "cpu" for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(tiny_base: Path, dtype: torch.dtype) -> None:
    model = open_base(tiny_base)
    for load in (model.load_text_encoder, model.load_unet, model.load_vae):
        assert {p.dtype for p in load(dtype).parameters()} == {dtype}


def test_what_is_known_without_loading(tiny_base: Path) -> None:
    model = open_base(str(tiny_base))
    assert model.family is Family.sd15
    assert model.name == "model"
    assert (model.latent_channels, model.vae_scale_factor, model.scaling_factor) == (4, 4, 0.5)
    assert model.native_size == 16
    assert model.scheduler_config["_class_name"] == "DDIMScheduler"
    assert model.model_index()["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert model.model_index()["safety_checker"] == [None, None]
    assert model.license_note == "not stated by the base"
    config = model.component_config("unet")
    config["block_out_channels"].append(1)
    assert model.component_config("unet")["block_out_channels"] == [16, 32]
    skeleton = model.skeleton("unet")
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    with pytest.raises(ModelError, match="has no text_encoder_2"):
        model.component_config("text_encoder_2")


def test_importing_and_opening_need_no_torch(tiny_base: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from hypersd_export.model.base import open_base; from hypersd_export.model import lora, fuse;"
        f"m = open_base({str(tiny_base)!r}); m.digest; m.tokenizer;"
        "bad = {'torch', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_digest_is_of_what_is_used(tiny_base: Path, folder: Path) -> None:
    digest = open_base(tiny_base).digest
    assert len(digest) == 64
    assert open_base(folder).digest == digest
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    assert open_base(folder).digest == digest
    assert open_base(folder).license_note == "mit"
    rewrite(folder / VAE, lambda t: t | {"decoder.conv_in.bias": t["decoder.conv_in.bias"] + 1})
    changed = open_base(folder).digest
    assert changed != digest
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=0)
    assert open_base(folder).digest not in {digest, changed}


def test_license_note(folder: Path) -> None:
    (folder / "LICENSE.txt").write_text("…")
    assert open_base(folder).license_note == "see its LICENSE file"


def test_fp16_variant_and_shards(folder: Path) -> None:
    for relative in (UNET, VAE, TEXT):
        path = folder / relative
        half = path.with_name(path.name.replace(".safetensors", ".fp16.safetensors"))
        path.rename(half)
        rewrite(half, lambda t: {k: v.half() for k, v in t.items()})
    assert "pass --variant fp16" in refused(folder, match="only variants are there")
    assert "drop --variant" in refused(folder, variant="bf16", match="no variant 'bf16'")
    model = open_base(folder, variant="fp16")
    assert model.load_unet(torch.float16).dtype == torch.float16
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    names = sorted(tensors)
    shards = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[::2]}
    shards["diffusion_pytorch_model-00002-of-00002.safetensors"] = names[1::2]
    whole = model.load_unet(torch.float32).state_dict()
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    for file_name, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / "unet" / file_name)
    weight_map = {name: file_name for file_name, part in shards.items() for name in part}
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for name, tensor in open_base(folder, variant="fp16").load_unet(torch.float32).state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=0)
    index.write_text("{}")
    refused(folder, variant="fp16", match="has no weight_map")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    refused(folder, variant="fp16", match=r"gone\.safetensors: no such file")


def test_names_of_older_releases(tiny_base: Path, folder: Path) -> None:
    new = open_base(tiny_base)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for name, value in tensors.items():
            for after, before in old.items():
                name = name.replace(f"attentions.0.{after}.", f"attentions.0.{before}.")
            result[name] = value[:, :, None, None] if name.endswith("query.weight") else value
        assert result.keys() != tensors.keys()
        return result

    rewrite(folder / VAE, rename)
    rewrite(
        folder / TEXT,
        lambda t: (
            {f"text_model.{k}": v for k, v in t.items()} | {"text_model.embeddings.position_ids": torch.arange(16)}
        ),
    )
    model = open_base(folder)
    for load in ("load_vae", "load_text_encoder"):
        expected = getattr(new, load)(torch.float32).state_dict()
        for name, tensor in getattr(model, load)(torch.float32).state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_weights_that_do_not_fit_the_config(folder: Path) -> None:
    def load(relative: str, match: str) -> str:
        with pytest.raises(ModelError, match=match) as caught:
            open_base(folder).load_unet(torch.float32)
        return one_line(caught.value)

    whole = (folder / UNET).read_bytes()
    rewrite(folder / UNET, lambda t: {k: v for k, v in t.items() if "conv_in" not in k})
    load(UNET, r"2 of \d+ tensors are missing \(conv_in")
    (folder / UNET).write_bytes(whole)
    rewrite(folder / UNET, lambda t: t | {"extra.weight": torch.ones(1)})
    load(UNET, r"1 tensors too many \(extra\.weight\)")
    (folder / UNET).write_bytes(whole)
    rewrite(folder / UNET, lambda t: t | {"conv_in.weight": torch.ones(16, 5, 3, 3)})
    message = load(UNET, "1 tensors have other shapes")
    assert "[16, 5, 3, 3] in the file, [16, 4, 3, 3] in the config" in message
    (folder / UNET).write_bytes(whole)
    edit(folder / "unet" / "config.json", down_block_types=["NoSuchBlock", "DownBlock2D"])
    load(UNET, "its config cannot be built")


@pytest.mark.parametrize("relative", [UNET, VAE, TEXT])
def test_a_damaged_file_is_found_before_anything_is_loaded(relative: str, folder: Path) -> None:
    path = folder / relative
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refused(folder, match="truncated safetensors")
    path.write_text("<html>404</html>")
    refused(folder, match="an HTML page")
    path.unlink()
    refused(folder, match="no weights")


def test_pickles_in_a_folder(folder: Path) -> None:
    pickle = folder / "unet" / "diffusion_pytorch_model.bin"
    expected = open_base(folder).load_unet(torch.float32).state_dict()
    torch.save(load_file(folder / UNET), pickle)
    (folder / UNET).unlink()
    assert f"convert {pickle} {folder / UNET}" in refused(folder, match="a pickle, which can run code")
    model = open_base(folder, allow_pickle=True)
    for name, tensor in model.load_unet(torch.float32).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_paths_that_are_no_pipeline(tiny_base: Path, folder: Path, tmp_path: Path) -> None:
    refused("no/such/folder/at/all", match="no such file or folder")
    refused("x" * 5000, match="no such file or folder")
    refused(tmp_path, match="not a pipeline folder")
    refused(tiny_base / "unet", match="one component, not a pipeline; pass it as --unet")
    save_file({"a": torch.ones(1)}, tmp_path / "some.safetensors")
    refused(tmp_path, match=r"no model_index\.json, but some\.safetensors")
    (folder / "model_index.json").write_text("{}")
    refused(folder, match="has no _class_name")
    (folder / "model_index.json").write_text("not json")
    refused(folder, match="not readable as JSON")
    refused(tiny_base, revision="main", match="--revision main is for hub ids")


def test_incomplete_or_foreign_folders(folder: Path) -> None:
    index = folder / "model_index.json"
    edit(index, text_encoder=["transformers", "T5EncoderModel"])
    refused(folder, match="its text_encoder is T5EncoderModel, where CLIPTextModel is needed")
    edit(index, text_encoder=[None, None])
    refused(folder, match="its text_encoder is None")
    edit(index, text_encoder=["transformers", "CLIPTextModel"])
    edit(folder / "vae" / "config.json", _class_name="AsymmetricAutoencoderKL")
    refused(folder, match="a AsymmetricAutoencoderKL, where AutoencoderKL is needed")
    edit(folder / "vae" / "config.json", _class_name="AutoencoderKL")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    refused(folder, match=r"scheduler_config\.json: no such file")
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        folder_parts(folder, json.loads(index.read_text()), PARTS, variant=None, allow_pickle=False)


@pytest.mark.parametrize(
    ("class_name", "family", "title"),
    [
        ("StableDiffusion3Pipeline", Family.sd3, "Stable Diffusion 3"),
        ("FluxPipeline", Family.flux, "FLUX"),
        ("KandinskyPipeline", Family.other, "another family"),
    ],
)
def test_other_families_are_resolved_and_refused_by_name(
    class_name: str, family: Family, title: str, folder: Path
) -> None:
    edit(folder / "model_index.json", _class_name=class_name)
    model = open_base(folder)
    assert model.family is family
    assert len(model.digest) == 64
    for call in (model.require_exportable, lambda: model.load_unet(torch.float32)):
        with pytest.raises(ModelError, match="cannot be exported yet") as caught:
            call()
        assert title in one_line(caught.value)
    with pytest.raises(ModelError, match="cannot be exported yet"):
        open_base(folder, unet=folder / "unet")


def test_families_by_width() -> None:
    assert family_of_pipeline("StableDiffusionPipeline", {"cross_attention_dim": 1024}) is Family.sd21
    assert family_of_pipeline("LatentConsistencyModelPipeline", {"cross_attention_dim": 768}) is Family.sd15
    assert family_of_pipeline("StableDiffusionPipeline", None) is Family.sd15


def test_unets_that_are_not_text_to_image(folder: Path) -> None:
    edit(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(ModelError, match="takes 9 channels where text-to-image takes 4") as caught:
        open_base(folder).require_exportable()
    one_line(caught.value)
    edit(folder / "unet" / "config.json", in_channels=4, addition_embed_type="text_time")
    with pytest.raises(ModelError, match="needs addition_embed_type='text_time'"):
        open_base(folder).require_exportable()


def test_another_unet_or_vae(tiny_base: Path, folder: Path, tmp_path: Path) -> None:
    rewrite(folder / UNET, lambda t: t | {"conv_in.bias": t["conv_in.bias"] + 1})
    rewrite(folder / VAE, lambda t: t | {"decoder.conv_in.bias": t["decoder.conv_in.bias"] + 1})
    plain = open_base(tiny_base)
    lone = tmp_path / "lone" / "unet.safetensors"
    lone.parent.mkdir()
    shutil.copy(folder / UNET, lone)
    beside = tmp_path / "beside" / "unet.safetensors"
    beside.parent.mkdir()
    shutil.copy(folder / UNET, beside)
    shutil.copy(folder / "unet" / "config.json", beside.parent)
    for unet in (folder, folder / "unet", lone, beside):
        model = open_base(tiny_base, unet=unet, vae=folder / "vae")
        gained = model.load_unet(torch.float32).conv_in.bias - plain.load_unet(torch.float32).conv_in.bias
        torch.testing.assert_close(gained, torch.ones(16))
        gained = model.load_vae(torch.float32).decoder.conv_in.bias - plain.load_vae(torch.float32).decoder.conv_in.bias
        torch.testing.assert_close(gained, torch.ones(16))
        assert model.digest != plain.digest


def test_overrides_that_are_something_else(tiny_base: Path, tmp_path: Path) -> None:
    refused(tiny_base, unet="no/such/unet/here", match="--unet no/such/unet/here: no such file or folder")
    refused(tiny_base, vae=tmp_path, match=r"has neither config\.json nor vae/config\.json")
    refused(tiny_base, vae=tiny_base / "unet", match="a UNet2DConditionModel, where AutoencoderKL is needed")
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, lora)
    refused(tiny_base, unet=lora, match="a LoRA, not a UNet; pass it as --lora")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(1)}, other)
    refused(tiny_base, vae=other, match=r"not a VAE \(first tensor weight\)")
    with pytest.raises(ModelError, match="tensors are missing"):
        open_base(tiny_base, unet=tiny_base / VAE).load_unet(torch.float32)


def test_builtin(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypersd_export import builtin

    monkeypatch.setattr(builtin, "model_dir", lambda: tmp_path / "none")
    refused("builtin", match="the built-in model is not in this installation")
    monkeypatch.setattr(builtin, "model_dir", lambda: tiny_base)
    monkeypatch.setattr(builtin, "card", lambda: {"license": "CC BY 4.0"})
    model = open_base("builtin")
    assert (model.name, model.license_note) == ("builtin", "CC BY 4.0")
    refused("builtin", revision="main", match="--revision main is for hub ids")


def test_folder_names() -> None:
    assert base_module._folder_name(Path("/x/models--a--b/snapshots/1")) == "a/b"
    assert base_module._folder_name(Path("/x/thing")) == "thing"
    assert isinstance(BaseModel.__doc__, str)

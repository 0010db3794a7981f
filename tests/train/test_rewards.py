"""Published rewards from files in their own layouts: against their formulas written out, and their gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from hypersd_export.errors import ModelError, OptionError
from tests.train import small_rewards
from tests.train.small_rewards import SIZE, SMALL, head_tensors
from trainer.rewards.aesthetic import AESTHETIC_V2, AestheticReward, fold_linear
from trainer.rewards.clip import ClipReward
from trainer.rewards.hps import HpsReward
from trainer.rewards.image_reward import ImageReward
from trainer.rewards.preprocess import CLIP_MEAN, CLIP_STD, Fit, Preprocess
from trainer.rewards.registry import Kind, RewardConfig, open_rewards

PROMPTS = ["a cat", "dogs on a cat"]


def pictures(count=2, height=SIZE, width=SIZE, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pil_resized(picture, height, width):
    """PIL's bicubic on float pixels, which it does not round."""
    channels = [Image.fromarray(channel.numpy(), mode="F") for channel in picture]
    return torch.stack([torch.from_numpy(np.array(c.resize((width, height), Image.BICUBIC))) for c in channels])


def clip_normalised(pixels):
    """(pixels − mean) / std of pixels in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


@pytest.mark.parametrize(("height", "width", "to"), [
    (60, 60, (24, 24)), (48, 100, (24, 50)), (20, 30, (24, 36)), (24, 24, (24, 24)),
])  # fmt: skip
def test_preprocessing_is_pils_bicubic_a_centre_crop_and_clips_normalisation(height, width, to):
    picture = pictures(1, height, width)
    resized = pil_resized(picture[0] / 2 + 0.5, *to)
    top, left = (to[0] - SIZE) // 2, (to[1] - SIZE) // 2
    expected = clip_normalised(resized[:, top : top + SIZE, left : left + SIZE])
    torch.testing.assert_close(SMALL(picture)[0], expected, rtol=0, atol=2e-5)


def test_transformers_processor_crops_and_normalises_alike(tmp_path):
    """On a picture of 8 bits that needs no resizing there is no rounding either."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = small_rewards.small_clip(tmp_path)
    image = (pictures(1, 24, 41)[0].permute(1, 2, 0).numpy() * 127 + 128).round().astype(np.uint8)
    expected = CLIPImageProcessorPil.from_pretrained(folder)(Image.fromarray(image), return_tensors="pt").pixel_values
    ours = Preprocess.of(folder)(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("height", "width", "inner"), [(48, 100, (12, 24)), (24, 10, (24, 10)), (30, 30, (24, 24))])
def test_padding_puts_the_whole_picture_on_black(height, width, inner):
    picture = pictures(1, height, width)
    expected = torch.zeros(3, SIZE, SIZE)
    top, left = (SIZE - inner[0]) // 2, (SIZE - inner[1]) // 2
    expected[:, top : top + inner[0], left : left + inner[1]] = pil_resized(picture[0] / 2 + 0.5, *inner)
    made = Preprocess(size_px=SIZE, mean=CLIP_MEAN, std=CLIP_STD, fit=Fit.PAD)(picture)[0]
    torch.testing.assert_close(made, clip_normalised(expected), rtol=0, atol=2e-5)


def attention(x, seen, query, key, value, out, heads, mask=None):
    """Multi-head attention of x [B, N, D] on `seen`, from (weight, bias) of each projection."""
    q, k, v = (F.linear(a, *p).unflatten(2, (heads, -1)).transpose(1, 2)
               for a, p in ((x, query), (seen, key), (seen, value)))  # fmt: skip
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), *out)


def pair(tensors, name):
    return tensors[f"{name}.weight"], tensors[f"{name}.bias"]


def norm(tensors, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], *pair(tensors, name), eps)


def open_clip_features(tensors, pixels=None, ids=None, *, heads):
    """What OpenCLIP's model gives, before its features are made unit: `encode_image` or `encode_text`."""
    prefix = "visual." if ids is None else ""
    if ids is None:
        x = F.conv2d(pixels, tensors["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
        first = tensors["visual.class_embedding"].expand(len(x), 1, -1)
        x = norm(tensors, "visual.ln_pre", torch.cat([first, x], 1) + tensors["visual.positional_embedding"], 1e-5)
        mask = None
    else:
        x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"][: ids.shape[1]]
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for number in range(2):
        name = f"{prefix}transformer.resblocks.{number}."
        y = norm(tensors, f"{name}ln_1", x, 1e-5)
        split = zip(tensors[f"{name}attn.in_proj_weight"].chunk(3), tensors[f"{name}attn.in_proj_bias"].chunk(3),
                    strict=True)  # fmt: skip
        x = x + attention(y, y, *split, pair(tensors, f"{name}attn.out_proj"), heads, mask)
        y = F.gelu(F.linear(norm(tensors, f"{name}ln_2", x, 1e-5), *pair(tensors, f"{name}mlp.c_fc")))
        x = x + F.linear(y, *pair(tensors, f"{name}mlp.c_proj"))
    if ids is None:
        return norm(tensors, "visual.ln_post", x[:, 0], 1e-5) @ tensors["visual.proj"]
    x = norm(tensors, "ln_final", x, 1e-5)
    return x[torch.arange(len(x)), ids.argmax(1)] @ tensors["text_projection"]


@pytest.fixture
def hps(tmp_path):
    """(reward, tensors): the checkpoint is a pickle with a state_dict, as the authors'."""
    tensors = small_rewards.open_clip_tensors()
    torch.save({"epoch": 1, "state_dict": tensors}, tmp_path / "HPS_v2.1_compressed.pt")
    small_rewards.tiny_tokenizer(tmp_path)
    reward = HpsReward(
        tmp_path / "HPS_v2.1_compressed.pt", tokenizer=tmp_path, head_dims=(10, 8), allow_pickle=True,
        preprocess=Preprocess(size_px=SIZE, mean=CLIP_MEAN, std=CLIP_STD, fit=Fit.PAD),
    )  # fmt: skip
    return reward, tensors


def test_hps_is_open_clips_cosine(hps):
    reward, tensors = hps
    ids = torch.tensor([[516, 97, 259, 517, 517, 517], [516, 260, 259, 97, 258, 517]])
    words = reward._tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids
    image = pictures()
    for given in (ids, words):
        seen, read = (
            F.normalize(open_clip_features(tensors, *inputs, heads=2), dim=1)
            for inputs in ((clip_normalised(image / 2 + 0.5), None), (None, given))
        )
        if given is words:
            torch.testing.assert_close(reward(image, PROMPTS), (seen * read).sum(1), rtol=0, atol=2e-6)
        pooled = reward._model.text_model(input_ids=given).pooler_output
        torch.testing.assert_close(F.normalize(reward._model.text_projection(pooled), dim=1), read, rtol=0, atol=2e-6)
    assert reward.name == "HPS_v2.1_compressed"


def image_reward(tensors, pixels, ids, mask, heads=2):
    """`score_gard` of the authors' code, written out on the state dict."""
    see = {n.removeprefix("blip.visual_encoder."): t for n, t in tensors.items() if "visual_encoder" in n}
    read = {n.removeprefix("blip.text_encoder."): t for n, t in tensors.items() if "text_encoder" in n}
    x = F.conv2d(pixels, *pair(see, "patch_embed.proj"), stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([see["cls_token"].expand(len(x), 1, -1), x], 1) + see["pos_embed"]
    for number in range(2):
        name = f"blocks.{number}."
        y = norm(see, f"{name}norm1", x, 1e-6)
        split = zip(see[f"{name}attn.qkv.weight"].chunk(3), see[f"{name}attn.qkv.bias"].chunk(3), strict=True)
        x = x + attention(y, y, *split, pair(see, f"{name}attn.proj"), heads)
        y = F.gelu(F.linear(norm(see, f"{name}norm2", x, 1e-6), *pair(see, f"{name}mlp.fc1")))
        x = x + F.linear(y, *pair(see, f"{name}mlp.fc2"))
    seen = norm(see, "norm", x, 1e-6)
    x = read["embeddings.word_embeddings.weight"][ids]
    x = norm(read, "embeddings.LayerNorm", x + read["embeddings.position_embeddings.weight"][: ids.shape[1]], 1e-12)
    for number in range(2):
        for kind, other in (("attention", None), ("crossattention", seen)):
            name = f"encoder.layer.{number}.{kind}."
            parts = [pair(read, f"{name}{part}") for part in ("self.query", "self.key", "self.value", "output.dense")]
            allowed = mask[:, None, None] if other is None else None
            y = attention(x, x if other is None else other, *parts, heads, allowed)
            x = norm(read, f"{name}output.LayerNorm", x + y, 1e-12)
        name = f"encoder.layer.{number}."
        y = F.linear(F.gelu(F.linear(x, *pair(read, f"{name}intermediate.dense"))), *pair(read, f"{name}output.dense"))
        x = norm(read, f"{name}output.LayerNorm", x + y, 1e-12)
    raw = x[:, 0]
    for number in (0, 2, 4, 6, 7):
        raw = F.linear(raw, *pair(tensors, f"mlp.layers.{number}"))
    return (raw[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def blip(tmp_path):
    """(reward, tensors): the checkpoint is a pickled state dict, as the authors'."""
    tensors = small_rewards.image_reward_tensors()
    torch.save(tensors, tmp_path / "ImageReward.pt")
    words = small_rewards.bert_tokenizer(tmp_path / "bert")
    return ImageReward(
        tmp_path / "ImageReward.pt", tokenizer=words, preprocess=SMALL, head_dims=(10, 8), allow_pickle=True
    ), tensors


def test_image_reward_is_its_authors_formula(blip):
    reward, tensors = blip
    words = reward._tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert words.attention_mask.sum(1).tolist() == [4, 7]  # [CLS] dog ##s on a cat [SEP]
    image = pictures()
    expected = image_reward(
        tensors, clip_normalised(image / 2 + 0.5), words.input_ids, words.attention_mask.bool(), heads=2
    )  # fmt: skip
    made = reward(image, PROMPTS)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=2e-6)
    assert float((made - reward(image, PROMPTS[::-1])).abs().min()) > 1e-3  # it reads


def test_pick_score_is_transformers_logit(tmp_path):
    from transformers import CLIPModel

    folder = small_rewards.small_clip(tmp_path)
    reward = ClipReward(folder, scale=None)
    ids = reward._tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder).eval()(input_ids=ids, pixel_values=SMALL(pictures()))
    torch.testing.assert_close(reward(pictures(), PROMPTS), out.logits_per_image.diagonal(), rtol=0, atol=1e-5)


def mlp(tensors, places):
    """The predictor's own module, in eval mode, from its state dict."""
    modules = [nn.Dropout(0.2)] * (places[-1] + 1)
    for place in places:
        rows, columns = tensors[f"layers.{place}.weight"].shape
        modules[place] = nn.Linear(columns, rows)
    module = nn.Sequential(*modules)
    module.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in tensors.items()})
    return module.eval()


def test_the_shipped_head_is_the_authors_mlp():
    tensors = load_file(AESTHETIC_V2)
    assert {name: tuple(t.shape) for name, t in tensors.items() if name.endswith("weight")} == {
        "layers.0.weight": (1024, 768), "layers.2.weight": (128, 1024), "layers.4.weight": (64, 128),
        "layers.6.weight": (16, 64), "layers.7.weight": (1, 16),
    }  # fmt: skip
    weight, bias = fold_linear(tensors, AESTHETIC_V2)
    features = F.normalize(torch.randn(5, 768, generator=torch.Generator().manual_seed(0)), dim=1)
    scores = features @ weight.T + bias
    torch.testing.assert_close(scores, mlp(tensors, (0, 2, 4, 6, 7))(features), rtol=1e-5, atol=1e-5)
    assert 0 < float(scores.min()) < float(scores.max()) < 10


@pytest.mark.parametrize("version", [1, 2])
def test_both_heads_are_read_from_the_authors_pth(tmp_path, version):
    clip = ClipReward(small_rewards.small_clip(tmp_path / "clip"))
    head = {"weight": torch.randn(1, 8), "bias": torch.randn(1)} if version == 1 else head_tensors(8)
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises(ModelError, match="a pickle, which can run code"):
        AestheticReward(clip, head=tmp_path / "head.pth")
    reward = AestheticReward(clip, head=tmp_path / "head.pth", allow_pickle=True)
    features = clip.image_features(pictures())
    expected = F.linear(features, *head.values()) if version == 1 else mlp(head, (0, 2, 4, 6, 7))(features)
    torch.testing.assert_close(reward(pictures(), PROMPTS), expected[:, 0].detach(), rtol=1e-5, atol=1e-6)


def test_a_head_with_something_between_its_layers_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"layers \[0, 3, 6, 9, 11\], where a head without activations has"):
        fold_linear(head_tensors(8, places=(0, 3, 6, 9, 11)), tmp_path)
    with pytest.raises(ModelError, match="no aesthetic or reward head"):
        fold_linear({"weight": torch.zeros(1, 8)}, tmp_path)
    with pytest.raises(ModelError, match="does not end in one score"):
        fold_linear({"weight": torch.zeros(2, 8), "bias": torch.zeros(2)}, tmp_path)
    clip = ClipReward(small_rewards.small_clip(tmp_path))
    with pytest.raises(ModelError, match="for features of 768 values, and this CLIP's have 8"):
        AestheticReward(clip)


@pytest.mark.parametrize("name", ["hps", "blip", "pick", "aesthetic"])
def test_gradients_reach_the_pictures_alone_and_are_right(name, request, tmp_path):
    """The gradient's product with a direction is the score's slope along it, in both signs."""
    if name in ("hps", "blip"):
        reward = request.getfixturevalue(name)[0]
    else:
        reward = ClipReward(small_rewards.small_clip(tmp_path / "clip"), scale=None)
    if name == "aesthetic":
        save_file(head_tensors(8), tmp_path / "head.safetensors")
        reward = AestheticReward(reward, head=tmp_path / "head.safetensors")
    image = pictures(height=30, width=40).requires_grad_()
    scores = reward(image, PROMPTS)
    assert scores.shape == (2,)
    assert scores.dtype == torch.float32
    (gradient,) = torch.autograd.grad(scores.sum(), image)
    direction = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        up, down = (reward(image + sign * 0.02 * direction, PROMPTS) for sign in (1, -1))
    slope = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close((up - down) / 0.04, slope, rtol=0.05, atol=1e-5)
    modules = [value for value in vars(reward).values() if isinstance(value, nn.Module)]
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(image, PROMPTS), scores)


def test_files_that_are_something_else_are_refused_in_one_line(tmp_path):
    small_rewards.tiny_tokenizer(tmp_path)
    tensors = small_rewards.open_clip_tensors()
    path = tmp_path / "hps.safetensors"
    for change, words in (
        ({"visual.conv1.weight": None}, "visual.conv1.weight is missing"),
        ({"ln_final.bias": None}, "text_model.final_layer_norm.bias is missing, of 1"),
        ({"visual.ln_mid.weight": torch.zeros(3)}, "visual.ln_mid.weight has no place there, of 1"),
        ({"visual.ln_post.bias": torch.zeros(3)}, "size mismatch for vision_model.post_layernorm.bias"),
    ):
        save_file({n: t for n, t in {**tensors, **change}.items() if t is not None}, path)
        with pytest.raises(ModelError, match=f"not the weights of an OpenCLIP model .*{words}") as error:
            HpsReward(path, tokenizer=tmp_path, head_dims=(10, 8))
        assert "\n" not in str(error.value)
    save_file(small_rewards.image_reward_tensors(), path)
    with pytest.raises(ModelError, match="no BERT tokenizer"):
        ImageReward(path, tokenizer=tmp_path / "none", head_dims=(10, 8))
    with pytest.raises(ModelError, match=r"no such file; a reward's weights are not fetched"):
        ImageReward(tmp_path / "none.pt", tokenizer=tmp_path)


def test_rewards_are_opened_by_name_and_share_a_clip(tmp_path):
    folder = str(small_rewards.small_clip(tmp_path / "clip"))
    save_file(head_tensors(8), tmp_path / "head.safetensors")
    configs = [
        RewardConfig(kind=Kind.CLIP, model=folder), RewardConfig(kind=Kind.PICK_SCORE, model=folder),
        RewardConfig(kind=Kind.AESTHETIC, model=folder, head=str(tmp_path / "head.safetensors")),
    ]  # fmt: skip
    clip, pick, aesthetic = open_rewards(configs)
    assert aesthetic._clip is clip
    ratio = pick(pictures(), PROMPTS) / clip(pictures(), PROMPTS)
    torch.testing.assert_close(ratio, torch.full((2,), math.exp(2.6592) / 100), rtol=1e-4, atol=0)
    assert open_rewards([RewardConfig(kind=Kind.CLIP)])[0].name == "builtin"


@pytest.mark.parametrize(("config", "words"), [
    ({"kind": Kind.AESTHETIC}, r"aesthetic: its model is missing: set it to the path of a CLIP ViT-L/14"),
    ({"kind": Kind.HPS}, "hps: its model is missing"),
    ({"kind": Kind.IMAGE_REWARD, "model": "x.pt"}, "image_reward: set its tokenizer to a folder"),
])  # fmt: skip
def test_what_a_reward_needs_is_said(config, words):
    with pytest.raises(OptionError, match=words):
        open_rewards([RewardConfig(**config)])


def test_a_weight_of_zero_is_refused():
    with pytest.raises(OptionError, match="reward clip: weight 0 must be above 0"):
        RewardConfig(kind=Kind.CLIP, weight=0)

import numpy as np
import pytest
import torch

from hypersd_export.errors import DataError
from trainer.pretrain.clip import contrastive_loss, matches
from trainer.pretrain.concepts import BACKGROUNDS, CONCEPTS, STYLES, caption
from trainer.pretrain.drawings import Drawings, read_drawings
from trainer.pretrain.scenes import (
    UNSAID,
    Placement,
    SceneRenderer,
    SceneSpec,
    draw_specs,
    held_out_mask,
    scene_batches,
)
from trainer.pretrain.unet import LatentPool, caption_index, min_snr_weight
from trainer.pretrain.vocabulary import MAX_LENGTH, all_captions, train_tokenizer


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return read_drawings()


def _spec(concept=0, style=0, background=0, named=(UNSAID, UNSAID), count=1) -> SceneSpec:
    full = lambda value: torch.full((count,), value)  # noqa: E731
    return SceneSpec(full(concept), full(style), full(background), full(named[0]), full(named[1]))


def test_vocabulary_sizes():
    assert len(CONCEPTS) == len(set(CONCEPTS)) == 102
    assert (len(STYLES), len(BACKGROUNDS)) == (3, 8)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("cat-face", "noto", "blue"), "a cat face on a blue background, noto style"),
        (("owl", None, None), "an owl"),
        (("unicorn", None, "red"), "a unicorn on a red background"),
        (("pear", "fluent", None), "a pear, fluent style"),
    ],
)
def test_captions_say_what_is_named_and_no_more(parts, text):
    assert caption(*parts) == text


def test_held_out_combinations_are_a_fifth_and_leave_every_drawing_in_training():
    mask = held_out_mask()
    assert mask.shape == (102, 3, 8)
    assert 0.19 < mask.mean() < 0.215
    assert mask.sum(2).max() <= 2
    assert (mask == held_out_mask()).all()


def test_drawings_are_complete_and_visible(drawings):
    assert drawings.rgba.shape == (102, 3, 128, 128, 4)
    coverage = (drawings.rgba[..., 3] > 127).mean((2, 3))
    assert coverage.min() > 0.1  # every drawing fills a tenth of its tile at least
    assert (drawings.rgba[..., 3].max((2, 3)) == 255).all()


def test_unreadable_and_foreign_atlas_are_one_line_errors(tmp_path):
    from PIL import Image

    with pytest.raises(DataError, match="cannot be read"):
        read_drawings(tmp_path / "none.webp")
    Image.new("RGBA", (4, 4)).save(tmp_path / "small.png")
    with pytest.raises(DataError, match="need 2176x2304"):
        read_drawings(tmp_path / "small.png")


def test_an_unrotated_scene_is_the_drawing_over_its_background(drawings):
    still = Placement(size=(1.0, 1.0), rotation=0.0, overhang=0.0)
    renderer = SceneRenderer(drawings, 32, still)
    generator = torch.Generator().manual_seed(0)
    picture = renderer(_spec(concept=5, style=1, background=3), generator)[0]
    rgba = torch.from_numpy(drawings.rgba[5, 1]).float() / 255
    colour = torch.tensor(list(BACKGROUNDS.values())[3]) / 255
    over = rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:]) * colour
    expected = over.reshape(32, 4, 32, 4, 3).mean((1, 3)).permute(2, 0, 1) * 2 - 1
    mirrored = expected.flip(2)
    difference = min((picture - expected).abs().max(), (picture - mirrored).abs().max())
    assert difference < 2e-5


def test_size_sets_the_extent_and_position_keeps_it_inside(drawings):
    solid = Drawings(np.full((102, 3, 128, 128, 4), 255, np.uint8))
    half = SceneRenderer(solid, 32, Placement(size=(0.5, 0.5), rotation=0.0, overhang=0.0))
    pictures = half(_spec(background=1, count=64), torch.Generator().manual_seed(1))
    ink = (pictures[:, 0] + 1) / 2
    black = 32 / 255
    area = ((ink - black) / (1 - black)).sum((1, 2))
    torch.testing.assert_close(area, torch.full((64,), 256.0), rtol=2e-2, atol=0)
    centres = (ink.sum(1) * torch.arange(32)).sum(1) / ink.sum((1, 2))
    assert centres.std() > 1  # the place varies


def test_two_draws_of_one_caption_differ_and_one_seed_repeats(drawings):
    renderer = SceneRenderer(drawings, 32)
    first = renderer(_spec(), torch.Generator().manual_seed(1))
    again = renderer(_spec(), torch.Generator().manual_seed(1))
    other = renderer(_spec(), torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.05


def test_specs_keep_to_what_is_allowed_and_are_silent_half_the_time():
    mask = held_out_mask()
    spec = draw_specs(4000, ~mask, torch.Generator().manual_seed(0))
    assert not mask[spec.concept, spec.style, spec.background].any()
    assert 0.46 < (spec.named_style == UNSAID).float().mean() < 0.54
    assert 0.46 < (spec.named_background == UNSAID).float().mean() < 0.54
    said = spec.named_style != UNSAID
    assert torch.equal(spec.named_style[said], spec.style[said])


def test_batches_are_a_function_of_the_seed(drawings):
    renderer, mask = SceneRenderer(drawings, 32), ~held_out_mask()
    (spec, pictures), (same_spec, same_pictures) = (next(scene_batches(renderer, mask, 4, 7)) for _ in range(2))
    assert torch.equal(pictures, same_pictures)
    assert spec.captions() == same_spec.captions()
    assert pictures.shape == (4, 3, 32, 32)
    assert pictures.abs().max() <= 1 + 1e-6


def test_caption_index_points_at_the_scene_s_own_caption():
    spec = draw_specs(200, ~held_out_mask(), torch.Generator().manual_seed(3))
    captions = all_captions()
    assert len(captions) == 102 * 4 * 9
    assert [captions[i] for i in caption_index(spec)] == spec.captions()


def test_matches_are_the_captions_that_are_true():
    spec = SceneSpec(
        torch.tensor([4, 4, 4, 9]), torch.tensor([0, 0, 1, 0]), torch.tensor([2, 3, 2, 2]),
        torch.tensor([UNSAID, 0, 1, UNSAID]), torch.tensor([UNSAID, UNSAID, 2, 2]),
    )  # fmt: skip
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert matches(spec).int().tolist() == expected


def test_contrastive_loss_is_infonce_where_each_caption_has_one_picture():
    torch.manual_seed(0)
    text, image = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    logits = 5 * text @ image.T
    labels = torch.arange(6)
    expected = (
        torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)
    ) / 2
    loss = contrastive_loss(text, image, torch.eye(6).bool(), torch.tensor(5.0))
    torch.testing.assert_close(loss, expected)


def test_min_snr_weights():
    alphas_cumprod = torch.tensor([0.99, 5 / 6, 0.5, 0.01])  # SNR 99, 5, 1, 1/99
    torch.testing.assert_close(min_snr_weight(alphas_cumprod), torch.tensor([5 / 99, 1, 1, 1]))


def test_every_caption_fits_the_tokenizer_and_every_text_has_tokens(tmp_path):
    from transformers import CLIPTokenizer

    train_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    lengths = [len(ids) for ids in tokenizer(all_captions()).input_ids]
    assert max(lengths) <= 16 < MAX_LENGTH == tokenizer.model_max_length
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("").input_ids == [start, end]
    odd = tokenizer("Grüße 🐱 中文").input_ids
    assert start not in odd[1:-1]
    assert end not in odd[1:-1]  # nothing is unknown: every byte is a token
    assert tokenizer("A FOX").input_ids == tokenizer("a fox").input_ids


class _HalfVae:
    """Encodes to the mean of 4x4 patches."""

    class config:  # noqa: N801 (diffusers' name)
        scaling_factor = 2.0

    def encode(self, pictures):
        class Distribution:
            def mode(self):
                return torch.nn.functional.avg_pool2d(pictures, 4)

        return type("Encoded", (), {"latent_dist": Distribution()})()


def test_latent_pool_pairs_latents_with_their_captions_and_renews(drawings):
    renderer = SceneRenderer(drawings, 32, Placement(size=(0.5, 0.5), rotation=0.0))
    pool = LatentPool(_HalfVae(), renderer, ~held_out_mask(), size=128, seed=0, chunk=64)
    latents, index = pool.draw(96)
    assert latents.shape == (96, 3, 8, 8)
    captions, colours = all_captions(), list(BACKGROUNDS)
    border = torch.cat([latents[:, :, 0], latents[:, :, -1], latents[:, :, :, 0], latents[:, :, :, -1]], 2)
    checked = 0
    for values, i in zip(border, index.tolist(), strict=True):
        named = [c for c in colours if f"on a {c} background" in captions[i]]
        if named:  # most border cells show the bare background, scaled
            colour = (torch.tensor(BACKGROUNDS[named[0]]) / 255 * 2 - 1) * 2
            assert (values - colour[:, None]).abs().amax(0).median() < 1e-4
            checked += 1
    assert checked > 20
    before = pool._latents.clone()
    pool.renew()
    assert [torch.equal(a, b) for a, b in zip(before, pool._latents, strict=True)].count(False) == 1

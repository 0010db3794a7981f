"""Canvases: what is seen of each drawing, and that the masks fit the very pictures."""

import numpy as np
import pytest
import torch

from trainer.pretrain.canvases import draw_canvases, joined, visible
from trainer.pretrain.concepts import BACKGROUNDS, CONCEPTS
from trainer.pretrain.drawings import Drawings, read_drawings
from trainer.pretrain.scenes import SceneRenderer, held_out_mask


@pytest.fixture(scope="module")
def renderer():
    return SceneRenderer(read_drawings(), 32)


def drawn(renderer, drawings, count=40, seed=0, allowed=None):
    allowed = ~held_out_mask() if allowed is None else allowed
    return draw_canvases(renderer, drawings, count, allowed, torch.Generator().manual_seed(seed))


def test_what_is_seen_of_a_layer_is_its_alpha_through_those_above():
    alpha = torch.tensor([0.8, 0.5, 0.25]).view(1, 3, 1, 1)
    torch.testing.assert_close(visible(alpha).flatten(), torch.tensor([0.8 * 0.5 * 0.75, 0.5 * 0.75, 0.25]))
    solid = torch.zeros(1, 2, 4, 4)
    solid[0, 0, :3], solid[0, 1, 2:] = 1.0, 1.0
    seen = visible(solid)[0]
    assert seen[0].sum(1).tolist() == [4, 4, 0, 0]
    assert torch.equal(seen[1], solid[0, 1])


@pytest.mark.parametrize("drawings", [1, 2, 3])
def test_masks_never_overlap_and_leave_enough_to_be_seen(renderer, drawings):
    canvases = drawn(renderer, drawings)
    assert canvases.pictures.shape == (40, 3, 32, 32)
    counts = [len(known.classes) for known in canvases.truth]
    assert max(counts) == drawings
    assert sum(counts) > 0.85 * 40 * drawings
    for known in canvases.truth:
        assert known.masks.shape == (len(known.classes), 32, 32)
        assert known.masks.dtype is torch.bool
        assert int(known.masks.sum(0).max()) <= 1
        assert int(known.masks.sum((1, 2)).min()) >= 12


def test_the_masks_fit_the_picture():
    """Squares of one colour, no two concepts' alike: where a mask is, the picture has its concept's colour."""
    rgba = np.full((102, 3, 128, 128, 4), 255, np.uint8)
    rgba[..., 0] = (2 * np.arange(102))[:, None, None, None]
    rgba[..., 1:3] = 7
    renderer = SceneRenderer(Drawings(rgba), 32)
    canvases, right = drawn(renderer, 3), []
    for picture, known in zip((canvases.pictures / 2 + 0.5) * 255, canvases.truth, strict=True):
        for mask, number in zip(known.masks, known.classes.tolist(), strict=True):
            inner = -torch.nn.functional.max_pool2d(-mask[None].float(), 5, 1, 2)[0] > 0
            right.append(((picture[0][inner] - 2 * number).abs() < 0.5) & ((picture[1][inner] - 7).abs() < 0.5))
    assert len(torch.cat(right)) > 40 * 80
    assert float(torch.cat(right).float().mean()) > 0.98  # the tip of a corner mixes in and is no mask


def test_only_what_is_allowed_on_the_background_is_drawn(renderer):
    """One background, two drawings: both are there, whatever the generator draws."""
    allowed = np.zeros((len(CONCEPTS), 3, len(BACKGROUNDS)), bool)
    allowed[4, 0] = allowed[9, 2] = True
    canvases = drawn(renderer, 2, allowed=allowed)
    classes = {tuple(sorted(known.classes.tolist())) for known in canvases.truth}
    assert classes <= {(4, 9), (4,), (9,)}
    assert (4, 9) in classes


def test_canvases_are_a_function_of_the_seed(renderer):
    first, again, other = (drawn(renderer, 2, count=6, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.pictures, again.pictures)
    assert all(torch.equal(a.masks, b.masks) for a, b in zip(first.truth, again.truth, strict=True))
    assert not torch.equal(first.pictures, other.pictures)
    both = joined([first, other])
    assert torch.equal(both.pictures, torch.cat([first.pictures, other.pictures]))
    assert both.truth == [*first.truth, *other.truth]

"""Structure feedback: the segmenter's own loss, COCO's polygons in cropped squares, a step from a picture."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hypersd_export.diffusion import run, start_sample
from hypersd_export.errors import DataError, ModelError, OptionError
from tests.train.small_run import log
from tests.train.small_unet import SHAPE, batch
from tests.train.test_feedback import PLANS, Flat, below, brightness, settings, small, stacked
from trainer.base import open_training_base
from trainer.data.coco import CocoInstances
from trainer.distill import feedback_run
from trainer.distill.config import DataConfig
from trainer.distill.feedback import FeedbackStep, Structure
from trainer.distill.feedback_config import StructureConfig
from trainer.distill.networks import Role
from trainer.distill.run import Distillation
from trainer.rewards.preprocess import normalise
from trainer.rewards.structure import IMAGENET_MEAN, IMAGENET_STD, InstanceLoss, Instances

__all__ = ["below"]  # a fixture
SIZE = 64
CLASSES = {"cat": 0, "dog": 1, "bird": 2}


@pytest.fixture(scope="module")
def segmenters(tmp_path_factory):
    """Folders of a small random MaskFormer and Mask2Former."""
    from transformers import (
        DetrConfig,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        MaskFormerConfig,
        MaskFormerForInstanceSegmentation,
        SwinConfig,
    )

    root = tmp_path_factory.mktemp("segmenters")
    swin = SwinConfig(
        image_size=SIZE, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    common = {"backbone_config": swin, "mask_feature_size": 32, "id2label": {n: c for c, n in CLASSES.items()}}
    detr = DetrConfig(
        d_model=16, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2, encoder_attention_heads=2,
        decoder_ffn_dim=16, encoder_ffn_dim=16, num_queries=5,
    )  # fmt: skip
    torch.manual_seed(0)
    made = {
        "maskformer": MaskFormerForInstanceSegmentation(
            MaskFormerConfig(**common, decoder_config=detr, fpn_feature_size=32)
        ),
        "mask2former": Mask2FormerForUniversalSegmentation(
            Mask2FormerConfig(
                **common, feature_size=32, hidden_dim=32, encoder_layers=1, decoder_layers=2, num_queries=5,
                encoder_feedforward_dim=16, dim_feedforward=16, num_attention_heads=2, train_num_points=64,
            )
        ),
    }  # fmt: skip
    for name, model in made.items():
        model.save_pretrained(root / name)
    return root


def pictures(seed=0):
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def two():
    """A cat and a bird."""
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    masks[0, 4:30, 4:30] = True
    masks[1, 40:, 20:] = True
    return Instances(masks, torch.tensor([0, 2]))


NOTHING = Instances(torch.zeros(0, SIZE, SIZE, dtype=torch.bool), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["maskformer", "mask2former"])
def test_it_is_the_models_own_loss_of_normalised_pixels(segmenters, kind):
    from transformers import AutoModelForUniversalSegmentation

    loss, image, known = InstanceLoss(segmenters / kind), pictures(), two()
    assert loss.classes == CLASSES
    model = AutoModelForUniversalSegmentation.from_pretrained(segmenters / kind).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.manual_seed(7)
    expected = model(
        pixel_values=((image[:1] / 2 + 0.5) - mean) / std, mask_labels=[known.masks.float()],
        class_labels=[known.classes],
    ).loss.reshape(())  # fmt: skip
    made = loss(image, [known, NOTHING], [7, 8])
    torch.testing.assert_close(made, torch.stack([expected, torch.zeros(())]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["maskformer", "mask2former"])
def test_its_gradient_reaches_the_pictures_alone_and_going_against_it_helps(segmenters, kind):
    loss, image = InstanceLoss(segmenters / kind), pictures()[:1].requires_grad_()
    before = loss(image, [two()], [3])
    (gradient,) = torch.autograd.grad(before.sum(), image)
    step = 0.05 * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (loss(image + sign * step, [two()], [3]) for sign in (1, -1))
    assert float(down) < float(before.detach()) < float(up)
    if kind == "maskformer":  # the other one's points move with the masks, which is no part of its gradient
        assert float((up - down) / 0.1) == pytest.approx(float(gradient.norm()), rel=0.2)
    assert not any(weight.requires_grad for weight in loss._model.parameters())


def test_what_it_draws_is_a_function_of_the_seed_and_disturbs_nobody(segmenters):
    loss = InstanceLoss(segmenters / "mask2former")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = loss(pictures(), [two()] * 2, [3, 4])
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(loss(pictures(), [two()] * 2, [3, 4]), first)
    assert not torch.equal(loss(pictures(), [two()] * 2, [5, 6]), first)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(pictures(), [two()] * 2, [3, 4]), first)


def test_other_models_are_refused(segmenters, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="a clip, where structure feedback takes maskformer or mask2former"):
        InstanceLoss(tmp_path)
    (tmp_path / "config.json").write_text((segmenters / "maskformer" / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded as MaskFormerForInstanceSegmentation"):
        InstanceLoss(tmp_path)


def coco(path, **changes):
    """Two pictures of 40x20 px: the first with a cat, a crowd of dogs and a bird at the left rim; the second empty."""
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 20},
                   {"id": 2, "file_name": "b.png", "width": 40, "height": 20}],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}, {"id": 16, "name": "bird"}],
        "annotations": [
            {"image_id": 1, "category_id": 17, "iscrowd": 0, "segmentation": [[12, 4, 23, 4, 23, 13, 12, 13]]},
            {"image_id": 1, "category_id": 18, "iscrowd": 1, "segmentation": {"counts": [1], "size": [20, 40]}},
            {"image_id": 1, "category_id": 16, "iscrowd": 0, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]},
        ],
    }  # fmt: skip
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_cocos_polygons_become_masks_of_the_cropped_square(tmp_path):
    read = CocoInstances(coco(tmp_path / "c.json"), CLASSES, 20)
    first, second = read(["folder/a.png", "b.png"])
    assert first.classes.tolist() == [0]  # the crowd is left out, and of the bird the crop leaves nothing
    expected = torch.zeros(20, 20, dtype=torch.bool)
    expected[4:14, 2:14] = True  # the crop begins at column 10
    assert torch.equal(first.masks[0], expected)
    assert (second.masks.shape, second.classes.shape) == ((0, 20, 20), (0,))
    (half,) = CocoInstances(tmp_path / "c.json", CLASSES, 10)(["a.png"])
    assert torch.equal(half.masks[0], expected[::2, ::2])


def test_annotations_that_do_not_fit_are_refused(tmp_path):
    path = coco(tmp_path / "c.json")
    with pytest.raises(DataError, match=r"c.json: does not list x.png; take the annotations of this data"):
        CocoInstances(path, CLASSES, 20)(["x.png"])
    with pytest.raises(DataError, match=r"the segmenter has no class 'bird' \(of 1\)"):
        CocoInstances(path, {"cat": 0, "dog": 1}, 20)
    coded = [{"image_id": 1, "category_id": 17, "segmentation": {"counts": "abc", "size": [20, 40]}}]
    with pytest.raises(DataError, match=r"an instance of a.png is run-length coded; only polygons are read"):
        CocoInstances(coco(tmp_path / "d.json", annotations=coded), CLASSES, 20)(["a.png"])
    (tmp_path / "e.json").write_text('{"images": []}')
    with pytest.raises(DataError, match=r"not instances in COCO's form \(KeyError: 'categories'\)"):
        CocoInstances(tmp_path / "e.json", CLASSES, 20)


class Darkness:
    """A structure loss that is the picture's own brightness, and remembers what it was asked."""

    classes = CLASSES

    def __init__(self):
        self.asked = []

    def __call__(self, images, truth, seeds):
        self.asked += list(zip(truth, seeds, strict=True))
        return images.mean((1, 2, 3)) + 2


def make(share=0.5, weight=3.0, count=8, **changes):
    """A step, its structure loss, a batch and its draws."""
    base = settings()
    feedback = replace(base.feedback, structure=StructureConfig(model="m", annotations="a", share=share, weight=weight))
    config = replace(base, feedback=feedback, batch=count)
    dark = Darkness()
    step = FeedbackStep(
        stacked(), config, config.stages[0], rewards={"clip": brightness}, plans=PLANS, vae=Flat(),
        structure=Structure(dark, lambda names: [f"of {name}" for name in names]),
    )  # fmt: skip
    return step, dark, batch(count), replace(step.draw(0, SHAPE), **changes)


@pytest.mark.parametrize("course", range(len(PLANS)))
def test_it_begins_from_the_noised_picture_at_a_drawn_step(course):
    """As image-to-image does, by the plan's own p and q."""
    count = PLANS[course].num_steps
    begin = torch.tensor([0, 0, count - 1, count - 1])
    step, _, given, draws = make(
        count=4, course=torch.full((4,), course), index=torch.full((4,), count - 1), begin=begin,
        structured=torch.tensor([True, False, True, True]),
    )  # fmt: skip
    begin[1] = 0
    table, played = PLANS[course].table(), step.play(given, draws)
    for row in range(4):
        x = table.init_noise_sigma * draws.noise[row : row + 1]
        if draws.structured[row]:
            x = start_sample(
                table, start=int(begin[row]), latents=given.latents[row : row + 1], noise=draws.noise[row : row + 1]
            )
        one, text = slice(row, row + 1), given.conditioning.rows(slice(row, row + 1))
        if begin[row] < count - 1:
            before = replace(table, rows=table.rows[:-1])
            x = run(
                before, lambda x, t, text=text: step.networks.frozen(Role.STUDENT, x, torch.tensor([int(t)]), text), x,
                step_noise=lambda stream, one=one: draws.path_noise[one, stream - 1], start=int(begin[row]),
            )  # fmt: skip
        torch.testing.assert_close(played[one], x, rtol=1e-4, atol=1e-4)


def test_each_sample_is_asked_for_one_thing_and_the_shares_are_divided_out():
    step, dark, given, draws = make(share=0.25, structured=torch.arange(8) < 2)
    out = step(given, draws)
    bright = step.pictures(given, draws).mean((1, 2, 3)).detach()
    hinge = 2 * (0.5 - bright[2:]).clamp(min=0).sum() / 8 / 0.75
    lost = (bright[:2] + 2).sum() / 8 / 0.25
    torch.testing.assert_close(out.loss.detach(), hinge + 3 * lost)
    torch.testing.assert_close(out.logs["structure"], lost)
    torch.testing.assert_close(out.logs["reward_clip"], bright[2:].mean())
    assert dark.asked == [("of sample 0", int(draws.seed[0])), ("of sample 1", int(draws.seed[1]))]


@pytest.mark.parametrize("structured", [True, False])
def test_a_micro_batch_of_one_kind_alone_goes_through(structured):
    step, _, given, draws = make(structured=torch.full((8,), structured))
    out = step(given, draws)
    out.loss.backward()
    assert set(out.logs) == {"structure", "reward_clip"}
    assert float(out.logs["reward_clip" if structured else "structure"]) == 0
    assert all(weight.grad is not None for weight in step.networks.student_parameters())


def test_of_a_large_batch_the_share_begins_from_pictures_and_never_after_the_drawn_step():
    draws = make(share=0.3, count=400)[3]
    assert float(draws.structured.float().mean()) == pytest.approx(0.3, abs=0.08)
    assert (draws.begin <= draws.index).all()
    assert (draws.begin[~draws.structured] == 0).all()
    assert set(draws.begin[draws.structured].tolist()) == {0, 1, 2, 3}


def test_a_run_with_a_segmenter_and_annotated_pictures(tiny_base, below, segmenters, tmp_path, monkeypatch):
    monkeypatch.setattr(feedback_run, "open_rewards", lambda terms, device: [brightness for _ in terms])
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(("a", "b")):
        noise = np.random.default_rng(number).integers(0, 255, (70, 140, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a cat")
    images = [{"id": n, "file_name": f"{x}.png", "width": 140, "height": 70} for n, x in ((1, "a"), (2, "b"))]
    square = [{"image_id": 1, "category_id": 17, "segmentation": [[45, 5, 80, 5, 80, 60, 45, 60]]}]
    annotations = coco(tmp_path / "c.json", images=images, annotations=square)
    config = small(tiny_base, below, count=3, micro_batch=2)
    structure = StructureConfig(model=str(segmenters / "mask2former"), annotations=str(annotations))
    config = replace(
        config, feedback=replace(config.feedback, structure=structure),
        data=DataConfig(source=str(folder), size_px=SIZE),
    )  # fmt: skip
    for name in ("one", "two"):
        base = open_training_base(str(tiny_base))
        for _ in Distillation(config, tmp_path / name, base=base).run():
            pass
    made = [line for line in log(tmp_path / "one") if "structure" in line]
    assert len(made) == 3
    assert max(line["structure"] for line in made) > 0.5
    assert log(tmp_path / "one") == log(tmp_path / "two")


@pytest.mark.parametrize(("changes", "words"), [
    ({"model": "m"}, "feedback.structure: model 'm', annotations '': takes both or neither"),
    ({"share": 1.0}, r"feedback.structure: share 1.0, weight 1.0: in \(0, 1\), and above 0"),
    ({"weight": 0.0}, "weight 0.0"),
])  # fmt: skip
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(OptionError, match=words):
        StructureConfig(**changes)


def test_normalising_is_the_formula():
    image = pictures()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(normalise(image, IMAGENET_MEAN, IMAGENET_STD), (image / 2 + 0.5 - mean) / std)

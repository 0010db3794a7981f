"""The built-in segmenter: its figures by hand, its training, its folder and its command; the weights that ship."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hypersd_export.diffusion import FewStepPlan, Guidance, Solver, initial_noise
from hypersd_export.errors import DataError, OptionError
from hypersd_export.model.files import read_header
from tests.train.test_feedback import below, small
from trainer.base import encode_pictures, open_training_base
from trainer.cli import app
from trainer.config import as_json, override
from trainer.data.builtin import BuiltinInstances, BuiltinScenes
from trainer.distill.config import DataConfig
from trainer.distill.feedback_config import StructureConfig
from trainer.distill.run import Distillation
from trainer.distill.validate import decode
from trainer.pretrain.canvases import Canvases, draw_canvases, scene_canvases
from trainer.pretrain.concepts import CONCEPTS, spoken
from trainer.pretrain.degrade import DEGRADATIONS, degrade
from trainer.pretrain.drawings import read_drawings
from trainer.pretrain.preference import Teacher
from trainer.pretrain.scenes import SceneRenderer, draw_specs, held_out_mask
from trainer.pretrain.segmented import average_precision, found_figures, iou, mean_loss
from trainer.pretrain.segmenter import SegmenterConfig, SegmenterTraining
from trainer.rewards.structure import BUILTIN_SEGMENTER, Found, InstanceLoss, Instances

__all__ = ["below"]  # a fixture


@pytest.fixture(scope="module")
def renderer():
    return SceneRenderer(read_drawings(), 32)


def strip(*columns, of=8):
    """A mask [1, of] of these columns."""
    mask = torch.zeros(1, of, dtype=torch.bool)
    mask[0, list(columns)] = True
    return mask


def test_overlap_is_intersection_over_union():
    a = torch.stack([strip(0, 1, 2, 3), strip()])
    b = torch.stack([strip(2, 3, 4), strip(0, 1, 2, 3), strip()])
    torch.testing.assert_close(iou(a, b), torch.tensor([[2 / 5, 1, 0], [0, 0, 0]], dtype=torch.float64))


@pytest.mark.parametrize(("hits", "instances", "expected"), [
    ([1, 1], 2, 1.0),
    ([1, 0, 1], 2, (1 + 2 / 3) / 2),
    ([0, 1, 1], 2, 2 / 3),  # the best precision at this recall or beyond
    ([1], 4, 0.25),
    ([0, 0], 3, 0.0),
])  # fmt: skip
def test_average_precision_is_the_area_under_the_curve(hits, instances, expected):
    scores = torch.linspace(0.9, 0.1, len(hits))
    order = torch.randperm(len(hits), generator=torch.Generator().manual_seed(0))
    made = average_precision(scores[order], torch.tensor(hits, dtype=torch.bool)[order], instances)
    assert made == pytest.approx(expected)


def test_what_was_found_is_counted():
    """Two instances: one found with its class, one with another's; a second proposal of the first is a false one, and
    one that is likelier nothing is no mask for the overlap."""
    truth = [Instances(torch.stack([strip(0, 1, 2, 3), strip(4, 5, 6)]), torch.tensor([7, 8]))]
    masks = torch.stack([strip(0, 1, 2), strip(4, 5), strip(0, 1, 2, 3), strip(4, 5, 6)])[None]
    classes = torch.tensor([[7, 9, 7, 8]])
    found = Found(masks, classes, torch.tensor([[1, 0.9, 1, 0.2]]), torch.tensor([[0.9, 0.8, 0.7, 0.1]]))
    figures = found_figures(found, truth)
    assert figures["instances"] == 2
    assert figures["mask IoU"] == pytest.approx((1 + 2 / 3) / 2)
    assert figures["class right"] == 0.5
    assert figures["AP50"] == pytest.approx((1 + 2 / 4) / 2)  # hits at ranks 1 and 4
    nothing = Found(masks, classes, torch.zeros(1, 4), torch.zeros(1, 4))
    assert found_figures(nothing, truth)["mask IoU"] == 0


def test_a_scenes_mask_fits_the_very_picture_that_the_renderer_draws(renderer):
    spec = draw_specs(12, ~held_out_mask(), torch.Generator().manual_seed(4))
    made = scene_canvases(renderer, spec, torch.Generator().manual_seed(5))
    assert torch.equal(made.pictures, renderer(spec, torch.Generator().manual_seed(5)))
    plain = renderer.backdrop(spec.background) * 2 - 1
    for picture, colour, known, concept in zip(made.pictures, plain, made.truth, spec.concept, strict=True):
        assert known.classes.tolist() == [int(concept)]
        changed = (picture - colour).abs().amax(0) > 1e-4
        assert bool(changed[known.masks[0]].float().mean() > 0.9)  # but where a drawing has the background's colour
        faint = (picture - colour).abs().amax(0)[~known.masks[0]]
        assert float((faint > 0.6).float().mean()) < 0.1  # outside, rims and holes alone


QUICK = (
    "batch=6", "held_out=6", "width=8", "hidden=16", "layers=1", "queries=4", "points=32", "steps=3", "few_steps=2",
    "schedule.steps=24", "schedule.cooldown=2", "schedule.warmup=3", "schedule.lr=5e-3",
)  # fmt: skip
KINDS = ["drawings", "the teacher in 3 steps", "the teacher in 2 steps", *(f"degraded by {n}" for n in DEGRADATIONS)]


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """A short run: its folder, its configuration, its results and itself."""
    config = override(SegmenterConfig(base=str(tiny_base)), QUICK)
    training = SegmenterTraining(config, tmp_path_factory.mktemp("segmenter"))
    return training.out, config, list(training.run()), training


def test_a_run_writes_a_folder_of_transformers_and_says_what_it_measured(trained):
    out, config, results, training = trained
    assert [result.step for result in results] == list(range(24))
    assert sum(result.losses["loss"] for result in results[-3:]) / 3 < results[0].losses["loss"] - 2
    folder = out / "segmenter"
    loss = InstanceLoss(folder)
    assert loss.classes == {name: number for number, name in enumerate(CONCEPTS)}
    header = read_header(folder / "model.safetensors")
    assert {tensor.dtype for name, tensor in header.tensors.items() if name.startswith("class")} == {"F16"}
    record = json.loads((folder / "segmenter.json").read_text())
    assert record["held_out"] == training.figures
    assert record["config"] == as_json(config)
    figures = ("instances", "mask IoU", "class right", "AP50")
    found = [f"{count} drawings, {name}" for count in (1, 2, 3) for name in figures]
    assert list(training.figures) == [*found, *(f"loss, {kind}" for kind in KINDS)]
    assert training.figures["1 drawings, instances"] == 6


def test_a_finished_run_is_not_trained_again_and_a_killed_one_goes_on(trained, tiny_base, tmp_path):
    out, config, _, training = trained
    again = SegmenterTraining(config, out)
    assert list(again.run()) == []
    assert again.figures == training.figures
    config = override(config, ["schedule.steps=6"])
    for result in SegmenterTraining(config, tmp_path).run():
        if result.step == 4:  # the state is that of before the cool-down, at step 6 - 2
            break
    assert not (tmp_path / "segmenter").exists()
    going_on = SegmenterTraining(config, tmp_path)
    assert [result.step for result in going_on.run()] == [4, 5]
    assert InstanceLoss(tmp_path / "segmenter").classes == InstanceLoss(out / "segmenter").classes


def test_the_same_seed_gives_the_same_losses(trained, tmp_path):
    _, config, results, _ = trained
    first = next(SegmenterTraining(config, tmp_path).run())
    assert first.losses == results[0].losses


def test_settings_that_cannot_be():
    with pytest.raises(OptionError, match="batch 8: must be a multiple of 3, a third for each number"):
        SegmenterConfig(batch=8)


def test_the_command_prints_what_it_would_do(tmp_path):
    result = CliRunner().invoke(app, ["segmenter", "--out", str(tmp_path / "x"), "--set", "batch=9", "--dry-run"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["batch"] == 9
    assert not (tmp_path / "x").exists()


def test_the_command_trains_and_says_how_well(trained):
    out, config, _, training = trained  # it is done already: the command says what there is
    given = [word for value in (*QUICK, f"base={config.base}") for word in ("--set", value)]
    result = CliRunner().invoke(app, ["segmenter", "--out", str(out), *given])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert sum(line.startswith("held out, ") for line in lines) == len(training.figures)
    assert lines[-1] == f"wrote {out / 'segmenter'}"


def test_the_teacher_may_begin_from_pictures(tiny_base):
    """Half noised, and with the last row's t = 499 alone: one step of two."""
    base = open_training_base(str(tiny_base))
    size, generator = base.native_size, torch.Generator().manual_seed(0)
    pictures = SceneRenderer(read_drawings(), size)(draw_specs(2, ~held_out_mask(), generator), generator)
    teacher = Teacher(base, 2.0)
    made = teacher(["a cat", "a dog"], 2, 5, pictures=pictures)
    table = FewStepPlan(solver=Solver.DDIM, num_steps=2, guidance=Guidance.of(2.0)).table()
    vae, encoder, unet = base.load_vae(torch.float32), base.prompt_encoder(torch.float32), base.load_unet(torch.float32)
    text, empty = encoder(["a dog"], size=(size, size)).states, encoder.empty().states
    noise = torch.from_numpy(initial_noise(seed=6, index=0, shape=base.latent_shape(size)))[None]
    row = table.rows[1]
    with torch.no_grad():
        x = row.p * encode_pictures(vae, pictures[1:]) + row.q * noise
        u, c = (unet(row.k * x, int(row.t), states, return_dict=False)[0] for states in (empty, text))
        expected = decode(vae, row.a * x + row.b * (u + 2.0 * (c - u)))
    torch.testing.assert_close(made[1:], expected, rtol=0, atol=0.05)  # the UNet runs in bfloat16


def test_the_scenes_annotations_fit_the_very_pictures_that_were_encoded(tiny_base, tmp_path):
    base = open_training_base(str(tiny_base))
    source = BuiltinScenes(base, seed=3, cache=tmp_path, size_px=base.native_size)
    batch = source.batch([0, 7, 300])
    classes = {name: 101 - number for number, name in enumerate(CONCEPTS)}  # another numbering than the concepts' own
    annotations = BuiltinInstances(source, classes)
    known = annotations(batch.names)
    for row, (chunk, item) in enumerate(((0, 0), (0, 7), (1, 44))):
        canvases, spec = source.canvases(chunk), source.specs(chunk)
        encoded = encode_pictures(base.load_vae(torch.float32), canvases.pictures[item : item + 1])
        torch.testing.assert_close(batch.latents[row], encoded[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(known[row].masks, canvases.truth[item].masks)
        assert known[row].classes.tolist() == [101 - int(spec.concept[item])]
        assert spoken(CONCEPTS[int(spec.concept[item])]) in batch.captions[row]
    with pytest.raises(DataError, match=r"'a\.png' is no built-in scene"):
        annotations(["a.png"])
    with pytest.raises(DataError, match=r"has no class 'avocado' \(of 101 that the built-in scenes show\)"):
        BuiltinInstances(source, {"bat": 0})


def test_only_the_built_in_scenes_have_built_in_annotations(tiny_base, below, tmp_path, trained):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "a.txt").write_text("a cat")
    config = small(tiny_base, below, count=1)
    structure = StructureConfig(model=str(trained[0] / "segmenter"), annotations="builtin")
    config = replace(
        config, feedback=replace(config.feedback, structure=structure), data=DataConfig(source=str(folder))
    )
    with pytest.raises(
        OptionError, match=r"annotations=builtin: only the built-in scenes have them, and data.source is"
    ):
        next(Distillation(config, tmp_path / "run", base=open_training_base(str(tiny_base))).run())


@pytest.fixture(scope="module")
def shipped():
    return InstanceLoss(BUILTIN_SEGMENTER)


def test_what_ships_is_small_and_is_of_the_recipe(shipped):
    assert (BUILTIN_SEGMENTER / "model.safetensors").stat().st_size < 3e6
    assert list(shipped.classes) == list(CONCEPTS)
    record = json.loads((BUILTIN_SEGMENTER / "segmenter.json").read_text())
    assert record["config"] == as_json(SegmenterConfig())
    assert record["held_out"]["1 drawings, instances"] == 256


def test_what_ships_finds_held_out_drawings(shipped, renderer):
    """On 64 canvases, far fewer than the record's: bounds are well below its figures."""
    one, two = (
        draw_canvases(renderer, number, 64, held_out_mask(), torch.Generator().manual_seed(77)) for number in (1, 2)
    )
    alone, both = (found_figures(shipped.find(made.pictures), made.truth) for made in (one, two))
    assert alone["mask IoU"] > 0.85
    assert alone["class right"] > 0.7
    assert both["mask IoU"] > 0.65
    assert both["class right"] > 0.45


def test_its_loss_knows_the_right_mask_and_class_and_a_picture_that_is_worse(shipped, renderer):
    generator = torch.Generator().manual_seed(78)
    scenes = scene_canvases(renderer, draw_specs(24, held_out_mask(), generator), generator)
    clean = mean_loss(shipped, scenes)
    moved = [Instances(known.masks.roll(8, 2), known.classes) for known in scenes.truth]
    other = [Instances(known.masks, (known.classes + 50) % 102) for known in scenes.truth]
    assert mean_loss(shipped, Canvases(scenes.pictures, moved)) > 1.3 * clean
    assert mean_loss(shipped, Canvases(scenes.pictures, other)) > 1.3 * clean
    for kind, name in enumerate(DEGRADATIONS):
        if name in ("blur", "noise", "blocks", "ghost"):
            assert mean_loss(shipped, Canvases(degrade(scenes.pictures, generator, kind), scenes.truth)) > clean


def test_a_worse_picture_gets_better_against_the_gradient_of_its_loss(shipped, renderer):
    """Six blurred scenes, eight small steps, at the points of each one's own seed: the loss falls in all of them."""
    generator = torch.Generator().manual_seed(79)
    scenes = scene_canvases(renderer, draw_specs(6, held_out_mask(), generator), generator)
    x, seeds = degrade(scenes.pictures, generator, 0), range(6)
    begin = shipped(x, scenes.truth, seeds).detach()
    for _ in range(8):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(shipped(x, scenes.truth, seeds).sum(), x)
        x = (x - 0.1 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).detach()
    assert bool((shipped(x, scenes.truth, seeds) < begin).all())

"""Figures of pictures whose answers are known, the cache of pictures, and a run that was killed."""

import json

import numpy as np
import pytest

from benchmarks.bench import quality
from benchmarks.bench.eyes import Eye
from benchmarks.bench.gallery import Gallery, Series, Share, own_gpu, picture_key
from benchmarks.bench.prompts import Prompt
from benchmarks.bench.quality import (
    Candidate,
    Exam,
    Question,
    against,
    by_category,
    differences,
    figures_json,
    mean_of_rows,
    psnr_of,
    rows_of,
)
from benchmarks.feature_cache import FeatureCache
from benchmarks.metrics import unit
from hypersd_export.errors import BundleError, OptionError

RNG = np.random.default_rng(0)
WORDS = [f"word {i}" for i in range(70)]


def seeded(text, seed=0):
    return np.random.default_rng([*text.encode(), seed])


class Colours:
    """A drawer: a picture is its prompt's colour, with noise of its seed."""

    def __init__(self, name="colours", noise=8, dies_at=None):
        self.key, self.noise, self.drawn, self.closed = {"name": name, "noise": noise}, noise, 0, 0
        self.dies_at = dies_at

    def draw(self, prompts, first_seed):
        if self.dies_at is not None and self.drawn >= self.dies_at:
            raise KeyboardInterrupt
        self.drawn += len(prompts)
        return np.stack([self.picture(text, first_seed + i) for i, text in enumerate(prompts)])

    def picture(self, text, seed):
        colour = seeded(text).integers(40, 216, 3)
        noise = np.random.default_rng(seed).integers(-self.noise, self.noise + 1, (6, 6, 3))
        return (colour + noise).clip(0, 255).astype(np.uint8)

    def close(self):
        self.closed += 1


def colour_eye():
    """Sees the mean colour; knows which colour a caption means."""

    def features(colours):
        return unit(np.concatenate([colours, np.ones((len(colours), 1))], 1)) * 2

    return Eye(
        protocol={"name": "colour"}, digest="eye",
        pictures=lambda p: features(p.mean((1, 2)) / 128 - 1),
        captions=lambda t: features(np.stack([seeded(text).integers(40, 216, 3) for text in t]) / 128 - 1),
    )  # fmt: skip


def gallery_at(folder, **settings):
    return Gallery(cache=FeatureCache(folder), eye=colour_eye(), tell=lambda text: None, **settings)


def question(count=70, **settings):
    prompts = tuple(Prompt(text=t, category="even" if i % 2 == 0 else "odd") for i, t in enumerate(WORDS[:count]))
    return Question(**{"prompts": prompts, "varied": 5, "each": 3, "reference": Colours("teacher"), **settings})


def candidate(name, drawer, **settings):
    return Candidate(name=name, kind="bundle", facts={"steps": 4}, drawer=drawer, **settings)


# figures


def test_identical_pictures_are_at_no_distance():
    features = unit(RNG.standard_normal((40, 8)))
    found = against(features, features)
    for name in ("fd_t", "kid_t", "cmmd_t"):
        assert found[name].value == pytest.approx(0, abs=1e-9), name
    assert found["precision"].value == found["recall"].value == 1
    pictures = RNG.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    assert psnr_of(pictures, pictures).value == quality.PSNR_CAP_DB


def test_constant_pictures_have_no_spread_and_cover_nothing():
    reference = unit(RNG.standard_normal((40, 8)))
    constant = np.repeat(reference[:1], 40, 0)
    found = against(constant, reference)
    assert (found["precision"].value, found["recall"].value) == (1, 1 / 40)
    mean, trace = reference.mean(0), np.trace(np.cov(reference, rowvar=False))
    assert found["fd_t"].value == pytest.approx(np.square(constant[0] - mean).sum() + trace, rel=1e-9)
    assert found["kid_t"].value > 0


def test_shuffled_pictures_are_as_near_but_do_not_fit_their_prompts(tmp_path):
    """FD does not see the order; CLIP score sees nothing else."""

    class Shuffled(Colours):
        def draw(self, prompts, first_seed):
            return super().draw(prompts[1:] + prompts[:1], first_seed)

    exam = Exam(gallery=gallery_at(tmp_path), question=question())
    right, wrong = candidate("right", Colours()), candidate("wrong", Shuffled("shuffled"))
    exam.draw([right, wrong])
    good, bad = exam.estimates(right), exam.estimates(wrong)
    assert good["clip_score"].value > 99.5
    assert bad["clip_score"].value < 95
    assert bad["fd_t"].value == pytest.approx(good["fd_t"].value, abs=0.003)
    found = differences(bad, good)
    assert found["clip_score"]["apart"]
    assert found["clip_score"]["value"] == pytest.approx(bad["clip_score"].value - good["clip_score"].value)
    assert found["diversity"]["value"] > 0  # two colours stand among the pictures of one prompt
    assert "precision" not in found


def test_psnr_by_hand():
    black = np.zeros((4, 2, 2, 3), np.uint8)
    assert psnr_of(black, black + np.uint8(51)).value == pytest.approx(20 * np.log10(5))
    half = black.copy()
    half[:2] = 51
    found = psnr_of(half, black)
    assert found.value == pytest.approx(20 * np.log10(5) + 10 * np.log10(2))
    assert found.interval[0] < found.value < found.interval[1]


def test_figures_as_json():
    found = figures_json({"a": mean_of_rows(np.array([1.0, 3.0])), "b": against(np.eye(4), np.eye(4))["recall"]}, 2)
    assert found["a"]["value"] == 2.0
    assert set(found["a"]) == {"value", "low", "high", "count"}
    assert set(found["b"]) == {"value", "count"}
    json.dumps(found, allow_nan=False)


def test_categories_are_means_of_their_own_prompts():
    prompts = [Prompt(text="x", category=c) for c in ("a", "b", "a", "")]
    found = by_category(np.array([1.0, 10.0, 3.0, 5.0]), prompts)
    assert {name: (figure["value"], figure["count"]) for name, figure in found.items()} == {
        "a": (2.0, 2), "b": (10.0, 1), "none": (5.0, 1),
    }  # fmt: skip
    assert by_category(np.ones(2), prompts[:1] * 2) == {}


def test_diversity_can_be_left_out(tmp_path):
    exam = Exam(gallery=gallery_at(tmp_path), question=question(reference=None, varied=0))
    one = candidate("one", Colours("one"))
    assert len(exam.question.jobs(one)) == 1
    exam.draw([one])
    assert set(exam.estimates(one)) == {"clip_score"}
    with pytest.raises(OptionError, match="--varied -1"):
        question(varied=-1)


def test_diversity_is_that_of_pictures_of_one_prompt(tmp_path):
    exam = Exam(gallery=gallery_at(tmp_path), question=question(reference=None))
    series = exam.question.spread
    assert series.prompts[:4] == (WORDS[0],) * 3 + (WORDS[1],)
    assert series.first_seed == quality.VARIETY_SEED
    same, noisy = candidate("same", Colours("same", noise=0)), candidate("noisy", Colours(noise=40))
    exam.draw([same, noisy])
    assert exam.estimates(same)["diversity"].value == pytest.approx(0, abs=1e-12)
    assert exam.estimates(noisy)["diversity"].value > 1e-4
    assert set(exam.estimates(same)) == {"clip_score", "diversity"}


# the cache


def test_a_second_metric_costs_no_pictures(tmp_path):
    drawer = Colours()
    exam = Exam(gallery=gallery_at(tmp_path), question=question())
    exam.draw([candidate("a", drawer)])
    assert (drawer.drawn, drawer.closed) == (70 + 15, 2)
    again = Colours()
    other = Exam(gallery=gallery_at(tmp_path), question=question())
    other.gallery.eye = Eye(**{**_fields(colour_eye()), "digest": "another eye"})
    other.draw([candidate("a", again)])
    other.estimates(candidate("a", again))
    assert again.drawn == 0


def _fields(eye):
    return {name: getattr(eye, name) for name in ("protocol", "digest", "pictures", "captions")}


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    exam = Exam(gallery=gallery_at(tmp_path), question=question(reference=None))
    killed = Colours(dies_at=64)
    with pytest.raises(KeyboardInterrupt):
        exam.draw([candidate("a", killed)])
    assert killed.drawn == 64  # two chunks
    resumed = Colours()
    exam.draw([candidate("a", resumed)])
    assert resumed.drawn == 70 + 15 - 64
    straight = Exam(gallery=gallery_at(tmp_path / "fresh"), question=question(reference=None))
    straight.draw([candidate("a", Colours())])
    mine, theirs = (e.estimates(candidate("a", Colours())) for e in (exam, straight))
    assert all(np.array_equal(mine[name].replicates, theirs[name].replicates) for name in theirs)


def test_chunks_have_their_seeds_and_keys():
    series = Series(prompts=tuple(WORDS), first_seed=100)
    chunks = list(series.chunks())
    assert [(len(c.prompts), c.first_seed) for c in chunks] == [(32, 100), (32, 132), (6, 164)]
    keys = [json.dumps(picture_key(Colours(name), c)) for name in "ab" for c in chunks]
    assert len(set(keys)) == 6


def test_two_processes_share_the_chunks_and_have_the_figures_of_one(tmp_path):
    """Both ranks in one process: each draws its own chunks, and after that nothing is left to draw."""
    waits = []
    exams, drawers = [], []
    for rank in range(2):
        share = Share(rank=rank, world=2, wait=lambda: waits.append(1))
        exams.append(Exam(gallery=gallery_at(tmp_path / "two", share=share), question=question()))
        drawers.append(Colours())
    for exam, drawer in zip(exams, drawers, strict=True):
        exam.draw([candidate("a", drawer)])
    assert [drawer.drawn for drawer in drawers] == [32 + 6 + 15, 32]
    assert len(waits) == 2
    alone = Exam(gallery=gallery_at(tmp_path / "one"), question=question())
    alone.draw([candidate("a", Colours())])
    assert rows_of(exams[0], [candidate("a", drawers[0])]) == rows_of(alone, [candidate("a", Colours())])
    assert [drawer.drawn for drawer in drawers] == [32 + 6 + 15, 32]


# rows


def test_rows_with_differences_to_the_first_that_is_measured(tmp_path):
    class Broken(Colours):
        def draw(self, prompts, first_seed):
            raise BundleError("no GPU here")

    exam = Exam(gallery=gallery_at(tmp_path), question=question())
    twin = Colours("twin", noise=0)
    candidates = [
        candidate("broken", Broken("broken")), candidate("a", Colours(), twin=twin),
        candidate("b", Colours("b", noise=60), twin_missing="its LoRA is not found"),
        Candidate(name="teacher", kind="teacher", facts={}, missing="no base"),
    ]  # fmt: skip
    exam.draw(candidates)
    broken, a, b, teacher = rows_of(exam, candidates)
    assert (broken["status"], broken["why"]) == ("not run", "no GPU here")
    assert (teacher["status"], teacher["why"]) == ("not run", "no base")
    assert set(a["figures"]) == {name for name in quality.METRICS if not name.startswith("reward")}
    assert set(a["categories"]) == {"even", "odd"}
    assert "differences" not in a
    assert b["differences"]["clip_score"]["value"] < 0
    assert b["psnr_why"] == "its LoRA is not found"
    assert 30 < a["figures"]["psnr_db"]["value"] < 40
    json.dumps([broken, a, b, teacher], allow_nan=False)


def test_questions_in_one_line():
    with pytest.raises(OptionError, match="1 prompts: at least 2"):
        question(1)
    with pytest.raises(OptionError, match="1 pictures of a prompt"):
        question(each=1)


def test_each_process_has_a_gpu_of_its_own():
    assert [own_gpu(rank, None) for rank in range(2)] == ["0", "1"]
    assert [own_gpu(rank, "4,6") for rank in range(3)] == ["4", "6", "4"]


def test_alone_unless_launched(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    share = Share.of_launch()
    assert (share.rank, share.world, share.wait()) == (0, 1, None)

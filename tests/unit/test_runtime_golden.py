"""golden/: reproduced by the hand-made bundles, and each kind of difference is seen and placed."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hypersd_export.runtime as runtime
from hypersd_export.errors import HypersdError
from hypersd_export.runtime import Pipeline
from hypersd_export.runtime.golden import psnr
from tests.bundles import PLAIN_PLANS, make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("golden") / "bundle")


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_psnr_has_known_answers() -> None:
    a = np.zeros((2, 2, 3), dtype=np.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + np.uint8(255)) == pytest.approx(0.0)
    assert psnr(a, a + np.uint8(1)) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(a, a[:1]) == -math.inf


@pytest.mark.parametrize("plans", [None, PLAIN_PLANS], ids=["guidance and step noise", "neither"])
def test_reproduced(bundle: Path, tmp_path: Path, plans: Any) -> None:
    path = bundle if plans is None else make_bundle(tmp_path / "b", plans)
    pipeline = Pipeline.from_bundle(path)
    assert pipeline.golden_psnr() > 50
    report = pipeline.golden()
    assert isinstance(report, runtime.GoldenReport)
    assert report.passed
    assert report.latents_max_abs < 1e-5
    assert report.noise_max_abs == 0
    assert report.ids_equal
    assert report.line().startswith("picture ")


def test_another_picture_fails(copy: Path) -> None:
    pixels = np.asarray(Image.open(copy / "golden" / "expected.png")).copy()
    pixels[0, 0] ^= 255
    Image.fromarray(pixels).save(copy / "golden" / "expected.png")
    report = Pipeline.from_bundle(copy, check=False).golden()
    assert report.psnr_db < 50
    assert not report.passed
    assert "PSNR" in report.line()


def test_other_noise_and_other_ids_are_told_apart(copy: Path) -> None:
    def change(name: str, index: Any) -> None:
        array = np.load(copy / "golden" / name)
        array[index] += 1
        np.save(copy / "golden" / name, array)

    change("step_noise.npy", (1, 0, 0, 0, 0))
    report = Pipeline.from_bundle(copy, check=False).golden()
    assert (report.noise_max_abs, report.ids_equal, report.passed) == (1.0, True, False)
    change("negative_ids.npy", (0, 1))
    report = Pipeline.from_bundle(copy, check=False).golden()
    assert (report.ids_equal, report.passed) == (False, False)
    assert "ids DIFFER" in report.line()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda g: shutil.rmtree(g), r"golden is not there: the bundle was exported with --no-golden"),
        (lambda g: (g / "golden.json").unlink(), r"cannot read .*golden\.json"),
        (lambda g: (g / "golden.json").write_text("[]"), r"cannot read .*golden\.json"),
        (lambda g: (g / "golden.json").write_text("{}"), r"cannot read .*golden\.json"),
        (lambda g: edit(g / "golden.json", format="hypersd-golden/2"), "is of format 'hypersd-golden/2'"),
        (lambda g: (g / "latents.npy").unlink(), r"cannot read .*latents\.npy"),
        (lambda g: np.save(g / "initial_noise.npy", np.zeros(3)), r"cannot read .*initial_noise\.npy"),
        (lambda g: (g / "step_noise.npy").write_bytes(b"x"), r"cannot read .*step_noise\.npy"),
        (lambda g: (g / "expected.png").write_bytes(b"x"), r"cannot read .*expected\.png"),
        (lambda g: edit(g / "golden.json", steps=9), "has tables for 4, 2"),
    ],
)
def test_unusable(copy: Path, damage: Any, message: str) -> None:
    damage(copy / "golden")
    with pytest.raises(HypersdError, match=message) as caught:
        Pipeline.from_bundle(copy, check=False).golden()
    assert "\n" not in str(caught.value)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_null_guidance_is_the_plans(copy: Path) -> None:
    edit(copy / "golden" / "golden.json", guidance=None)
    assert Pipeline.from_bundle(copy, check=False).golden().passed


def test_names_of_the_package() -> None:
    assert set(runtime.__all__) <= {name for name in runtime.__all__ if getattr(runtime, name)}
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = runtime.Nothing

"""PSNR and largest difference: known answers."""

import math

import numpy as np
import pytest

from hypersd_export.verify.gates import Gate
from hypersd_export.verify.metrics import PSNR_CAP_DB, max_abs, psnr, reported


def test_bytes_do_not_wrap():
    black, almost, white = (np.full((4, 4), value, dtype=np.uint8) for value in (0, 1, 255))
    np.testing.assert_allclose(psnr(black, white), 0.0, atol=1e-12)
    np.testing.assert_allclose(psnr(black, almost), 20 * math.log10(255), rtol=1e-12)
    np.testing.assert_allclose(psnr(almost, black), 48.1308036086791, rtol=1e-12)
    assert max_abs(black, white) == 255
    assert max_abs(white, black) == 255


def test_known_answers_of_floats():
    reference = np.array([-1.0, 1.0, 0.5, 0.0])  # range 2
    np.testing.assert_allclose(psnr(reference + 0.02, reference), 40.0, rtol=1e-12)
    np.testing.assert_allclose(psnr(reference + 0.02, reference, peak=0.2), 20.0, rtol=1e-12)
    constant = np.full(3, 5.0)  # no range: its magnitude
    np.testing.assert_allclose(psnr(constant + 0.05, constant), 40.0, rtol=1e-12)
    np.testing.assert_allclose(max_abs(reference + 0.02, reference), 0.02, rtol=1e-12)


def test_limits():
    zeros = np.zeros(3)
    assert psnr(zeros, zeros) == math.inf
    assert psnr(zeros + 1, zeros) == -math.inf
    assert math.isnan(psnr(np.array([np.nan, 1]), np.array([0.0, 1])))
    assert psnr(np.array([np.inf, 1]), np.array([0.0, 1])) == -math.inf
    assert psnr(np.empty(0), np.empty(0)) == math.inf
    assert max_abs(np.empty(0), np.empty(0)) == 0.0
    assert [reported(db) for db in (math.inf, -math.inf, math.nan, 42.0)] == [
        PSNR_CAP_DB,
        -PSNR_CAP_DB,
        -PSNR_CAP_DB,
        42,
    ]


def test_shapes_must_agree():
    for metric in (psnr, max_abs):
        with pytest.raises(ValueError, match=r"\(1, 3\) and \(3, 1\)"):
            metric(np.ones((1, 3)), np.ones((3, 1)))


def test_a_gate_keeps_the_worst_and_names_every_failure():
    gate = Gate(name="unet", least_db=30.0)
    reference = np.array([-1.0, 1.0])
    gate.compare(reference + 0.002, reference, "at t = 999")
    gate.compare(reference + 0.2, reference, "at t = 499")
    gate.compare(reference + np.nan, reference, "at t = 1")
    gate.refuse("has no output")
    assert gate.failures == [
        "unet 20.0 dB at t = 499 (needs 30)",
        "unet -200.0 dB at t = 1 (needs 30)",
        "unet has no output",
    ]
    figures = gate.to_json()
    assert figures["psnr_db"] == -PSNR_CAP_DB
    assert math.isfinite(figures["max_abs"])
    good = Gate(name="vae", least_db=30.0)
    good.compare(reference, reference, "")
    assert good.failures == []
    assert good.to_json() == {"psnr_db": PSNR_CAP_DB, "max_abs": 0.0, "least_db": 30.0}

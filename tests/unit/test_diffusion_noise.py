"""Philox4x32-10 against Random123's known answers, the shipped vectors, and a scalar reimplementation."""

import math
import struct

import numpy as np
import pytest

from hypersd_export.diffusion import initial_noise, noise_vectors, philox4x32, philox_normal, step_noise
from hypersd_export.errors import OptionError

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, expected.
KNOWN_ANSWERS = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def scalar_philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """The published pseudocode, one counter at a time, in Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def scalar_normals(seed: int, index: int, stream: int, count: int) -> list[float]:
    """The layout in the docstring of `noise.py`, with libm's functions instead of NumPy's."""
    values: list[float] = []
    for block in range((count + 3) // 4):
        words = scalar_philox([block & 0xFFFFFFFF, block >> 32, index, stream], (seed & 0xFFFFFFFF, seed >> 32))
        for u, v in (words[:2], words[2:]):
            radius = math.sqrt(-2.0 * math.log((u + 1) / 2**32))
            values += [radius * math.cos(2 * math.pi * (v / 2**32)), radius * math.sin(2 * math.pi * (v / 2**32))]
    return values[:count]


def bits(values: np.ndarray) -> np.ndarray:
    """float32 as integers whose difference counts ulps."""
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.int32).astype(np.int64)
    return np.where(raw < 0, -(raw & 0x7FFFFFFF), raw)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert philox4x32(np.array(counter, dtype=np.uint32), key).tolist() == expected
    assert scalar_philox(counter, key) == expected


def test_many_counters_at_once_equal_one_at_a_time():
    counters = np.arange(40, dtype=np.uint32).reshape(2, 5, 4) * np.uint32(0x01234567)
    together = philox4x32(counters, (7, 0xDEADBEEF))
    for place in np.ndindex(2, 5):
        assert together[place].tolist() == scalar_philox(counters[place].tolist(), (7, 0xDEADBEEF))


def test_shipped_vectors():
    vectors = noise_vectors()
    assert vectors["format"] == "hypersd-noise/1"
    for known, (counter, key, expected) in zip(vectors["philox4x32_10"], KNOWN_ANSWERS, strict=True):
        assert [int(word, 16) for word in known["counter"]] == counter
        assert tuple(int(word, 16) for word in known["key"]) == key
        assert [int(word, 16) for word in known["output"]] == expected
    assert len(vectors["normals"]) >= 6
    for entry in vectors["normals"]:
        ours = philox_normal(
            seed=int(entry["seed"]), index=entry["index"], stream=entry["stream"], shape=tuple(entry["shape"])
        )
        flat = ours.reshape(-1)[entry["first"] : entry["first"] + len(entry["float32_hex"])]
        theirs = np.array([struct.unpack(">f", bytes.fromhex(word))[0] for word in entry["float32_hex"]], np.float32)
        assert np.abs(bits(flat) - bits(theirs)).max() <= 1, entry
        np.testing.assert_allclose(flat, entry["values"], rtol=1e-6)


@pytest.mark.parametrize(
    ("seed", "index", "stream"), [(0, 0, 0), (42, 3, 1), (2**64 - 1, 2**32 - 1, 2**32 - 1), (2**32, 0, 8)]
)
def test_normals_equal_the_scalar_version_to_one_ulp(seed, index, stream):
    ours = philox_normal(seed=seed, index=index, stream=stream, shape=(3, 67))
    theirs = np.array(scalar_normals(seed, index, stream, 201)).astype(np.float32)
    assert ours.dtype == np.float32
    assert np.abs(bits(ours.reshape(-1)) - bits(theirs)).max() <= 1


def test_noise_is_standard_normal_and_streams_are_independent():
    z = philox_normal(seed=1, index=0, stream=0, shape=(200_000,)).astype(np.float64)
    n = len(z)
    # Five standard errors of the first four moments: 1/n, 2/n, 15/n, 96/n.
    assert abs(z.mean()) < 5 * (1 / n) ** 0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    # Kolmogorov-Smirnov against the normal distribution: 1.95/sqrt(n) is p = 0.001.
    cdf = np.array([0.5 * (1 + math.erf(v / 2**0.5)) for v in np.sort(z)[::50]])
    assert np.abs(cdf - (np.arange(0, n, 50) + 0.5) / n).max() < 1.95 / n**0.5
    others = [
        philox_normal(seed=2, index=0, stream=0, shape=(n,)),
        philox_normal(seed=1 + 2**32, index=0, stream=0, shape=(n,)),
        philox_normal(seed=1, index=1, stream=0, shape=(n,)),
        philox_normal(seed=1, index=0, stream=1, shape=(n,)),
        np.roll(z, 1),
        np.roll(z, 2),
    ]
    for other in others:
        assert abs((z * other).mean()) < 5 / n**0.5


def test_shape_is_only_a_view_of_the_same_sequence():
    flat = philox_normal(seed=5, index=2, stream=3, shape=(48,))
    np.testing.assert_array_equal(philox_normal(seed=5, index=2, stream=3, shape=(3, 4, 4)).reshape(-1), flat)
    np.testing.assert_array_equal(philox_normal(seed=5, index=2, stream=3, shape=(7,)), flat[:7])
    assert philox_normal(seed=5, index=2, stream=3, shape=(0,)).shape == (0,)
    assert philox_normal(seed=5, index=2, stream=3, shape=()).shape == ()


def test_named_streams():
    shape = (4, 2, 2)
    np.testing.assert_array_equal(
        initial_noise(seed=9, index=1, shape=shape), philox_normal(seed=9, index=1, stream=0, shape=shape)
    )
    np.testing.assert_array_equal(
        step_noise(seed=9, index=1, step=4, shape=shape), philox_normal(seed=9, index=1, stream=4, shape=shape)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"^seed -1: must be from 0 to 2\^64 - 1$"),
        ({"seed": 2**64}, r"^seed 18446744073709551616: must be from 0 to 2\^64 - 1$"),
        ({"index": 2**32}, r"^image index 4294967296: must be from 0 to 2\^32 - 1$"),
        ({"stream": -2}, r"^noise stream -2: must be from 0 to 2\^32 - 1$"),
    ],
)
def test_out_of_range_is_one_line(arguments, message):
    with pytest.raises(OptionError, match=message):
        philox_normal(**{"seed": 0, "index": 0, "stream": 0, "shape": (1,), **arguments})


def test_step_zero_is_refused():
    with pytest.raises(OptionError, match=r"^step 0: steps are counted from 1"):
        step_noise(seed=0, index=0, step=0, shape=(1,))

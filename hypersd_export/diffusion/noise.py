"""Noise that is the same everywhere: Philox4x32-10 and Box-Muller, from (seed, image index, stream) alone.

Layout, for a reader in another language:
  key      = (seed & 0xffffffff, seed >> 32)
  counter  = (block & 0xffffffff, block >> 32, index, stream),  block = 0, 1, 2, …
  words    w0 w1 w2 w3 of each block (Philox4x32, 10 rounds: Salmon et al., SC 2011)
  u(w)     = (w + 1) * 2^-32 in (0, 1],   v(w) = w * 2^-32 in [0, 1)
  normals  sqrt(-2 ln u(w0)) * (cos, sin)(2 pi v(w1)),  sqrt(-2 ln u(w2)) * (cos, sin)(2 pi v(w3))
in float64, cast to float32; so block i holds normals 4i … 4i + 3 of the flattened (C-order) array. Only ln, cos and sin
may differ between platforms, by the last bit of a double: the float32 values agree to 1 ulp. `index` is the position of
an image in its batch (each has its own noise, of a shape without batch axis); stream 0 is the initial noise and stream
i the noise of step i, counted from 1. Test vectors: `noise_vectors.json`, see `noise_vectors()`.
"""

import json
from importlib import resources
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.errors import OptionError

Words = npt.NDArray[np.uint32]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_TWO_PI = 2.0 * np.pi
_UNIT = 2.0**-32


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of each counter: uint32 [..., 4] -> uint32 [..., 4]. `key` is two 32-bit words, low word first."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _MASK,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def philox_normal(*, seed: int, index: int, stream: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Standard normal noise of `shape`, float32, by the layout of the module docstring.

    seed: 0 … 2^64 - 1; index and stream: 0 … 2^32 - 1; `OptionError` otherwise.
    """
    _check("seed", seed, 64)
    _check("image index", index, 32)
    _check("noise stream", stream, 32)
    count = prod(shape)
    block = np.arange((count + 3) // 4, dtype=np.uint64)
    counter = np.empty((len(block), 4), dtype=np.uint32)
    counter[:, 0], counter[:, 1] = block & _MASK, block >> _SHIFT
    counter[:, 2], counter[:, 3] = index, stream
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((words[:, 0::2] + 1.0) * _UNIT))
    angle = _TWO_PI * (words[:, 1::2] * _UNIT)
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return normals.reshape(-1)[:count].astype(np.float32).reshape(shape)


def initial_noise(*, seed: int, index: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The noise that image `index` starts from, before `init_noise_sigma`; `shape` has no batch axis."""
    return philox_normal(seed=seed, index=index, stream=0, shape=shape)


def step_noise(*, seed: int, index: int, step: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The fresh noise of step `step` (the 1-based row number) for image `index`; `shape` has no batch axis."""
    if step < 1:
        raise OptionError(f"step {step}: steps are counted from 1; stream 0 is the initial noise")
    return philox_normal(seed=seed, index=index, stream=step, shape=shape)


def noise_vectors() -> dict[str, Any]:
    """The shipped test vectors for other implementations: Philox words and normals (as float32 bit patterns)."""
    text = resources.files(__package__).joinpath("noise_vectors.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def _check(what: str, value: int, bits: int) -> None:
    if not 0 <= value < 2**bits:
        raise OptionError(f"{what} {value}: must be from 0 to 2^{bits} - 1")

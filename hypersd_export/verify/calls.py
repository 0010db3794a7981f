"""Calls of a UNet as torch answers them, for an artifact to be held against: those of the golden picture's own loop.

An artifact that takes several images at once gets others behind that one, or it could mix up its rows unseen.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.diffusion import Guidance, StepTable, philox_normal, start_sample
from hypersd_export.runtime.text import Text
from hypersd_export.verify.reference import Watch, unet_output

Float = npt.NDArray[np.float32]
Calls = dict[tuple[float, float], tuple[Float, Float]]
"""By (timestep, input scale): the rows [U, C, h, w] that the network was given, and its output for them."""


def noted(calls: Calls, table: StepTable) -> Watch:
    """Keeps each call of a plan's loop in `calls`, but for what another plan's had already."""
    rows = iter(table.rows)

    def watch(sample: Float, t: float, output: Float) -> None:
        calls.setdefault((float(t), float(next(rows).k)), (sample, output))

    return watch


def full(
    calls: Calls, unet: Any, tables: Sequence[tuple[StepTable, Float]], guidance: Guidance, *, text: Text, more: int,
    seed: int,
) -> Calls:  # fmt: skip
    """The calls with `more` images behind each one's own: k (p z0 + q noise), with noise of `seed`.

    `tables`: each plan's with the latents z0 [1, C, h, w] that it came to; `text`: for those images, by branches.
    """
    found: Calls = {}
    for table, latents in tables:
        clean = np.repeat(latents, more, axis=0)
        for number, row in enumerate(table.rows):
            key = (float(row.t), float(row.k))
            if key in found:
                continue
            sample, output = calls[key]
            noise = philox_normal(seed=seed, index=0, stream=len(found), shape=clean.shape)
            noisy = (row.k * start_sample(table, start=number, latents=clean, noise=noise)).astype(np.float32)
            others = np.concatenate([noisy] * len(sample))  # the branches of guidance see the same latents
            found[key] = _behind(sample, others), _behind(output, unet_output(unet, others, key[0], text, guidance))
    return found


def _behind(first: Float, others: Float) -> Float:
    """The rows of each branch together: `first` has one of each, `others` as many of each."""
    shape = others.shape[1:]
    return np.concatenate([first[:, None], others.reshape(len(first), -1, *shape)], axis=1).reshape(-1, *shape)

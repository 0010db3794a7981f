"""golden/: the picture that a bundle must give, with the noise and the ids that lead to it.

Three things are compared, so that a difference can be placed: the ids (tokenizer), the seed's noise (Philox) and the
picture, made here from the *stored* noise.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hypersd_export.diffusion.noise import philox_normal
from hypersd_export.diffusion.plan import GuidanceKind
from hypersd_export.errors import BundleError
from hypersd_export.runtime.result import Float

if TYPE_CHECKING:
    from hypersd_export.runtime.pipeline import Pipeline

FORMAT = "hypersd-golden/1"
NOISE_TOLERANCE = 1e-6
"""Largest difference of the seed's noise to the stored one: a few units in the last place of float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenReport:
    """How close this machine came to golden/."""

    psnr_db: float
    """Of the pictures, infinite if they are equal."""
    min_psnr_db: float
    latents_max_abs: float
    noise_max_abs: float
    ids_equal: bool

    @property
    def passed(self) -> bool:
        """Whether picture, noise and ids all hold."""
        return self.psnr_db > self.min_psnr_db and self.noise_max_abs <= NOISE_TOLERANCE and self.ids_equal

    def line(self) -> str:
        """The report in one line."""
        picture = "equal" if math.isinf(self.psnr_db) else f"PSNR {self.psnr_db:.1f} dB"
        return (
            f"picture {picture} (at least {self.min_psnr_db:g} dB), latents within {self.latents_max_abs:.2g}, "
            f"noise within {self.noise_max_abs:.2g}, prompt ids {'equal' if self.ids_equal else 'DIFFER'}"
        )


def psnr(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two pictures in dB, infinite if they are equal, -infinite for other sizes."""
    if a.shape != b.shape:
        return -math.inf
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _array(folder: Path, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(folder / name, allow_pickle=False).reshape(shape)
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {folder / name} ({str(error)[:80]}): export the bundle again") from error
    return array


def _golden(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise BundleError(f"{folder} is not there: the bundle was exported with --no-golden")
    try:
        golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
        keys = ("prompt", "negative_prompt", "seed", "index", "steps", "guidance", "expected", "min_psnr_db")
        values = {key: golden[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"cannot read {folder / 'golden.json'} ({error!r:.80}): export the bundle again") from error
    if golden.get("format") != FORMAT:
        raise BundleError(f"{folder} is of format {golden.get('format')!r}, and this version reads {FORMAT!r}")
    return values


def _picture(path: Path) -> npt.NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise BundleError(f"cannot read {path} ({str(error)[:80]}): export the bundle again") from error


def _noise_difference(golden: dict[str, Any], stored: dict[int, Float]) -> float:
    """Largest difference between the seed's noise and the stored one, over all streams."""
    mine = {
        stream: philox_normal(seed=golden["seed"], index=golden["index"], stream=stream, shape=noise.shape[1:])
        for stream, noise in stored.items()
    }
    return max(float(np.abs(mine[stream] - noise[0]).max()) for stream, noise in stored.items())


def reproduce(pipeline: "Pipeline") -> GoldenReport:
    """Make golden/'s picture with this pipeline and compare.

    Raises:
        BundleError: golden/ is missing or cannot be read.
    """
    folder = pipeline.folder.own / "golden"
    golden = _golden(folder)
    entry = pipeline.plans.for_steps(golden["steps"])
    texts = {"prompt_ids": golden["prompt"]}
    weight = None
    if entry.plan.guidance.kind is GuidanceKind.CFG:
        texts = {"negative_ids": golden["negative_prompt"], **texts}
        weight = entry.plan.guidance.scale if golden["guidance"] is None else float(golden["guidance"])
    ids = [pipeline.texts.ids(text) for text in texts.values()]
    ids_equal = all(
        np.array_equal(mine, _array(folder, f"{name}{encoder.suffix}.npy", (1, -1)))
        for name, rows in zip(texts, ids, strict=True)
        for encoder, mine in zip(pipeline.texts.all, rows, strict=True)
    )
    shape = pipeline.latent_shape
    noise = _array(folder, "initial_noise.npy", (1, *shape)).astype(np.float32)
    streams = entry.table.noise_streams
    fresh: dict[int, Float] = {}
    if streams:
        stored = _array(folder, "step_noise.npy", (len(streams), 1, *shape)).astype(np.float32)
        fresh = dict(zip(streams, stored, strict=True))
    latents, pixels = pipeline.draw(entry, ids, weight, noise, fresh.__getitem__, pipeline.time_ids())
    expected = _array(folder, "latents.npy", latents.shape)
    return GoldenReport(
        psnr_db=psnr(pixels[0], _picture(folder / golden["expected"])),
        min_psnr_db=float(golden["min_psnr_db"]),
        latents_max_abs=float(np.abs(latents - expected).max()),
        noise_max_abs=_noise_difference(golden, {0: noise, **fresh}),
        ids_equal=ids_equal,
    )

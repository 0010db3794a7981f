"""Write golden/: the picture that every runtime must reproduce, with the noise and the ids that lead to it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hypersd_export.diffusion import GuidanceKind, PlanEntry, initial_noise, step_noise

EXPECTED = "expected.png"


def write_golden(
    folder: Path,
    entry: PlanEntry,
    *,
    prompt: str,
    negative_prompt: str,
    seed: int,
    ids: Mapping[str, Sequence[npt.NDArray[np.int64]]],
    latents: npt.NDArray[np.float32],
    image: npt.NDArray[np.uint8],
    min_psnr_db: float,
) -> None:
    """Write the test vectors of one entry of plan.json, for image 0 of `seed`.

    `ids` has `prompt` and `negative`, int64 [1, S] for each text encoder; `latents` [1, C, h, w] are the last x;
    `image` [H, W, 3] is torch's. Arrays are saved as golden.schema.json says; step_noise.npy only where the table
    adds noise.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    shape = latents.shape[1:]
    np.save(folder / "initial_noise.npy", initial_noise(seed=seed, index=0, shape=shape)[None])
    streams = entry.table.noise_streams
    if streams:
        rows = [step_noise(seed=seed, index=0, step=stream, shape=shape)[None] for stream in streams]
        np.save(folder / "step_noise.npy", np.stack(rows))
    for name, found in ids.items():
        for number, row in enumerate(found, start=1):
            np.save(folder / (f"{name}_ids.npy" if number == 1 else f"{name}_ids_{number}.npy"), row)
    np.save(folder / "latents.npy", latents)
    Image.fromarray(image).save(folder / EXPECTED)
    guidance = entry.plan.guidance
    golden = {
        "format": "hypersd-golden/1",
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "index": 0,
        "steps": entry.steps,
        "guidance": guidance.scale if guidance.kind is GuidanceKind.CFG else None,
        "expected": EXPECTED,
        "min_psnr_db": min_psnr_db,
    }
    (folder / "golden.json").write_text(json.dumps(golden, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

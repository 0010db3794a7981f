"""What all peers with a diffusers-like pipeline have in common. Runs in their environments, see README.md."""

from collections.abc import Mapping
from typing import Any

from benchmarks.bench.protocol import Clocked, Seconds
from hypersd_export.diffusion.noise import initial_noise


class DiffusersPainter:
    """Draws with a pipeline of diffusers' interface, by the scheduler, the call and the noise of our bundle.

    request: folder (the converted pipeline), scheduler (class name), config, call (its arguments), latents
    [C, h, w], prompt, threads. Fresh noise of later steps is the pipeline's own.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request, self._seconds = request, Seconds()
        self._pipeline: Any = None

    def open(self) -> Any:
        """The pipeline, ready to draw."""
        raise NotImplementedError

    def facts(self) -> Mapping[str, Any]:
        """For the report."""
        raise NotImplementedError

    def load(self) -> Mapping[str, Any]:
        """See `benchmarks.bench.protocol.Painter`."""
        import diffusers

        pipeline = self.open()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = getattr(diffusers, self.request["scheduler"]).from_config(self.request["config"])
        for attribute, name in (("text_encoder", "text_encoder"), ("unet", "unet"), ("vae", "vae_decoder")):
            setattr(pipeline, attribute, Clocked(getattr(pipeline, attribute), name, self._seconds))
        self._pipeline = pipeline
        return self.facts()

    def draw(self, seed: int, images: int) -> tuple[Mapping[str, float], Any]:
        """See `benchmarks.bench.protocol.Painter`; picture i is that of (seed, i)."""
        import numpy as np
        import torch

        self._seconds.clear()
        shape = tuple(self.request["latents"])
        noise = np.stack([initial_noise(seed=seed, index=i, shape=shape) for i in range(images)])
        drawn = self._pipeline(
            self.request["prompt"], num_images_per_prompt=images, latents=torch.from_numpy(noise),
            generator=torch.Generator().manual_seed(seed), **self.request["call"],
        )  # fmt: skip
        return self._seconds, np.stack([np.asarray(image.convert("RGB")) for image in drawn.images])

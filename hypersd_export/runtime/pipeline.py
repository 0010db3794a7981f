"""The bundle as a callable: prompt in, pictures out. No torch, no scheduler.

    ids = tokenizer(prompt)
    states = text_encoder(ids)
    x = init_noise_sigma * noise(seed, image number)
    x = a x + b net(k x, t) + c z      for each row of plan.json's table; with CFG net = u + w (c - u)
    pixels = vae_decoder(x / scaling_factor)

Image i of a seed has the noise of (seed, i), so it is the same picture however many are made with it. The graphs have
a batch size of their own; images are put through in groups of that size, the last one filled up. A bundle whose
pipeline is one graph does all of this in one call of it. What runs the graphs is a `Runtime` (`runtime/graph.py`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hypersd_export.bundle.manifest import bundle_digest, read_manifest, verify_files
from hypersd_export.bundle.publish import recover
from hypersd_export.bundle.span import Span
from hypersd_export.diffusion.noise import initial_noise, step_noise
from hypersd_export.diffusion.plan import Guidance, GuidanceKind
from hypersd_export.diffusion.planfile import PlanEntry, PlanFile
from hypersd_export.diffusion.sampling import run, start_sample
from hypersd_export.diffusion.table import start_row
from hypersd_export.errors import BundleError, OptionError, PlanError
from hypersd_export.runtime.encoders import TextEncoders
from hypersd_export.runtime.folder import Folder
from hypersd_export.runtime.graph import Runtime, filled
from hypersd_export.runtime.groups import groups
from hypersd_export.runtime.images import to_image, to_sample, to_uint8
from hypersd_export.runtime.result import Float, Result
from hypersd_export.runtime.runtimes import open_runtime
from hypersd_export.runtime.single import SingleGraph
from hypersd_export.runtime.text import Guide, Ids, SizeHints
from hypersd_export.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

    from hypersd_export.runtime.golden import GoldenReport

StepNoise = Callable[[int], Float]


@dataclass(kw_only=True)
class Pipeline:
    """A loaded bundle; make it with `from_bundle`. Components are loaded when they are first needed.

    One call at a time: a pipeline belongs to one thread.
    """

    path: Path
    plans: PlanFile
    digest: str
    runtime: Runtime
    batch: int = 1
    """Images at once where the graphs leave that open."""
    span: Span | None = None
    """The range of shapes that the graphs take; None where they are of one shape."""
    function: str | None = None
    """Which one, where packages have several; None is the default."""
    _texts: TextEncoders | None = None
    _seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        *,
        runtime: str | None = None,
        provider: str | None = None,
        check: bool = True,
        threads: int | None = None,
        batch: int | None = None,
        function: str | None = None,
        cuda_graph: bool = False,
    ) -> "Pipeline":
        """Open a bundle.

        Args:
            path: the folder that `hypersd-export` wrote.
            runtime: what runs the graphs, one of the bundle's targets; the first of them if None.
            provider: onnxruntime's, a key of `hypersd_export.runtime.onnx.PROVIDERS` ("cpu" if None); never replaced
                by another.
            check: compare every file with its sha256 in the manifest first.
            threads: onnxruntime's, for one operator; one per core if None.
            batch: images at once where the graphs were exported for a range of them; the export's own number if None.
            cuda_graph: with onnxruntime's "cuda", capture the UNet's call once and replay it.
            function: of a bundle that `hypersd-export coreml-merge` made, whose pictures these are; the first if None.

        Raises:
            BundleError: no bundle, another version, a file that was changed, is missing or does not belong.
            OptionError, MissingBackend: the runtime or its provider.
        """
        bundle = Path(path)
        if not bundle.exists():
            recover(bundle)  # an export that was killed while it replaced this bundle
        manifest = read_manifest(bundle)
        if check:
            verify_files(bundle, manifest)
        span = Span.of(manifest.options)
        if batch is not None and batch < 1:
            raise OptionError(f"batch {batch}: must be at least 1")
        if batch is not None and span is not None:
            span.check_batch(batch)
        opened = open_runtime(
            runtime, bundle, manifest, provider=provider, threads=threads, function=function, cuda_graph=cuda_graph
        )
        plans = Folder(bundle, function).plans()
        return cls(
            path=bundle, plans=plans, digest=bundle_digest(bundle), runtime=opened, span=span, function=function,
            batch=batch or int(manifest.options.get("batch") or 1),
        )  # fmt: skip

    @property
    def folder(self) -> Folder:
        """The bundle's configurations."""
        return Folder(self.path, self.function)

    @property
    def provider(self) -> str:
        """What the graphs run on: onnxruntime's provider, or the device."""
        return self.runtime.provider

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of one image."""
        if self.is_single_graph:
            return self._whole().latent_shape
        shape = self.runtime.graph("unet").inputs["sample"].shape[1:]
        config = self.folder.config("unet")
        size = config.get("sample_size")
        stated = (config.get("in_channels"), *(size if isinstance(size, list) else (size, size)))
        full = [here or there for here, there in zip(shape, stated, strict=True)]
        sides = [side for side in full if isinstance(side, int)]
        if len(sides) != 3:
            raise BundleError(f"{self.path}/unet does not say how large its latents are: export the bundle again")
        return sides[0], sides[1], sides[2]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the pictures in pixels."""
        _, height, width = self.latent_shape
        scale = 2 ** (len(self.folder.value("vae_decoder", "block_out_channels")) - 1)
        return width * scale, height * scale

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        guidance: float | None = None,
        steps: int | None = None,
        seed: int = 0,
        num_images: int = 1,
        init_image: "Image | None" = None,
        strength: float = 0.6,
        noise: Float | None = None,
        size: tuple[int, int] | None = None,
        size_hints: SizeHints | None = None,
    ) -> Result:
        """Make pictures of one prompt.

        Args:
            prompt: any text, the empty one included; what the text encoder cannot hold is cut with a warning.
            negative_prompt: what the unconditional branch sees; only where the plan has one (guidance kind cfg).
            guidance: scale of u + w (c - u) in place of the plan's; only where the kind is cfg. Up to 1 means none.
            steps: which table of plan.json; the first one if None.
            seed: 0 … 2^64 - 1.
            num_images: image i has the noise (seed, i).
            init_image: start from this picture (image-to-image) instead of from noise alone.
            strength: how much of the way is walked from `init_image`: the last ⌊steps * strength⌋ rows.
            noise: standard normal [num_images, C, h, w] in place of the seed's initial noise.
            size: (width, height) in pixels, where the graphs were exported for a range; the export's own if None.
            size_hints: what SDXL is told of the picture's size; that it is what it is if None.

        Raises:
            OptionError: a value that is out of range, or has no effect with this plan.
            BundleError: the bundle's graphs or configurations do not fit together.
        """
        entry = self._entry(steps)
        weight = self._weight(entry, guidance, negative_prompt)
        if num_images < 1:
            raise OptionError(f"num_images {num_images}: must be at least 1")
        if init_image is not None and self.is_single_graph:
            raise OptionError("an initial image: a single graph starts from noise; export without --single-graph")
        if size_hints is not None and not self.texts.told_size:
            raise OptionError("original size, crop and target size are what SDXL is told; leave them out here")
        start = 0 if init_image is None else self._start(entry, strength)
        self._seconds = {}
        texts = [prompt] if weight is None else [negative_prompt, prompt]
        with self._timed("pipeline" if self.is_single_graph else "text_encoder"):
            ids = [self.texts.ids(text) for text in texts]
        with self._timed("pipeline" if self.is_single_graph else "unet"):  # it is loaded here
            shape = self.latent_shape if size is None else self._shape_at(size)
        time_ids = self.time_ids(size_hints, size)
        noise = self._initial_noise(seed, num_images, noise, shape)

        def fresh(stream: int) -> Float:
            return np.stack([step_noise(seed=seed, index=i, step=stream, shape=shape) for i in range(num_images)])

        if init_image is None:
            latents, pixels = self.draw(entry, ids, weight, noise, fresh, time_ids)
        else:
            guide = self._guide(ids, weight, time_ids)
            clean = self._image_latents(init_image, size or self.size)
            x = start_sample(entry.table, start=start, latents=clean, noise=noise)
            latents = self.sample(entry, x.astype(np.float32), guide, fresh, start=start)
            pixels = self.decode(latents)
        return Result(
            images=[to_image(image) for image in pixels],
            latents=latents,
            seconds=dict(self._seconds),
            plan=entry,
            prompt=prompt,
            negative_prompt=negative_prompt,
            guidance=weight,
            seed=seed,
            bundle_digest=self.digest,
        )

    @property
    def texts(self) -> TextEncoders:
        """The bundle's text encoders and tokenizers."""
        if self._texts is None:
            tokens = self._whole().tokens if self.is_single_graph else None
            self._texts = TextEncoders(folder=self.folder, runtime=self.runtime, tokens=tokens)
        return self._texts

    @property
    def tokenizer(self) -> Tokenizer:
        """The first text encoder's tokenizer."""
        return self.texts.tokenizer(self.texts.all[0])

    @property
    def is_single_graph(self) -> bool:
        """Whether the pipeline is one graph here."""
        return self.runtime.is_single_graph

    def time_ids(self, size_hints: SizeHints | None = None, size: tuple[int, int] | None = None) -> Float | None:
        """What SDXL is told of the picture's size (None: the export's own), float32 [1, 6]; None for other families."""
        return (size_hints or SizeHints()).time_ids(size or self.size) if self.texts.told_size else None

    def draw(
        self, entry: PlanEntry, ids: Sequence[Ids], weight: float | None, noise: Float, fresh: StepNoise,
        time_ids: Float | None = None,
    ) -> tuple[Float, npt.NDArray[np.uint8]]:  # fmt: skip
        """Latents [N, C, h, w] and pixels uint8 [N, H, W, 3] from noise [N, C, h, w].

        ids: of the prompt, before it those of the negative prompt where there is a weight. time_ids: [1, 6], SDXL's.
        """
        if self.is_single_graph:
            with self._timed("pipeline"):
                return self._whole().draw(ids, noise, entry.table, fresh, time_ids)
        x = np.float32(entry.table.init_noise_sigma) * noise
        latents = self.sample(entry, x.astype(np.float32), self._guide(ids, weight, time_ids), fresh)
        return latents, self.decode(latents)

    def _guide(self, ids: Sequence[Ids], weight: float | None, time_ids: Float | None) -> Guide:
        with self._timed("text_encoder"):
            return self.texts.guide(ids, weight, time_ids)

    def sample(self, entry: PlanEntry, x: Float, guide: Guide, fresh: StepNoise, *, start: int = 0) -> Float:
        """Walk the table from row `start`: latents [N, C, h, w] in, latents out; `fresh(stream)` gives [N, C, h, w]."""
        with self._timed("unet"):
            graph = self.runtime.graph("unet")
            unknown = set(graph.inputs) - {"sample", "timestep", *guide.cond}
            if unknown:
                names = ", ".join(sorted(unknown))
                raise BundleError(f"the UNet of {self.path} also wants {names}, which this version does not feed")
            branches = 1 if guide.uncond is None else 2
            rows = graph.inputs["sample"].shape[0] or branches * min(self.batch, len(x))
            if rows % branches:
                raise BundleError(f"the UNet of {self.path} has {rows} rows, and guidance needs an even number")
            size = rows // branches
            call = graph.fixed(**guide.rows(size))

            def net(scaled: Float, t: float) -> Float:
                timestep = filled(graph.inputs["timestep"], t)
                parts = [guide.denoise(call, part, timestep) for part in groups(scaled, size)]
                return np.concatenate(parts)[: len(scaled)]

            latents: Float = run(entry.table, net, x, step_noise=fresh, start=start)
            return latents.astype(np.float32)

    def decode(self, latents: Float) -> npt.NDArray[np.uint8]:
        """Latents [N, C, h, w] to pixels uint8 [N, H, W, 3]."""
        with self._timed("vae_decoder"):
            graph = self.runtime.graph("vae_decoder")
            scaled = latents / np.float32(self.folder.value("vae_decoder", "scaling_factor"))
            scaled = scaled + np.float32(self.folder.config("vae_decoder").get("shift_factor") or 0.0)
            size = graph.inputs["latent_sample"].shape[0] or min(self.batch, len(latents))
            parts = [to_uint8(graph.run(latent_sample=part)["sample"]) for part in groups(scaled, size)]
            return np.concatenate(parts)[: len(latents)]

    def golden(self) -> "GoldenReport":
        """Reproduce golden/ (see `hypersd_export.runtime.golden`)."""
        from hypersd_export.runtime.golden import reproduce

        return reproduce(self)

    def golden_psnr(self) -> float:
        """PSNR in dB between golden/'s picture and ours from the same noise; infinite if they are equal."""
        return self.golden().psnr_db

    def warm_up(self, steps: int | None = None) -> None:
        """Draw twice for nothing: a GPU compiles kernels at the first call and captures CUDA graphs at the second."""
        for _ in range(2):
            self("", steps=steps)

    def _entry(self, steps: int | None) -> PlanEntry:
        try:
            return self.plans.for_steps(steps)
        except PlanError as error:
            raise OptionError(str(error)) from None

    def _start(self, entry: PlanEntry, strength: float) -> int:
        try:
            return start_row(entry.steps, strength)
        except PlanError as error:
            raise OptionError(str(error)) from None

    def _weight(self, entry: PlanEntry, guidance: float | None, negative_prompt: str) -> float | None:
        """The weight of u + w (c - u), None without an unconditional branch."""
        plan = entry.plan.guidance
        if plan.kind is GuidanceKind.CFG:
            if guidance is None or guidance == plan.scale:
                return plan.scale
            if self.is_single_graph:
                raise OptionError(
                    f"guidance {guidance}: {plan.scale:g} is a constant of this bundle's single graph; export with "
                    "--guidance for another"
                )
            try:
                return Guidance.of(guidance).scale
            except PlanError as error:
                raise OptionError(str(error)) from None
        fixed = f"the {entry.steps}-step plan of this bundle has guidance {plan.kind}"
        if guidance is not None:
            raise OptionError(f"guidance {guidance}: {fixed}, fixed at export; export with --guidance for another")
        if negative_prompt:
            raise OptionError(f"a negative prompt has no effect: {fixed}, with no unconditional branch; leave it out")
        return None

    def _shape_at(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The latents of a picture of this size; `OptionError` where the graphs do not draw it."""
        if self.span is None:
            if size != self.size:
                own = "x".join(map(str, self.size))
                raise OptionError(f"size {size[0]}x{size[1]}: this bundle draws {own}; export with --dynamic size=…")
            return self.latent_shape
        self.span.check_size(*size)
        channels, height, _ = self.latent_shape
        scale = self.size[1] // height
        return channels, size[1] // scale, size[0] // scale

    def _initial_noise(
        self, seed: int, num_images: int, given: Float | None, shape: tuple[int, int, int]
    ) -> Float:  # fmt: skip
        """The caller's noise, checked, or the seed's."""
        if given is None:
            return np.stack([initial_noise(seed=seed, index=i, shape=shape) for i in range(num_images)])
        if given.shape != (num_images, *shape):
            raise OptionError(f"noise of shape {given.shape}: this bundle wants {(num_images, *shape)}")
        return given.astype(np.float32)

    def _image_latents(self, image: "Image", size: tuple[int, int]) -> Float:
        """Latents [1, C, h, w] of a picture: the posterior's mean (diffusers draws from it) times scaling_factor."""
        if not (self.path / "vae_encoder").is_dir():
            raise BundleError(f"{self.path} has no vae_encoder, which image-to-image needs: export the bundle again")
        with self._timed("vae_encoder"):
            graph = self.runtime.graph("vae_encoder")
            sample = to_sample(image, *size)
            rows = graph.inputs["sample"].shape[0] or 1
            moments = graph.run(sample=np.repeat(sample, rows, axis=0))["latent_parameters"][:1]
            mean = moments[:, : moments.shape[1] // 2].astype(np.float32)
            shift = np.float32(self.folder.config("vae_decoder").get("shift_factor") or 0.0)
            latents: Float = (mean - shift) * np.float32(self.folder.value("vae_decoder", "scaling_factor"))
            return latents

    def _whole(self) -> SingleGraph:
        return SingleGraph(self.runtime.single())

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

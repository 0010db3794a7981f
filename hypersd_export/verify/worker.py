"""`python -m hypersd_export.verify.worker request.json`: golden files by torch, and every artifact held against torch.

Components are loaded one at a time, first by torch and then by what runs the artifact here: onnxruntime, or the MIL
interpreter for Core ML's packages. Writes `golden/` and `report.json` into
the request's `out`; lines on standard output say how far it is. In a process of its own it cannot raise the export's
memory.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.bundle.packages import PIPELINE
from hypersd_export.bundle.texts import Encoder, encoders_of
from hypersd_export.diffusion import GuidanceKind, PlanEntry, PlanFile, philox_normal
from hypersd_export.graphs.spec import Component
from hypersd_export.model.pages import release
from hypersd_export.runtime.graph import Graph, Runtime, filled
from hypersd_export.runtime.text import Text, rows
from hypersd_export.targets import Target
from hypersd_export.verify.corners import Corner, corners_of
from hypersd_export.verify.gates import COMPONENT_DB, COREML_IMAGE_DB, IMAGE, IMAGE_DB, LOSSY_DB, Gate
from hypersd_export.verify.golden import write_golden
from hypersd_export.verify.request import VerifyRequest
from hypersd_export.verify.source import Source, check_unchanged, open_source
from hypersd_export.worker import serve

REPORT = "report.json"
GATE_SEED = 20_24
"""Seed of what the gates feed in beside the golden picture's own values."""

Float = npt.NDArray[np.float32]
Progress = Callable[[str], None]


@dataclass(slots=True)
class Verification:
    """One run: what was asked, and what the components have given so far."""

    request: VerifyRequest
    source: Source
    plans: PlanFile
    progress: Progress
    scratch: Path
    gates: list[Gate] = field(default_factory=list)
    ids: dict[str, list[npt.NDArray[np.int64]]] = field(default_factory=dict)
    """`prompt` and `negative`: the ids [1, S] for each text encoder."""
    texts: dict[str, Text] = field(default_factory=dict)
    """`prompt` and `negative` as the UNet sees them."""
    latents: dict[int, Float] = field(default_factory=dict)
    """By step count, [1, C, h, w]."""
    images: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    """By step count, [H, W, 3]."""

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        """The text encoders."""
        return encoders_of(self.source.configs)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, h, w] of one image's latents."""
        shapes = self.request.shapes
        return shapes.channels, shapes.latent_height, shapes.latent_width

    def gate(self, name: str, least_db: float) -> Gate:
        """A new gate whose figures go into the report."""
        lossy_db = LOSSY_DB.get(name, least_db) if self.request.lossy else least_db
        gate = Gate(name=name, least_db=min(least_db, lossy_db))
        self.gates.append(gate)
        return gate

    def compares(self, component: Component) -> bool:
        """Whether there is an artifact of this component to be held against torch."""
        return self.request.compare and component in self.request.components

    def corners(self, component: Component, module: Any) -> list[Corner]:
        """What a loaded torch component gives at the ends of the graphs' ranges; nothing where it is not compared."""
        if not self.compares(component):
            return []
        request, guidance = self.request, self.plans.default.plan.guidance
        return corners_of(component, module, request.corners, request.shapes, guidance.embedded)

    def load(self, component: str) -> Any:
        """A fused torch component in float32."""
        import torch

        self.progress(f"torch: {component}")
        return self.source.load(component, torch.float32)[0]

    def graph(self, component: Component) -> Graph:
        """The artifact of a component, as the runtime opens it.

        On the CPU an fp16 graph is rounded op by op, or half precision would not be seen there (`onnx_fp16`).
        """
        from hypersd_export.runtime.onnx import open_graph

        self.progress(f"{self.provider}: {component}")
        if self.request.target is Target.COREML:
            return self.runtime().graph(component)
        path = self.request.components[component] / "model.onnx"
        if self.request.precision == "fp16" and self.request.provider == "cpu":
            return open_graph(rounded(path, self.scratch / component), optimise=False)
        return open_graph(path, provider=self.request.provider)

    def runtime(self) -> Runtime:
        """What draws the final image with the artifacts."""
        from hypersd_export.runtime.onnx import OnnxRuntime

        if self.request.target is Target.COREML:
            from hypersd_export.verify.coreml import InterpretedRuntime

            request = self.request
            packages: dict[str, Path | tuple[Path, ...]] = (
                {c.value: packages_in(folder, c) for c, folder in request.components.items()}
                if request.whole is None
                else {PIPELINE: request.whole}
            )
            return InterpretedRuntime(packages=packages, ports=request.ports)
        return OnnxRuntime(path=self.request.bundle, provider=self.request.provider)

    @property
    def provider(self) -> str:
        """What the artifacts run on here, for lines on the progress."""
        return "interpreter" if self.request.target is Target.COREML else self.request.provider


def packages_in(folder: Path, component: Component) -> tuple[Path, ...]:
    """A component's package in a folder, or its pieces in their order."""
    return tuple(sorted(folder.glob(f"{component}*.mlpackage"))) or (folder / f"{component}.mlpackage",)


def verify(request: VerifyRequest, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Write `out`/golden and return {"parity": figures by component, "failures": [lines]}; parity {} if not compared.

    Raises `HypersdError` for a base that cannot be opened any more, or an artifact that does not load.
    """
    source = open_source(request.source)
    check_unchanged(source, request.digests)
    plans = PlanFile.from_json(json.loads((request.bundle / "plan.json").read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(dir=request.out, ignore_cleanup_errors=True) as scratch:
        run = Verification(request=request, source=source, plans=plans, progress=progress, scratch=Path(scratch))
        return _verify(run)


def _verify(run: Verification) -> dict[str, Any]:
    request, plans = run.request, run.plans
    for stage in (_tokenizers, _text_encoders, _unet, _vae):
        stage(run)
        release()
    entry = plans.default
    write_golden(
        request.out / "golden",
        entry,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        ids=run.ids,
        latents=run.latents[entry.steps],
        image=run.images[entry.steps],
        min_psnr_db=request.golden_db,
    )
    if request.compare:
        _image(run)
    return {
        "parity": {gate.name: gate.to_json() for gate in run.gates},
        "failures": [failure for gate in run.gates for failure in gate.failures],
    }


def rounded(path: Path, folder: Path) -> Path:
    """A variant of an fp16 model.onnx, written into `folder`, that computes half op by op wherever it runs."""
    from hypersd_export.targets import onnx_fp16

    model = onnx_fp16.read(path)
    onnx_fp16.round_to_half(model)
    return onnx_fp16.save_beside(model, path, folder)


def _tokenizers(run: Verification) -> None:
    """Prompt ids by transformers from the bundle's tokenizers; the runtime's own must be the same."""
    from transformers import CLIPTokenizer

    from hypersd_export.runtime.tokenizer import load_tokenizer

    length = run.request.shapes.tokens
    run.ids = {"prompt": [], "negative": []}
    for encoder in run.encoders:
        folder = run.request.bundle / encoder.tokenizer
        theirs, ours = CLIPTokenizer.from_pretrained(folder), load_tokenizer(folder, length=length)
        for name, text in (("prompt", run.request.prompt), ("negative", run.request.negative_prompt)):
            row = theirs(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
            ids = np.asarray([row], dtype=np.int64)
            run.ids[name].append(ids)
            if run.request.compare and not np.array_equal(ours.encode(text), ids):
                run.gate(encoder.tokenizer, 0.0).refuse(f"gives other ids than transformers for {text!r}")


def _text_encoders(run: Verification) -> None:
    from hypersd_export.verify.reference import nothing, seen

    outputs = [_text_encoder(run, number) for number in range(len(run.encoders))]
    shapes = run.request.shapes
    run.texts = {name: seen(run.source, [given[name] for given in outputs], shapes) for name in run.ids}
    if run.source.base.zero_empty and not run.request.negative_prompt:
        run.texts["negative"] = nothing(run.texts["negative"])


def _text_encoder(run: Verification, number: int) -> dict[str, dict[str, Float]]:
    """What one text encoder gives for the prompts by their names, one row of each output; its artifact is compared."""
    from hypersd_export.verify.reference import text_outputs

    request, encoder = run.request, run.encoders[number]
    component = Component(encoder.component)
    module = run.load(component)
    count, tokens = request.shapes.batch, request.shapes.tokens
    random = np.random.default_rng(GATE_SEED + number).integers(0, int(module.config.vocab_size), (count, tokens))
    batches = {name: np.repeat(ids[number], count, axis=0) for name, ids in run.ids.items()} | {"random ids": random}
    references = {name: text_outputs(module, ids) for name, ids in batches.items()}
    corners = run.corners(component, module)
    del module
    if run.compares(component):
        gate, graph = run.gate(component, COMPONENT_DB[request.precision]), run.graph(component)
        for name, ids in batches.items():
            found = graph.run(input_ids=ids)
            pooled = [output for output in ("pooler_output",) if output in references[name]]
            for output in dict.fromkeys((*encoder.outputs, *pooled, *found)):
                gate.compare(found[output], references[name][output], f"in {output} for {name}")
        for corner in corners:
            corner.compare(gate, graph)
    return {name: {output: value[:1] for output, value in references[name].items()} for name in run.ids}


def _unet(run: Verification) -> None:
    """The whole loop of every plan; the artifact then gets what torch got in it, at each of their timesteps."""
    from hypersd_export.verify.calls import Calls, full, noted
    from hypersd_export.verify.reference import denoise

    request = run.request
    module = run.load("unet")
    calls: Calls = {}
    for entry in run.plans.entries:
        run.progress(f"torch: {entry.steps} steps")
        cfg = entry.plan.guidance.kind is GuidanceKind.CFG
        run.latents[entry.steps] = denoise(
            module,
            entry.table,
            entry.plan.guidance,
            cond=run.texts["prompt"],
            uncond=run.texts["negative"] if cfg else None,
            seed=request.seed,
            shape=run.shape,
            watch=noted(calls, entry.table),
        )
    if not run.compares(Component.UNET):
        return
    if request.shapes.batch > 1:
        run.progress("torch: unet on noise")
        more = request.shapes.batch - 1
        tables = [(entry.table, run.latents[entry.steps]) for entry in run.plans.entries]
        guidance = run.plans.default.plan.guidance
        calls = full(calls, module, tables, guidance, text=_unet_texts(run, more), more=more, seed=GATE_SEED)
    corners = run.corners(Component.UNET, module)
    del module
    release()
    gate, graph = run.gate(Component.UNET, COMPONENT_DB[request.precision]), run.graph(Component.UNET)
    text = _unet_texts(run, request.shapes.batch)
    for (t, _), (sample, reference) in calls.items():
        out = graph.run(sample=sample, timestep=filled(graph.inputs["timestep"], t), **text)["out_sample"]
        db, largest = gate.compare(out, reference, f"at t = {t:g}")
        gate.steps.append({"t": t, "psnr_db": round(db, 2), "max_abs": min(largest, 3.4e38)})
    for corner in corners:
        corner.compare(gate, graph)


def _unet_texts(run: Verification, count: int) -> Text:
    """Texts for the rows of one call with `count` images: unconditional rows first, where the graph has both."""
    shapes = run.request.shapes
    names = ("prompt",) if shapes.unet_batch == shapes.batch else ("negative", "prompt")
    return rows([run.texts[name] for name in names], count)


def _vae(run: Verification) -> None:
    """Every plan's picture; the decoder on the default plan's latents and on noise, the encoder on what torch decoded
    from them. The other plans' latents are decoded by the whole pipeline.

    On noise, as a wrong activation in a decoder need not show on latents that keep near zero.
    """
    from hypersd_export.verify.reference import decode, encode, to_uint8, unscale

    request, batch = run.request, run.request.shapes.batch
    module = run.load("vae")
    unscaled = {steps: unscale(module, latents) for steps, latents in run.latents.items()}
    pictures = {steps: decode(module, latents) for steps, latents in unscaled.items()}
    run.images = {steps: to_uint8(picture)[0] for steps, picture in pictures.items()}
    if not run.compares(Component.VAE_DECODER):
        return
    steps = run.plans.default.steps
    random = philox_normal(seed=GATE_SEED, index=1, stream=0, shape=(batch, *run.shape))
    codes = {f"{steps} steps": np.repeat(unscaled[steps], batch, axis=0), "noise": random}
    decoded = {f"{steps} steps": np.repeat(pictures[steps], batch, axis=0), "noise": decode(module, random)}
    views = {name: np.clip(image, -1, 1) for name, image in decoded.items()}
    encoded = {name: encode(module, view) for name, view in views.items()}
    corners = {part: run.corners(part, module) for part in (Component.VAE_DECODER, Component.VAE_ENCODER)}
    del module
    release()
    gate, graph = run.gate(Component.VAE_DECODER, COMPONENT_DB[request.precision]), run.graph(Component.VAE_DECODER)
    for name, z in codes.items():
        gate.compare(graph.run(latent_sample=z)["sample"], decoded[name], f"for {name}")
    for corner in corners[Component.VAE_DECODER]:
        corner.compare(gate, graph)
    if not run.compares(Component.VAE_ENCODER):
        return
    gate, graph = run.gate(Component.VAE_ENCODER, COMPONENT_DB[request.precision]), run.graph(Component.VAE_ENCODER)
    for name, view in views.items():
        halves = zip(
            np.split(graph.run(sample=view)["latent_parameters"], 2, axis=1),
            np.split(encoded[name], 2, axis=1),
            ("mean", "log-variance"),
            strict=True,
        )
        for mine, theirs, half in halves:  # apart: the log-variance's range would hide the mean's error
            gate.compare(mine, theirs, f"in the {half} for {name}")
    for corner in corners[Component.VAE_ENCODER]:
        corner.compare(gate, graph)


def _image(run: Verification) -> None:
    """The whole torch-free pipeline against the whole torch pipeline, for every plan of the bundle."""
    from hypersd_export.runtime.pipeline import Pipeline

    request = run.request
    least_db = COREML_IMAGE_DB if request.target is Target.COREML else IMAGE_DB
    gate = run.gate(IMAGE, least_db[request.precision])
    pipeline = Pipeline(path=request.bundle, plans=run.plans, digest="", runtime=run.runtime())
    for entry in run.plans.entries:
        run.progress(f"{run.provider}: image in {entry.steps} steps")
        result = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt if _is_cfg(entry) else "",
            steps=entry.steps,
            seed=request.seed,
        )
        if run.request.whole is not None:  # which has no components to be held against torch by themselves
            gate.compare(result.latents, run.latents[entry.steps], f"in the latents of {entry.steps} steps")
        db, largest = gate.compare(np.asarray(result.images[0]), run.images[entry.steps], f"in {entry.steps} steps")
        gate.steps.append({"steps": entry.steps, "psnr_db": round(db, 2), "max_abs": largest})


def _is_cfg(entry: PlanEntry) -> bool:
    return entry.plan.guidance.kind is GuidanceKind.CFG


def main(arguments: list[str] | None = None) -> int:
    """Read the request, write the report: what was found, or the one line of a `HypersdError`."""
    paths = sys.argv[1:] if arguments is None else arguments
    request = VerifyRequest.read(Path(paths[0]))
    return serve(lambda: verify(request, progress=lambda text: print(text, flush=True)), request.out / REPORT)


if __name__ == "__main__":
    sys.exit(main())

"""The range scan: how large every fp16 value of a pipeline becomes, and which ops must therefore stay in float32.

The fused pipeline draws seeded prompts, in float32 arithmetic on the weights that fp16 rounded, and of every value that
would be half the largest magnitude leaves the session: text encoder, the UNet at every row of every plan, decoder, and
the encoder on the decoded pictures. An op stays in float32 if something that it takes, makes or forms inside might not
fit into half:

- a value beyond `LIMIT` keeps the op that makes it and every op that takes it;
- normalisations square what they take, so the square counts;
- sums are not counted: matrix products, convolutions and means accumulate in float32 on every GPU that we know of;
- where a constant mask was added nothing is counted: what is meant to vanish in the softmax may overflow.

onnx_ir and onnxruntime are imported inside.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hypersd_export.bundle.texts import Encoder
from hypersd_export.diffusion import GuidanceKind, PlanEntry, PlanFile, initial_noise, run, step_noise
from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.model.pages import release
from hypersd_export.runtime.groups import groups
from hypersd_export.runtime.text import TIME_IDS, SizeHints, Text, apart, rows, text_of, zeros
from hypersd_export.targets import onnx, onnx_fp16
from hypersd_export.targets.onnx_fp16 import HALF_MAX

if TYPE_CHECKING:
    import onnx_ir

MARGIN = 4.0
"""Ours: other prompts and seeds may reach four times as far as those that were drawn."""
LIMIT = HALF_MAX / MARGIN
SQUARING = frozenset(
    {"InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization", "ReduceL2"}
)
"""Ops that square what they take before they sum it."""
SCAN_SEED = 20_26
PROMPTS = (
    "",
    "a crowded night market in the rain, paper lanterns and neon signs, steam over the food stalls, wet stones that "
    "mirror every colour, people with umbrellas, an old tram at the far end, highly detailed, wide, long exposure",
)
"""Drawn beside the export's own prompt: an empty one, and a long one."""
LARGEST, SMALLEST = "largest.", "smallest."
"""Before a value's name: the outputs that measure it."""
FINITE = 3.4e38
"""What a report says for an infinity or NaN."""

Float = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """What is drawn: by every plan of `plans` the prompts, and the negative one which is the last.

    ids: [P + 1, S] for each of the `encoders`. zero_empty: the negative one, which is empty, is zeros to the UNet.
    """

    encoders: tuple[Encoder, ...]
    ids: tuple[Ids, ...]
    zero_empty: bool = False
    plans: PlanFile
    shapes: Shapes
    scaling_factor: float
    shift_factor: float = 0.0

    @property
    def count(self) -> int:
        """How many prompts."""
        return len(self.ids[0]) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptOp:
    """An op that stays in float32: its node, its kind, and the magnitude (or its square) that is too large for half."""

    node: str
    op: str
    largest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranges:
    """What the scan found in one component: the `kept` ops, of `ops` that compute half, and by name the `largest`
    magnitude of every value that is half."""

    kept: tuple[KeptOp, ...]
    ops: int
    largest: Mapping[str, float]

    @property
    def top(self) -> float:
        """The largest magnitude of all."""
        return max(self.largest.values(), default=0.0)

    def line(self) -> str:
        """How many ops are kept and why, for people."""
        said = f"{len(self.kept)} of {self.ops} ops stay in float32; values reach {self.top:.3g}, safe is {LIMIT:.5g}"
        if not self.kept:
            return said
        worst = max(self.kept, key=lambda op: op.largest)
        return f"{said}; {worst.node} ({worst.op}) handles {worst.largest:.3g}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kept": [{"node": op.node, "op": op.op, "largest": _digits(op.largest)} for op in self.kept],
            "ops": self.ops,
            "largest": {name: _digits(value) for name, value in self.largest.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Ranges":
        """Read what `to_json` wrote."""
        return cls(kept=tuple(KeptOp(**op) for op in data["kept"]), ops=data["ops"], largest=data["largest"])


def _digits(value: float) -> float:
    """Four digits, and a number that JSON has."""
    return float(f"{value:.4g}") if value < FINITE else FINITE


def scan(
    graphs: Mapping[Component, Path], drawing: Drawing, scratch: Path, progress: Progress = lambda _: None
) -> dict[Component, Ranges]:
    """Draw with the model.onnx of each component, one of them in memory at a time, and say what may overflow.

    `scratch` is a folder for variants of the graphs that share their data files, on the same disk if possible. Without
    a VAE encoder among `graphs` none is measured.
    """
    found: dict[Component, Ranges] = {}

    def probed(component: Component, use: "Callable[[Probe], Any]") -> Any:
        progress(f"range scan: {component}")
        probe = open_probe(graphs[component], scratch / component)
        result = use(probe)
        found[component] = ranges(onnx_fp16.read(graphs[component]), probe.largest)
        del probe
        release()  # the session holds the component's weights, and the next one needs the room
        return result

    encoded = [
        probed(Component(encoder.component), functools.partial(_encode_text, drawing=drawing, encoder=encoder, ids=ids))
        for encoder, ids in zip(drawing.encoders, drawing.ids, strict=True)
    ]
    texts = _texts(drawing, encoded)
    latents = probed(Component.UNET, lambda probe: _denoise(probe, drawing, texts, progress))
    pictures = probed(Component.VAE_DECODER, lambda probe: _decode(probe, drawing, latents))
    if Component.VAE_ENCODER in graphs:
        probed(Component.VAE_ENCODER, lambda probe: _in_groups(probe, drawing, "sample", np.clip(pictures, -1, 1)))
    return found


def _encode_text(probe: "Probe", *, drawing: Drawing, encoder: Encoder, ids: Ids) -> dict[str, Float]:
    """The outputs that count, [P + 1, …] by name."""
    parts = [probe.run(input_ids=part) for part in groups(ids, drawing.shapes.batch)]
    return {name: np.concatenate([part[name] for part in parts])[: len(ids)] for name in encoder.outputs}


def _texts(drawing: Drawing, encoded: Sequence[Mapping[str, Float]]) -> list[Text]:
    """Every prompt as the UNet sees it, the negative one's last."""
    shapes, found = drawing.shapes, apart(text_of(drawing.encoders, encoded))
    if drawing.zero_empty:
        found[-1] = zeros(found[-1])
    if not shapes.pooled:
        return found
    return [{**text, TIME_IDS: SizeHints().time_ids((shapes.width, shapes.height))} for text in found]


def _denoise(probe: "Probe", drawing: Drawing, texts: Sequence[Text], progress: Progress) -> Float:
    """Latents [plans · P, C, h, w]: every prompt by every plan, each from a noise of its own."""
    latents = []
    for entry in drawing.plans.entries:
        progress(f"range scan: unet in {entry.steps} steps")
        latents.append(np.concatenate(list(_by_plan(probe, drawing, entry, texts)))[: drawing.count])
    return np.concatenate(latents)


def _by_plan(probe: "Probe", drawing: Drawing, entry: PlanEntry, texts: Sequence[Text]) -> Iterator[Float]:
    """Latents of as many prompts at a time as the graph has rows for."""
    shapes, guidance = drawing.shapes, entry.plan.guidance
    shape = shapes.channels, shapes.latent_height, shapes.latent_width
    cfg = guidance.kind is GuidanceKind.CFG
    size = shapes.unet_batch // (2 if cfg else 1)
    uncond, numbers = [texts[-1]] * size, np.arange(drawing.count)
    for part in groups(numbers, size):
        cond = [texts[n] for n in part]
        text = rows([*uncond, *cond] if cfg else cond, 1)

        def net(x: Float, t: float, text: Text = text) -> Float:
            sample = (np.concatenate([x, x]) if cfg else x).astype(np.float32)
            out: Float = probe.run(sample=sample, timestep=np.float32(t), **text)["out_sample"]
            if not cfg:
                return out
            u, c = np.split(out, 2)
            return np.asarray(u + np.float32(guidance.scale) * (c - u))

        def fresh(stream: int, part: npt.NDArray[np.int64] = part) -> Float:
            return np.stack([step_noise(seed=SCAN_SEED, index=int(n), step=stream, shape=shape) for n in part])

        noise = np.stack([initial_noise(seed=SCAN_SEED, index=int(n), shape=shape) for n in part])
        start = np.float32(entry.table.init_noise_sigma) * noise
        yield np.asarray(run(entry.table, net, start, step_noise=fresh), dtype=np.float32)


def _decode(probe: "Probe", drawing: Drawing, latents: Float) -> Float:
    """Pictures [N, 3, H, W] around [-1, 1]."""
    unscaled = latents / np.float32(drawing.scaling_factor) + np.float32(drawing.shift_factor)
    return _in_groups(probe, drawing, "latent_sample", unscaled)


def _in_groups(probe: "Probe", drawing: Drawing, name: str, rows: npt.NDArray[Any]) -> Float:
    """The first output for all rows, as many at a time as the graph takes."""
    parts = [next(iter(probe.run(**{name: part}).values())) for part in groups(rows, drawing.shapes.batch)]
    return np.concatenate(parts)[: len(rows)]


@dataclass(slots=True)
class Probe:
    """A component's graph in float32 that also measures; `largest` are the magnitudes seen so far, by value."""

    graph: Any
    outputs: tuple[str, ...]
    largest: dict[str, float] = field(default_factory=dict)

    def run(self, **feeds: npt.ArrayLike) -> dict[str, Float]:
        """The graph's own outputs."""
        found = self.graph.run(**feeds)
        for name, value in found.items():
            inner = name.removeprefix(LARGEST).removeprefix(SMALLEST)
            if inner != name:
                seen = abs(float(value)) if math.isfinite(value) else math.inf
                self.largest[inner] = max(self.largest.get(inner, 0.0), seen)
        return {name: found[name] for name in self.outputs}


def open_probe(path: Path, scratch: Path) -> Probe:
    """Load the model.onnx of an fp16 component as a probe; its files are written into `scratch`."""
    from hypersd_export.runtime.onnx import open_graph

    model = onnx_fp16.read(path)
    outputs = tuple(str(value.name) for value in model.graph.outputs)
    for value in onnx_fp16.widen(model):
        _measure(model, value)
    probe = onnx_fp16.save_beside(model, path, scratch)
    onnx.let_go(model.graph.initializers.values())  # onnxruntime maps the weights itself
    return Probe(graph=open_graph(probe, optimise=False), outputs=outputs)


def ranges(model: "onnx_ir.Model", largest: Mapping[str, float]) -> Ranges:
    """Which nodes of an fp16 model must stay in float32, by the largest magnitude of each of its half values.

    Casts that take such a value to float32 are not among them: they take it as it comes.
    """
    needs: dict[str, tuple[str, float]] = {}
    half = {value.name: value for value in onnx_fp16.half_values(model)}
    ops = {value.producer() for value in half.values()}

    def keep(node: "onnx_ir.Node | None", magnitude: float) -> None:
        if node in ops and magnitude > LIMIT:
            assert node is not None
            assert node.name is not None
            needs[node.name] = node.op_type, max(magnitude, needs.get(node.name, ("", 0.0))[1])

    for name, value in half.items():
        magnitude = largest[str(name)]
        for node in (value.producer(), *value.consumers()):
            keep(node, magnitude)
            if node is not None and node.op_type in SQUARING and node.inputs[0] is value:
                keep(node, magnitude * magnitude)
    order = [str(node.name) for node in model.graph if node.name in needs]
    kept = tuple(KeptOp(node=name, op=needs[name][0], largest=needs[name][1]) for name in order)
    return Ranges(kept=kept, ops=len(ops), largest=dict(largest))


def _measure(model: "onnx_ir.Model", value: "onnx_ir.Value") -> None:
    """Outputs with the largest and the smallest element of a value, leaving out where a mask was added."""
    import onnx_ir

    producer = value.producer()
    assert producer is not None
    seen, nodes = value, []
    added = producer.inputs if producer.op_type == "Add" else ()
    hidden = next((mask for mask in map(_mask, added) if mask is not None), None)
    if hidden is not None:
        arrays = {"hidden": hidden, "zero": np.zeros((), np.float32)}
        constants = [
            onnx.add_initializer(model.graph, f"{name}.{value.name}", onnx_ir.tensor(array))
            for name, array in arrays.items()
        ]
        nodes.append(onnx_ir.node("Where", [*constants, value], name=f"unmasked.{value.name}"))
        seen = nodes[0].outputs[0]
        seen.name = f"{nodes[0].name}.out"
    for op, prefix in (("ReduceMax", LARGEST), ("ReduceMin", SMALLEST)):  # a third of the time of Abs and one of them
        nodes.append(onnx_ir.node(op, [seen], {"keepdims": 0}, name=f"{op}.{value.name}"))
        out = nodes[-1].outputs[0]
        out.name, out.dtype, out.shape = f"{prefix}{value.name}", onnx_ir.DataType.FLOAT, onnx_ir.Shape(())
        model.graph.outputs.append(out)
    model.graph.insert_after(producer, nodes)


def _mask(value: "onnx_ir.Value | None") -> npt.NDArray[np.bool_] | None:
    """Where a constant is as low as half goes; None for everything else. In a widened graph a Cast lies between."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    if value.dtype is None or not value.dtype.is_floating_point():
        return None
    hidden: npt.NDArray[np.bool_] = np.asarray(value.const_value.numpy()) <= -HALF_MAX
    return hidden if hidden.any() else None


def scan_prompts(prompt: str) -> tuple[str, ...]:
    """What is drawn: the export's own prompt and `PROMPTS`, each once."""
    return tuple(dict.fromkeys((prompt, *PROMPTS)))


def encode_prompts(encode: Callable[[str], Ids], texts: Iterable[str]) -> Ids:
    """Ids [P, S] of the texts; those that are too long are cut without a word."""
    import warnings

    from hypersd_export.runtime.tokenizer import PromptTruncated

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncated)
        return np.concatenate([encode(text) for text in texts])

"""The whole pipeline as one ONNX graph: `compose` joins the parts that `hypersd_export.targets.onnx` built.

    prompt ids (and negative ids under CFG), noise, step noises   →   image uint8 [B, H, W, 3], latents [B, C, h, w]

The plan's rows are constants. The steps are one Loop whose body is the UNet once, with its weights in the outer scope,
so that no weight is stored twice and the graph does not grow with the steps; or they are unrolled, for what cannot run
a Loop. Guidance is there only if the plan has it. Arithmetic is the runtime's, in float32 and in the same order:

    x = init_noise_sigma · noise;   x = a x + b net(k x, t) + c z for each row;   image = decode(x / scaling_factor)

onnx and onnx_ir are imported inside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hypersd_export.bundle.texts import Encoder, encoders_of
from hypersd_export.diffusion import Guidance, GuidanceKind, Row, StepTable
from hypersd_export.errors import OptionError
from hypersd_export.graphs.spec import Component, Shapes
from hypersd_export.targets import onnx

if TYPE_CHECKING:
    import onnx_ir

PIPELINE_FILE = "pipeline.onnx"
PIPELINE_DATA_FILE = "pipeline.onnx_data"
ONE_ENCODER = encoders_of({})
_UNPACKING = frozenset({"DequantizeLinear"})
"""Ops of integer weights alone (`targets.onnx_quantize`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wiring:
    """What joins the parts: the rows, the guidance, how latents are scaled for the VAE, and the text encoders.

    `unroll` writes the steps one after another instead of as a Loop. `empty`: for each text encoder the ids of an empty
    prompt where that, as what is steered away from, is zeros to the UNet (SDXL); else ().
    """

    table: StepTable
    guidance: Guidance
    shapes: Shapes
    scaling_factor: float
    shift_factor: float = 0.0
    unroll: bool = False
    encoders: tuple[Encoder, ...] = ONE_ENCODER
    empty: tuple[tuple[int, ...], ...] = ()

    @property
    def parts(self) -> tuple[Component, ...]:
        """The components that are joined."""
        texts = tuple(Component(encoder.component) for encoder in self.encoders)
        return *texts, Component.UNET, Component.VAE_DECODER

    @property
    def cfg(self) -> bool:
        """Whether the UNet sees unconditional rows too."""
        return self.guidance.kind is GuidanceKind.CFG

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[B, C, h, w]."""
        shapes = self.shapes
        return shapes.batch, shapes.channels, shapes.latent_height, shapes.latent_width

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the cache key."""
        return {
            "table": self.table.to_json(), "guidance": {"kind": self.guidance.kind.value, "scale": self.guidance.scale},
            "shapes": self.shapes.to_json(), "scaling_factor": self.scaling_factor, "shift_factor": self.shift_factor,
            "unroll": self.unroll, "encoders": [asdict(encoder) for encoder in self.encoders], "empty": self.empty,
        }  # fmt: skip


def compose(
    parts: Mapping[Component, Path], wiring: Wiring, folder: Path, *, external: bool | None = None
) -> dict[str, Any]:
    """Write `folder/pipeline.onnx` from the model.onnx of each of `wiring.parts`; returns the manifest's figures.

    Weights are mapped from the parts' files and written once; `external` as in `onnx.build`. Raises `OptionError` for
    parts of different opsets, or whose shapes are not those of `wiring`.
    """
    import onnx_ir

    models = {part: onnx_ir.load(parts[part]) for part in wiring.parts}
    opsets = {part.value: model.opset_imports[""] for part, model in models.items()}
    if len(set(opsets.values())) > 1:
        raise OptionError(f"the parts have different opsets ({opsets}): export them with one --opset")
    weight_bytes = sum(value.const_value.nbytes for model in models.values() for value in _weights(model))
    graph = _Composer(models, wiring).graph()
    model = onnx_ir.Model(graph, ir_version=max(model.ir_version for model in models.values()))
    model.opset_imports.update({name: v for part in models.values() for name, v in part.opset_imports.items()})
    if external is None:
        external = weight_bytes > onnx.EXTERNAL_DATA_BYTES
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder, external=external, names=(PIPELINE_FILE, PIPELINE_DATA_FILE))
    names = [value.name for value in graph.inputs], [value.name for value in graph.outputs]
    onnx.check(folder / PIPELINE_FILE, *names)
    written = sum(value.const_value.nbytes for value in graph.initializers.values())
    return {
        "opset": model.opset_imports[""],
        "nodes": sum(1 for _ in graph.all_nodes()),
        "weight_bytes": int(written),
        "parts_weight_bytes": int(weight_bytes),
        "external_data": external,
        "unrolled": wiring.unroll,
        "inputs": {value.name: list(value.shape.numpy()) for value in graph.inputs},
    }


def _weights(model: "onnx_ir.Model") -> "list[onnx_ir.Value]":
    return list(model.graph.initializers.values())


class _Composer:
    """Builds the graph; `self._nodes` is where the next node goes: the graph, or the body of its loop."""

    def __init__(self, models: "Mapping[Component, onnx_ir.Model]", wiring: Wiring) -> None:
        self._models, self._wiring = models, wiring
        self._nodes: list[onnx_ir.Node] = []
        self._root = self._nodes
        self._initializers: dict[str, onnx_ir.Value] = {}
        self._shared: dict[Component, dict[onnx_ir.Value, onnx_ir.Value]] = {}
        self._scalars: dict[float, onnx_ir.Value] = {}
        self._names: dict[str, int] = {}

    def graph(self) -> "onnx_ir.Graph":
        """Text encoder, steps, decoder, pixels."""
        import onnx_ir

        shapes, table = self._wiring.shapes, self._wiring.table
        latent = self._wiring.latent_shape
        inputs = prompt = self._ids("input_ids")
        texts = [self._text(prompt, "prompt")]
        if self._wiring.cfg:
            negative = self._ids("negative_input_ids")
            inputs = [*prompt, *negative]
            texts.insert(0, self._present(negative, self._text(negative, "negative")))
        if shapes.pooled:
            size = self._input("time_ids", onnx_ir.DataType.FLOAT, (shapes.batch, 6))
            inputs = [*inputs, size]
            texts = [{**text, "time_ids": size} for text in texts]
        noise = self._input("noise", onnx_ir.DataType.FLOAT, latent)
        inputs = [*inputs, noise]
        fresh = None
        if table.noise_streams:
            fresh = self._input("step_noise", onnx_ir.DataType.FLOAT, (len(table.noise_streams), *latent))
            inputs.append(fresh)
        context = {
            name: value if len(texts) == 1 else self._op("Concat", *(text[name] for text in texts), axis=0)
            for name, value in texts[0].items()
        }
        x = noise if table.init_noise_sigma == 1.0 else self._op("Mul", noise, self._scalar(table.init_noise_sigma))
        steps = self._unrolled if self._wiring.unroll else self._loop
        latents = self._op("Identity", steps(x, context, fresh))
        image = self._pixels(latents)
        image.name, latents.name = self._name("image"), self._name("latents")
        _say(image, onnx_ir.DataType.UINT8, (shapes.batch, shapes.height, shapes.width, 3))
        _say(latents, onnx_ir.DataType.FLOAT, latent)
        return onnx_ir.Graph(
            inputs, [image, latents], nodes=self._nodes, initializers=list(self._initializers.values()),
            opset_imports={"": self._models[Component.UNET].opset_imports[""]}, name="pipeline",
        )  # fmt: skip

    def _ids(self, name: str) -> "list[onnx_ir.Value]":
        """The inputs of one text's ids, for each text encoder."""
        import onnx_ir

        shape = self._wiring.shapes.batch, self._wiring.shapes.tokens
        return [self._input(f"{name}{each.suffix}", onnx_ir.DataType.INT64, shape) for each in self._wiring.encoders]

    def _text(self, ids: "Sequence[onnx_ir.Value]", which: str) -> "dict[str, onnx_ir.Value]":
        """A text as the UNet sees it: the states of the encoders side by side, and the pooled one."""
        states, pooled = [], {}
        for encoder, row in zip(self._wiring.encoders, ids, strict=True):
            part = Component(encoder.component)
            outputs = self._part(part, {"input_ids": row}, prefix=f"{part}.{which}")
            states.append(outputs[encoder.states])
            if encoder.pooled is not None:
                pooled["text_embeds"] = outputs[encoder.pooled]
        return {"encoder_hidden_states": self._op("Concat", *states, axis=-1) if pooled else states[0], **pooled}

    def _present(self, ids: "Sequence[onnx_ir.Value]", text: "dict[str, onnx_ir.Value]") -> "dict[str, onnx_ir.Value]":
        """The text, or zeros where its ids are an empty prompt's and the wiring says so."""
        import onnx_ir

        if not self._wiring.empty:
            return text
        other = None
        for row, empty in zip(ids, self._wiring.empty, strict=True):
            same = self._op("Equal", row, self._constant("empty", np.asarray([empty], np.int64)))
            differs = self._op("Cast", self._op("Not", same), to=int(onnx_ir.DataType.FLOAT))
            axes = self._constant("axis", np.asarray([1], np.int64))
            here = self._op("ReduceMax", differs, axes, keepdims=1)
            other = here if other is None else self._op("Max", other, here)
        axes = self._constant("axis", np.asarray([2], np.int64))
        by_rank = {"text_embeds": other, "encoder_hidden_states": self._op("Unsqueeze", other, axes)}
        return {name: self._op("Mul", value, by_rank[name]) for name, value in text.items()}

    def _loop(self, x: Any, context: Any, fresh: Any) -> Any:
        """A Loop that carries the latents; the rows are columns, and a row's value is gathered by the iteration."""
        import onnx_ir

        rows = self._wiring.table.rows
        streams = self._wiring.table.noise_streams
        place = [streams.index(n) if n in streams else 0 for n in range(1, len(rows) + 1)]
        places = self._constant("rows.noise", np.asarray(place, np.int64)) if streams else None
        count = self._constant("steps", np.int64(len(rows)))
        always = self._constant("always", np.bool_(True))
        outer, self._nodes = self._nodes, []
        number = self._input("step", onnx_ir.DataType.INT64, ())
        go_on = self._input("go_on", onnx_ir.DataType.BOOL, ())
        before = self._input("x", onnx_ir.DataType.FLOAT, self._wiring.latent_shape)

        def value(name: str) -> Any:
            column = np.asarray([getattr(row, name) for row in rows], np.float32)
            return self._op("Gather", self._constant(f"rows.{name}", column), number, axis=0)

        def noise() -> Any:
            return self._op("Gather", fresh, self._op("Gather", places, number, axis=0), axis=0)

        after = self._step(before, context, value, noise, rows)
        still = self._op("Identity", go_on)
        _say(still, onnx_ir.DataType.BOOL, ())
        _say(after, onnx_ir.DataType.FLOAT, self._wiring.latent_shape)
        body = onnx_ir.Graph([number, go_on, before], [still, after], nodes=self._nodes, name="step")
        self._nodes = outer
        return self._op("Loop", count, always, x, body=body)

    def _unrolled(self, x: Any, context: Any, fresh: Any) -> Any:
        """The steps one after another; what a step does not need (k = 1, no noise) is left out of it."""
        streams = self._wiring.table.noise_streams
        for number, row in enumerate(self._wiring.table.rows, start=1):

            def value(name: str, row: Row = row) -> Any:
                return self._scalar(getattr(row, name))

            def noise(number: int = number) -> Any:
                at = self._constant("noise.place", np.int64(streams.index(number)))
                return self._op("Gather", fresh, at, axis=0)

            x = self._step(x, context, value, noise, [row])
        return x

    def _step(
        self, x: Any, context: Any, value: Callable[[str], Any], noise: Callable[[], Any], rows: Sequence[Row]
    ) -> Any:
        """a x + b net(k x, t) + c z, for one row or for any of several."""
        scaled = x if all(row.k == 1.0 for row in rows) else self._op("Mul", value("k"), x)
        if self._wiring.cfg:
            scaled = self._op("Concat", scaled, scaled, axis=0)
        feeds = {"sample": scaled, "timestep": value("t"), **context}
        out = self._part(Component.UNET, feeds, prefix="unet")["out_sample"]
        if self._wiring.cfg:
            uncond, cond = self._ops("Split", 2, out, axis=0, num_outputs=2)
            difference = self._op("Sub", cond, uncond)
            out = self._op("Add", uncond, self._op("Mul", self._scalar(self._wiring.guidance.scale), difference))
        x = self._op("Add", self._op("Mul", value("a"), x), self._op("Mul", value("b"), out))
        if any(row.c != 0.0 for row in rows):
            x = self._op("Add", x, self._op("Mul", value("c"), noise()))
        return x

    def _pixels(self, latents: Any) -> Any:
        """decode(x / scaling_factor + shift_factor) as `runtime.images.to_uint8` rounds it: uint8 [B, H, W, 3]."""
        import onnx_ir

        z = self._op("Div", latents, self._scalar(self._wiring.scaling_factor))
        if self._wiring.shift_factor:
            z = self._op("Add", z, self._scalar(self._wiring.shift_factor))
        sample = self._part(Component.VAE_DECODER, {"latent_sample": z}, prefix="vae_decoder")["sample"]
        half = self._scalar(0.5)
        unit = self._op("Clip", self._op("Add", self._op("Mul", sample, half), half), self._scalar(0), self._scalar(1))
        levels = self._op("Mul", self._op("Transpose", unit, perm=(0, 2, 3, 1)), self._scalar(255))
        return self._op("Cast", self._op("Round", levels), to=int(onnx_ir.DataType.UINT8))

    def _part(self, part: Component, feeds: Mapping[str, Any], *, prefix: str) -> dict[str, Any]:
        """The nodes of a part, once more; its weights are shared by all the places where it stands.

        Inputs are cast to the part's own types, outputs to float32.
        """
        import onnx_ir

        graph = self._models[part].graph
        if part not in self._shared:
            self._shared[part] = {
                value: self._initializer(self._name(f"{part}.{value.name}"), value.const_value)
                for value in graph.initializers.values()
            }
            self._unpack(part)
        values: dict[Any, Any] = dict(self._shared[part])
        for value in graph.inputs:
            values[value] = self._cast(feeds[value.name], value.dtype)
        for node in graph:
            if node.op_type not in _UNPACKING:
                self._nodes.append(self._again(node, values, prefix))
        float32 = onnx_ir.DataType.FLOAT
        return {
            value.name: values[value] if value.dtype == float32 else self._op("Cast", values[value], to=int(float32))
            for value in graph.outputs
        }

    def _unpack(self, part: Component) -> None:
        """Integer weights are given back their type once, outside of the loop: not anew at each step, and onnxruntime
        takes no weight of the outer scope for the matrix products that it fuses with their unpacking."""
        for node in self._models[part].graph:
            if node.op_type in _UNPACKING:
                self._root.append(self._again(node, self._shared[part], str(part)))

    def _again(self, node: Any, values: dict[Any, Any], prefix: str) -> Any:
        """A node once more, its inputs from `values`, where its outputs are put."""
        import onnx_ir

        inputs = [None if value is None else values[value] for value in node.inputs]
        outputs = [onnx_ir.Value(name=self._name(f"{prefix}.{value.name}")) for value in node.outputs]
        values.update(zip(node.outputs, outputs, strict=True))
        name, attributes = self._name(f"{prefix}.{node.name or node.op_type}"), list(node.attributes.values())
        return onnx_ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=name)

    def _cast(self, value: Any, dtype: Any) -> Any:
        import onnx_ir

        if dtype in (onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT64):
            return value
        return self._op("Cast", value, to=int(dtype))

    def _scalar(self, number: float) -> Any:
        """A float32 constant; equal ones are one."""
        value = float(np.float32(number))
        if value not in self._scalars:
            self._scalars[value] = self._constant("scalar", np.float32(value))
        return self._scalars[value]

    def _constant(self, name: str, value: Any) -> Any:
        """An initialiser of the outer graph."""
        import onnx_ir

        array = np.asarray(value)
        tensor = onnx_ir.tensor(array, name=self._name(name))
        return self._initializer(str(tensor.name), tensor)

    def _initializer(self, name: str, tensor: Any) -> Any:
        import onnx_ir

        kind, shape = onnx_ir.TensorType(tensor.dtype), onnx_ir.Shape(tensor.shape)
        self._initializers[name] = onnx_ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
        return self._initializers[name]

    def _op(self, kind: str, *inputs: Any, **attributes: Any) -> Any:
        return self._ops(kind, 1, *inputs, **attributes)[0]

    def _ops(self, kind: str, outputs: int, *inputs: Any, **attributes: Any) -> Any:
        import onnx_ir

        name = self._name(kind)
        values = [onnx_ir.Value(name=f"{name}_out{number or ''}") for number in range(outputs)]
        self._nodes.append(onnx_ir.node(kind, inputs, attributes, outputs=values, name=name))
        return values

    def _name(self, wanted: str) -> str:
        """Unique: onnxruntime wants that of nodes, in the body too."""
        count = self._names[wanted] = self._names.get(wanted, 0) + 1
        return wanted if count == 1 else f"{wanted}.{count}"

    def _input(self, name: str, dtype: Any, shape: Sequence[int]) -> Any:
        import onnx_ir

        value = onnx_ir.Value(name=self._name(name))
        _say(value, dtype, shape)
        return value


def _say(value: Any, dtype: Any, shape: Sequence[int]) -> None:
    """State type and shape, as inputs and outputs must."""
    import onnx_ir

    value.shape, value.type = onnx_ir.Shape(shape), onnx_ir.TensorType(dtype)

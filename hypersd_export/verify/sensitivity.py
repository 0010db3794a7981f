"""How much a UNet's output changes where some of its weights are rounded, measured on a saved Core ML package.

What it is fed is what the network sees when the pipeline draws: prompts, noise and steps of their own, none of which
the gates or the golden picture have. An error is squared and relative to the output's own square.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hypersd_export.diffusion import GuidanceKind, PlanEntry
from hypersd_export.graphs.spec import Shapes
from hypersd_export.model.pages import release
from hypersd_export.runtime.graph import filled
from hypersd_export.runtime.ports import Port, Ports
from hypersd_export.verify.coreml import InterpretedGraph
from hypersd_export.verify.mil import Package
from hypersd_export.verify.reference import denoise, prompt_states
from hypersd_export.verify.source import Source

SEED = 20_28
"""Of the noise; the gates, the golden picture and the range scan have others."""
PROMPTS = ("a small boat on a lake at dawn, oil painting", "portrait of an old man with a red scarf")
WORST = 1e6
"""An error that is larger, infinite or no number counts as this."""

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


def calls_of(source: Source, entry: PlanEntry, shapes: Shapes) -> list[Feeds]:
    """What the UNet is fed, by our names, where torch draws `PROMPTS` by a plan: of the first prompt the first step, of
    the second the last. Rows are repeated to `shapes.unet_batch`, the timestep is one number."""
    *states, negative = prompt_states(source, (*PROMPTS, ""), shapes, negative=True)
    unet, _ = source.load("unet", torch.float32)
    calls: list[Feeds] = []

    def seen(_: torch.nn.Module, given: tuple[torch.Tensor, ...], named: Mapping[str, Any]) -> None:
        rows = {"sample": given[0], "encoder_hidden_states": named["encoder_hidden_states"]}
        rows |= named.get("added_cond_kwargs", {})
        feeds = {name: value.repeat_interleave(shapes.unet_batch // len(value), 0) for name, value in rows.items()}
        calls.append({name: value.numpy() for name, value in (feeds | {"timestep": given[1]}).items()})

    unet.register_forward_pre_hook(seen, with_kwargs=True)
    guidance = entry.plan.guidance
    uncond = negative if guidance.kind is GuidanceKind.CFG else None
    shape = shapes.channels, shapes.latent_height, shapes.latent_width
    for number, cond in enumerate(states):
        denoise(unet, entry.table, guidance, cond=cond, uncond=uncond, seed=SEED + number, shape=shape)
    del unet
    release()
    return [calls[0], calls[-1]]


def fed(package: Package, calls: Sequence[Feeds], ports: Ports) -> list[Feeds]:
    """The calls by a package's own names and shapes; one number fills its input."""
    inputs = InterpretedGraph(package=package).inputs
    found: list[Feeds] = []
    for feeds in calls:
        own = {(port := ports.get(name, Port(name=name))).name: port.theirs(value) for name, value in feeds.items()}
        found.append({name: filled(tensor, float(own[name])) if own[name].ndim == 0 else own[name]
                      for name, tensor in inputs.items()})  # fmt: skip
    return found


def constants(package: Package, names: Iterable[str]) -> dict[str, Array]:
    """The package's weights of these names, mapped from its file."""
    wanted = set(names)
    ops = (op for op in package.function().block.operations if op.type == "const" and op.outputs[0].name in wanted)
    return {op.outputs[0].name: package.file.value(op.attributes["val"]) for op in ops}


def output_errors(
    package: Package, calls: Sequence[Feeds], weights: Callable[[], Iterable[Mapping[str, Array]]]
) -> list[float]:
    """For each of `weights()` (see `Package.evaluate_with`) the error of the outputs with them in place of the
    package's own: the mean over the calls and the outputs."""
    sums: list[float] = []
    for feeds in calls:
        exact = package.evaluate(feeds)
        for number, outputs in enumerate(package.evaluate_with(feeds, weights())):
            sums += [0.0] * (number + 1 - len(sums))
            sums[number] += sum(relative_error(outputs[name], own) for name, own in exact.items()) / len(exact)
    return [min(each / len(calls), WORST) for each in sums]


def relative_error(found: Array, exact: Array) -> float:
    """Sum of the squared differences over the sum of the squares; `WORST` where that is no number."""
    own = exact.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.square(found - own).sum() / np.square(own).sum())
    return error if error < WORST else WORST

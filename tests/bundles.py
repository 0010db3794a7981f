"""Hand-made bundles for tests: graphs of a few nodes, so that NumPy can say what every picture must be.

text_encoder  states = table[ids] + positions
unet          out = 0.9 sample + 0.0005 t + 0.3 mean(states, tokens)
vae_decoder   sample = tanh(first three channels, each cell as 2 x 2 pixels)
vae_encoder   mean = 2 x 2 averages and their mean over the channels, log-variance 0
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_export.bundle.manifest import write_manifest
from hypersd_export.diffusion.noise import initial_noise, step_noise
from hypersd_export.diffusion.plan import FewStepPlan, Guidance, GuidanceKind, Solver
from hypersd_export.diffusion.planfile import PlanEntry, PlanFile
from hypersd_export.model.tokenizer import Tokenizer, write_tokenizer
from tests.tiny import SPECIALS, bytes_to_unicode

TOKENS = 16
CHANNELS = 4
HEIGHT, WIDTH = 4, 6  # of the latents; pictures are 12 wide and 8 high
SCALING = 0.5
CFG = Guidance(kind=GuidanceKind.CFG, scale=3.0)

CFG_PLANS = (
    FewStepPlan(solver=Solver.TCD, num_steps=4, eta=0.3, guidance=CFG),
    FewStepPlan(solver=Solver.DDIM, num_steps=2, guidance=CFG),
)
PLAIN_PLANS = (FewStepPlan(solver=Solver.DDIM, num_steps=3),)


def vocabulary() -> dict[str, int]:
    """Bytes, bytes at the end of a word, two merges, begin and end."""
    alphabet = list(bytes_to_unicode().values())
    merged = ["ca", "cat</w>", "do", "dog</w>"]
    return {token: i for i, token in enumerate([*alphabet, *(c + "</w>" for c in alphabet), *merged, *SPECIALS])}


def embedding() -> np.ndarray:
    """The text encoder's table, float32 [vocabulary, channels]."""
    return np.random.default_rng(1).standard_normal((len(vocabulary()), CHANNELS)).astype(np.float32)


def positions() -> np.ndarray:
    """The text encoder's positions, float32 [tokens, channels]."""
    return np.random.default_rng(2).standard_normal((TOKENS, CHANNELS)).astype(np.float32)


def save_graph(
    path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, np.ndarray]
) -> None:
    import onnx
    from onnx import helper, numpy_helper

    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def value_info(name: str, shape: Sequence[int | str], kind: str = "FLOAT") -> Any:
    """A named input or output."""
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)


def write_text_encoder(folder: Path, batch: int | str) -> None:
    from onnx import helper

    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Add", ["embedded", "positions"], ["last_hidden_state"]),
        helper.make_node("ReduceMean", ["last_hidden_state", "axis"], ["pooler_output"], keepdims=0),
    ]
    save_graph(
        folder / "model.onnx", nodes, [value_info("input_ids", [batch, TOKENS], "INT64")],
        [value_info("last_hidden_state", [batch, TOKENS, CHANNELS]), value_info("pooler_output", [batch, CHANNELS])],
        {"table": embedding(), "positions": positions(), "axis": np.array([1])},
    )  # fmt: skip


def write_unet(folder: Path, rows: int | str, *, half: bool = False, timestep_rank: int = 0) -> None:
    from onnx import helper

    kind, dtype = ("FLOAT16", np.float16) if half else ("FLOAT", np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["encoder_hidden_states", "tokens"], ["mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "cells"], ["text"]),
        helper.make_node("Mul", ["sample", "by_sample"], ["s"]),
        helper.make_node("Mul", ["timestep", "by_time"], ["t"]),
        helper.make_node("Mul", ["text", "by_text"], ["c"]),
        helper.make_node("Add", ["s", "t"], ["st"]),
        helper.make_node("Add", ["st", "c"], ["out_sample"]),
    ]
    save_graph(
        folder / "model.onnx", nodes,
        [
            value_info("sample", [rows, CHANNELS, HEIGHT, WIDTH], kind),
            value_info("timestep", [1] * timestep_rank, kind),
            value_info("encoder_hidden_states", [rows, TOKENS, CHANNELS], kind),
        ],
        [value_info("out_sample", [rows, CHANNELS, HEIGHT, WIDTH], kind)],
        {
            "tokens": np.array([1]), "cells": np.array([2, 3]), "by_sample": np.array(0.9, dtype),
            "by_time": np.array(0.0005, dtype), "by_text": np.array(0.3, dtype),
        },
    )  # fmt: skip


def write_vae(bundle: Path, batch: int | str) -> None:
    from onnx import helper

    nodes = [
        helper.make_node("Slice", ["latent_sample", "zero", "three", "one"], ["rgb"]),
        helper.make_node("Resize", ["rgb", "", "scales"], ["large"], mode="nearest"),
        helper.make_node("Tanh", ["large"], ["sample"]),
    ]
    save_graph(
        bundle / "vae_decoder" / "model.onnx", nodes, [value_info("latent_sample", [batch, CHANNELS, HEIGHT, WIDTH])],
        [value_info("sample", [batch, 3, 2 * HEIGHT, 2 * WIDTH])],
        {
            "zero": np.array([0]), "three": np.array([3]), "one": np.array([1]),
            "scales": np.array([1, 1, 2, 2], dtype=np.float32),
        },
    )  # fmt: skip
    nodes = [
        helper.make_node("AveragePool", ["sample"], ["rgb"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("ReduceMean", ["rgb", "axis"], ["grey"], keepdims=1),
        helper.make_node("Concat", ["rgb", "grey"], ["mean"], axis=1),
        helper.make_node("Sub", ["mean", "mean"], ["zeros"]),
        helper.make_node("Concat", ["mean", "zeros"], ["latent_parameters"], axis=1),
    ]
    save_graph(
        bundle / "vae_encoder" / "model.onnx", nodes, [value_info("sample", [batch, 3, 2 * HEIGHT, 2 * WIDTH])],
        [value_info("latent_parameters", [batch, 2 * CHANNELS, HEIGHT, WIDTH])], {"axis": np.array([1])},
    )  # fmt: skip


def states_of(ids: np.ndarray) -> np.ndarray:
    """What the text encoder makes of ids [1, S]: [S, C]."""
    return embedding()[ids[0]] + positions()


def latents_of(
    plan: FewStepPlan,
    noise: np.ndarray,
    cond: np.ndarray,
    uncond: np.ndarray | None,
    weight: float,
    fresh: Callable[[int], np.ndarray],
) -> np.ndarray:
    """The sampling loop spelt out for one image, in float64: noise [C, h, w] to latents."""

    def net(x: np.ndarray, t: float, states: np.ndarray) -> np.ndarray:
        return 0.9 * x + 0.0005 * t + 0.3 * states.mean(0)[:, None, None]

    table = plan.table()
    x = table.init_noise_sigma * noise.astype(np.float64)
    for number, row in enumerate(table.rows, start=1):
        out = net(row.k * x, row.t, cond)
        if uncond is not None:
            u = net(row.k * x, row.t, uncond)
            out = u + weight * (out - u)
        x = row.a * x + row.b * out
        if row.c:
            x = x + row.c * fresh(number)
    return x


def pixels_of(latents: np.ndarray) -> np.ndarray:
    """What the decoder makes of latents [C, h, w]: uint8 [H, W, 3]."""
    sample = np.tanh((latents[:3] / SCALING).repeat(2, 1).repeat(2, 2))
    return ((sample / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def ids_of(text: str) -> np.ndarray:
    """Ids of an ASCII word list by hand: 'cat' and 'dog' are merges, other words are spelt."""
    words = vocabulary()
    ids = [words[SPECIALS[0]]]
    for word in text.split():
        if word + "</w>" in words:
            ids.append(words[word + "</w>"])
        else:
            ids += [words[c] for c in word[:-1]] + [words[word[-1] + "</w>"]]
    ids.append(words[SPECIALS[1]])
    return np.array([ids + [words[SPECIALS[1]]] * (TOKENS - len(ids))])


def _write_golden(bundle: Path, plan: FewStepPlan) -> None:
    from PIL import Image

    folder = bundle / "golden"
    folder.mkdir()
    shape, seed = (CHANNELS, HEIGHT, WIDTH), 7
    cfg = plan.guidance.kind is GuidanceKind.CFG
    prompt, negative = "cat hat", "dog" if cfg else ""
    streams = plan.table().noise_streams
    fresh = {i: step_noise(seed=seed, index=0, step=i, shape=shape) for i in streams}
    noise = initial_noise(seed=seed, index=0, shape=shape)
    cond, uncond = states_of(ids_of(prompt)), states_of(ids_of(negative)) if cfg else None
    latents = latents_of(plan, noise, cond, uncond, plan.guidance.scale, fresh.__getitem__)
    golden = {
        "format": "hypersd-golden/1", "prompt": prompt, "negative_prompt": negative, "seed": seed, "index": 0,
        "steps": plan.num_steps, "guidance": plan.guidance.scale if cfg else None, "expected": "expected.png",
        "min_psnr_db": 50,
    }  # fmt: skip
    (folder / "golden.json").write_text(json.dumps(golden))
    np.save(folder / "initial_noise.npy", noise[None])
    if streams:
        np.save(folder / "step_noise.npy", np.stack([fresh[i][None] for i in streams]))
    np.save(folder / "prompt_ids.npy", ids_of(prompt))
    np.save(folder / "negative_ids.npy", ids_of(negative))
    np.save(folder / "latents.npy", latents[None].astype(np.float32))
    Image.fromarray(pixels_of(latents)).save(folder / "expected.png")


def seal(bundle: Path, parity: Any = "not verified") -> Path:
    """Write the manifest of what is in the folder now."""
    write_manifest(
        bundle,
        hypersd="0.0.0",
        base={"name": "hand-made", "family": "sd15", "digest": "0" * 64},
        loras=[{"file": "x.safetensors", "digest": "1" * 64, "scale": 1.0, "format": "kohya", "plan_source": None}],
        targets={"onnx": {"precision": "fp32", "opset": 18}},
        options={"size": "12x8"},
        versions={"onnx": "1"},
        stages=[{"name": "unet", "seconds": 0.1, "peak_mb": 10.0, "cached": False}],
        parity=parity,
    )
    return bundle


def make_bundle(
    folder: Path,
    plans: Sequence[FewStepPlan] = CFG_PLANS,
    *,
    batch: int = 1,
    dynamic: bool = False,
    half: bool = False,
    timestep_rank: int = 0,
) -> Path:
    """Write a complete bundle; `batch` images at a time, or any number if `dynamic`."""
    cfg = plans[0].guidance.kind is GuidanceKind.CFG
    images: int | str = "batch" if dynamic else batch
    write_text_encoder(folder / "text_encoder", images)
    write_unet(
        folder / "unet", "rows" if dynamic else batch * (2 if cfg else 1), half=half, timestep_rank=timestep_rank
    )
    write_vae(folder, images)
    vae = {"scaling_factor": SCALING, "latent_channels": CHANNELS, "block_out_channels": [8, 8]}
    configs: dict[str, dict[str, Any]] = {
        "text_encoder": {"hidden_size": CHANNELS, "max_position_embeddings": TOKENS},
        "unet": {"in_channels": CHANNELS, "sample_size": [HEIGHT, WIDTH]},
        "vae_decoder": vae,
        "vae_encoder": vae,
    }
    for name, config in configs.items():
        (folder / name / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(vocabulary=vocabulary(), merges=("c a", "ca t</w>", "d o", "do g</w>"), max_length=TOKENS)
    write_tokenizer(tokenizer, folder / "tokenizer")
    entries = tuple(PlanEntry(plan=plan, table=plan.table(), source="the test") for plan in plans)
    (folder / "plan.json").write_text(json.dumps(PlanFile(entries=entries).to_json()))
    _write_golden(folder, plans[0])
    return seal(folder)

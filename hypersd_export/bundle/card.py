"""The model card (README.md of a bundle): what it is, how it was made, and how to make pictures with it.

Plain string templating over a plain dict, so that the card can be rebuilt from data alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hypersd_export.bundle.span import Span

_TEMPLATE = """\
---
{front_matter}
---

# {title}

{summary}

| | |
|---|---|
{facts}

## Make pictures

With the runtime of this project, which needs neither torch nor diffusers:

```
pip install 'hypersd[{extra}]'
hypersd-generate . --prompt {prompt_shell}
```

or from Python:

```python
from hypersd_export.runtime import Pipeline

pipeline = Pipeline.from_bundle(".")
pipeline({prompt_python}, seed=0).images[0].save("picture.png")
```

The schedule is inside (`plan.json`), so there is no scheduler to choose. The same seed gives the same noise on every
machine. `hypersd-generate . --golden` reproduces the picture in `golden/` and says how close it came.

## The plan

{plans}

{table_note}
{elsewhere}
## Checked against torch

{parity}

## Licence and limits

{licence}

The base pipeline's safety checker was **dropped** in the export: nothing filters what this model draws, and whoever
publishes its output answers for it.
"""

_ENGINES = """\
## The engines

Each is a program for {module} {version} and GPUs of compute capability {capabilities}; on others, or with another
version, it does not run, and `hypersd-generate` says so before it loads anything. {compiled}

{table}"""

_COMPILED = {
    "rtx": "Kernels are compiled for the GPU at the first call, and kept in the user's cache.",
    "classic": "They were compiled for the GPU that they were built on.",
}

_PACKAGES = """\
## The Core ML packages

ML programs for {deployment_target} and later. {how}

On a Mac `hypersd-generate` runs them (`--provider cpu-and-ne` and the like chooses what Core ML may use);
`hypersd-export verify .` evaluates them anywhere, without Core ML.

{table}"""

_HOW = {
    "plain": "Names and shapes are those of the ONNX layout; the timestep is float32 [1], ids are int32.",
    "apple": "Names, shapes and types are those of Apple's Swift package ml-stable-diffusion: `Resources/README.md` "
    "says how to compile them, and which calls play this bundle's plan.",
    "single": "One call makes a picture: `input_ids` (int32; under guidance `negative_input_ids` too), `noise` and, "
    "where the plan adds noise, `step_noise` (standard normal) in, an RGB image out.",
}

_OPTIMUM = """\
## In optimum

The folder has Optimum's layout and tensor names. Turn IO binding **off**: with it (the default on CUDA) the latents are
overwritten during the loop whenever guidance is off, and every picture is garbage.

```python
from diffusers import {scheduler}
from optimum.onnxruntime import {pipeline}

pipeline = {pipeline}.from_pretrained(".", use_io_binding=False)
pipeline.scheduler = {scheduler}.from_pretrained(".", subfolder="scheduler")
image = pipeline({prompt_python}, {call}).images[0]
```

{exact}"""

_SINGLE = """\
## In any ONNX runtime

`pipeline.onnx` is the whole pipeline: one call, and no loop, scheduler or guidance of your own.

{inputs}

It gives `image`, uint8 [B, H, W, 3], and `latents`. The ids are the tokenizer's (`tokenizer/`), padded to the length
above; `noise` and `step_noise` are standard normal. `golden/` has an example of each, and the picture that it gives."""

_EXACT = "With this scheduler and this call diffusers takes the same steps as `plan.json`."
_INEXACT = (
    "diffusers cannot express this plan exactly: its steps come close to those of `plan.json` but are not the same, "
    "so use `hypersd-generate` where the picture must be the same."
)


def _inputs(shapes: Mapping[str, Sequence[int]]) -> str:
    rows = [
        [f"`{name}`", "int64" if "input_ids" in name else "float32", str(list(shape))] for name, shape in shapes.items()
    ]
    return _table(["input", "type", "shape"], rows)


def _sentence(note: str | None) -> str:
    return f"({note})" if note else ""


def _number(value: float) -> str:
    return f"{value:.4g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _front_matter(card: Mapping[str, Any]) -> str:
    lines = ["library_name: hypersd", "pipeline_tag: text-to-image"]
    if card.get("license"):
        lines.append(f"license: {json.dumps(card['license'])}")
    if card["base"].get("hub_id"):
        lines.append(f"base_model: {json.dumps(card['base']['hub_id'])}")
    return "\n".join([*lines, "tags:", "- text-to-image", "- few-step", *(f"- {name}" for name in card["targets"])])


def _facts(card: Mapping[str, Any]) -> str:
    base = card["base"]
    rows = [("Base", f"{base['name']} ({base['family']}), sha256 `{base['digest'][:16]}…`")]
    for lora in card["loras"]:
        rows.append(("LoRA", f"{lora['file']} at scale {lora['scale']:g}, sha256 `{lora['digest'][:16]}…`"))
    if not card["loras"]:
        rows.append(("LoRA", "none"))
    rows.append(("Picture", f"{card['width']} x {card['height']} px, {card['batch']} at a time"))
    if card.get("span") is not None:
        span = Span.from_json(card["span"])
        rows.append(("Range", f"{span.sizes()} px, {span.batch[0]} to {span.batch[1]} at a time"))
    for name, target in card["targets"].items():
        said = {key: target[key] for key in ("precision", "opset", "flavour", "weights", "attention") if key in target}
        rows.append(("Target", f"{name}: " + ", ".join(f"{key} {value}" for key, value in said.items())))
    rows += [("In float32", line) for line in map(_kept, card["targets"].values()) if line]
    if not card.get("scanned", True):
        rows.append(("Range scan", "not run (--no-scan): ops may overflow in fp16"))
    rows.append(("Made with", f"hypersd {card['hypersd']}, {card['created']}"))
    return "\n".join(f"| {key} | {value} |" for key, value in rows)


def _kept(target: Mapping[str, Any]) -> str:
    """Which ops of an fp16 target are computed in float32, by component; "" where none is, or nothing is in fp16."""
    counts = {name: len(nodes) for name, nodes in target.get("fp32_nodes", {}).items() if nodes}
    return ", ".join(f"{count} of the ops of {name}" for name, count in counts.items()) + (
        ", which the range scan found too large for fp16; their names are in `manifest.json`" if counts else ""
    )


def _extra(targets: Mapping[str, Any]) -> str:
    """The extra of this package that runs the bundle's first target, which is the one that `hypersd-generate` takes."""
    name, target = next(iter(targets.items()))
    return "cpu" if name == "onnx" else f"{name}-classic" if target.get("flavour") == "classic" else name


def _engines(target: Mapping[str, Any]) -> str:
    """What the engines are for, and their sizes."""
    rows = [
        [name, f"`{engine['file']}`", f"{engine['bytes'] / 1e6:,.1f}"] for name, engine in target["engines"].items()
    ]
    flavour = target["flavour"]
    return _ENGINES.format(
        module={"rtx": "TensorRT-RTX", "classic": "TensorRT"}[flavour],
        version=target["version"],
        capabilities=", ".join(target["capabilities"]),
        compiled=_COMPILED[flavour],
        table=_table(["component", "file", "MB"], rows),
    )


def _packages(target: Mapping[str, Any]) -> str:
    """What the packages are for, how they are called, and their sizes."""
    rows = []
    for name, found in target["components"].items():
        files, palettes = ", ".join(f"`{file}`" for file in found["packages"]), found.get("palettes")
        bits = "" if palettes is None else f"{palettes['bits']} bits"
        rows.append([name, files, f"{found['bytes'] / 1e6:,.1f}", bits])
    return _PACKAGES.format(
        deployment_target=target["deployment_target"],
        how=_HOW["single" if _is_single(target) else target["layout"]],
        table=_table(["component", "file", "MB", "palettes"], rows),
    )


def _is_single(target: Mapping[str, Any]) -> bool:
    """Whether a Core ML target is one package for the whole pipeline."""
    return "pipeline" in target.get("components", {})


def _plans(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for number, entry in enumerate(entries):
        plan, guidance = entry["plan"], entry["plan"]["guidance"]
        kind = guidance["kind"]
        rows.append(
            [
                f"{entry['steps']}" + (" (default)" if number == 0 and len(entries) > 1 else ""),
                str(plan["solver"]),
                "none" if kind == "none" else f"{kind} {guidance['scale']:g}",
                f"{plan.get('eta', 0.0):g}",
                ", ".join(_number(row["t"]) for row in entry["table"]["rows"]),
                str(entry["source"]),
            ]
        )
    return _table(["steps", "solver", "guidance", "eta", "timesteps", "from"], rows)


def _table_note(entries: Sequence[Mapping[str, Any]], *, single_graph: bool) -> str:
    note = "Guidance follows `u + w (c - u)`. "
    if any(entry["plan"]["guidance"]["kind"] == "cfg" for entry in entries):
        if single_graph:
            return note + "It is a constant of the graph; `--negative-prompt` works."
        return note + "Where it is `cfg`, `--guidance` and `--negative-prompt` work; the scale above is the default."
    return note + "No plan here evaluates an unconditional branch, so there is no `--guidance` and no negative prompt."


def _parity(parity: Mapping[str, Any] | str) -> str:
    if isinstance(parity, str):
        return f"This bundle was exported with `--no-verify`: **{parity}**."
    rows = []
    for name, numbers in parity.items():
        worst = numbers.get("max_abs")
        rows.append([name, _decibel(numbers.get("psnr_db")), "–" if worst is None else _number(worst)])
    text = _table(["component", "PSNR, dB", "largest difference"], rows)
    return text + "\n\nOn seeded inputs at each of the plan's timesteps; the full numbers are in `manifest.json`."


def _decibel(value: Any) -> str:
    if value is None:
        return "–"
    return "equal" if isinstance(value, str) or value >= 200 else f"{value:.1f}"


def _elsewhere(card: Mapping[str, Any]) -> str:
    """How other tools use what is there, a section for each target that has something to say."""
    sections = []
    if "onnx" in card["targets"]:
        sections.append(_onnx(card))
    if "tensorrt" in card["targets"]:
        sections.append(_engines(card["targets"]["tensorrt"]))
    if "coreml" in card["targets"]:
        sections.append(_packages(card["targets"]["coreml"]))
    return "".join(f"\n{section}\n" for section in sections)


def _onnx(card: Mapping[str, Any]) -> str:
    if card.get("single_graph"):
        return _SINGLE.format(inputs=_inputs(card["single_graph"]))
    xl = "XL" if card["base"]["family"] == "sdxl" else ""
    return _OPTIMUM.format(
        pipeline=f"ORTStableDiffusion{xl}Pipeline",
        scheduler=card["scheduler"],
        call=card["call"],
        prompt_python=json.dumps(str(card["prompt"]), ensure_ascii=False),
        exact=" ".join(filter(None, [_EXACT if card["exact"] else _INEXACT, _sentence(card.get("note"))])),
    )


def model_card(card: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        card: plain data with the keys

            title, summary: a heading and one or two sentences
            base: {name, family, digest, hub_id (optional)}
            loras: [{file, scale, digest}]
            width, height, batch: the picture in pixels, and how many the graphs make at a time
            span: the range of both that the graphs take, or None; scanned: whether fp16 graphs were searched for ops
                that overflow
            targets: {"onnx": {"precision": …, "opset": …}}, with `fp32_nodes` by component where ops of an fp16 target
                are in float32, of engines `flavour`, `version`, `capabilities`, `weights` and `engines`, and of Core ML
                `deployment_target`, `layout`, `attention` and `components`
            entries: the entries of plan.json
            scheduler: diffusers' class name; call: the keyword arguments of the pipeline call as Python source, such
                as "num_inference_steps=4, guidance_scale=0.0"; exact: whether diffusers can express the plan;
                note (optional): what `diffusers_scheduler` has to say about it
            parity: as in manifest.json
            prompt: an example
            single_graph (optional): {input: shape} of pipeline.onnx, where the bundle is that
            license: an identifier, or None; license_note: sentences
            hypersd, created: as in manifest.json

    Raises:
        KeyError: a key is missing.
    """
    prompt = str(card["prompt"])
    return _TEMPLATE.format(
        front_matter=_front_matter(card),
        title=card["title"],
        summary=card["summary"],
        facts=_facts(card),
        extra=_extra(card["targets"]),
        prompt_shell="'" + prompt.replace("'", "'\\''") + "'",
        prompt_python=json.dumps(prompt, ensure_ascii=False),
        plans=_plans(card["entries"]),
        table_note=_table_note(
            card["entries"],
            single_graph=bool(card.get("single_graph")) or _is_single(card["targets"].get("coreml", {})),
        ),
        elsewhere=_elsewhere(card),
        parity=_parity(card["parity"]),
        licence=card["license_note"],
    )

"""The official Hyper-SD LoRAs on their own bases, beside the paper's figures: for a machine with a hub.

    python -m benchmarks.real_weights --model sd15 --prompts coco5k.tsv --provider cuda --out real

exports every LoRA to every target (`--form`), draws the same prompts and seeds with each bundle, with torch and with
the base at 25 steps, and writes the quality report, real_weights.json and real_weights.md with the paper's rows below.
Base, LoRAs, CLIP and reward models come from the hub, or from `--base` and `--loras FOLDER`. `--dry-run` needs no base:
it reads each LoRA, finds its modules in the published UNet, and says what would be done. SDXL's pipeline cannot be
exported yet, which its rows then say.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench.entrants import TEACHER, TORCH
from benchmarks.bench.everything import FORMS, export_all
from benchmarks.bench.prompts import read_prompts
from benchmarks.results import one_line_error, write_result
from hypersd_export.diffusion import PRESETS, FewStepPlan
from hypersd_export.errors import HypersdError, OptionError
from hypersd_export.model import hub
from hypersd_export.model.fuse import match
from hypersd_export.model.lora import read_lora
from hypersd_export.spec import ExportSpec

REPOSITORY = "ByteDance/Hyper-SD"
EYE = "vit-b-32"
METRICS = ("clip_score", "reward_aesthetic", "reward_image_reward", "reward_pick_score")
PAPER: Mapping[str, Mapping[str, tuple[float, float, float, float]]] = {
    "sd15": {
        "SD15-Base, 25 steps": (31.88, 5.26, 0.18, 0.217), "LCM, 4 steps": (30.36, 5.66, -0.37, 0.212),
        "TCD, 4 steps": (30.62, 5.45, -0.15, 0.214), "Hyper-SD15, 1 step": (30.87, 5.79, 0.29, 0.215),
    },
    "sdxl": {
        "SDXL-Base, 25 steps": (33.16, 5.54, 0.87, 0.229), "TCD, 4 steps": (32.45, 5.42, 0.67, 0.226),
        "Lightning, 4 steps": (32.40, 5.63, 0.72, 0.229), "Hyper-SDXL, 4 steps": (32.56, 5.74, 0.93, 0.232),
        "Hyper-SDXL, 1 step (UNet)": (32.85, 5.85, 1.19, 0.231),
    },
}  # fmt: skip
"""Table 2 of arXiv 2404.13686: CLIP score of ViT-B/32, aesthetic, ImageReward, PickScore, on COCO's 5,000 prompts."""
FILES = {
    "aesthetic": ("openai/clip-vit-large-patch14", ("*.json", "*.txt", "model.safetensors")),
    "pick_score": ("yuvalkirstain/PickScore_v1", ("*.json", "*.txt", "model.safetensors")),
    "image_reward": ("THUDM/ImageReward", ("ImageReward.pt",)),
}
"""Where the rewards' files lie on the hub; the aesthetic head itself is in the package."""
BERT = ("google-bert/bert-base-uncased", ("*.json", "vocab.txt"))
"""The tokenizer of ImageReward's text side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Official:
    """One released LoRA: its file's name, the plan it was made for, and its base."""

    name: str
    plan: FewStepPlan
    base: str

    @property
    def steps(self) -> int:
        """The step count that it was made for."""
        return self.plan.num_steps


def official(model: str, steps: Sequence[int]) -> list[Official]:
    """The LoRAs of a model without guidance, for these step counts; OptionError for one that was not released."""
    known = {
        entry.plan.num_steps: Official(name=f"{entry.name}.safetensors", plan=entry.plan, base=entry.base)
        for entry in PRESETS
        if (entry.family, entry.kind) == (model, "lora") and entry.name.startswith("Hyper-") and "CFG" not in entry.name
    }  # fmt: skip
    missing = [count for count in steps if count not in known]
    if missing or not steps:
        listed = ", ".join(map(str, sorted(known)))
        raise OptionError(f"--steps {','.join(map(str, missing or steps))}: {model} has LoRAs for {listed}")
    return [known[count] for count in steps]


def lora_file(lora: Official, folder: Path | None) -> Path:
    """Its file in the folder, or the hub's copy; OptionError or ModelError in one line."""
    if folder is None:
        return hub.fetch_files(REPOSITORY, None, (lora.name,)) / lora.name
    if not (folder / lora.name).is_file():
        raise OptionError(f"--loras {folder}: has no {lora.name}; leave the option away to take it from {REPOSITORY}")
    return folder / lora.name


def checked(lora: Official, path: Path, model: str) -> dict[str, Any]:
    """What a LoRA file holds, and that all of it has a place in the published UNet; no weights of that are needed."""
    from trainer.distill.config import recipe
    from trainer.distill.measure import empty_model
    from trainer.distill.memory import unet_of

    file = read_lora(path)
    unet = empty_model("UNet2DConditionModel", unet_of(recipe(model))[0])
    found = match(unet, file.components.get("unet", {}), component="unet")
    return {
        "file": lora.name, "bytes": path.stat().st_size, "sha256": file.digest, "format": str(file.format),
        "modules": len(found), "ranks": sorted({delta.rank for delta in found.values()}),
        "components": sorted(file.components), "plan": lora.plan.to_json(),
    }  # fmt: skip


def specs(
    loras: Sequence[tuple[Official, Path]],
    forms: Sequence[str],
    *,
    base: str,
    provider: str,
    out: Path,
    cache_dir: Path | None,
) -> dict[str, ExportSpec]:
    """What is exported, by name; the plan is the one that the LoRA's file name stands for."""
    return {
        f"{form}-{lora.steps}": ExportSpec(
            **FORMS[form], base=base, provider=provider, loras=(str(path),), cache_dir=cache_dir,
            out=out / "bundles" / f"{form}-{lora.steps}", overwrite=True,
        )
        for lora, path in loras
        for form in forms
    }  # fmt: skip


def hub_rewards() -> tuple[str, ...]:
    """`--reward` of the paper's three, from the hub."""
    folders = {kind: hub.fetch_files(name, None, patterns) for kind, (name, patterns) in FILES.items()}
    bert = hub.fetch_files(BERT[0], None, BERT[1])
    return (
        f"aesthetic={folders['aesthetic']}", f"pick_score={folders['pick_score']}",
        f"image_reward={folders['image_reward'] / 'ImageReward.pt'},{bert},pickle",
    )  # fmt: skip


def page(model: str, report: Mapping[str, Any]) -> str:
    """Ours and the paper's, as one Markdown table each."""
    head = "| | CLIP score | aesthetic | ImageReward | PickScore |\n|---|---|---|---|---|"
    lines = [
        f"# Official weights: {model}",
        "",
        f"{report['prompts']['count']:,} prompts; {report['eye']['name']} looks.",
        "",
        head,
    ]
    for row in report["candidates"]:
        if row["status"] != "measured":
            lines.append(f"| {row['name']} | not run: {row['why']} | | | |")
            continue
        cells = (row["figures"].get(name) for name in METRICS)
        shown = ("" if c is None else f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells)
        lines.append(f"| {row['name']} | {' | '.join(shown)} |")
    lines += ["", "The paper's (arXiv 2404.13686, table 2; other prompts, seeds and code than ours):", "", head]
    lines += [f"| {name} | {' | '.join(f'{value:g}' for value in values)} |" for name, values in PAPER[model].items()]
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Read, export, examine, write; HypersdError where nothing can be."""
    from benchmarks.bench.commands import Selection
    from benchmarks.bench.examine import Asked, run_quality
    from benchmarks.bench.weights import Places
    from hypersd_export.spec import parse_ints

    wanted = official(options.model, parse_ints("--steps", options.steps) or ())
    prompts = read_prompts(options.prompts, options.count)
    loras = [(lora, lora_file(lora, options.loras)) for lora in wanted]
    base, forms = options.base or wanted[0].base, options.form or ["onnx-fp32", "onnx-fp16", "tensorrt"]
    planned = specs(
        loras, forms, base=base, provider=options.provider or "cpu", out=options.out, cache_dir=options.cache_dir
    )
    data: dict[str, Any] = {
        "model": options.model, "base": base, "prompts": len(prompts), "eye": options.clip,
        "loras": [checked(lora, path, options.model) for lora, path in loras],
        "bundles": {name: spec.to_json() for name, spec in planned.items()},
        "paper": {name: dict(zip(METRICS, values, strict=True)) for name, values in PAPER[options.model].items()},
    }  # fmt: skip
    if options.dry_run:
        return data
    rewards = tuple(options.reward) if options.reward else hub_rewards()
    bundles, absent = export_all(planned)
    if not bundles:
        raise HypersdError(f"nothing could be exported: {absent[0][1]}")
    selection = Selection(
        bundles=tuple(bundles), versus=(TORCH, TEACHER), provider=options.provider, absent=tuple(absent),
        places=Places(base=base), cache_dir=options.cache_dir,
    )  # fmt: skip
    asked = Asked(prompts=options.prompts, count=options.count, clip=options.clip, rewards=rewards)
    command = ["python", "-m", "benchmarks.real_weights", "--model", options.model, "--steps", options.steps]
    report = run_quality(selection, asked, out=options.out, command=command)
    if report is None:
        return {}
    write_result(options.out, "real_weights", data | {"report": report}, page(options.model, report))
    return data


def main(arguments: Sequence[str] | None = None) -> int:
    """The last line of standard output is what was done, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PAPER), default="sd15")
    parser.add_argument("--steps", default="1,2,4,8", help="of the LoRAs")
    parser.add_argument("--form", action="append", choices=tuple(FORMS), help="repeatable")
    parser.add_argument("--prompts", type=Path, required=True, help=".txt, .tsv, .csv, .json or .jsonl")
    parser.add_argument("--count", type=int, help="so many of them; the paper has 5,000 of COCO's")
    parser.add_argument("--base", help="its folder, file or hub id, where it is not the published one")
    parser.add_argument("--loras", type=Path, help="a folder with the official files")
    parser.add_argument("--clip", default=EYE, help="what looks, as in hypersd-bench quality")
    parser.add_argument("--reward", action="append", help="instead of the paper's three from the hub; repeatable")
    parser.add_argument("--provider", help="onnxruntime's: cpu, cuda, …")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="check the files, say what would be done")
    options = parser.parse_args(arguments)
    with one_line_error(options.out) as ended:
        print(json.dumps(run(options)))
    return ended.code


if __name__ == "__main__":
    sys.exit(main())

"""The model card says what users must know, with the numbers of this bundle."""

import ast
import re
from typing import Any

import pytest

from hypersd_export.bundle.card import model_card
from hypersd_export.diffusion.planfile import PlanEntry, PlanFile
from tests.bundles import CFG_PLANS, PLAIN_PLANS


def facts(plans: Any = CFG_PLANS, **changes: Any) -> dict[str, Any]:
    entries = tuple(PlanEntry(plan=plan, table=plan.table(), source="preset x|y") for plan in plans)
    return {
        "title": "Small emoji model, few steps", "summary": "A test.",
        "base": {"name": "builtin", "family": "sd15", "digest": "ab" * 32, "hub_id": "me/model"},
        "loras": [{"file": "tcd-lora.safetensors", "scale": 0.125, "digest": "cd" * 32}],
        "width": 64, "height": 32, "batch": 1, "targets": {"onnx": {"precision": "fp32", "opset": 20}},
        "entries": PlanFile(entries=entries).to_json()["entries"], "scheduler": "TCDScheduler",
        "call": "num_inference_steps=4, guidance_scale=3.0, eta=0.3", "exact": True,
        "parity": {"unet": {"psnr_db": 88.25, "max_abs": 1.25e-5}, "image": {"psnr_db": 200.0}},
        "prompt": 'a "cat\'s" hat', "license": "apache-2.0", "license_note": "Apache-2.0, drawings by others.",
        "hypersd": "0.1.0", "created": "2026-01-01", **changes,
    }  # fmt: skip


def test_facts_are_there() -> None:
    text = model_card(facts())
    for part in (
        "# Small emoji model", "builtin (sd15)", "`" + "ab" * 8 + "…`", "tcd-lora.safetensors at scale 0.125",
        "64 x 32 px", "onnx: precision fp32, opset 20", "hypersd 0.1.0", "license: \"apache-2.0\"",
        'base_model: "me/model"', "Apache-2.0, drawings by others.", "safety checker was **dropped**",
    ):  # fmt: skip
        assert part in text, part
    assert "{" not in text.split("```python")[0], "no field is left unfilled"


def test_engines_instead_of_onnx_files() -> None:
    """Nothing about optimum, for which there is no file; the extra that runs them, what they are for, their sizes."""
    engine = {"file": "unet/unet.rtx-1.7.engine", "bytes": 29_800_000}
    target = {
        "precision": "fp16", "opset": 20, "flavour": "rtx", "version": "1.7.1.116", "capabilities": ["8.6", "8.9"],
        "weights": "full", "engines": {"unet": engine}, "fp32_nodes": {"unet": [], "vae_encoder": ["a", "b", "c"]},
    }  # fmt: skip
    text = model_card(facts(targets={"tensorrt": target}))
    for part in (
        "pip install 'hypersd[tensorrt]'", "TensorRT-RTX 1.7.1.116 and GPUs of compute capability 8.6, 8.9;",
        "| unet | `unet/unet.rtx-1.7.engine` | 29.8 |",
        "tensorrt: precision fp16, opset 20, flavour rtx, weights full |",
        "| In float32 | 3 of the ops of vae_encoder, which the range scan found", "- tensorrt\n",
    ):  # fmt: skip
        assert part in text, part
    for part in ("optimum", "- onnx\n", "ORTStable", "\n\n\n"):
        assert part not in text, part
    both = {"onnx": {"precision": "fp32", "opset": 20}, "tensorrt": target | {"flavour": "classic"}}
    text = model_card(facts(targets=both))
    for part in ("hypersd[cpu]", "ORTStable", "for TensorRT 1.7.1.116", "built on.\n"):
        assert part in text, part
    text = model_card(facts(targets=dict(reversed(both.items()))))
    assert "hypersd[tensorrt-classic]" in text


def test_core_ml_packages() -> None:
    """What they are for, how they are called in each layout, their sizes."""
    unet = {"packages": ["unet/Unet1.mlpackage", "unet/Unet2.mlpackage"], "bytes": 7_800_000, "palettes": {"bits": 6}}
    target = {
        "precision": "fp16", "deployment_target": "iOS17", "layout": "apple", "attention": "split-einsum",
        "components": {"unet": unet, "vae_decoder": {"packages": ["v.mlpackage"], "bytes": 1_200_000}},
    }  # fmt: skip
    text = model_card(facts(targets={"coreml": target}))
    for part in (
        "pip install 'hypersd[coreml]'", "coreml: precision fp16, attention split-einsum |",
        "for iOS17 and later. Names,", "| unet | `unet/Unet1.mlpackage`, `unet/Unet2.mlpackage` | 7.8 | 6 bits |",
        "| vae_decoder | `v.mlpackage` | 1.2 |",
        "`Resources/README.md` says how", "`--guidance` and `--negative-prompt` work", "- coreml\n",
    ):  # fmt: skip
        assert part in text, part
    single = {**target, "layout": "plain", "components": {"pipeline": {"packages": ["p.mlpackage"], "bytes": 1}}}
    text = model_card(facts(targets={"coreml": single}))
    assert "One call makes a picture" in text
    assert "Resources" not in text
    assert "It is a constant of the graph; `--negative-prompt` works." in text


def test_the_plan_table_has_the_rows_timesteps() -> None:
    text = model_card(facts())
    rows = [line for line in text.splitlines() if line.startswith(("| 4 (default)", "| 2 |"))]
    assert rows[0] == "| 4 (default) | tcd | cfg 3 | 0.3 | 999, 759, 499, 259 | preset x\\|y |"
    assert rows[1].startswith("| 2 | ddim | cfg 3 | 0 | 999, 499 |")
    assert "`--guidance` and `--negative-prompt` work" in text
    assert "no negative prompt" in model_card(facts(PLAIN_PLANS))


def test_the_python_in_it_is_python_and_turns_io_binding_off() -> None:
    text = model_card(facts())
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
    assert "use_io_binding=False" in blocks[1]
    assert "from diffusers import TCDScheduler" in blocks[1]
    assert 'pipeline("a \\"cat\'s\\" hat", num_inference_steps=4, guidance_scale=3.0, eta=0.3)' in blocks[1]
    assert "IO binding **off**" in text
    assert "hypersd-generate . --prompt 'a \"cat'\\''s\" hat'" in text


def test_an_inexact_scheduler_says_so() -> None:
    assert "takes the same steps" in model_card(facts())
    text = model_card(facts(exact=False, note="DDIMScheduler takes no timesteps"))
    assert "cannot express this plan exactly" in text
    assert "(DDIMScheduler takes no timesteps)" in text


def test_parity_numbers_or_their_absence() -> None:
    text = model_card(facts())
    assert "| unet | 88.2 | 1.25e-05 |" in text
    assert "| image | equal | – |" in text
    assert "| vae | – | – |" in model_card(facts(parity={"vae": {}}))
    assert "`--no-verify`: **not verified**" in model_card(facts(parity="not verified"))


def test_without_lora_licence_and_hub_id() -> None:
    base = {"name": "folder", "family": "sd15", "digest": "0" * 64}
    text = model_card(facts(loras=[], license=None, base=base))
    assert "| LoRA | none |" in text
    assert "license:" not in text
    assert "base_model:" not in text


def test_a_missing_fact_is_a_bug() -> None:
    card = facts()
    del card["call"]
    with pytest.raises(KeyError, match="call"):
        model_card(card)

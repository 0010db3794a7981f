"""What is resolved before the first graph: backends, the built-in base with its LoRA, plans that share one UNet."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hypersd_export import builtin
from hypersd_export.errors import MissingBackend, ModelError, OptionError
from hypersd_export.graphs.spec import Component
from hypersd_export.job import default_loras, open_job, tool_versions
from hypersd_export.spec import ExportSpec, PlanFlags
from hypersd_export.targets import Target


@pytest.fixture
def card(tiny_base, lora_file, tmp_path, monkeypatch):
    """The tiny base as the built-in model; the returned card may be changed."""
    shutil.copytree(tiny_base, tmp_path / "model")
    shutil.copyfile(lora_file, tmp_path / "three.safetensors")
    (tmp_path / "ATTRIBUTION.md").write_text("Drawings by many.")
    card = {"name": "tiny", "steps": 25, "guidance": 4.0, "license": "Apache-2.0", "prompt": "a cat"}
    monkeypatch.setattr(builtin, "model_dir", lambda: tmp_path / "model")
    monkeypatch.setattr(builtin, "card", lambda: card)
    return card


def test_the_built_in_base_is_exported_by_its_card(card):
    job = open_job(ExportSpec())
    [entry] = job.plans.entries
    assert (entry.steps, entry.plan.guidance.scale, entry.source) == (25, 4.0, "card of the built-in model")
    assert (job.shapes.unet_batch, job.prompt) == (2, "a cat")
    assert job.source.loras == ()
    assert job.options()["base"] == "builtin"


def test_its_own_lora_is_the_default_and_can_be_left_away(card):
    card["lora"] = {"3": "three.safetensors", "2": "three.safetensors", "8": "eight.safetensors"}
    job = open_job(ExportSpec())
    assert [lora.path.name for lora, _ in job.source.loras] == ["three.safetensors"]
    assert [entry.steps for entry in job.plans.entries] == [3, 2]
    assert job.lora_records()[0]["plan_source"] == "metadata of three.safetensors"
    assert open_job(ExportSpec(loras=())).plans.default.steps == 25
    assert [entry.steps for entry in open_job(ExportSpec(plan=PlanFlags(steps=(2,)))).plans.entries] == [2]
    with pytest.raises(OptionError, match=r"--steps 25: the built-in LoRAs are for 3, 2, 8 steps; pass --lora none"):
        default_loras(ExportSpec(plan=PlanFlags(steps=(25,))))
    with pytest.raises(OptionError, match=r"--steps 2,8: each built-in LoRA is for its own step count"):
        default_loras(ExportSpec(plan=PlanFlags(steps=(2, 8))))
    card["unified"] = "all.safetensors"
    (path,) = default_loras(ExportSpec(plan=PlanFlags(steps=(2, 8))))
    assert Path(path).name == "all.safetensors"
    (path,) = default_loras(ExportSpec(plan=PlanFlags(steps=(2, 3))))  # one of their own serves both
    assert Path(path).name == "three.safetensors"
    with pytest.raises(OptionError, match="--steps 2,1: "):
        default_loras(ExportSpec(plan=PlanFlags(steps=(2, 1))))
    with pytest.raises(OptionError, match="--steps 1: "):
        default_loras(ExportSpec(plan=PlanFlags(timesteps=(999,))))


def test_it_is_never_used_with_another_base(card, tiny_base):
    card["lora"] = {"3": "three.safetensors"}
    flags = PlanFlags(steps=(3,), scheduler="ddim", guidance=1.0)
    assert default_loras(ExportSpec(base=str(tiny_base), plan=flags)) == ()
    assert default_loras(ExportSpec(unet=str(tiny_base / "unet"), plan=flags)) == ()
    job = open_job(ExportSpec(unet=str(tiny_base / "unet"), plan=flags))
    assert job.plans.default.source == "flags"  # the card speaks of another UNet


def test_licences_name_the_built_in_models_sources(card):
    from hypersd_export.assemble import licenses

    text = licenses(open_job(ExportSpec()))
    assert "Base builtin: Apache-2.0" in text
    assert "Drawings by many." in text


def test_without_a_built_in_model_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin, "model_dir", lambda: tmp_path)
    monkeypatch.setattr(builtin, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelError, match="the built-in model is not in this installation"):
        open_job(ExportSpec())


@pytest.mark.parametrize("package", ["torch", "diffusers", "onnxscript", "psutil"])
def test_a_missing_package_names_its_extra(tiny_spec, monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(MissingBackend, match=rf"needs {package}, .* pip install 'hypersd\[export\]'"):
        open_job(tiny_spec)


def test_a_cache_key_depends_on_what_the_stage_uses(tiny_spec, lora_file):
    def keys(**changes):
        job = open_job(replace(tiny_spec, **changes))
        return {
            component: json.dumps(job.component_depends(Target.ONNX, component), sort_keys=True)
            for component in Component
        }

    def differs(**changes):
        return {component.value for component in Component if keys(**changes)[component] != plain[component]}

    plain = keys()
    assert differs(provider="cpu", verify=False, overwrite=True) == set()
    assert differs(plan=PlanFlags(steps=(9,), scheduler="tcd", guidance=1.0)) == set()
    assert differs(plan=PlanFlags(steps=(2,), scheduler="ddim", guidance=2.0)) == {"unet"}
    assert differs(loras=(str(lora_file),), plan=PlanFlags(guidance=1.0)) == {"text_encoder", "unet"}
    assert differs(size=(24, 16)) == {"unet", "vae_decoder", "vae_encoder"}
    assert differs(batch=2) == {component.value for component in Component}
    assert differs(precision="fp32") == set()
    assert differs(opset=18) == {component.value for component in Component}


def test_plans_with_different_embedded_guidance_cannot_share_a_unet():
    from hypersd_export.diffusion import FewStepPlan, Guidance, GuidanceKind, PlanEntry, PlanFile, Solver
    from hypersd_export.job import check_one_unet

    def plan_file(*scales):
        plans = [
            FewStepPlan(solver=Solver.LCM, num_steps=steps, guidance=Guidance(kind=GuidanceKind.EMBEDDED, scale=scale))
            for steps, scale in enumerate(scales, start=1)
        ]
        return PlanFile(entries=tuple(PlanEntry(plan=plan, table=plan.table(), source="") for plan in plans))

    check_one_unet(plan_file(8.0, 8.0))
    with pytest.raises(OptionError, match="different guidance scales in the one UNet"):
        check_one_unet(plan_file(8.0, 5.0))


def test_versions_are_found_without_importing():
    versions = tool_versions()
    assert {"hypersd", "python", "torch", "onnx", "onnxruntime"} <= set(versions)

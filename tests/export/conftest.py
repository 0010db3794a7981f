"""Exported bundles that the tests of this package share: each graph is exported once."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hypersd_export.diffusion import FewStepPlan, Guidance, Solver, plans_to_metadata
from hypersd_export.export import Exported, export
from hypersd_export.graphs.spec import Graph, Shapes
from hypersd_export.spec import ExportSpec, PlanFlags
from hypersd_export.verify.request import VerifyRequest
from hypersd_export.verify.source import SourceRequest, open_source
from tests.tiny import COMPONENTS

PLANS = (
    FewStepPlan(solver=Solver.TCD, num_steps=3, eta=0.3, guidance=Guidance.of(3.0)),
    FewStepPlan(solver=Solver.DDIM, num_steps=2, guidance=Guidance.of(3.0)),
)
"""The plans of the LoRA: with guidance, one with fresh noise and one without."""


@pytest.fixture(scope="session")
def export_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage cache of all exports in this test run, shared by the workers of xdist."""
    root = tmp_path_factory.getbasetemp()
    return (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "hypersd-stages"


@pytest.fixture(scope="session")
def tiny_spec(tiny_base: Path, export_cache: Path) -> ExportSpec:
    """The tiny base without a LoRA: 2 or 4 steps of DDIM, no guidance."""
    flags = PlanFlags(steps=(2, 4), scheduler="ddim", guidance=1.0)
    return ExportSpec(base=str(tiny_base), plan=flags, cache_dir=export_cache)


@pytest.fixture(scope="session")
def exported(tiny_spec: ExportSpec, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`tiny_spec`, exported and verified in a process of its own."""
    return export(replace(tiny_spec, out=tmp_path_factory.mktemp("bundles") / "tiny"))


@pytest.fixture(scope="session")
def lora_file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA for UNet and text encoder whose metadata holds `PLANS`."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from tests.lora_files import ATTENTION, TEXT_ATTENTION, kohya, random_pairs, write

    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    text = CLIPTextModel.from_pretrained(tiny_base / "text_encoder")
    tensors = kohya(random_pairs(unet, ATTENTION), "unet")
    tensors |= kohya(random_pairs(text, TEXT_ATTENTION, seed=1), "text_encoder")
    path = tmp_path_factory.mktemp("loras") / "few-steps.safetensors"
    return write(path, tensors, {"hypersd.plan": plans_to_metadata(PLANS)})


@pytest.fixture(scope="session")
def lora_exported(
    exported: Exported, tiny_spec: ExportSpec, lora_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    """The tiny base with the LoRA at scale 0.8 and its plans, for two oblong pictures (24 x 16 px) at a time."""
    out = tmp_path_factory.mktemp("bundles") / "lora"
    spec = replace(tiny_spec, plan=PlanFlags(), loras=(f"{lora_file}:0.8",), batch=2, size=(24, 16), out=out)
    return export(spec, isolate=False)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify in this process although a process of its own is asked for."""
    from hypersd_export.verify import process, worker

    monkeypatch.setattr(process, "_in_process_of_its_own", worker.verify)


@pytest.fixture
def quick_build(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs come from the exported bundle instead of the exporter; returns the names that were asked for."""
    from hypersd_export.targets import onnx

    asked: list[str] = []

    def build(graph: Graph, folder: Path, **_: object) -> dict[str, object]:
        asked.append(graph.name)
        shutil.copyfile(exported.path / graph.name / "model.onnx", folder / "model.onnx")
        return {"precision": "fp32", "opset": 20}

    monkeypatch.setattr(onnx, "build", build)
    return asked


@pytest.fixture
def quick_verify(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verification is that of the exported bundle."""
    from hypersd_export import proof as module

    def run_verification(request: VerifyRequest, **_: object) -> dict[str, object]:
        shutil.copytree(exported.path / "golden", request.out / "golden")
        return dict(exported.manifest.parity)

    monkeypatch.setattr(module, "run_verification", run_verification)


@pytest.fixture
def request_for(tiny_base: Path, exported: Exported, tmp_path: Path) -> VerifyRequest:
    """A verification of a copy of the exported bundle."""
    bundle = tmp_path / "bundle"
    shutil.copytree(exported.path, bundle)
    (tmp_path / "out").mkdir()
    source = SourceRequest(base=str(tiny_base))
    return VerifyRequest(
        source=source,
        digests=open_source(source).digests,
        bundle=bundle,
        components={component: bundle / component for component in COMPONENTS},
        out=tmp_path / "out",
        shapes=Shapes(**exported.manifest.options["shapes"]),
        precision="fp32",
        provider="cpu",
        prompt="a cat",
        negative_prompt="",
        seed=1,
        compare=True,
        golden_db=50.0,
    )

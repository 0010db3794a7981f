"""An export that is interrupted, killed or out of disk: the destination is whole, and finished stages are reused."""

import errno
import shutil
from dataclasses import replace

import pytest

from hypersd_export import export as export_module
from hypersd_export import proof
from hypersd_export.bundle import publish
from hypersd_export.bundle.manifest import bundle_digest, verify_files
from hypersd_export.errors import DestinationError, OptionError
from hypersd_export.export import ASSEMBLE, LOAD, PUBLISH, VERIFY, export
from hypersd_export.runtime.pipeline import Pipeline
from hypersd_export.spec import PlanFlags
from hypersd_export.targets import onnx

COMPONENTS = tuple(f"onnx-{name}" for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder"))
CACHED = (*COMPONENTS, VERIFY)
"""The stages that are kept, in the order of the export."""

pytestmark = pytest.mark.usefixtures("quick_build", "quick_verify")


def break_stage(monkeypatch, stage: str, error: BaseException) -> None:
    """Raise `error` inside a stage, after it has written something where it writes."""
    if stage in COMPONENTS:
        real = onnx.build

        def build(graph, folder, **options):
            made = real(graph, folder, **options)
            if stage == f"onnx-{graph.name}":
                raise error
            return made

        monkeypatch.setattr(onnx, "build", build)
        return
    module, name = {
        LOAD: (export_module, "open_job"),
        ASSEMBLE: (export_module, "assemble"),
        VERIFY: (proof, "run_verification"),
        "manifest": (export_module, "write_manifest"),
        PUBLISH: (publish, "publish"),
    }[stage]
    real_function = getattr(module, name)

    def broken(*arguments, **options):
        real_function(*arguments, **options) if name != "publish" else None
        raise error

    monkeypatch.setattr(module, name, broken)


def leftovers(out):
    return sorted(path.name for path in out.parent.iterdir() if path != out)


@pytest.fixture
def spec(tiny_spec, tmp_path):
    (tmp_path / "place").mkdir()
    return replace(tiny_spec, cache_dir=tmp_path / "cache", out=tmp_path / "place" / "bundle")


@pytest.mark.parametrize("stage", [LOAD, *COMPONENTS, ASSEMBLE, VERIFY, "manifest", PUBLISH])
def test_ctrl_c_leaves_nothing_and_the_next_run_goes_on(spec, stage, monkeypatch):
    with monkeypatch.context() as patch:
        break_stage(patch, stage, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(spec)
    assert not spec.out.exists()
    assert leftovers(spec.out) == []
    manifest = export(spec).manifest
    order = [LOAD, *COMPONENTS, ASSEMBLE, VERIFY, "manifest", PUBLISH]
    finished = [name for name in CACHED if order.index(name) < order.index(stage)]
    assert [stage["name"] for stage in manifest.stages if stage["cached"]] == finished
    verify_files(spec.out)


@pytest.mark.parametrize("stage", ["onnx-unet", ASSEMBLE, VERIFY, "manifest", PUBLISH])
def test_ctrl_c_leaves_the_bundle_that_stood_there(spec, stage, monkeypatch):
    before = export(spec).digest
    new = replace(spec, overwrite=True, batch=2, plan=PlanFlags(steps=(3,), scheduler="ddim", guidance=1.0))
    with monkeypatch.context() as patch:
        break_stage(patch, stage, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            export(new)
    assert bundle_digest(spec.out) == before
    verify_files(spec.out)
    assert leftovers(spec.out) == []


@pytest.mark.parametrize("stage", ["onnx-unet", ASSEMBLE, VERIFY, "manifest", PUBLISH])
def test_a_full_disk_is_one_line_and_leaves_nothing(spec, stage, monkeypatch):
    break_stage(monkeypatch, stage, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DestinationError, match=r"no space left on the disk .* MB free\)") as error:
        export(spec)
    assert "\n" not in str(error.value)
    assert not spec.out.exists()
    assert leftovers(spec.out) == []


def test_a_kill_between_the_renames_is_mended_by_whoever_comes_next(spec):
    before = export(spec).digest
    aside = spec.out.with_name(f".{spec.out.name}.hypersd-old-1-abcd")
    spec.out.rename(aside)  # old aside, new not yet in: here the process was killed
    assert Pipeline.from_bundle(spec.out).digest == before
    spec.out.rename(aside)
    with pytest.raises(DestinationError, match="--overwrite"):
        export(spec)
    assert bundle_digest(spec.out) == before
    spec.out.rename(aside)
    export(replace(spec, overwrite=True))
    verify_files(spec.out)
    assert leftovers(spec.out) == []


def test_a_kill_after_the_renames_leaves_the_new_bundle(spec):
    export(spec)
    aside = spec.out.with_name(f".{spec.out.name}.hypersd-old-1-abcd")
    shutil.copytree(spec.out, aside)  # new in, old not yet deleted
    with pytest.raises(DestinationError, match="--overwrite"):
        export(spec)
    assert leftovers(spec.out) == []
    verify_files(spec.out)


def test_the_cache_knows_what_a_stage_depends_on(spec, quick_build, lora_file):
    export(spec)
    assert quick_build == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    quick_build.clear()
    again = replace(spec, overwrite=True)
    other_steps = replace(again, plan=PlanFlags(steps=(3,), scheduler="tcd", guidance=1.0))
    stages = export(other_steps).manifest.stages
    assert quick_build == []  # another schedule is another table, not another network
    assert [stage["cached"] for stage in stages if stage["name"] == VERIFY] == [False]
    export(replace(again, loras=(str(lora_file),), plan=PlanFlags(guidance=1.0)))
    assert quick_build == ["text_encoder", "unet"]  # the VAE has no LoRA
    quick_build.clear()
    export(replace(again, loras=(f"{lora_file}:0.5",), plan=PlanFlags(guidance=1.0)))
    assert quick_build == ["text_encoder", "unet"]  # another scale
    quick_build.clear()
    export(replace(again, plan=PlanFlags(steps=(2,), scheduler="ddim", guidance=3.0)))
    assert quick_build == ["unet"]  # two rows
    quick_build.clear()
    export(replace(again, size=(24, 16)))
    assert quick_build == ["unet", "vae_decoder", "vae_encoder"]
    quick_build.clear()
    export(replace(again, opset=21))
    assert quick_build == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    quick_build.clear()
    export(again)
    assert quick_build == []


def test_a_lora_that_does_not_fit_is_refused_before_anything_is_built(spec, quick_build, lora_file, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(lora_file)
    renamed = {key.replace("down_blocks_0", "down_blocks_7"): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "other.safetensors")
    from hypersd_export.errors import LoraError

    flags = PlanFlags(steps=(2,), guidance=1.0)
    with pytest.raises(LoraError, match="down_blocks_7"):
        export(replace(spec, loras=(str(tmp_path / "other.safetensors"),), plan=flags))
    assert quick_build == []
    with pytest.raises(OptionError, match="pass --steps N"):
        export(replace(spec, plan=PlanFlags()))

"""`hypersd-export` on the command line: one line for bad input, an untouched destination, what the commands print."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hypersd_export import __version__
from hypersd_export.cli import app
from hypersd_export.export import export
from tests.export.conftest import export_cache, exported, in_process, quick_build, quick_verify, tiny_spec  # noqa: F401

STEPS = ("--steps", "2", "--scheduler", "ddim", "--guidance", "1")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result, code: int = 1) -> str:
    """The one line of a refusal."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr.removeprefix("error: ").strip()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "place" / "bundle"


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy of the tiny base that a test may damage."""
    shutil.copytree(tiny_base, tmp_path / "base")
    return tmp_path / "base"


def weights(base, component="unet"):
    return base / component / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "onx"], "--target onx: unknown, choose from onnx, tensorrt, coreml and all"),
        (["--target", "coreml", "--deployment-target", "iOS15"], "--deployment-target iOS15: choose iOS16, iOS17, iOS"),
        (["--target", "all", "--palettize", "3"], "--palettize 3: iOS17 stores 8, 6, 4, 2 bits a weight (iOS18"),
        (["--layout", "apple"], "--layout and --allow-approximate-schedule are about --target coreml: add it"),
        (["--steps", "0"], "--steps 0: a plan has from 1 to 1000 steps"),
        (["--steps", "-1"], "--steps -1: a plan has from 1 to 1000 steps"),
        (["--steps", "1001"], "--steps 1001: a plan has from 1 to 1000 steps"),
        (["--steps", "many"], "--steps many: whole numbers"),
        (["--steps", "2", "--scheduler", "unipc"], "--scheduler unipc: not one-step; choose from ddim"),
        (["--steps", "2", "--scheduler", "euler", "--eta", "0.5"], "eta 0.5: solver euler has none"),
        (["--timesteps", "100,900"], "must fall strictly"),
        (["--size", "big"], "--size big: give WIDTHxHEIGHT"),
        ([*STEPS, "--size", "20x16"], "--size 20x16: both sides must be multiples of 8 pixels"),
        (["--batch", "0"], "--batch 0: from 1 to 64"),
        (["--opset", "9"], "--opset 9: torch.onnx writes 18 to 23"),
        (["--precision", "int8"], "--precision int8: onnx is written in fp32"),
        (["--single-graph", "--steps", "1,2"], "--single-graph with --steps 1,2: a graph holds one schedule"),
        (["--unroll"], "--unroll: it is about --single-graph"),
        (["--provider", "gpu", *STEPS], "provider 'gpu' is not known"),
        (["--provider", "cuda", *STEPS], "needs onnxruntime-gpu, which is not installed"),
        (["--lora", "none", "--lora", "a.safetensors"], "--lora none: it cannot stand beside another --lora"),
        (["--lora", "missing.safetensors"], "missing.safetensors: no such file"),
        (["--lora", "x.safetensors:0", *STEPS], "scale 0"),
        ([], "nothing says how many steps"),
    ],
)
def test_bad_options_are_one_line(tiny_base, out, tmp_path, arguments, message):
    found = refused(run("--base", tiny_base, "--out", out, "--cache-dir", tmp_path / "cache", *arguments))
    assert message in found
    assert not out.parent.exists()


def test_bad_files_are_one_line(base, out, tmp_path):
    def error(*arguments):
        found = refused(run("--out", out, "--cache-dir", tmp_path / "cache", *STEPS, *arguments))
        assert not out.parent.exists()
        return found

    assert "no such file or folder" in error("--base", tmp_path / "nowhere" / "model")
    page = tmp_path / "page.safetensors"
    page.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    assert "an HTML page, not weights" in error("--base", page)
    assert "an HTML page, not weights" in error("--base", base, "--lora", page)
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x04whatever")
    assert "convert it with `python -m hypersd_export.model.convert" in error("--base", pickle)
    whole = weights(base).read_bytes()
    weights(base).write_bytes(whole[: len(whole) // 2])
    assert "truncated safetensors" in error("--base", base)
    weights(base).write_bytes(b"\xff" * 4096)
    assert "safetensors" in error("--base", base)


def test_a_destination_that_cannot_be_used_is_one_line(tiny_base, tmp_path):
    def error(out):
        return refused(run("--base", tiny_base, "--out", out, "--cache-dir", tmp_path / "cache", *STEPS))

    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    assert "is not empty: pass --overwrite" in error(full)
    assert "does not delete it" in refused(
        run("--base", tiny_base, "--out", full, "--overwrite", "--cache-dir", tmp_path / "cache", *STEPS)
    )
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    assert "is a file" in error(full / "mine.txt")
    assert "is a file; choose another --out" in error(full / "mine.txt" / "below")
    if os.geteuid() != 0:
        full.chmod(0o500)
        assert "not writable" in error(full / "bundle")


def test_unexpected_system_errors_are_one_line_too(tiny_base, out, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("hypersd_export.export.open_job", denied)
    assert refused(run("--base", tiny_base, "--out", out, *STEPS)) == "/some/file: Permission denied"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hypersd_export.export.open_job", full)
    assert "no space left on the disk" in refused(run("--base", tiny_base, "--out", out, *STEPS))


def test_usage_errors_exit_with_2(tmp_path):
    assert run("--batch", "x").exit_code == 2
    assert run("--nonsense").exit_code == 2
    assert run("inspect").exit_code == 2


@pytest.mark.usefixtures("quick_build", "quick_verify")
def test_ctrl_c_is_one_line_and_130(tiny_base, out, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hypersd_export.proof.run_verification", interrupt)
        result = run("--base", tiny_base, "--out", out, "--cache-dir", tmp_path / "cache", *STEPS)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("error: interrupted; ")
    assert not out.exists()
    again = run("--base", tiny_base, "--out", out, "--cache-dir", tmp_path / "cache", *STEPS)
    assert again.exit_code == 0, again.output
    assert again.stderr.count("(cached)") == 4


@pytest.mark.usefixtures("quick_build", "in_process")
def test_an_export_says_what_it_does_and_prints_where_the_bundle_is(tiny_base, out, tmp_path, exported):  # noqa: F811
    options = ("--base", tiny_base, "--out", out, "--cache-dir", tmp_path / "cache", *STEPS)
    result = run(*options)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert "plan: 2 steps of ddim, eta 0, epsilon, no guidance (flags)" in result.stderr
    for stage in ("load", "onnx-text_encoder", "onnx-unet", "verify"):
        assert stage in result.stderr
    assert "parity with torch: text_encoder 1" in result.stderr
    assert run("verify", out).exit_code == 0
    unverified = run(*options, "--overwrite", "--no-verify")
    assert unverified.exit_code == 0
    assert "parity with torch: not verified" in unverified.stderr
    assert json.loads((out / "manifest.json").read_text())["parity"] == "not verified"
    assert "**not verified**" in (out / "README.md").read_text()
    assert "parity   not verified" in run("inspect", out).stdout
    assert run("verify", out).exit_code == 0  # golden is torch's all the same


def test_dry_run_prints_the_resolved_spec_and_writes_nothing(tiny_base, out, tmp_path):
    result = run(
        "--base", tiny_base, "--out", out, "--cache-dir", tmp_path / "cache", *STEPS, "--size", "24x16", "--dry-run"
    )
    assert result.exit_code == 0, result.output
    spec = json.loads(result.stdout)
    assert (spec["options"]["width"], spec["options"]["height"]) == (24, 16)
    assert [entry["steps"] for entry in spec["plans"]] == [2]
    assert spec["out"] == str(out)
    assert not out.parent.exists()
    assert not (tmp_path / "cache").exists()


def test_inspect(exported):  # noqa: F811
    text = run("inspect", exported.path)
    assert text.exit_code == 0
    assert "plan     2 steps of ddim" in text.stdout
    assert "picture  16 x 16 px, batch 1" in text.stdout
    assert exported.digest in text.stdout
    data = json.loads(run("inspect", exported.path, "--json").stdout)
    assert data["digest"] == exported.digest
    assert data["base"]["family"] == "sd15"
    assert data["files"]["count"] == len(exported.manifest.files)
    assert [entry["steps"] for entry in data["plans"]] == [2, 4]
    assert data["versions"]["hypersd"] == __version__


def test_verify(exported):  # noqa: F811
    result = run("verify", exported.path)
    assert result.exit_code == 0
    assert result.stdout.startswith("all files as exported; picture ")
    data = json.loads(run("verify", exported.path, "--json").stdout)
    assert data["passed"] is True
    assert data["psnr_db"] > 50


def test_a_bundle_that_was_tampered_with_is_refused_by_name(exported, tmp_path):  # noqa: F811
    bundle = tmp_path / "bundle"
    shutil.copytree(exported.path, bundle)
    plan = bundle / "plan.json"
    plan.write_text(plan.read_text().replace("999", "998"))
    assert "plan.json was changed" in refused(run("verify", bundle))
    shutil.copyfile(exported.path / "plan.json", plan)
    (bundle / "unet" / "model.onnx").unlink()
    (bundle / "extra.onnx").write_text("x")
    found = refused(run("verify", bundle))
    assert "unet/model.onnx is missing" in found
    assert "extra.onnx is not in the manifest" in found
    assert "no bundle at" in refused(run("inspect", tmp_path / "nowhere"))
    assert "is not a bundle" in refused(run("inspect", tmp_path))


def test_a_golden_picture_that_is_not_reproduced_fails(exported, tmp_path):  # noqa: F811
    from hypersd_export.bundle.manifest import read_manifest, write_manifest

    bundle = tmp_path / "bundle"
    shutil.copytree(exported.path, bundle)
    shutil.copyfile(bundle / "golden/expected.png", bundle / "golden/kept.png")
    from PIL import Image

    Image.new("RGB", (16, 16), "red").save(bundle / "golden/expected.png")
    manifest = read_manifest(bundle).to_json()
    write_manifest(bundle, **{key: manifest[key] for key in manifest if key not in ("format", "files")})
    assert "the golden picture is not reproduced on cpu" in refused(run("verify", bundle))


def test_refit_on_the_command_line(exported, tmp_path):  # noqa: F811
    out = tmp_path / "new"
    assert "refit: name the LoRA" in refused(run("refit", exported.path, "--out", out))
    lost = refused(run("refit", exported.path, "--lora", "b.safetensors", "--out", out))
    assert lost.startswith("model: no such file or folder")  # a manifest has the last part of a path alone
    assert "no bundle at" in refused(run("refit", tmp_path / "none", "--lora", "b.safetensors", "--out", out))
    assert not out.exists()


@pytest.mark.usefixtures("quick_build", "quick_verify")
def test_the_cache_is_listed_and_pruned(tiny_spec, tmp_path):  # noqa: F811
    cache = tmp_path / "cache"
    assert "0 stages" in run("cache", "list", "--cache-dir", cache).stdout
    export(replace(tiny_spec, out=tmp_path / "bundle", cache_dir=cache))
    listed = run("cache", "list", "--cache-dir", cache).stdout
    assert "onnx-unet" in listed
    assert "5 stages" in listed
    data = json.loads(run("cache", "list", "--cache-dir", cache, "--json").stdout)
    assert {entry["name"] for entry in data["entries"]} >= {"onnx-unet", "verify"}
    assert "0 stages deleted" in run("cache", "prune", "--cache-dir", cache, "--older-than-days", 1).stdout
    assert "5 stages deleted" in run("cache", "prune", "--cache-dir", cache).stdout
    assert run("cache").exit_code == 2


def test_the_console_script(monkeypatch, capsys):
    from hypersd_export.cli import main

    monkeypatch.setattr(sys, "argv", ["hypersd-export", "cache", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "prune" in capsys.readouterr().out


def test_help_is_quick():
    code = "from hypersd_export.cli import app; app(['--help'], standalone_mode=False)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)  # once, so that bytecode is there
    before = os.times()
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    elapsed = time.perf_counter() - began
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    assert "--single-graph" in done.stdout
    assert min(elapsed, cpu) < 0.7  # the processor's time counts where the machine is busy

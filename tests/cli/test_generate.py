"""hypersd-generate: the command line over hand-made bundles, in process but for the import hygiene."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hypersd_export.bundle.digest import sha256_file
from hypersd_export.runtime import Pipeline, nvidia
from hypersd_export.runtime import cli as generate_cli
from hypersd_export.runtime.cli import app
from tests.bundles import make_bundle, seal
from tests.engine_bundles import make_engine_bundle
from tests.fake_device import FakeDevice

ROOT = Path(__file__).parents[2]
RUNNER = CliRunner()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("generate") / "bundle")


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of the test's own."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


def run(*arguments: Any) -> Any:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def succeeds(*arguments: Any) -> Any:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fails(message: str, *arguments: Any) -> None:
    """Exit code 1, one line on stderr with the message, nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_one_picture_with_its_provenance(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures" / "cat.png"
    result = succeeds(
        bundle, "--prompt", "cat 🐱", "--negative-prompt", "dog", "--seed", 3, "--guidance", 2, "--out", out
    )
    assert result.stdout == f"{out}\n"
    assert "4 steps (the test), seed 3" in result.stderr
    assert names(out.parent) == ["cat.png"]
    text = Image.open(out).text
    assert (text["prompt"], text["negative_prompt"], text["seed"], text["index"]) == ("cat 🐱", "dog", "3", "0")
    assert float(text["guidance"]) == 2.0
    assert json.loads(text["plan"])["steps"] == 4
    assert text["bundle_digest"] == sha256_file(bundle / "manifest.json")
    assert text["Software"].startswith("hypersd ")
    expected = Pipeline.from_bundle(bundle)("cat 🐱", negative_prompt="dog", seed=3, guidance=2.0)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(expected.images[0]))


def test_names_of_files(bundle: Path, elsewhere: Path, tmp_path: Path) -> None:
    succeeds(bundle, "--prompt", "A cat, in a Hat!", "--seed", 5)
    assert names(elsewhere) == ["a-cat-in-a-hat-5-0.png"]
    succeeds(bundle, "--prompt", "cat", "--prompt", "🐱", "--num-images", 2, "--out", tmp_path / "many")
    assert names(tmp_path / "many") == [
        "000-cat-0-0.png", "000-cat-0-1.png", "001-picture-0-0.png", "001-picture-0-1.png",
    ]  # fmt: skip
    succeeds(bundle, "--prompt", "cat", "--num-images", 3, "--out", "x.png")
    assert sorted(path.name for path in elsewhere.glob("x*")) == ["x-0.png", "x-1.png", "x-2.png"]
    np.testing.assert_array_equal(
        np.asarray(Image.open(elsewhere / "x-1.png")), np.asarray(Image.open(tmp_path / "many" / "000-cat-0-1.png"))
    )


def test_enlarge_repeats_pixels(bundle: Path, tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    succeeds(bundle, "--prompt", "cat", "--out", small)
    succeeds(bundle, "--prompt", "cat", "--enlarge", 3, "--out", large)
    pixels = np.asarray(Image.open(small))
    np.testing.assert_array_equal(np.asarray(Image.open(large)), pixels.repeat(3, 0).repeat(3, 1))
    fails("must be from 1 to 64", bundle, "--prompt", "cat", "--enlarge", 0, "--out", large)


def test_prompt_file_and_grid(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffcat\n\n  dog in a hat \n", encoding="utf-8")
    result = succeeds(
        bundle, "--prompt", "first", "--prompt-file", tmp_path / "prompts.txt", "--num-images", 2, "--grid", "--json",
        "--out", tmp_path / "grid.png",
    )  # fmt: skip
    assert json.loads(result.stdout)["prompts"] == ["first", "cat", "dog in a hat"]
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.size == (2 * 12, 3 * 8)
    assert json.loads(sheet.text["prompt"]) == ["first", "cat", "dog in a hat"]
    second = Pipeline.from_bundle(bundle)("cat", num_images=2).images[1]
    np.testing.assert_array_equal(np.asarray(sheet)[8:16, 12:], np.asarray(second))
    succeeds(bundle, "--prompt", "cat", "--grid", "--out", tmp_path / "folder")
    assert names(tmp_path / "folder") == ["cat-0-grid.png"]


def test_json_is_one_object(bundle: Path, tmp_path: Path) -> None:
    result = succeeds(bundle, "--prompt", "cat", "--steps", 2, "--json", "--out", tmp_path / "x.png", "--threads", 1)
    assert len(result.stdout.splitlines()) == 1
    report = json.loads(result.stdout)
    assert report["files"] == [str(tmp_path / "x.png")]
    assert (report["steps"], report["guidance"], report["seed"], report["provider"]) == (2, 3.0, 0, "cpu")
    assert report["bundle_digest"] == sha256_file(bundle / "manifest.json")
    assert list(report["seconds"]) == ["open", "text_encoder", "unet", "vae_decoder", "write", "total"]
    assert report["seconds"]["total"] >= max(report["seconds"].values())
    assert report["warnings"] == []


def test_image_to_image(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (12, 8), "red").save(tmp_path / "init.png")
    succeeds(bundle, "--prompt", "cat", "--init-image", tmp_path / "init.png", "--strength", 0.25, "--out", "x.png")
    expected = Pipeline.from_bundle(bundle)("cat", init_image=Image.new("RGB", (12, 8), "red"), strength=0.25)
    np.testing.assert_array_equal(np.asarray(Image.open("x.png")), np.asarray(expected.images[0]))
    succeeds(bundle, "--prompt", "cat", "--init-image", tmp_path / "init.png", "--out", "y.png")
    fails("--strength needs --init-image", bundle, "--prompt", "cat", "--strength", 0.5)
    fails("does not exist", bundle, "--prompt", "cat", "--init-image", "none.png")
    fails("leaves none of 4 steps", bundle, "--prompt", "c", "--init-image", tmp_path / "init.png", "--strength", 0.1)


@pytest.mark.parametrize("prompt", ["", "🐱", "日本語", "zzzz"])
def test_any_prompt_gives_a_picture(bundle: Path, prompt: str) -> None:
    result = succeeds(bundle, "--prompt", prompt, "--out", "x.png")
    assert "warning" not in result.stderr
    assert Image.open("x.png").text["prompt"] == prompt


def test_one_warning_names_the_dropped_tail(bundle: Path) -> None:
    prompt = "cat " * 14 + "dog dog"
    result = succeeds(bundle, "--prompt", prompt, "--num-images", 2, "--json", "--out", "x.png")
    lines = [line for line in result.stderr.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: the prompt is 18 tokens long")
    assert lines[0].endswith("dropped 'dog dog'")
    assert json.loads(result.stdout)["warnings"] == [lines[0].removeprefix("warning: ")]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_other_warnings_go_their_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    collected: list[str] = []
    with pytest.warns(UserWarning, match="of another kind"), generate_cli._warnings_as_lines(collected):
        warnings.warn("of another kind", UserWarning, stacklevel=1)
    assert collected == []


# Golden


def test_golden(bundle: Path, copy: Path) -> None:
    assert "prompt ids equal" in succeeds(bundle, "--golden").stdout
    report = json.loads(succeeds(bundle, "--golden", "--json").stdout)
    assert report["passed"]
    assert report["equal"] or report["psnr_db"] > 50
    Image.new("RGB", (12, 8)).save(copy / "golden" / "expected.png")
    result = run(copy, "--golden", "--no-check")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the golden picture is not reproduced")
    assert json.loads(run(copy, "--golden", "--json", "--no-check").stdout)["psnr_db"] < 50


# Runtimes


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_bundle(tmp_path_factory.mktemp("engines"))[0]


def test_a_bundle_of_engines(engines: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nvidia, "open_device", lambda flavour: FakeDevice())
    report = json.loads(succeeds(engines, "--prompt", "cat", "--seed", 2, "--json", "--out", "mine.png").stdout)
    assert report["runtime"] == "tensorrt"
    assert report["provider"] == "Fake RTX, TensorRT rtx 1.7.1.116"
    report = json.loads(succeeds(bundle, "--prompt", "cat", "--seed", 2, "--json", "--out", "theirs.png").stdout)
    assert (report["runtime"], report["provider"]) == ("onnx", "cpu")
    np.testing.assert_array_equal(np.asarray(Image.open("mine.png")), np.asarray(Image.open("theirs.png")))
    assert "prompt ids equal" in succeeds(engines, "--golden", "--runtime", "tensorrt").stdout


def test_a_notice_of_the_runtime_is_one_line(engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nvidia, "open_device", lambda flavour: FakeDevice(capturable=False))
    result = succeeds(engines, "--prompt", "cat", "--out", "x.png")
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2  # the text encoder, called for each prompt of the guidance, and the UNet
    assert all("cannot be captured as a CUDA graph" in line for line in lines)


def test_runtimes_that_cannot_be_used(engines: Path, bundle: Path, elsewhere: Path) -> None:
    """The last line is what a machine without a GPU says."""
    fails("runtime 'metal' is not known", bundle, "--prompt", "cat", "--runtime", "metal")
    fails("this bundle was exported to onnx", bundle, "--prompt", "cat", "--runtime", "tensorrt")
    fails("this bundle was exported to onnx", bundle, "--prompt", "cat", "--runtime", "coreml")
    fails("--provider cuda: it is onnxruntime's", engines, "--prompt", "cat", "--provider", "cuda")
    assert names(elsewhere) == []


def test_no_driver_is_one_line(engines: Path, elsewhere: Path) -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime")
    pytest.importorskip("tensorrt_rtx")
    if int(cuda.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("this machine has a GPU")
    fails("runtime 'tensorrt' does not start on this machine", engines, "--prompt", "cat")
    assert names(elsewhere) == []


# What users get wrong


@pytest.mark.parametrize(
    "arguments",
    [
        ["BUNDLE"],
        ["BUNDLE", "--golden", "--prompt", "cat"],
        ["BUNDLE", "--prompt", "cat", "--seed", "many"],
        ["BUNDLE", "--prompt", "cat", "--colour"],
    ],
)
def test_usage_errors_exit_with_2(bundle: Path, arguments: list[str]) -> None:
    result = run(*(bundle if argument == "BUNDLE" else argument for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "steps 3: this bundle has tables for 4, 2"),
        (["--seed", "-1"], "seed -1"),
        (["--num-images", "0"], "--num-images 0: must be at least 1"),
        (["--guidance", "-2"], "guidance"),
        (["--provider", "cuda"], "pip install 'hypersd[gpu]'"),
        (["--provider", "quantum"], "provider 'quantum' is not known"),
        (["--threads", "0"], "--threads 0"),
        (["--out", "x.jpg"], "pictures are written as PNG"),
        (["--prompt-file", "none.txt"], "cannot read --prompt-file none.txt"),
        (["--prompt", "caf\udce9"], "not valid UTF-8"),
    ],
)
def test_values_that_cannot_be_used(bundle: Path, elsewhere: Path, arguments: list[str], message: str) -> None:
    fails(message, bundle, "--prompt", "cat", *arguments)
    assert names(elsewhere) == []


def test_an_empty_prompt_file(bundle: Path, elsewhere: Path) -> None:
    (elsewhere / "p.txt").write_text("\n \n")
    fails("has no prompt", bundle, "--prompt-file", "p.txt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: (b / "unet" / "model.onnx").write_bytes(b"tampered"), "unet/model.onnx was changed"),
        (lambda b: (b / "tokenizer" / "tokenizer.json").unlink(), "tokenizer/tokenizer.json is missing"),
        (lambda b: (b / "extra.txt").write_text("x"), "extra.txt is not in the manifest"),
        (lambda b: (b / "manifest.json").unlink(), "has no manifest.json"),
        (lambda b: (b / "manifest.json").write_text("{}"), "is of format 'None'"),
    ],
)
def test_a_bundle_that_was_changed(copy: Path, elsewhere: Path, damage: Any, message: str) -> None:
    damage(copy)
    fails(message, copy, "--prompt", "cat", "--out", "new/x.png")
    assert names(elsewhere) == []


def test_a_plan_of_another_version(copy: Path) -> None:
    (copy / "plan.json").write_text('{"format": "hypersd-plan/9", "entries": []}')
    fails("hypersd-plan/9", seal(copy), "--prompt", "cat")


def test_no_bundle(tmp_path: Path) -> None:
    fails("no bundle at", tmp_path / "nowhere", "--prompt", "cat")
    fails("is not a bundle", tmp_path, "--prompt", "cat")


def test_a_destination_that_cannot_be_written(
    bundle: Path, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    fails("is a file", bundle, "--prompt", "cat", "--out", tmp_path / "file" / "x.png")
    fails("is a file", bundle, "--prompt", "cat", "--out", tmp_path / "file")
    (tmp_path / "folder.png").mkdir()
    fails("is a folder", bundle, "--prompt", "cat", "--out", tmp_path / "folder.png")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    fails("is not writable; choose another --out", bundle, "--prompt", "cat", "--out", "new/x.png")
    assert names(elsewhere) == []


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "MB free)"), (errno.EROFS, "Read-only file system")])
def test_a_folder_that_cannot_be_made(bundle: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    fails(message, bundle, "--prompt", "cat", "--out", "new/x.png")


def test_a_full_disk_leaves_nothing(bundle: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "x.png").write_bytes(b"old")

    def full(self: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    fails("no space left on the disk", bundle, "--prompt", "cat", "--out", "x.png")
    fails("no space left on the disk", bundle, "--prompt", "cat", "--out", "new/deep/x.png")
    assert names(elsewhere) == ["x.png"]
    assert (elsewhere / "x.png").read_bytes() == b"old"


def test_ctrl_c(bundle: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "sample", interrupted)
    result = run(bundle, "--prompt", "cat", "--out", "new/x.png")
    assert (result.exit_code, result.stderr) == (130, "error: interrupted\n")
    assert names(elsewhere) == []


# The program as such


def test_help_names_every_option() -> None:
    text = succeeds("--help").output
    for option in (
        "--prompt", "--prompt-file", "--negative-prompt", "--guidance", "--steps", "--seed", "--num-images",
        "--init-image", "--strength", "--runtime", "--provider", "--threads", "--out", "--json", "--grid", "--golden",
        "--no-check",
    ):  # fmt: skip
        assert option in text
    assert "Usage" in run().output


def test_imports_are_free() -> None:
    """Neither --help nor the import of the packages brings in anything heavy; a picture needs no torch."""
    code = """
import sys
import hypersd_export.runtime.cli, hypersd_export.runtime
import hypersd_export.bundle.card, hypersd_export.bundle.cache, hypersd_export.bundle.publish, hypersd_export.bundle
heavy = {"torch", "diffusers", "transformers", "onnxruntime", "onnx"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert not {"numpy", "PIL", "tokenizers", "rich"} & set(sys.modules), "these come when there is work for them"
sys.argv[0] = "hypersd-generate"
try:
    hypersd_export.runtime.cli.main()
except SystemExit as done:
    assert not done.code, done.code
assert not (heavy - {"onnxruntime"}) & set(sys.modules)
assert not {name for name in sys.modules if name.startswith("PIL.Jpeg")}, "no picture format but PNG"
"""
    bundle = make_bundle(Path("bundle").absolute())
    command = [sys.executable, "-c", code, str(bundle), "--prompt", "cat", "--out", str(Path("x.png").absolute())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("x.png").is_file()

"""`hypersd-train distill` and `tscd`: from a folder of pictures to LoRAs, and every refusal in one line."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from hypersd_export.model.lora import read_lora
from tests.train.small_run import log
from trainer import cli

SMALL = (
    "lora.rank=2", "lora.alpha=2", 'lora.modules=["to_q"]', "batch=2", "mixed_precision=no", "log_with=none",
    "validate_every=0", "adversarial.head_channels=16", "adversarial.teacher_steps=2", "save_every=1",
    *(f"stages.{n}.steps=1" for n in range(4)),
)  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line: (exit code, stdout, stderr without the libraries' own lines)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hypersd-train", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("error:")]

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures with captions, and one without."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, caption in enumerate(("a cat", "a dog", "gato", "猫")):
        Image.new("RGB", (20, 20), (number * 60, 80, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    Image.new("RGB", (20, 20)).save(folder / "silent.png")
    return folder


def _set(*assignments):
    return [word for assignment in assignments for word in ("--set", assignment)]


def test_from_a_folder_of_pictures_to_four_loras_and_on(run, tiny_base, pictures, tmp_path):
    command = ("tscd", "--base", tiny_base, "--data", pictures, "--out", tmp_path / "out", *_set(*SMALL))
    code, out, errors = run(*command)
    assert (code, errors) == (0, [])
    lines = out.splitlines()
    assert json.loads(lines[0])["lora"]["rank"] == 2
    assert "data: left out 1 × no caption: silent.png" in lines
    assert sum(line.startswith("stage ") for line in lines) == 4
    assert lines[-1] == f"done: the LoRAs are in {tmp_path / 'out'}"
    for number, k in enumerate((8, 4, 2, 1)):
        assert read_lora(tmp_path / "out" / f"stage{number + 1}-k{k}-lora.safetensors").plan_json
    assert len(log(tmp_path / "out")) == 4
    code, out, _ = run(*command)
    assert code == 0
    assert "every stage is finished" in out
    code, out, _ = run(*command, *_set("stages.3.steps=2"))
    assert "going on from stage 4, step 1" in out
    assert len(log(tmp_path / "out")) == 5
    assert run(*command, "--resume", "never")[0] == 1
    assert "seed 0 -> 5" in run(*command, *_set("seed=5"))[2][0]


def test_the_method_is_one_flag(run, tiny_base, pictures, tmp_path):
    method = ("--method", "lcm", "--base", tiny_base, "--data", pictures, "--out", tmp_path)
    code, _, errors = run("distill", *method, *_set(*SMALL[:-3]))
    assert (code, errors) == (0, [])
    assert (tmp_path / "lcm-k1-lora.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distill", "--method", "dmd", "--out", "x"), "there are: tscd, tcd, lcm, pcm"),
        (("tscd", "--recipe", "sd9", "--out", "x"), "--recipe 'sd9' is not a distillation recipe"),
        (("tscd", "--recipe", "sd15", "--out", "x"), "needs --data"),
        (("tscd",), "--out is missing"),
        (("tscd", "--out", "x", "--set", "stages.7.lr=1"), "unknown key '7'"),
        (("tscd", "--out", "x", "--set", "method=lcm"), "use --method"),
        (("tscd", "--out", "x", "--set", "batch=0"), "batch 0"),
        (("tscd", "--out", "x", "--set", "log_with=paper"), "log_with 'paper'"),
        (("tscd", "--out", "/proc/run"), "/proc/run"),
        (("tscd", "--out", __file__), __file__),
        (("tscd", "--out", str(Path(__file__).parent)), "has files but no run"),
        (("tscd", "--out", "x", "--resume", "yesterday"), "--resume yesterday"),
        (("tscd", "--out", "x", "--base", "/no/such/base", "--dry-run"), "/no/such/base"),
        (("tscd", "--out", "x", "--data", "/no/such/data"), "/no/such/data"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_and_leave_nothing(run, arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(*arguments)
    assert code == 1
    assert len(errors) == 1
    assert message in errors[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_dry_run_is_json_and_writes_nothing(run, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, errors = run("tscd", "--base", tiny_base, "--dry-run", *_set(*SMALL))
    assert (code, errors) == (0, [])
    figures = json.loads(out)
    assert figures["config"]["stages"][0]["segments"] == 8
    assert [stage["segments"] for stage in figures["passes_per_step"]] == [8, 4, 2, 1]
    assert {"one_gpu", "each_of_eight_gpus"} <= set(figures["memory_gib"])
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_there_is_a_bar(tiny_base, tmp_path, capsys):
    from tests.train.small_run import small_config, start

    cli._with_bar(start(small_config(tiny_base), tmp_path).run())
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'stage2-k1-lora.safetensors'}".replace("\n", "") in out.replace("\n", "")


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp", "FSDP"), ("zero2", "DEEPSPEED")])
def test_the_launch_configurations_are_read_by_accelerate(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(Path(cli.__file__).parent / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.mixed_precision == "no"
    if name == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "zero2":
        assert config.deepspeed_config["zero_stage"] == 2

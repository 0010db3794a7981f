"""Killed at any moment, a run goes on to the same losses; a damaged checkpoint or a full disk is a clear error."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hypersd_export.errors import DataError, DestinationError, OptionError
from tests.train.small_run import STEPS, finish, log, loras, opened, small_config, start
from trainer.config import as_json
from trainer.distill import snapshot
from trainer.distill.resume import check_config, open_run
from trainer.distill.run import Distillation
from trainer.distill.snapshot import Place, Snapshot, checkpoints, load_snapshot, newest, save_snapshot


class Killed(BaseException):
    """A kill, as far as one process can play it: nothing catches it."""


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["consistency", "adversarial"])
def unbroken(request, tiny_base, tmp_path_factory):
    config, out = small_config(tiny_base, w_adv=request.param), tmp_path_factory.mktemp("unbroken")
    return config, finish(config, out), loras(out)


@pytest.fixture
def done(tiny_base, tmp_path):
    """A finished run of one stage with every checkpoint kept."""
    config = small_config(tiny_base, save_every=1, keep=9)
    config = replace(config, stages=config.stages[:1])
    finish(config, tmp_path)
    return config, tmp_path


@pytest.mark.parametrize("after", range(1, 2 * STEPS + 1))
def test_a_run_killed_after_any_step_resumes_to_the_same_losses_bit_for_bit(unbroken, after, tmp_path):
    config, lines, files = unbroken
    run = start(config, tmp_path).run()
    for _ in range(after):
        next(run)
    del run  # nothing that a kill would not leave is written after a step is yielded
    assert finish(config, tmp_path) == lines
    assert loras(tmp_path) == files


def test_the_adversarial_run_has_a_critic_that_learns(unbroken):
    config, lines, _ = unbroken
    critic = [line["critic"] for line in lines if "critic" in line]
    assert len(critic) == (STEPS if config.stages[1].w_adv else 0)
    assert len(set(critic)) == len(critic)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(unbroken, tmp_path, monkeypatch):
    config, lines, files = unbroken

    def killed(path):
        if path.name.startswith("stage2-step000002"):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_flush", killed)
        with pytest.raises(Killed):
            finish(config, tmp_path)
    assert [path.name for _, path in checkpoints(tmp_path)][-1] == "stage1-step000003.safetensors"
    assert list((tmp_path / "checkpoints").glob("*.partial"))
    assert finish(config, tmp_path) == lines
    assert loras(tmp_path) == files


def test_a_kill_between_the_last_checkpoint_and_the_lora_loses_no_lora(unbroken, tmp_path, monkeypatch):
    config, lines, files = unbroken

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("trainer.distill.run.save_student", killed)
        with pytest.raises(Killed):
            finish(config, tmp_path)
    assert loras(tmp_path) == {}
    assert finish(config, tmp_path) == lines
    assert loras(tmp_path) == files


def test_a_finished_run_is_left_alone_and_more_steps_go_on_from_its_end(done):
    config, out = done
    files, lines = loras(out), log(out)
    assert finish(config, out) == lines
    assert loras(out) == files
    longer = replace(config, stages=(replace(config.stages[0], steps=STEPS + 2),))
    assert finish(longer, out)[: len(lines)] == lines
    assert [line["step"] for line in log(out)] == list(range(STEPS + 2))
    assert loras(out) != files


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20], lambda data: data[:100], lambda data: b"", lambda data: b"<html>" + data,
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    ],
    ids=["cut", "only a header", "empty", "page", "one bit"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_an_error_that_names_the_one_before_and_the_flag(done, damage):
    config, out = done
    lines = log(out)
    paths = [path for _, path in checkpoints(out)]
    paths[-1].write_bytes(damage(paths[-1].read_bytes()))
    with pytest.raises(DataError) as caught:
        finish(config, out)
    message = str(caught.value)
    assert str(paths[-1]) in message
    assert f"--resume {paths[-2]}" in message
    assert "\n" not in message
    assert log(out) == lines  # nothing was begun
    assert finish(config, out, resume=str(paths[-2])) == lines
    assert paths[-1].exists()  # written again
    assert finish(config, out) == lines


def test_when_every_checkpoint_is_damaged_nothing_is_offered(done):
    config, out = done
    for _, path in checkpoints(out):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no older one that is whole"):
        finish(config, out)


def test_resuming_from_an_older_checkpoint_sets_the_newer_aside(done):
    config, out = done
    lines, paths = log(out), [path for _, path in checkpoints(out)]
    run = start(config, out, resume=str(paths[0])).run()
    assert next(run).result.step == 1
    assert [path for _, path in checkpoints(out)] == paths[:2]
    assert paths[2].with_name(paths[2].name + snapshot.SET_ASIDE).exists()
    assert finish(config, out) == lines


def test_rotation_keeps_the_newest(tiny_base, tmp_path):
    finish(small_config(tiny_base, save_every=1, keep=3), tmp_path)
    assert [place for place, _ in checkpoints(tmp_path)] == [Place(2, 1), Place(2, 2), Place(2, 3)]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "SafetensorError"],
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(done, error, monkeypatch):
    config, out = done
    before = {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()}

    def full(_tensors, path, _metadata=None):
        path.write_bytes(b"half")
        raise error

    longer = replace(config, stages=(replace(config.stages[0], steps=STEPS + 1),), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(DestinationError, match="the disk is full") as caught:
            finish(longer, out)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()} == before
    assert len(finish(longer, out)) == STEPS + 1


def test_a_full_disk_at_a_lora_is_one_line_and_the_lora_comes_with_the_next_start(tiny_base, tmp_path, monkeypatch):
    config = small_config(tiny_base)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.distill.run.save_student", full)
        with pytest.raises(DestinationError, match=r"stage1-k2-lora\.safetensors: the disk is full"):
            finish(config, tmp_path)
    finish(config, tmp_path)
    assert len(loras(tmp_path)) == 4


def test_a_checkpoint_of_another_folder_begins_a_run_there(done, tmp_path_factory):
    config, out = done
    other = tmp_path_factory.mktemp("branch")
    finish(config, other, resume=str(checkpoints(out)[0][1]))
    assert [line["step"] for line in log(other)] == [1, 2]
    assert {name: content[1] for name, content in loras(other).items()} == {
        name: content[1] for name, content in loras(out).items()
    }
    assert finish(config, other) == log(other)


def test_a_rename_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = Snapshot(place=Place(1, 1), tensors={"a": torch.zeros(2)}, extra={})
    save_snapshot(tmp_path, old, keep=1)

    def refuse(_self, _target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", refuse)
        with pytest.raises(DestinationError):
            save_snapshot(tmp_path, replace(old, place=Place(1, 2)), keep=1)
    found = newest(tmp_path)
    assert found is not None
    assert found.place == old.place
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["stage1-step000001.safetensors"]


def test_every_kind_of_content_survives_and_every_change_of_it_is_seen(tmp_path):
    tensors = {
        "f": torch.randn(3, 2), "h": torch.randn(4).half(), "b": torch.randn(5).bfloat16(), "i": torch.arange(3),
        "u": torch.tensor([1, 255], dtype=torch.uint8), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3),
        "strided": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "flag": torch.tensor([True, False]),
    }  # fmt: skip
    path = save_snapshot(tmp_path, Snapshot(place=Place(3, 7), tensors=tensors, extra={"x": [1, None]}), keep=1)
    again = load_snapshot(path)
    assert (again.place, again.extra) == (Place(3, 7), {"x": [1, None]})
    for name, tensor in tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name], tensor)
    state = json.dumps({"stage": 3, "step": 7, "x": [1, None]})
    good = snapshot.digest(again.tensors, state)
    assert good != snapshot.digest(again.tensors, state.replace("7", "8"))
    assert good != snapshot.digest({**again.tensors, "f": again.tensors["f"].T.contiguous()}, state)
    assert good != snapshot.digest({**again.tensors, "u": again.tensors["u"].to(torch.int8)}, state)


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="not a checkpoint of a distillation"):
        load_snapshot(path)
    save_file({"a": torch.zeros(1)}, path, {"format": "99", "state": "{}", "sha256": ""})
    with pytest.raises(DataError, match="format 99"):
        load_snapshot(path)


def test_a_checkpoint_holds_the_run_and_not_the_base(unbroken, tmp_path):
    config, _, _ = unbroken
    finish(config, tmp_path)
    tensors = load_file(checkpoints(tmp_path)[-1][1])
    groups = {name.split(".")[0] for name in tensors}
    critic = {"critic", "critic_optimizer"} if config.stages[1].w_adv else set()
    assert groups == {"adapters", "optimizer"} | critic
    base, _ = opened(config.base)
    assert not set(tensors) & set(base.load_unet(torch.float32).state_dict())


def test_a_changed_configuration_is_refused_by_name(done):
    config, out = done
    for changed, key in (
        (replace(config, seed=1), "seed 0 -> 1"), (replace(config, ema_decay=0.5), "ema_decay 0.95 -> 0.5"),
        (replace(config, guidance=(2.0, 5.0)), "guidance"),
        (replace(config, lora=replace(config.lora, rank=3)), "lora.rank"),
        (replace(config, stages=(replace(config.stages[0], lr=1.0),)), "stages.0.lr"),
        (replace(config, stages=(replace(config.stages[0], steps=2),)), "stages.0.steps 3 -> 2"),
        (replace(config, stages=config.stages * 2), "stages.1.lr null -> 0.001"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match="the configuration is not that of") as caught:
            finish(changed, out)
        assert key in str(caught.value)
    finish(replace(config, save_every=7, keep=1, log_with="none", micro_batch=2, gradient_checkpointing=True), out)


def test_steps_of_a_later_stage_may_change_and_of_an_earlier_one_may_not(tiny_base):
    config = small_config(tiny_base)
    stored = as_json(config)
    first, second = config.stages
    check_config(stored, replace(config, stages=(first, replace(second, steps=1))), Place(1, 2), where="x")
    check_config(stored, replace(config, stages=(first, replace(second, steps=2))), Place(2, 2), where="x")
    for stages in ((first, replace(second, steps=1)), (replace(first, steps=9), second)):
        with pytest.raises(OptionError, match="steps"):
            check_config(stored, replace(config, stages=stages), Place(2, 2), where="x")


def test_a_changed_base_is_refused(done, monkeypatch):
    config, out = done
    base, source = opened(config.base)
    other = replace(base, model=replace(base.model, name="other"))
    monkeypatch.setattr(type(other), "digest", property(lambda self: "0" * 64))
    with pytest.raises(DataError, match="another base"):
        list(Distillation(config, out, base=other, source=source).run())


def test_the_write_test_of_another_process_is_no_strangers_file(tiny_base, tmp_path):
    (tmp_path / ".write-test-1").write_bytes(b"x")
    assert open_run(tmp_path, small_config(tiny_base), "latest") is None
    assert [path.name for path in tmp_path.iterdir()] == [".write-test-1"]


def test_folders_that_are_no_place_for_a_run(done, tmp_path_factory):
    config, out = done
    with pytest.raises(OptionError, match="has a run already"):
        finish(config, out, resume="never")
    with pytest.raises(OptionError, match="neither latest, never, nor a checkpoint"):
        finish(config, out, resume=str(out / "nothing"))
    with pytest.raises(OptionError, match="not a file"):
        finish(config, out, resume=str(out / "checkpoints"))
    other = tmp_path_factory.mktemp("other")
    (other / "vae.json").write_text("{}")
    with pytest.raises(OptionError, match="has files but no run"):
        finish(config, other)
    for _, path in checkpoints(out):
        path.unlink()
    with pytest.raises(OptionError, match="no checkpoint to go on from"):
        finish(config, out)
    file = other / "file"
    file.write_text("")
    with pytest.raises(DestinationError):
        finish(config, file / "below")

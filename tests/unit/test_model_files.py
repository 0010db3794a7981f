"""Every bad weight file gives one line that names the value, the limit and the way out, before anything is loaded."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hypersd_export.errors import LoraError, ModelError
from hypersd_export.model import convert, files
from tests.lora_files import one_line


def good(path: Path) -> Path:
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}, path, {"k": "v"})
    return path


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_header_and_tensors(tmp_path: Path) -> None:
    path = good(tmp_path / "a.safetensors")
    header = files.read_header(path)
    assert header.metadata == {"k": "v"}
    assert header.tensors["a"] == files.TensorInfo(dtype="F32", shape=(2, 3))
    torch.testing.assert_close(files.read_tensors(path)["a"], torch.arange(6.0).reshape(2, 3))


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = good(tmp_path / "a.safetensors")
    before = path.read_bytes()
    files.read_tensors(path)["a"].fill_(9)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty or an interrupted download"),
        (b"\0" * 64, "empty or an interrupted download"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page, not weights"),
        (b"\n  <html lang='en'>" + b" " * 100, "an HTML page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "git lfs pull"),
        (b"PK\x03\x04" + b"x" * 100, "a pickle under another name; convert it with `python -m"),
        (b"\x80\x02}q\x00." + b"x" * 100, "a pickle under another name"),
        (b"GGUF\x03\x00\x00\x00" + b"x" * 100, "GGUF"),
        (b'{"error": "not found"}' + b" " * 10, "truncated or not safetensors"),
        (struct.pack("<Q", 20) + b"x" * 20, "corrupt safetensors, its header is not readable"),
        (struct.pack("<Q", 2) + b"[]", "corrupt safetensors"),
    ],
)
@pytest.mark.parametrize("error", [ModelError, LoraError])
def test_what_is_not_safetensors_is_named(content: bytes, said: str, error: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        files.check_weights(path, allow_pickle=False, error=error)  # type: ignore[arg-type]
    assert said in one_line(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_as_a_pickle_does(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    head = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", length) + head + b"\0" * 4)
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    assert files.read_header(path).tensors["a"].shape == (1,)


def test_truncated_and_overlong_files(tmp_path: Path) -> None:
    path = good(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    for content, said in ((whole[:-1], "truncated"), (whole[:40], "truncated"), (whole + b"x", "corrupt")):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=said) as caught:
            files.read_header(path)
        assert "download it again" in one_line(caught.value)


def test_a_tensor_that_is_not_as_long_as_its_shape(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
    with pytest.raises(ModelError, match="a has 8 bytes") as caught:
        files.read_header(raw(tmp_path / "a.safetensors", header, b"12345678"))
    one_line(caught.value)


def test_missing_folder_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no such file"):
        files.read_header(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="a folder, where one weight file is needed"):
        files.read_header(tmp_path)
    path = good(tmp_path / "a.safetensors")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match="Permission denied"):
        files.read_header(path)


def test_paths_that_cannot_be_paths() -> None:
    assert not files.exists(Path("x" * 5000))
    assert not files.exists(Path("a\0b"))
    assert files.user_path("~no-such-user-here/x") == Path("~no-such-user-here/x")
    assert files.user_path("~/x") == Path.home() / "x"


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    shared = torch.ones(3)
    torch.save({"state_dict": {"a": shared, "twin": shared, "step": 3}, "epoch": 1}, path)
    with pytest.raises(ModelError) as caught:
        files.check_weights(path, allow_pickle=False)
    target = tmp_path / "model.safetensors"
    assert f"python -m hypersd_export.model.convert {path} {target}" in one_line(caught.value)
    assert "--allow-pickle" in str(caught.value)
    files.check_weights(path, allow_pickle=True)
    assert set(files.read_tensors(path)) == {"a", "twin"}
    assert convert.main([str(path), str(target)]) == 0
    assert files.read_header(target).tensors.keys() == {"a", "twin"}


def test_a_pickle_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (print, ("run",))

    path = tmp_path / "model.bin"
    torch.save({"a": Evil()}, path)
    with pytest.raises(ModelError, match="cannot be read as plain weights") as caught:
        files.read_tensors(path)
    one_line(caught.value)
    torch.save([1, 2], path)
    with pytest.raises(ModelError, match="holds a list"):
        files.read_tensors(path)


@pytest.mark.parametrize(
    ("content", "said"), [(b"<html>" + b" " * 20, "HTML"), (b"hello, this is text", "not a torch checkpoint")]
)
def test_a_ckpt_that_is_no_pickle(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=said):
        files.check_weights(path, allow_pickle=True)


def test_convert_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["only-one"]) == 2
    path = good(tmp_path / "a.safetensors")
    assert convert.main([str(path), str(tmp_path / "b.safetensors")]) == 1
    assert "nothing to convert" in capsys.readouterr().err
    torch.save({"n": 3}, tmp_path / "empty.pt")
    with pytest.raises(ModelError, match="holds no tensors"):
        convert.convert(tmp_path / "empty.pt", tmp_path / "b.safetensors")
    torch.save({"n": torch.ones(1)}, tmp_path / "one.pt")
    with pytest.raises(ModelError, match="exists; name another file"):
        convert.convert(tmp_path / "one.pt", path)


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ModelError, match="no such file"):
        files.read_json(path)
    path.write_text("{")
    with pytest.raises(ModelError, match="not readable as JSON") as caught:
        files.read_json(path)
    one_line(caught.value)
    path.write_text("[1]")
    with pytest.raises(ModelError, match="holds a list"):
        files.read_json(path)


def test_digest_of_files_does_not_depend_on_place_or_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    one = files.sha256_files([("x", tmp_path / "a"), ("y", tmp_path / "b")])
    assert one == files.sha256_files([("y", tmp_path / "b"), ("x", tmp_path / "a")])
    assert one != files.sha256_files([("x", tmp_path / "b"), ("y", tmp_path / "a")])
    assert files.sha256_file(tmp_path / "a") == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"


def test_written_tensors_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, {"a": torch.ones(2)}, {"k": "v"})
    assert path.stat().st_mode == usual.stat().st_mode
    assert files.read_header(path).metadata == {"k": "v"}


def test_only_the_last_part_of_a_local_path_is_told(tmp_path: Path) -> None:
    assert files.public_name(str(tmp_path)) == tmp_path.name
    assert files.public_name("/no/such/shards-{000..003}.tar") == "shards-{000..003}.tar"
    for name in ("builtin", "org/model", "", None):
        assert files.public_name(name) == name

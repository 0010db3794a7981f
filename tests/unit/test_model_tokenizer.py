"""The five tokenizer files, from every form that a base has, give transformers' own ids."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer

from hypersd_export.errors import ModelError
from hypersd_export.model.base import open_base
from hypersd_export.model.tokenizer import FILES, clip_tokenizer, read_tokenizer, write_tokenizer
from tests.lora_files import one_line, one_thread  # noqa: F401 - a fixture for the whole module
from tests.tiny import tiny_tokenizer

TEXTS = ("", "a cat and a dog", "  A   CAT!!\n", "\U0001f431 naïve 12345 don't", "<|endoftext|> x", "日本")


def ids(folder: Path, text: str) -> list[int]:
    """What the runtime reads: tokenizer.json by the tokenizers library."""
    return list(FastTokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)


@pytest.mark.parametrize("form", ["all", "fast only", "slow only", "merges as text"])
def test_the_same_ids_from_every_form(form: str, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    source = tmp_path / "source"
    tiny_tokenizer(source)
    expected = CLIPTokenizer.from_pretrained(source)
    if form == "slow only":
        (source / "tokenizer.json").unlink()
        (source / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|startoftext|>"}}))
    elif form != "all":
        (source / "vocab.json").unlink()
        (source / "merges.txt").unlink()
    if form == "merges as text":
        content = json.loads((source / "tokenizer.json").read_text())
        content["model"]["merges"] = [" ".join(m) for m in content["model"]["merges"]]
        (source / "tokenizer.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    write_tokenizer(read_tokenizer(source, 16), out)
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    again = CLIPTokenizer.from_pretrained(out)
    slow = CLIPTokenizer(str(out / "vocab.json"), str(out / "merges.txt"))
    assert again.model_max_length == 16
    assert again.pad_token == "<|endoftext|>"
    for text in TEXTS:
        wanted = expected(text).input_ids
        assert ids(out, text) == wanted
        assert again(text).input_ids == wanted
        assert slow(text).input_ids == wanted
    assert again("cat", padding="max_length").input_ids == expected("cat", padding="max_length").input_ids


def test_the_tokenizer_of_clip_vit_l14(tmp_path: Path) -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer.vocabulary) == 49408
    assert len(tokenizer.merges) == 48894
    assert (tokenizer.vocabulary["<|startoftext|>"], tokenizer.vocabulary["<|endoftext|>"]) == (49406, 49407)
    write_tokenizer(tokenizer, tmp_path)
    # the ids that OpenAI's own tokenizer gives (CLIP's README, and its test of "a photo of a cat")
    assert ids(tmp_path, "a diagram") == [49406, 320, 22697, 49407]
    assert ids(tmp_path, "a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 77


def test_written_by_the_base(tiny_base: Path, tmp_path: Path) -> None:
    open_base(tiny_base).write_tokenizer(tmp_path / "tokenizer")
    assert sorted(p.name for p in (tmp_path / "tokenizer").iterdir()) == sorted(FILES)
    written = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    own = json.loads((tiny_base / "tokenizer" / "tokenizer.json").read_text())
    assert written == own | {"truncation": None, "padding": None}


def test_damaged_tokenizers(tiny_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "pipeline"))
    fast = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(fast.read_text())

    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match) as caught:
            open_base(folder)
        one_line(caught.value)

    fast.write_text(json.dumps(content | {"model": {"type": "WordPiece"}}))
    refused("a WordPiece tokenizer, where CLIP's BPE is needed")
    extra = dict(content["added_tokens"][0], id=518, content="<new>")
    fast.write_text(json.dumps(content | {"added_tokens": [*content["added_tokens"], extra]}))
    refused("ids go up to 518 where the text encoder has 518 tokens")
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<none>"}))
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    refused("its pad token '<none>' is not in its vocabulary")
    fast.unlink()
    refused("no tokenizer")


def test_a_padding_token_that_prompts_may_contain_is_read_as_transformers_does(tmp_path: Path) -> None:
    """SD 2.x pads with "!", and its files have no tokenizer.json: "cat!" ends in the padding id, not in "!</w>"."""
    from transformers import CLIPTokenizer

    source, out = tmp_path / "source", tmp_path / "out"
    tiny_tokenizer(source)
    (source / "tokenizer.json").unlink()
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "!"}))
    expected = CLIPTokenizer.from_pretrained(source)
    write_tokenizer(read_tokenizer(source, 16), out)
    for text in (*TEXTS, "cat!", "a cat ! and a dog!!"):
        assert ids(out, text) == expected(text).input_ids
    assert expected("cat!").input_ids[-2] == expected.pad_token_id

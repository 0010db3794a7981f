"""Tokenisation: equal to transformers' CLIPTokenizer on odd prompts, cut with one warning, padded as configured."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from hypersd_export.errors import BundleError, MissingBackend, OptionError
from hypersd_export.model.tokenizer import Tokenizer as Files
from hypersd_export.model.tokenizer import clip_tokenizer, write_tokenizer
from hypersd_export.runtime.tokenizer import PromptTruncated, load_tokenizer
from tests.bundles import TOKENS, ids_of, vocabulary

ODD_PROMPTS = [
    "",
    " ",
    "\n\t",
    "a photo of a cat",
    "A Photo  OF a CAT",
    "it's we've I'm don't",
    "日本語のプロンプト",
    "кошка в шляпе",
    "🐱",
    "👨‍👩‍👧‍👦 family 🏳️‍🌈",
    "e\u0301te\u0301 été",
    "x\u0000y",
    "مرحبا بالعالم",
    "1234 5.6e-7",
    "a" * 60,
    "<|endoftext|>",
    "a <|startoftext|> b",
    "emoji☺️in the_middle-of,words!!",
    "\u200bzero\u200bwidth",
    "ﬁ ligature Ⅳ ½ ²",
    "{(cat:1.3)}, [dog]",
    "ß ẞ İ ı",
    "\ufffd\uffff",
    "क्षि",
    "cat " * 100,
    "🐱" * 50,
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(clip_tokenizer(77), folder)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    files = Files(vocabulary=vocabulary(), merges=("c a", "ca t</w>", "d o", "do g</w>"), max_length=TOKENS)
    write_tokenizer(files, tmp_path)
    return tmp_path


def test_known_ids_of_clip(clip: Path) -> None:
    ids = load_tokenizer(clip).encode("a photo of a cat")
    assert ids.dtype == np.int64
    assert ids.shape == (1, 77)
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]


def test_equals_transformers_on_odd_prompts(clip: Path) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(clip)
    ours = load_tokenizer(clip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncated)
        for prompt in ODD_PROMPTS:
            expected = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
            assert ours.encode(prompt)[0].tolist() == expected, repr(prompt)


def test_by_hand(small: Path) -> None:
    np.testing.assert_array_equal(load_tokenizer(small).encode("Cat hat dog"), ids_of("cat hat dog"))


def test_what_fits_exactly_does_not_warn(small: Path) -> None:
    tokenizer = load_tokenizer(small, length=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = tokenizer.encode("cat dog " * 3)
    np.testing.assert_array_equal(full, ids_of("cat dog " * 3)[:, :8])


@pytest.mark.parametrize(
    ("prompt", "tail"),
    [
        ("cat dog cat dog cat dog Big  cat", "'Big  cat'"),
        ("cat dog cat dog cat hello", "'ello'"),  # cut inside a word: the text as it was typed, from there on
        ("cat 🐱 dog cat é ü", "'cat é ü'"),
    ],
)
def test_too_long_is_cut_with_one_warning_that_names_the_rest(small: Path, prompt: str, tail: str) -> None:
    tokenizer = load_tokenizer(small, length=8)
    with pytest.warns(PromptTruncated) as caught:
        ids = tokenizer.encode(prompt)
    assert len(caught) == 1
    assert str(caught[0].message).endswith(f"the text encoder reads 8: dropped {tail}")
    assert ids.shape == (1, 8)
    assert ids[0, -1] == vocabulary()["<|endoftext|>"]


def test_a_very_long_tail_is_shortened(small: Path) -> None:
    with pytest.warns(PromptTruncated) as caught:
        load_tokenizer(small).encode("cat " * 1000)
    assert len(str(caught[0].message)) < 500


def test_lone_surrogates_are_refused(small: Path) -> None:
    with pytest.raises(OptionError, match="not valid UTF-8"):
        load_tokenizer(small).encode("caf\udce9")


def edit(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def test_padding_is_what_the_config_says(small: Path) -> None:
    edit(small / "tokenizer_config.json", pad_token={"content": "!", "lstrip": False})
    ids = load_tokenizer(small).encode("cat")
    assert ids[0].tolist() == ids_of("cat")[0, :3].tolist() + [vocabulary()["!"]] * (TOKENS - 3)
    data = json.loads((small / "tokenizer_config.json").read_text())
    del data["pad_token"]
    (small / "tokenizer_config.json").write_text(json.dumps(data))
    np.testing.assert_array_equal(load_tokenizer(small).encode("cat"), ids_of("cat"))  # special_tokens_map.json


def test_truncation_and_padding_in_tokenizer_json_are_switched_off(small: Path) -> None:
    edit(
        small / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "!",
        },
    )  # fmt: skip
    np.testing.assert_array_equal(load_tokenizer(small).encode("cat dog cat dog"), ids_of("cat dog cat dog"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", r"cannot read .*tokenizer\.json"),
        ("tokenizer_config.json", "{", r"cannot read .*tokenizer_config\.json"),
        ("tokenizer_config.json", '{"pad_token": "<|endoftext|>"}', "how long a prompt is"),
        ("tokenizer_config.json", '{"model_max_length": 1e30}', "how long a prompt is"),
        ("tokenizer_config.json", '{"model_max_length": 16, "pad_token": "<pad>"}', "no pad_token .*'<pad>'"),
        ("tokenizer_config.json", '{"model_max_length": 16, "pad_token": null}', "no pad_token"),
    ],
)
def test_unusable_folders(small: Path, name: str, text: str, message: str) -> None:
    (small / name).write_text(text)
    with pytest.raises(BundleError, match=message):
        load_tokenizer(small)


def test_missing_files(tmp_path: Path, small: Path) -> None:
    with pytest.raises(BundleError, match="cannot read"):
        load_tokenizer(tmp_path / "nowhere")
    (small / "tokenizer_config.json").unlink()
    assert load_tokenizer(small, length=9).encode("cat").shape == (1, 9)


def test_missing_package(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingBackend, match=r"pip install 'hypersd\[cpu\]'"):
        load_tokenizer(small)

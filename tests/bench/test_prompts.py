"""Prompt files in every form that the field has, and what is wrong with a bad one."""

import json

import pytest

from benchmarks.bench.prompts import Prompt, builtin_prompts, chosen, read_prompts
from hypersd_export.errors import OptionError

PARTI = 'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\na "red" cat\tAnimals\tSimple\tn\n'


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.txt", "\ufeffa cat\n\n  a dog \n", [("a cat", ""), ("a dog", "")]),
        ("a.tsv", PARTI, [("bond", "Abstract"), ('a "red" cat', "Animals")]),
        ("a.csv", 'caption,tag\n"a, b",x\n', [("a, b", "x")]),
        ("a.json", '["a cat", {"prompt": "b", "category": "c"}]', [("a cat", ""), ("b", "c")]),
        ("a.jsonl", '{"Prompt": "é", "tag": "t"}\n\n"plain"\n', [("é", "t"), ("plain", "")]),
    ],
)
def test_forms(tmp_path, name, text, wanted):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == [Prompt(text=t, category=c) for t, c in wanted]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "a.txt: has no prompt"),
        ("a.tsv", "Prompt\tCategory\n", "a.tsv: has no prompt"),
        ("a.tsv", "Text2\tCategory\nx\ty\n", "a.tsv: line 2 has no prompt, caption or text"),
        ("a.json", "{", "a.json: is not JSON"),
        ("a.json", '{"prompt": "x"}', "must hold a list of texts or of objects"),
        ("a.json", '["x", {"prompt": 3}]', "a.json: entry 2 has no prompt"),
        ("a.jsonl", '"x"\n{', "a.jsonl: line 2 is not JSON"),
        ("a.yaml", "x", "must end in .txt, .tsv, .csv, .json, .jsonl"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=message) as raised:
        read_prompts(tmp_path / name)
    assert "\n" not in str(raised.value)
    with pytest.raises(OptionError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_fewer_prompts_are_the_beginning_of_more_and_of_all_categories(tmp_path):
    """A smaller run's pictures are then part of a larger one's cache; and files are often sorted."""
    rows = [{"prompt": f"p{i}", "category": "first" if i < 50 else "second"} for i in range(100)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    some, more = (read_prompts(tmp_path / "a.json", count) for count in (20, 40))
    assert more[:20] == some
    assert 5 < sum(prompt.category == "first" for prompt in some) < 15
    assert len({prompt.text for prompt in read_prompts(tmp_path / "a.json", 100)}) == 100
    for count in (1, 101):
        with pytest.raises(OptionError, match=f"--count {count}: from 2 to 100"):
            chosen(some * 5, count)


def test_the_built_in_prompts_are_held_out_and_their_category_is_the_style():
    found = builtin_prompts(30)
    assert {prompt.category for prompt in found} <= {"noto style", "twemoji style", "fluent style"}
    assert all(prompt.text.endswith(prompt.category) for prompt in found)
    with pytest.raises(OptionError, match="--count 1: at least 2"):
        builtin_prompts(1)

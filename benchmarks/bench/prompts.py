"""Prompt files, as the field has them: txt, tsv or csv (PartiPrompts' columns), json, jsonl; and the built-in ones."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_export.errors import OptionError

TEXT_KEYS = ("prompt", "caption", "text")
CATEGORY_KEYS = ("category", "tag", "style")
ORDER_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt and, where its file says one, its category."""

    text: str
    category: str = ""


def read_prompts(path: Path, count: int | None = None) -> list[Prompt]:
    """The prompts of a file; `count` of them in a fixed random order, of which a smaller count is the beginning.

    txt: one a line. tsv, csv: a head with Prompt (or caption, text), and Category where there is one. json: a list of
    texts or of objects with the same keys; jsonl: one of either a line. Raises `OptionError` in one line.
    """
    readers = {".txt": _lines, ".tsv": _columns, ".csv": _columns, ".json": _json, ".jsonl": _json_lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise OptionError(f"--prompts {path}: must end in {', '.join(readers)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise OptionError(f"--prompts {path}: cannot be read ({str(error)[:80]})") from None
    found = [prompt for prompt in reader(text, path) if prompt.text.strip()]
    if not found:
        raise OptionError(f"--prompts {path}: has no prompt")
    return chosen(found, count)


def chosen(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """All, or the first `count` of a fixed random order: files are often sorted by category."""
    if count is None:
        return list(prompts)
    if not 2 <= count <= len(prompts):
        raise OptionError(f"--count {count}: from 2 to {len(prompts)}, the prompts that there are")
    order = np.random.default_rng(ORDER_SEED).permutation(len(prompts))
    return [prompts[i] for i in order[:count]]


def builtin_prompts(count: int) -> list[Prompt]:
    """Held-out combinations of the built-in model, fully named; the category is the drawing style."""
    from benchmarks.distilled import held_out_prompts

    if count < 2:
        raise OptionError(f"--count {count}: at least 2")
    return [Prompt(text=text, category=text.rpartition(", ")[2]) for text in held_out_prompts(count)]


def _lines(text: str, path: Path) -> Iterator[Prompt]:
    del path
    return (Prompt(text=line.strip()) for line in text.splitlines())


def _columns(text: str, path: Path) -> Iterator[Prompt]:
    rows = csv.DictReader(text.splitlines(), delimiter="," if path.suffix.lower() == ".csv" else "\t")
    for number, row in enumerate(rows, start=2):
        yield _object({key: value for key, value in row.items() if isinstance(key, str)}, f"{path}: line {number}")


def _json(text: str, path: Path) -> Iterator[Prompt]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise OptionError(f"--prompts {path}: is not JSON ({str(error)[:80]})") from None
    if not isinstance(data, list):
        raise OptionError(f"--prompts {path}: must hold a list of texts or of objects")
    for number, item in enumerate(data, start=1):
        yield _object(item, f"{path}: entry {number}")


def _json_lines(text: str, path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise OptionError(f"--prompts {path}: line {number} is not JSON ({str(error)[:80]})") from None
        yield _object(item, f"{path}: line {number}")


def _object(item: Any, where: str) -> Prompt:
    if isinstance(item, str):
        return Prompt(text=item.strip())
    values = {str(key).lower(): value for key, value in item.items()} if isinstance(item, Mapping) else {}
    text = next((values[key] for key in TEXT_KEYS if isinstance(values.get(key), str)), None)
    if text is None:
        raise OptionError(f"--prompts {where} has no {', '.join(TEXT_KEYS[:-1])} or {TEXT_KEYS[-1]}")
    category = next((values[key] for key in CATEGORY_KEYS if isinstance(values.get(key), str)), "")
    return Prompt(text=text.strip(), category=category.strip())

"""The CLIP tokenizer in every form that loaders ask for, from whichever form the base has.

transformers 5 saves `tokenizer.json` alone; transformers 4, Optimum and Apple's Swift runtime read `vocab.json` and
`merges.txt`. All are written, with the ids of the base. No vendor import: a tokenizer.json for CLIP is fixed but for
vocabulary and merges (transformers' `CLIPTokenizer`: NFC, white space to one space, lower case, the split pattern of
OpenAI's `simple_tokenizer.py`, byte-level BPE with `</w>`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_export.errors import ModelError
from hypersd_export.model.files import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_SIZE = 49408
CLIP_MERGES = Path(__file__).parent / "clip_merges.txt"  # see clip_merges.md
SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """A CLIP tokenizer: its vocabulary, its merges in order, its special tokens and its length with both ends."""

    vocabulary: dict[str, int]
    merges: tuple[str, ...]
    max_length: int
    start: str = START
    end: str = END
    pad: str = END
    unknown: str = END
    fast: dict[str, Any] | None = None  # the base's own tokenizer.json, kept as it is


def read_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """The tokenizer in a pipeline's `tokenizer/` folder; `max_length` is the text encoder's number of positions."""
    fast_file, vocab_file, merges_file = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    fast = read_json(fast_file) if fast_file.is_file() else None
    if vocab_file.is_file() and merges_file.is_file():
        vocabulary, merges = read_json(vocab_file), _read_merges(merges_file)
    elif fast is not None:
        vocabulary, merges = _from_fast(fast, fast_file)
    else:
        raise ModelError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json with merges.txt); download it again")
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings.update(read_json(folder / name))
    stated = settings.get("model_max_length")
    length = int(stated) if isinstance(stated, int) and 2 < stated <= max_length else max_length
    specials = {
        field: _token(settings.get(key), default)
        for field, key, default in (
            ("start", "bos_token", START), ("end", "eos_token", END),
            ("pad", "pad_token", END), ("unknown", "unk_token", END),
        )
    }  # fmt: skip
    for field, token in specials.items():
        if token not in vocabulary:
            raise ModelError(f"{folder}: its {field} token {token!r} is not in its vocabulary; download it again")
    return Tokenizer(vocabulary=vocabulary, merges=merges, max_length=length, fast=fast, **specials)


def clip_tokenizer(max_length: int = 77, *, pad: str = END) -> Tokenizer:
    """The tokenizer of CLIP ViT-L/14, which Stable Diffusion 1.x uses and a single-file checkpoint does not carry.

    OpenCLIP's is the same with `pad` "!" (Stable Diffusion 2.x, and SDXL's second one).
    """
    merges = _read_merges(CLIP_MERGES)
    alphabet = _alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in merges), START, END]
    return Tokenizer(vocabulary={t: i for i, t in enumerate(tokens)}, merges=merges, max_length=max_length, pad=pad)


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write all five files into `out` (made if missing): the same ids whichever of them a loader reads."""
    out.mkdir(parents=True, exist_ok=True)
    _dump(out / "vocab.json", tokenizer.vocabulary)
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(tokenizer.merges) + "\n", encoding="utf-8")
    fast = {**(tokenizer.fast or fast_tokenizer(tokenizer)), "truncation": None, "padding": None}
    _dump(out / "tokenizer.json", fast)
    specials = {
        "bos_token": tokenizer.start, "eos_token": tokenizer.end,
        "pad_token": tokenizer.pad, "unk_token": tokenizer.unknown,
    }  # fmt: skip
    _dump(out / "special_tokens_map.json", specials)
    config = {
        "add_prefix_space": False, "clean_up_tokenization_spaces": True, "do_lower_case": True, "errors": "replace",
        "model_max_length": tokenizer.max_length, "tokenizer_class": "CLIPTokenizer", **specials,
    }  # fmt: skip
    _dump(out / "tokenizer_config.json", config)


def empty_prompt(tokenizer: Tokenizer, length: int) -> list[int]:
    """The ids of "": the two ends, and padding up to `length`."""
    start, end, pad = (tokenizer.vocabulary[name] for name in (tokenizer.start, tokenizer.end, tokenizer.pad))
    return [start, end, *[pad] * (length - 2)]


def fast_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json (the `tokenizers` library's format 1.0) for a CLIP vocabulary."""
    start, end = tokenizer.vocabulary[tokenizer.start], tokenizer.vocabulary[tokenizer.end]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    # the padding token is special too: SD 2.x pads with "!", and transformers then reads every "!" of a prompt as one
    names = sorted({tokenizer.start, tokenizer.end, tokenizer.pad}, key=tokenizer.vocabulary.__getitem__)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": tokenizer.vocabulary[name], "content": name, **special} for name in names],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}, {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ]},
        "post_processor": {
            "type": "RobertaProcessing", "sep": [tokenizer.end, end], "cls": [tokenizer.start, start],
            "trim_offsets": False, "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": tokenizer.unknown, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": tokenizer.vocabulary, "merges": [m.split(" ") for m in tokenizer.merges],
        },
    }  # fmt: skip


def _from_fast(fast: dict[str, Any], path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Vocabulary (added tokens included) and merges of a tokenizer.json; older files hold merges as "a b"."""
    model = fast.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ModelError(f"{path}: a {model.get('type')} tokenizer, where CLIP's BPE is needed; pass another base")
    vocabulary = {**model["vocab"], **{t["content"]: t["id"] for t in fast.get("added_tokens") or []}}
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or [])
    return dict(sorted(vocabulary.items(), key=lambda item: item[1])), merges


def _read_merges(path: Path) -> tuple[str, ...]:
    lines: Sequence[str] = path.read_text(encoding="utf-8").split("\n")
    start = 1 if lines and lines[0].startswith("#version") else 0
    return tuple(line for line in lines[start:] if line.strip())


def _token(value: Any, default: str) -> str:
    """A special token, which configs give as text or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else default


def _alphabet() -> list[str]:
    """The printable stand-ins for the 256 bytes, in CLIP's order (`bytes_to_unicode` of GPT-2)."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in keep}
    rest = [b for b in range(256) if b not in table]
    return [*table.values(), *(chr(256 + n) for n in range(len(rest)))]


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

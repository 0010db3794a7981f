"""The tokenizer of the built-in model: a byte-level CLIP BPE trained on the captions."""

import itertools
import json
from pathlib import Path

from trainer.pretrain.concepts import BACKGROUNDS, CONCEPTS, STYLES, caption

MAX_LENGTH = 32
MERGES = 640
SPECIALS = ("<|startoftext|>", "<|endoftext|>")


def all_captions() -> list[str]:
    """Every caption there is, ordered [concept, style or unsaid, background or unsaid]."""
    return [caption(*parts) for parts in itertools.product(CONCEPTS, [*STYLES, None], [*BACKGROUNDS, None])]


def train_tokenizer(folder: Path) -> None:
    """Train the BPE on all captions and write a CLIPTokenizer into `folder`.

    Every byte is a token (CLIP's byte-level alphabet), so no prompt is out of vocabulary.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) * 2 + MERGES, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(all_captions(), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*dict.fromkeys(pieces), *SPECIALS])}
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges_file.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    clip = CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=MAX_LENGTH, pad_token=SPECIALS[1])
    clip.save_pretrained(folder)

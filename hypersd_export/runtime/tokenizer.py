"""CLIP tokenisation from a bundle's tokenizer/ folder, without transformers.

tokenizer.json holds the whole of it (normalisation, byte-level BPE, begin and end tokens); here the ids are cut and
padded to the text encoder's length as `CLIPTokenizer(padding="max_length", truncation=True)` does.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hypersd_export.errors import BundleError, MissingBackend, OptionError
from hypersd_export.runtime.graph import Notice

_TAIL = 300
"""Characters of a dropped tail that the warning shows."""


class PromptTruncated(Notice):
    """A prompt was longer than the text encoder reads; the message names what was dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """Text to a row of ids of fixed length: begin, tokens, end, padding."""

    backend: Any
    """A `tokenizers.Tokenizer`, its own cutting and padding switched off."""
    length: int
    pad_id: int

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """The ids of one prompt, int64 [1, length].

        A prompt that is too long is cut, its end token kept, with one `PromptTruncated` warning that names the rest.

        Raises:
            OptionError: the text is not valid Unicode (a lone surrogate, as from bytes that are not UTF-8).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise OptionError(f"prompt {text[:40]!a} is not valid UTF-8: check the terminal's encoding") from None
        encoding = self.backend.encode(text)
        ids = list(encoding.ids)
        if len(ids) > self.length:
            # offsets are character positions in the text as given; ids[length - 1] is the first token that has no place
            tail = text[encoding.offsets[self.length - 1][0] :].strip()
            tail = tail if len(tail) <= _TAIL else tail[:_TAIL] + "…"
            warnings.warn(
                f"the prompt is {len(ids)} tokens long and the text encoder reads {self.length}: dropped {tail!r}",
                PromptTruncated,
                stacklevel=2,
            )
            ids = [*ids[: self.length - 1], ids[-1]]
        ids += [self.pad_id] * (self.length - len(ids))
        return np.array([ids], dtype=np.int64)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path} ({str(error)[:80]}): export the bundle again") from error
    return data if isinstance(data, dict) else {}


def _token_text(value: Any) -> str | None:
    """A special token, which is written as a string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def load_tokenizer(folder: Path, *, length: int | None = None) -> Tokenizer:
    """The tokenizer of a bundle.

    Args:
        folder: has tokenizer.json and tokenizer_config.json (or special_tokens_map.json).
        length: the text encoder's number of positions; tokenizer_config.json's model_max_length if None.

    Raises:
        MissingBackend: the `tokenizers` package is not installed.
        BundleError: a file is missing or unusable, or nothing says how long a prompt is or what pads it.
    """
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise MissingBackend("tokenizers", "cpu", "the runtime") from error
    path = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise BundleError(f"cannot read {path} ({str(error)[:80]}): export the bundle again") from error
    backend.no_padding()
    backend.no_truncation()
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    if length is None:
        length = config.get("model_max_length")
    if not isinstance(length, int) or not 2 < length < 1_000_000:
        raise BundleError(f"{folder} does not say how long a prompt is (model_max_length): export the bundle again")
    pad = _token_text(config.get("pad_token"))
    pad_id = None if pad is None else backend.token_to_id(pad)
    if pad_id is None:
        raise BundleError(f"{folder} has no pad_token in its vocabulary ({pad!r}): export the bundle again")
    return Tokenizer(backend=backend, length=length, pad_id=pad_id)

"""The text side of a bundle: prompts to ids, ids to what the UNet sees of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hypersd_export.bundle.texts import SECOND, ZERO_EMPTY, Encoder
from hypersd_export.errors import BundleError
from hypersd_export.runtime.folder import Folder
from hypersd_export.runtime.graph import Runtime
from hypersd_export.runtime.groups import groups
from hypersd_export.runtime.text import TIME_IDS, Float, Guide, Ids, Text, apart, text_of, zeros
from hypersd_export.runtime.tokenizer import Tokenizer, load_tokenizer


@dataclass(kw_only=True)
class TextEncoders:
    """The text encoders of a bundle with their tokenizers, loaded when they are first needed.

    tokens: the length of a row of ids, where that does not follow from an encoder's graph.
    """

    folder: Folder
    runtime: Runtime
    tokens: int | None = None
    _tokenizers: dict[str, Tokenizer] = field(default_factory=dict)

    @cached_property
    def all(self) -> tuple[Encoder, ...]:
        """The encoders: one, or SDXL's two."""
        return self.folder.encoders()

    @property
    def told_size(self) -> bool:
        """Whether the UNet is told of the picture's size, as SDXL's is."""
        return len(self.all) > 1

    def tokenizer(self, encoder: Encoder) -> Tokenizer:
        """An encoder's tokenizer, at the length that it reads."""
        if encoder.tokenizer not in self._tokenizers:
            length = self.tokens
            if length is None:
                length = self.runtime.graph(encoder.component).inputs["input_ids"].shape[1]
            if length is None:
                length = self.folder.config(encoder.component).get("max_position_embeddings")
            self._tokenizers[encoder.tokenizer] = load_tokenizer(self.folder.path / encoder.tokenizer, length=length)
        return self._tokenizers[encoder.tokenizer]

    def ids(self, text: str) -> Ids:
        """The token ids of a text, int64 [1, S], for each encoder."""
        return tuple(self.tokenizer(encoder).encode(text) for encoder in self.all)

    def guide(self, ids: Sequence[Ids], weight: float | None, time_ids: Float | None) -> Guide:
        """What guides the UNet: ids of the prompt, before it those of the negative prompt where there is a weight."""
        texts = self.encode(ids)
        if weight is not None and self._is_nothing(ids[0]):
            texts[0] = zeros(texts[0])
        if time_ids is not None:
            texts = [{**text, TIME_IDS: time_ids} for text in texts]
        if weight is None:
            return Guide(cond=texts[0], uncond=None, weight=1.0)
        return Guide(cond=texts[1], uncond=texts[0], weight=weight)

    def _is_nothing(self, ids: Ids) -> bool:
        """Whether these are an empty prompt's, and the model has zeros for that (diffusers: no negative prompt)."""
        if not self.told_size or not self.folder.config(SECOND).get(ZERO_EMPTY):
            return False
        return all(np.array_equal(mine, theirs) for mine, theirs in zip(ids, self.ids(""), strict=True))

    def encode(self, ids: Sequence[Ids]) -> list[Text]:
        """Each text as the UNet sees it, without the picture's size."""
        outputs = []
        for encoder, rows in zip(self.all, zip(*ids, strict=True), strict=True):
            graph = self.runtime.graph(encoder.component)
            size = graph.inputs["input_ids"].shape[0] or len(rows)
            parts = [graph.run(input_ids=part) for part in groups(np.concatenate(rows), size)]
            missing = [name for name in encoder.outputs if name not in parts[0]]
            if missing:
                raise BundleError(f"{graph.path} has no output {missing[0]}: export the bundle again")
            outputs.append({name: np.concatenate([part[name] for part in parts]) for name in encoder.outputs})
        return apart(text_of(self.all, outputs))[: len(ids)]

"""Decodes token ids one at a time."""

from __future__ import annotations

import codecs

from .tokenizer import Tokenizer


class Detokenizer:
    """Decodes a growing sequence of ids. `add` returns the new text, in whole characters.

    The pieces joined, `finish` included, equal `tokenizer.decode(ids)` for every sequence of ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """Text that this id completes, often "". Raises RequestError for an id outside the vocabulary."""
        return self._utf8.decode(self._tokenizer.shown_bytes(token_id, self._skip_special))

    def finish(self) -> str:
        """The bytes that are still held back, as U+FFFD. Afterwards a new sequence may begin."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

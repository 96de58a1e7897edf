"""Compiles grammars for the vocabulary of a model, with llguidance. Compiled ones are kept for later requests."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Protocol

from ..errors import RequestError
from .grammar import Grammar
from .matcher import Matcher

# Compact, with a space, or pretty-printed. llguidance's own rule has no bound, and small models then write blanks only.
_WHITESPACE = r" |\n {0,32}|\n\t{0,16}"
_KEPT = 64  # compiled grammars


class Vocabulary(Protocol):
    """The properties of a tokenizer that a grammar needs."""

    vocab_size: int
    special_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes: ...
    def encode(self, text: str, *, allow_special: bool = True) -> list[int]: ...


class Grammars:
    """Compiles grammars for a tokenizer and a number of logits. Any thread may call it."""

    def __init__(self, tokenizer: Vocabulary | None, width: int) -> None:
        self._tokenizer, self._width = tokenizer, width
        self._lock = threading.Lock()
        self._library: Any = None  # llguidance's view of the vocabulary
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def prepare(self) -> None:
        """Makes what all grammars share, which takes seconds for a large vocabulary. Otherwise the first grammar does.

        Raises RequestError if llguidance is missing, or if the model has no tokenizer."""
        if self._tokenizer is None:
            raise RequestError("a grammar needs a tokenizer, and this model has none")
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                "a grammar needs the package llguidance: pip install llguidance, or qwenkern[serve], which has it"
            ) from error
        with self._lock:
            if self._library is None:
                wrapper: Any = _Wrapper(self._tokenizer, self._width)  # it reads the attributes alone
                self._library = llguidance.LLTokenizer(wrapper)

    def matcher(self, grammar: Grammar, end_ids: Iterable[int]) -> Matcher:
        """A matcher for a new text. ``end_ids`` end the text where the grammar may end.

        Raises RequestError, with llguidance's reason, for a grammar that it does not support."""
        self.prepare()
        with self._lock:
            compiled = self._compiled.pop(grammar, None) or self._compile(grammar)
            self._compiled[grammar] = compiled
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return Matcher(compiled.deep_copy(), lambda: self._compile(grammar), self._width, end_ids)

    def _compile(self, grammar: Grammar) -> Any:
        import llguidance

        try:
            source = _source(grammar)
        except ValueError as error:
            raise RequestError(f"{grammar.kind} is not supported: {error}") from error
        limits = llguidance.LLParserLimits(verbose_errors=False)
        compiled = llguidance.LLMatcher(self._library, source, log_level=0, limits=limits)
        if compiled.is_error():
            raise RequestError(f"{grammar.kind} is not supported: {compiled.get_error()}")
        return compiled


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    from llguidance import LLMatcher

    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.source, defaults={"whitespace_pattern": _WHITESPACE})
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    if grammar.kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, json.loads(grammar.source))))
    return LLMatcher.grammar_from_lark(grammar.source)


class _Wrapper:
    """A tokenizer as llguidance reads it. After the model's ids comes one that stands for the end of the text, because
    the ids that end a text differ from request to request."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Vocabulary, width: int) -> None:
        known = min(tokenizer.vocab_size, width)  # ids beyond are never drawn, or have no token
        self.tokens = [*map(tokenizer.token_bytes, range(known)), *[b""] * (width - known), b"<end>"]
        self.eos_token_id = width
        self.special_token_ids = sorted(token for token in {*tokenizer.special_ids, width} if token <= width)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, allow_special=False)

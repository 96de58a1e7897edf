"""Compiles grammars for the vocabulary of a model, with llguidance. Caches compiled grammars for later requests, and
the reasons for which others were refused."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from ..errors import EngineError, RequestError
from . import grammar_trial
from .grammar import Grammar
from .matcher import Matcher, Overrun

# Whitespace within JSON: compact, with a space, or pretty-printed. llguidance's default has no bound, and with it small
# models write nothing but whitespace.
WHITESPACE = r" |\n {0,32}|\n\t{0,16}"
MAX_COMPILED_BYTES = 2**28  # of all cached grammars together
MAX_REFUSED = 64  # refused grammars whose reason is cached
MAX_REASON = 500  # characters: llguidance may quote much of the grammar
_GROWTH = 2**22  # bytes by which the lexer of a grammar may grow after the trial
MAX_TRIALS = 2  # processes at once
_PATIENCE = 20.0  # seconds of wall time for a trial: a busy machine gives it little processor time
_TOOK = f"it takes more than {grammar_trial.SECONDS} s or {grammar_trial.BYTES >> 20} MiB to compile and to follow"


class Vocabulary(Protocol):
    """The properties of a tokenizer that a grammar needs."""

    vocab_size: int
    special_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes: ...
    def encode(self, text: str, *, allow_special: bool = True) -> list[int]: ...


class Grammars:
    """Compiles grammars for a tokenizer. width: the number of logits. Any thread may call it."""

    def __init__(self, tokenizer: Vocabulary | None, width: int) -> None:
        self._tokenizer, self._width = tokenizer, width
        self._lock = threading.Lock()
        self._trials = threading.BoundedSemaphore(MAX_TRIALS)
        self._library: Any = None  # llguidance.LLTokenizer, which has the vocabulary
        self._compiled: OrderedDict[Grammar, tuple[Any, int]] = OrderedDict()  # (matcher, bytes); last used at the end
        self._refused: OrderedDict[Grammar, str] = OrderedDict()  # the reasons; last requested at the end

    def prepare(self) -> None:
        """Gives llguidance the vocabulary, which all grammars share. This takes seconds for a large vocabulary. Without
        this call, the first grammar does it.

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
                wrapper: Any = _Wrapper(self._tokenizer, self._width)  # llguidance reads its attributes only
                self._library = llguidance.LLTokenizer(wrapper)

    def matcher(self, grammar: Grammar, end_ids: Iterable[int], overrun: Overrun | None = None) -> Matcher:
        """A matcher for a new text. ``end_ids`` end the text where the grammar may end. overrun: shared by the texts of
        one call.

        Raises RequestError for a grammar that llguidance does not support, with its reason, or that takes more time or
        memory than the bounds in grammar_trial.py. Raises EngineError if the machine is too busy to compile it."""
        return Matcher(
            self.compiled(grammar).deep_copy(),
            lambda: self._again(grammar),
            self._width,
            end_ids,
            overrun,
            lambda reason: self._refuse(grammar, reason),
        )

    def knows(self, grammar: Grammar) -> bool:
        """Whether ``compiled`` has the grammar, or its refusal, in the cache."""
        with self._lock:
            return grammar in self._compiled or grammar in self._refused

    def compiled(self, grammar: Grammar) -> Any:
        """llguidance's matcher at the beginning of a text. A new grammar takes 0.1 s to a few seconds, and is cached.

        Raises RequestError and EngineError as ``matcher``."""
        self.prepare()
        return self._known(grammar) or self._tried(grammar)

    def _known(self, grammar: Grammar) -> Any:
        """The cached matcher, or None for a new grammar. Raises RequestError for one that was refused before."""
        with self._lock:
            if reason := self._refused.get(grammar):
                self._refused.move_to_end(grammar)
                raise RequestError(reason)
            if known := self._compiled.get(grammar):
                self._compiled.move_to_end(grammar)
                return known[0]
            return None

    def _tried(self, grammar: Grammar) -> Any:
        """Compiles a new grammar: in a process of its own first, then here. Caches it, or the reason to refuse it."""
        try:
            source = _source(grammar)
        except ValueError as error:
            raise RequestError(f"{grammar.kind} is not supported: {error}") from error
        with self._trials:
            if known := self._known(grammar):  # another request has compiled it meanwhile
                return known
            reason, size = _try(source)
            if reason:
                raise RequestError(self._refuse(grammar, reason))
            compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled, size + _GROWTH
            while sum(size for _, size in self._compiled.values()) > MAX_COMPILED_BYTES:
                self._compiled.popitem(last=False)
        return compiled

    def _refuse(self, grammar: Grammar, reason: str) -> str:
        """Caches a reason to refuse a grammar. Returns the message of the error."""
        message = f"{grammar.kind} is not supported: {reason}"
        with self._lock:
            self._compiled.pop(grammar, None)
            self._refused[grammar] = message
            while len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)
        return message

    def _again(self, grammar: Grammar) -> Any:
        """Compiles a cached grammar again, because the state that its texts share has failed."""
        with self._lock:
            self._compiled.pop(grammar, None)
        return self._compile(grammar)

    def _compile(self, grammar: Grammar) -> Any:
        import llguidance

        compiled = llguidance.LLMatcher(
            self._library, _source(grammar), log_level=0, limits=grammar_trial.limits(llguidance)
        )
        if compiled.is_error():
            raise RequestError(f"{grammar.kind} is not supported: {_plain(compiled.get_error())}")
        return compiled


def _try(source: str) -> tuple[str, int]:
    """Compiles a grammar in a process of its own. Returns the reason to refuse it, or "", and the bytes that it takes.

    Raises EngineError if the process fails for a reason that is not the grammar's: the machine lacks time or memory."""
    import llguidance

    if not sys.executable:  # a program that embeds Python can start no trial: only llguidance's own limits apply
        return "", 0
    # -I -S: without site-packages, which take longer to import than the trial takes
    command = [sys.executable, "-I", "-S", grammar_trial.__file__, str(Path(llguidance.__file__).parents[1])]
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise EngineError(f"a grammar was not compiled within {_PATIENCE:g} s, because the machine is busy") from None
    if done.returncode == -signal.SIGKILL:  # not one of the trial's own limits: these raise other signals or errors
        raise EngineError("the system has killed the process that compiles a grammar; it may lack memory")
    if done.returncode in (-signal.SIGXCPU, -signal.SIGABRT) or "MemoryError" in done.stderr:
        return _TOOK, 0
    if done.returncode:
        return f"llguidance fails on it (status {done.returncode})", 0
    reason, size = json.loads(done.stdout)
    return _plain(reason), size


def _plain(reason: str) -> str:
    """llguidance's reason in one line, cut at MAX_REASON."""
    return " ".join(reason.replace("<non-verbose/>", "").split())[:MAX_REASON]


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own format. Raises ValueError."""
    from llguidance import LLMatcher

    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.source, defaults={"whitespace_pattern": WHITESPACE})
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    if grammar.kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, json.loads(grammar.source))))
    return LLMatcher.grammar_from_lark(grammar.source)


class _Wrapper:
    """A tokenizer as llguidance reads it. It has one more id than the model, ``width``, which stands for the end of the
    text: the ids that end a text differ from request to request."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Vocabulary, width: int) -> None:
        known = min(tokenizer.vocab_size, width)  # higher ids have no logit or no token
        self.tokens = [*map(tokenizer.token_bytes, range(known)), *[b""] * (width - known), b"<end>"]
        self.eos_token_id = width
        self.special_token_ids = sorted(token for token in {*tokenizer.special_ids, width} if token <= width)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, allow_special=False)

"""Follows a text through its grammar: which tokens may come next, and where the text may end.

accept(token) ─► next mask, during the forward pass ─► apply(row) ─► draw ─► accept(token) ...
                             greedy decoding on a CPU: draw ─► allows(token) ─► accept(token) ...
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RequestError

EACH = 0.01  # seconds of processor time allowed for each token; most grammars take less than a tenth of it
SLOW = 1.0  # largest Overrun in seconds: all other requests of the engine wait for this work
R = TypeVar("R")


class Overrun:
    """The processor time that the texts of one call have taken beyond their allowance, shared by their matchers.

    Work of llguidance adds its seconds. Each token takes EACH seconds away, down to zero, as in a leaky bucket."""

    seconds = 0.0


class Mask(NamedTuple):
    """The tokens that may come next. It lists the allowed or the forbidden ones, whichever are fewer, in order."""

    ids: NDArray[np.int64]
    are_allowed: bool

    def allows(self, token: int) -> bool:
        at = int(np.searchsorted(self.ids, token))
        return (at < len(self.ids) and int(self.ids[at]) == token) is self.are_allowed

    def apply(self, row: Tensor) -> None:
        """Sets the logits [V] of forbidden tokens to -inf."""
        # numpy, because torch divides even this work among threads, and waits for them when the cores are busy
        target: Any = row.numpy() if row.is_cpu else row
        ids: Any = self.ids if row.is_cpu else torch.from_numpy(self.ids).to(row.device)
        if self.are_allowed:
            kept = target[ids]
            target[:] = -math.inf
            target[ids] = kept
        else:
            target[ids] = -math.inf


@lru_cache(maxsize=32)  # in JSON, for example, most positions have the same few masks
def _mask(bits: bytes, width: int, end_ids: frozenset[int]) -> Mask:
    """The mask from llguidance's bitmask, which has a bit for each token and one, at ``width``, for the end of the
    text."""
    words = np.frombuffer(bits, dtype="<u4").copy()
    may_end = words[width // 32] >> width % 32 & 1
    words[width // 32] &= (1 << width % 32) - 1
    for token in end_ids:
        words[token // 32] &= ~np.uint32(1 << token % 32)
        words[token // 32] |= may_end << token % 32
    others = ~words
    others[width // 32] &= (1 << width % 32) - 1
    allowed, forbidden = np.flatnonzero(words), np.flatnonzero(others)
    are_allowed = len(allowed) <= len(forbidden)
    at, of = (allowed, words) if are_allowed else (forbidden, others)
    bits_of = np.flatnonzero(np.unpackbits(of[at].view(np.uint8), bitorder="little"))
    return Mask(at[bits_of >> 5] * 32 + (bits_of & 31), are_allowed)


class Matcher:
    """The state of one text in its grammar.

    One thread at a time may use it. ``prepare`` computes the next mask ahead of time, which takes 20 µs to some
    milliseconds; otherwise ``mask`` computes it. The texts of one grammar share parts of llguidance's state. If that
    state fails, the matcher follows its text again with a new state, so that one text cannot end another."""

    def __init__(
        self,
        state: Any,
        fresh: Callable[[], Any],
        width: int,
        end_ids: Iterable[int],
        overrun: Overrun | None = None,
        refuse: Callable[[str], object] = lambda reason: None,
    ) -> None:
        self._state = state  # llguidance.LLMatcher
        self._fresh = fresh  # makes a state that shares nothing with other texts
        self._width = width
        self._end_ids = frozenset(end_ids)
        self._overrun = overrun or Overrun()
        self._refuse = refuse  # is told that the grammar takes too much time, so that nobody runs it again
        self._taken: list[int] = []
        self._mask: Mask | None = None  # for the next token
        self._error: RequestError | None = None
        self.has_ended = False  # the grammar allows no further token

    def prepare(self) -> None:
        """Computes the next mask. Raises nothing: ``mask`` raises the error."""
        if self._mask or self._error:
            return
        self._mask = self._computed()
        if not self._mask:
            self._restart()
            self._mask = None if self._error else self._computed()
        if not self._mask:
            self._fail(self._state.get_error())

    def mask(self) -> Mask:
        """The tokens that may come next. Raises RequestError if llguidance fails, for example at one of its limits."""
        self.prepare()
        if self._error:
            raise self._error
        assert self._mask
        return self._mask

    def allows(self, token: int) -> bool:
        """Whether the mask allows a token. Computes the mask only if the token may be forbidden. Raises RequestError
        as ``mask``."""
        if not self._mask and not self._error and token not in self._end_ids:
            # Of a forced text, the mask allows one tokenization only. validate_tokens would accept any.
            forced = self.forced()
            if forced[0] == token if forced else self.accepted([token]) == 1:
                return True
        return self.mask().allows(token)

    def accept(self, token: int) -> None:
        """Appends a token to the text. The mask must allow it, and it must not end the text."""
        self._mask = None
        self._taken.append(token)
        self._overrun.seconds = max(0.0, self._overrun.seconds - EACH)
        if not self._timed(self._state.consume_token, token):
            self._restart()
        self.has_ended = not self._error and self._state.is_stopped()

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer would write them. May be empty."""
        return [] if self._error else list(self._timed(self._state.compute_ff_tokens))

    def accepted(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft, from its first one on, the grammar accepts."""
        return 0 if self._error else int(self._timed(self._state.validate_tokens, list(draft)))

    def _computed(self) -> Mask | None:
        """The next mask, or None if llguidance fails."""
        bits: bytes = self._timed(self._state.compute_bitmask)
        if self._state.is_error():
            return None
        return _mask(bits, self._width, self._end_ids)

    def _timed(self, call: Callable[..., R], *arguments: Any) -> R:
        """Calls llguidance, and adds the processor time to the overrun. Notes a failure if the overrun exceeds SLOW."""
        begin = time.thread_time()
        result = call(*arguments)
        self._overrun.seconds += time.thread_time() - begin
        if self._overrun.seconds > SLOW:
            reason = f"it has taken {SLOW:g} s more than {1000 * EACH:g} ms for each token, which is the most"
            self._fail(reason)
            self._refuse(reason)
        return result

    def _restart(self) -> None:
        """Follows the text again from its beginning."""
        try:
            self._state = self._timed(self._fresh)
        except RequestError as error:
            self._error = error
            return
        if not self._timed(self._state.consume_tokens, self._taken):
            self._fail(self._state.get_error())

    def _fail(self, reason: str) -> None:
        """Notes a failure, unless there was one before. ``mask`` raises it."""
        reason = " ".join(reason.replace("<non-verbose/>", "").split())
        self._error = self._error or RequestError(
            f"the grammar cannot go on after {len(self._taken)} tokens: {reason}; expected a simpler one, or one that "
            "this model's tokens can spell"
        )

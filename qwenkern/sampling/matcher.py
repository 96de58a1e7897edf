"""Follows a text through its grammar: which tokens may come next, and where the text may end.

accept(token) ─► masks of the next places, while the pass runs ─► forbid(row) ─► draw ─► accept(token) ...
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RequestError

SLOW = 1.0  # seconds of processor time for one mask: others wait for it


class Mask(NamedTuple):
    """The tokens that may come next. Either the allowed or the forbidden ones are listed, whichever are fewer."""

    ids: NDArray[np.int64]
    are_allowed: bool

    def allows(self, token: int) -> bool:
        at = int(np.searchsorted(self.ids, token))
        return (at < len(self.ids) and int(self.ids[at]) == token) is self.are_allowed

    def apply(self, row: Tensor) -> None:
        """Sets the logits [V] of forbidden tokens to -inf."""
        # numpy, because torch divides even this among threads, and waits for them where others keep them busy
        target: Any = row.numpy() if row.is_cpu else row
        ids: Any = self.ids if row.is_cpu else torch.from_numpy(self.ids).to(row.device)
        if self.are_allowed:
            kept = target[ids]
            target[:] = -math.inf
            target[ids] = kept
        else:
            target[ids] = -math.inf


class Matcher:
    """The place of one text in its grammar.

    One thread at a time may use it. ``prepare`` computes the masks of the next places ahead, which takes 20 µs to some
    milliseconds; otherwise ``mask`` does. llguidance's state is shared by the texts of one grammar. Where it fails, the
    text is followed again by a state of its own, so that what another text did to the shared one ends no other."""

    def __init__(self, state: Any, fresh: Callable[[], Any], width: int, end_ids: Iterable[int]) -> None:
        self._state = state  # llguidance.LLMatcher
        self._fresh = fresh  # makes one that shares nothing with others
        self._width = width
        self._end_ids = frozenset(end_ids)
        self._ends = np.array(sorted(self._end_ids), dtype=np.int64)
        self._taken: list[int] = []
        self._masks: deque[Mask] = deque()  # of the next place, and those that a draft leads to
        self._goes_back = True  # not every grammar can
        self._error: RequestError | None = None
        self.has_ended = False  # nothing may follow

    def copy(self) -> Matcher:
        """For another text. Only before the first token."""
        return Matcher(self._state.deep_copy(), self._fresh, self._width, self._end_ids)

    def prepare(self, draft: Sequence[int] = ()) -> None:
        """Computes the mask of the next place, and those after the tokens of a draft. Raises nothing: ``mask`` does."""
        self._masks.clear()
        if not self._add_mask():
            self._restart()
            if not self._error and not self._add_mask():
                self._error = self._failure(self._state.get_error())
        if self._error or not self._goes_back:
            return
        ahead = 0
        for token in draft:
            if token in self._end_ids or not self._masks[-1].allows(token):
                break
            self._state.consume_token(token)
            ahead += 1
            if self._state.is_stopped() or not self._add_mask():
                break
        if ahead and not self._state.rollback(ahead):
            self._goes_back = self._state.is_error() and len(self._masks) > 1
            self._restart()

    def mask(self) -> Mask:
        """The tokens that may come next. Raises RequestError if llguidance fails, for example at one of its bounds."""
        if not self._masks and not self._error:
            self.prepare()
        if self._error:
            raise self._error
        return self._masks[0]

    def accept(self, token: int) -> None:
        """Goes on by a token that the mask allows, and that does not end the text."""
        if self._masks:
            self._masks.popleft()
        self._taken.append(token)
        if not self._state.consume_token(token):
            self._restart()
        self.has_ended = not self._error and self._state.is_stopped()

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer would write them. May be empty."""
        return [] if self._error else list(self._state.compute_ff_tokens())

    def accepted(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft the grammar takes."""
        return 0 if self._error else int(self._state.validate_tokens(list(draft)))

    def _add_mask(self) -> bool:
        """False if llguidance fails."""
        begin = time.thread_time()
        bits = np.frombuffer(self._state.compute_bitmask(), dtype=np.uint8)
        if self._state.is_error():
            return False
        if (took := time.thread_time() - begin) > SLOW:
            self._error = self._failure(f"one step of it took {took:.1f} s, and {SLOW:.0f} s is the most")
        allowed = np.unpackbits(bits, count=self._width + 1, bitorder="little").view(np.bool_)
        allowed[self._ends] = allowed[-1]  # the last one stands for the end
        allowed = allowed[:-1]
        are_allowed = 2 * int(np.count_nonzero(allowed)) <= self._width
        self._masks.append(Mask(np.flatnonzero(allowed if are_allowed else ~allowed), are_allowed))
        return True

    def _restart(self) -> None:
        """Follows the text again from its beginning."""
        try:
            self._state = self._fresh()
        except RequestError as error:
            self._error = error
            return
        if not self._state.consume_tokens(self._taken):
            self._error = self._failure(self._state.get_error())

    def _failure(self, reason: str) -> RequestError:
        reason = " ".join(reason.replace("<non-verbose/>", "").split())
        return RequestError(
            f"the grammar cannot go on after {len(self._taken)} tokens: {reason}; expected a simpler one, or one that "
            "this model's tokens can spell"
        )

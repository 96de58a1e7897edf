"""Speculative decoding: verifies several guessed tokens of a text in one step, if they are likely to be right.

    the last token and its draft:   t0   d1   d2   d3        rows of one decode step, over the same pages
                                     │    │    │    │
    what the model draws:           d1   d2   x              x differs from d3, so d1, d2 and x are the next tokens

The bits of a row of a decode step do not depend on the other rows, and a token follows from its row's logits and the
next number of the request's own random stream. So text and log-probabilities are the same as without drafts.

The number of guessed tokens follows from two measurements: the time of a step by its number of rows, and the share of
right guesses by the length of the match. Leviathan et al., "Fast inference from transformers via speculative decoding",
2023, equation 1, gives the expected number of tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from .draft_model import DraftModel
from .drafts import LONGEST, SHORTEST, Drafts
from .request import Request

READINGS = 4  # latest measurements that are kept for each number of rows
OLD = 512  # steps after which a measurement is dropped
SIZES = (2, 3, 4, 6, 8, 12, 16)  # rows of a step with drafts: each size is captured once, and has logits of its own
FORGETTING = 1 / 32  # the share by which each new draft reduces the weight of older guesses
LEAST_GAIN = 1.1  # the least estimated speed-up by a draft, above 1 because estimates are inexact
BELIEF = 4.0  # the weight of the first estimate, in guesses
FIRST_RATE = 0.6  # the first estimate of the share of a small model's guesses that are right
BY_MODEL = 0  # instead of the length of a match: for a draft of the small model
BY_GRAMMAR = LONGEST + 1  # instead of the length of a match: for tokens that the request's grammar forces
FIRST_SLOPE = 0.1  # the first estimate of the time that a row adds, as a share of the time of a step of one row


class Costs:
    """The time of a decode step by its number of rows: the least of the latest measurements, because disturbances only
    add time.

    The first step of a size does not count, because it may compile kernels or record the step. Old measurements are
    dropped, so that a size which was slow once is tried again."""

    def __init__(self, most_rows: int) -> None:
        self._passes = 0
        self._readings: list[deque[tuple[int, float]]] = [deque(maxlen=READINGS) for _ in range(most_rows + 1)]
        self._has_run = [False] * (most_rows + 1)

    def read(self, rows: int, seconds: float) -> None:
        """Notes the time of a step."""
        self._passes += 1
        if self._has_run[rows]:
            self._readings[rows].append((self._passes, seconds))
        self._has_run[rows] = True
        for readings in self._readings:
            if readings and readings[0][0] < self._passes - OLD:
                readings.popleft()

    def of(self, rows: int) -> float:
        """The seconds of a step, interpolated between the nearest sizes that were measured. Before the first
        measurement only the ratio of two results has a meaning."""
        known = [(size, min(seconds for _, seconds in each)) for size, each in enumerate(self._readings) if each]
        below = max((pair for pair in known if pair[0] <= rows), default=None)
        above = min((pair for pair in known if pair[0] >= rows), default=None)
        if below and above:
            share = (rows - below[0]) / max(1, above[0] - below[0])
            return below[1] + (above[1] - below[1]) * share
        size, seconds = below or above or (0, 1.0)
        return seconds * (1 + FIRST_SLOPE * rows) / (1 + FIRST_SLOPE * size)


class Rates:
    """The share of guesses that are right, by the length of the match. others: the rates of other texts, which are the
    first estimates."""

    def __init__(self, others: Rates | None = None) -> None:
        lengths = range(BY_GRAMMAR + 1)
        self._right = [BELIEF * (others.of(match) if others else _first_rate(match)) for match in lengths]
        self._all = [BELIEF for _ in lengths]

    def of(self, match: int) -> float:
        return min(0.98, self._right[match] / self._all[match])

    def read(self, match: int, right: int, wrong: int) -> None:
        """Notes the guesses of a draft: ``right`` ones, then ``wrong`` ones. Only the first of these counts, because
        the others follow a wrong token. Older guesses count less and less."""
        for counts, new in ((self._right, right), (self._all, right + min(1, wrong))):
            counts[match] = counts[match] * (1 - FORGETTING) + new


def _first_rate(match: int) -> float:
    """The estimate before the first guess: higher for a longer match."""
    return {BY_MODEL: FIRST_RATE, BY_GRAMMAR: 1.0}.get(match, min(0.8, 0.1 * match))


class Plan:
    """A step that is planned: its rows, its expected number of new tokens, and its time."""

    def __init__(self, costs: Costs, sequences: int) -> None:
        self._costs = costs
        self.rows = sequences
        self._tokens = float(sequences)  # a sequence without a draft gets one token
        self._before = 0.0  # seconds of the small model before the step

    def length(self, most: int, rate: float, seconds: float = 0.0) -> int:
        """The length of another draft that gives the most tokens per second, or 0. seconds: the time of one guess."""
        best, length = LEAST_GAIN * self._tokens / (self._costs.of(self.rows) + self._before), 0
        for count in range(1, most + 1):
            if self.rows + count in SIZES:
                takes = self._costs.of(self.rows + count) + self._before + count * seconds
                speed = (self._tokens + _expected(count, rate)) / takes
                if speed > best:
                    best, length = speed, count
        return length

    def add(self, count: int, rate: float, seconds: float) -> None:
        self.rows += count
        self._tokens += _expected(count, rate)
        self._before += count * seconds


def _expected(count: int, rate: float) -> float:
    """The expected number of right guesses before the first wrong one."""
    return sum(rate**place for place in range(1, count + 1))


class Speculation:
    """The drafts of the running requests. most_rows: of one step. model: a small model that guesses if the text itself
    gives no draft."""

    def __init__(self, most_rows: int, model: DraftModel | None = None) -> None:
        self.most_rows = most_rows
        self.costs = Costs(most_rows)
        self.rates = Rates()  # of all texts
        self.num_drafted = self.num_accepted = 0  # tokens, since the beginning
        self._model = model

    def drafts(self, requests: Sequence[Request]) -> dict[Request, list[int]]:
        """The draft of each request: tokens that may follow its last token. Requests whose draft would cost more time
        than it saves are left out."""
        plan = Plan(self.costs, len(requests))
        found: dict[Request, list[int]] = {}
        wanted: dict[Request, int] = {}
        for request in requests if plan.rows < self.most_rows else ():
            most = min(self.most_rows - plan.rows, request.max_tokens - len(request.output_ids) - 1)
            if most <= 0:
                continue
            state = self._state(request)
            draft, match = _draft(request, state, most)
            length = plan.length(len(draft), state.rates.of(match)) if draft else 0
            seconds = 0.0
            if not length and self._model:  # its decode steps serve all requests together
                draft, match, seconds = [], BY_MODEL, self._model.seconds / len(requests)
                length = plan.length(most, state.rates.of(match), seconds)
            if length:
                plan.add(length, state.rates.of(match), seconds)
                state.match = match
                if draft:
                    found[request] = draft[:length]
                else:
                    wanted[request] = length
        if wanted and self._model:
            found |= {each: _within_grammar(each, draft) for each, draft in self._model.draft(wanted).items()}
        return {request: draft for request, draft in found.items() if draft}

    def read(self, request: Request, draft: list[int], accepted: int) -> None:
        """Notes how many tokens of a draft were right. If the text has ended, the rates do not change: nothing is known
        of guesses after its end."""
        self.num_drafted += len(draft)
        self.num_accepted += accepted
        if not request.has_ended:
            state = self._state(request)
            for rates in (state.rates, self.rates):
                rates.read(state.match, accepted, len(draft) - accepted)

    def _state(self, request: Request) -> State:
        state = request.speculated
        if state is None:
            state = request.speculated = State(Rates(self.rates))
            state.drafts.add(request.prompt_ids)
        state.drafts.add(request.output_ids[len(state.drafts) - len(request.prompt_ids) :])
        return state


def _draft(request: Request, state: State, most: int) -> tuple[list[int], int]:
    """Tokens that may come next, and the length of the match that they come from."""
    if request.matcher and (forced := request.matcher.forced()):
        return forced[:most], BY_GRAMMAR
    draft, match = state.drafts.draft(most)
    return _within_grammar(request, draft), match


def _within_grammar(request: Request, draft: list[int]) -> list[int]:
    """The tokens of a draft up to the first that the request's grammar forbids."""
    return draft[: request.matcher.accepted(draft)] if request.matcher else draft


class State:
    """The state of speculative decoding for one request."""

    def __init__(self, rates: Rates) -> None:
        self.drafts = Drafts()
        self.rates = rates
        self.match = SHORTEST  # of the latest draft

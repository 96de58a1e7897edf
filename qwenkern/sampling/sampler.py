"""Draws the next token of each sequence of a batch, with all operations of SamplingParams.

The host calls `sample` with logits. `Sampling` draws within a captured step: its tensors stay on the device, and
`sampled` reads the results of the step on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from .draw import NOT_FINITE, draw
from .drawing import DRAW_ROWS, NEUTRAL, Drawing, settings_of
from .logprobs import TokenLogprob, logprobs_of, packed, unpacked, with_logprobs
from .on_device import TokenStates
from .parameters import SampledSequence
from .penalties import choice_error, options_like, penalise

# A token id, or a TokenLogprob if the sequence requests log-probabilities. NOT_FINITE if the largest logit is NaN or
# infinite. An error if the sequence's own biases, penalties and grammar leave no token to draw.
Sampled = int | TokenLogprob | RequestError


@torch.inference_mode()
def sample(logits: Tensor, sequences: Sequence[SampledSequence]) -> list[Sampled]:
    """The next token of each row of logits [R, V]. The logits are float32, and may be overwritten."""
    largest = logits.amax(-1)  # NaN if any logit is
    finite = [math.isfinite(each) for each in largest.tolist()]
    logprobs = logprobs_of(logits, sequences)
    changed = [index for index, each in enumerate(sequences) if finite[index] and _is_changed(each)]
    failed: dict[int, RequestError] = {}
    for index in changed:
        sequence = sequences[index]
        penalise(logits[index], sequence)
        try:
            if sequence.matcher and not sequence.params.is_greedy:
                sequence.matcher.mask().apply(logits[index])
        except RequestError as error:
            failed[index] = error
    adjusted = logits.amax(-1) if changed else largest
    settings = uniforms = None
    if Drawing.of(sequences, logits.shape[-1]).is_random:
        numbers = [0.0 if each.params.is_greedy else each.uniform() for each in sequences]
        values = settings_of(sequences)[:DRAW_ROWS]
        settings, uniforms = (torch.tensor(each, **options_like(logits)) for each in (values, numbers))
    drawn: list[int] = draw(logits, adjusted, settings, uniforms).tolist()
    tops = adjusted.tolist()
    for index, sequence in enumerate(sequences):
        if sequence.matcher and sequence.params.is_greedy and math.isfinite(tops[index]):
            try:
                if not sequence.matcher.allows(drawn[index]):
                    row = logits[index : index + 1]
                    sequence.matcher.mask().apply(row[0])
                    tops[index], drawn[index] = row.amax().item(), int(draw(row, row, None, None))
            except RequestError as error:
                failed[index] = error
    tokens: list[Sampled] = []
    for index, (sequence, of) in enumerate(zip(sequences, logprobs, strict=True)):
        if not finite[index]:
            tokens.append(NOT_FINITE)
        elif index in failed:
            tokens.append(failed[index])
        elif not math.isfinite(tops[index]):
            tokens.append(choice_error(sequence, tops[index]))
        else:
            tokens.append(drawn[index] if of is None else with_logprobs(of, drawn[index]))
    return tokens


def _is_changed(sequence: SampledSequence) -> bool:
    """Whether a row's logits change before its token is drawn. For a greedy row, the grammar is asked after the token
    with the largest logit is chosen: if it allows this token, as nearly always, its mask has no effect."""
    return sequence.params.changes_logits or (sequence.matcher is not None and not sequence.params.is_greedy)


class Sampling:
    """Draws the tokens of ``size`` rows within a captured step, with tensors whose addresses do not change.

    ``moves`` is [size] int32: 1 for rows with a sequence, else 0."""

    def __init__(self, drawing: Drawing, states: TokenStates, moves: Tensor) -> None:
        self.drawing, self._moves = drawing, moves
        self._states = states
        size, device = len(moves), moves.device
        neutral = torch.tensor(NEUTRAL, dtype=torch.float32, device="cpu")
        self._settings = neutral[:, None].expand(-1, size).to(device).contiguous()
        self._uniforms = torch.zeros(size, dtype=torch.float32, device=device)
        self._slots = torch.full((size,), states.slots, dtype=torch.int64, device=device)

    def load(self, sequences: Sequence[SampledSequence], upload: Any) -> None:
        """Sets how each sequence draws its tokens. Rows without a sequence do not change; their tokens are not read."""
        count = len(sequences)
        upload(self._settings[:, :count], settings_of(sequences))
        if self.drawing.adjusts:
            spare = [self._states.slots] * (len(self._slots) - count)
            upload(self._slots, self._states.load(sequences, upload) + spare)

    def launch(self, sequences: Sequence[SampledSequence], upload: Any) -> None:
        """Prepares the next replay: uploads random numbers, and notes that the replay adds a token to each sequence."""
        if self.drawing.is_random:
            upload(self._uniforms[: len(sequences)], [sequence.uniform() for sequence in sequences])
        if self.drawing.adjusts:
            self._states.launched(sequences)

    def run(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draws from logits [size, V] float32. Returns the token ids [size], and the tensor whose rows `sampled` reads.
        Does not wait for the device."""
        drawing, states = self.drawing, self._states
        largest = adjusted = logits.amax(-1)
        logprobs = None if drawing.logprobs is None else logits.log_softmax(-1)
        if drawing.adjusts:
            logits = states.adjust(logits, self._slots, self._settings[DRAW_ROWS:])
            adjusted = logits.amax(-1)
        tokens = draw(logits, adjusted, self._settings[:DRAW_ROWS] if drawing.is_random else None, self._uniforms)
        if drawing.adjusts:
            states.count(tokens, self._slots, self._moves)
            self._settings[-1].sub_(self._moves)
        columns = [tokens[:, None], largest[:, None], adjusted[:, None]]
        if logprobs is not None and drawing.logprobs is not None:
            columns += packed(logprobs, tokens, drawing.logprobs)
        return tokens, torch.cat([column.double() for column in columns], dim=-1)  # holds ids and float32 exactly


def sampled(read: Sequence[float] | int, sequence: SampledSequence) -> Sampled:
    """The result of a captured step for one sequence. ``read``: its row of `Sampling.run`, or a token id."""
    if isinstance(read, int):
        return read
    token, largest, adjusted, *logprobs = read
    if not math.isfinite(largest):
        return NOT_FINITE
    if not math.isfinite(adjusted):
        return choice_error(sequence, adjusted)
    count = sequence.params.logprobs
    return int(token) if count is None else unpacked(int(token), logprobs, count)

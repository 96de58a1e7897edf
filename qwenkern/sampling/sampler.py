"""Draws the next token of each sequence of a batch, with all steps of SamplingParams.

`sample` does it for logits that the host has. `Sampling` does it within a captured step: there the device keeps what it
needs, and `sampled` reads what the step leaves for the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from .draw import NOT_FINITE, draw, or_not_finite
from .drawing import ROWS, Drawing, settings_of
from .logprobs import TokenLogprob, logprobs_of, packed, unpacked, with_logprobs
from .on_device import TokenStates
from .parameters import SampledSequence
from .penalties import choice_error, options_like, penalise

# A token id, or a TokenLogprob if the sequence requests log-probabilities. NOT_FINITE if the largest logit is NaN or
# infinite. An error if the sequence's own biases and penalties leave no token to draw.
Sampled = int | TokenLogprob | RequestError


@torch.inference_mode()
def sample(logits: Tensor, sequences: Sequence[SampledSequence]) -> list[Sampled]:
    """The next token of each row of logits [R, V]. The logits are float32, and may be overwritten."""
    finite = [math.isfinite(top) for top in logits.amax(-1).tolist()]  # amax is NaN if any logit is
    logprobs = logprobs_of(logits, sequences)
    changed = [index for index, each in enumerate(sequences) if each.params.changes_logits and finite[index]]
    for index in changed:
        penalise(logits[index], sequences[index])
    largest = dict(zip(changed, logits[changed].amax(-1).tolist(), strict=True)) if changed else {}
    candidates = Drawing.of(sequences, logits.shape[-1]).candidates
    settings = uniforms = None
    if candidates > 1:
        numbers = [0.0 if each.params.is_greedy else each.uniform() for each in sequences]
        settings, uniforms = (torch.tensor(each, **options_like(logits)) for each in (settings_of(sequences), numbers))
    drawn: list[int] = draw(logits, settings, uniforms, candidates).tolist()
    tokens: list[Sampled] = []
    for index, (sequence, of) in enumerate(zip(sequences, logprobs, strict=True)):
        if not finite[index]:
            tokens.append(NOT_FINITE)
        elif not math.isfinite(largest.get(index, 0.0)):
            tokens.append(choice_error(sequence, largest[index]))
        else:
            tokens.append(drawn[index] if of is None else with_logprobs(of, drawn[index]))
    return tokens


# In place of a token id, below NOT_FINITE: what the largest logit is after penalties and biases
_LARGEST = {-2: -math.inf, -3: math.inf, -4: math.nan}


class Sampling:
    """The draw of ``size`` rows within a captured step: tensors whose addresses stay, and the operations on them.

    ``moves`` is [size] int32: 1 for rows with a sequence, else 0."""

    def __init__(self, drawing: Drawing, states: TokenStates, moves: Tensor) -> None:
        self.drawing, self._moves = drawing, moves
        self._states = states
        size, device = len(moves), moves.device
        self._settings = torch.ones(ROWS * 2, size, dtype=torch.float32, device=device)  # greedy
        self._settings[3] = 0
        self._settings[5:] = 0
        self._uniforms = torch.zeros(size, dtype=torch.float32, device=device)
        self._slots = torch.full((size,), states.slots, dtype=torch.int64, device=device)

    def load(self, sequences: Sequence[SampledSequence], upload: Any) -> None:
        """Sets how each sequence draws its tokens. Rows without a sequence stay as they are: nobody reads them."""
        count = len(sequences)
        upload(self._settings[:, :count], settings_of(sequences))
        if self.drawing.adjusts:
            spare = [self._states.slots] * (len(self._slots) - count)
            upload(self._slots, self._states.load(sequences, upload) + spare)

    def launch(self, sequences: Sequence[SampledSequence], upload: Any) -> None:
        """Prepares the next replay: uploads the random numbers, and notes that it adds a token to each sequence."""
        if self.drawing.candidates > 1:
            upload(self._uniforms[: len(sequences)], [sequence.uniform() for sequence in sequences])
        if self.drawing.adjusts:
            self._states.launched(sequences)

    def run(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draws from logits [size, V] float32. Returns the token ids [size], and what `sampled` reads. Nothing waits
        for the device."""
        drawing, states = self.drawing, self._states
        largest = logits.amax(-1)
        logprobs = None if drawing.logprobs is None else logits.log_softmax(-1)
        if drawing.adjusts:
            logits = states.adjust(logits, self._slots, self._settings)
        tokens = draw(logits, self._settings, self._uniforms, drawing.candidates)
        out = tokens
        if drawing.adjusts:
            states.count(tokens, self._slots, self._moves)
            self._settings[7].sub_(self._moves)
            adjusted = logits.amax(-1)
            for code, value in _LARGEST.items():
                out = torch.where(adjusted.isnan() if math.isnan(value) else adjusted == value, code, out)
        out = or_not_finite(out, largest)
        return tokens, out if logprobs is None else packed(logprobs, out, drawing.logprobs or 0)


def sampled(read: Any, sequence: SampledSequence) -> Sampled:
    """The outcome for one sequence of what a captured step left in its row: a token id, or a row of `packed`."""
    token = int(read[0] if isinstance(read, list) else read)
    if token in _LARGEST:
        return choice_error(sequence, _LARGEST[token])
    if token == NOT_FINITE or sequence.params.logprobs is None:
        return token
    return unpacked(read, sequence.params.logprobs)

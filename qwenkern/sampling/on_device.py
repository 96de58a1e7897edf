"""Penalties, biases and masks as tensors on the device, so that a captured step applies and updates them.

    logits [R, V] ─► repetition, presence, frequency ─► bias ─► early ends ─► grammar's mask ─► draw ─► tokens [R]
                          ▲                                                                              │
                          └──────────────── history: how often each token was drawn ◄────────────────────┘

A sequence keeps its slot, a row of these tensors, for as long as it is decoded. Its prompt is uploaded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import kernels as ops
from ..kernels.penalise import IS_END, ONCE, SEEN
from .parameters import SampledSequence

_FEWEST_SLOTS = 8
Upload = Callable[[Tensor, Tensor], None]  # copies to the device, in stream order


class TokenStates:
    """The tensors that change the logits of sequences: one slot per sequence, and a spare slot for rows without a
    sequence.

    When there are more sequences than slots, the least recently loaded one loses its slot. It is uploaded again when it
    returns."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._device = vocabulary, device
        self.slots = 0
        self._forget()

    def reserve(self, rows: int) -> bool:
        """Makes slots for at least ``rows`` sequences. Returns whether the tensors are new: then no step has captured
        them, and no sequence is loaded."""
        if rows <= self.slots:
            return False
        self.slots = max(_FEWEST_SLOTS, 1 << (rows - 1).bit_length())
        self._forget()
        return True

    def _forget(self) -> None:
        rows, words = self.slots + 1, -(-self._vocabulary // 32)
        # For each token: its count in the output times ONCE, plus SEEN if it is in prompt or output, plus IS_END.
        self.history = torch.zeros(rows, self._vocabulary, dtype=torch.int32, device=self._device)
        self.bias = torch.zeros(rows, self._vocabulary, dtype=torch.float32, device=self._device)
        # The mask of a grammar: bit t % 32 of word t // 32 allows token t. All ones allow every token.
        self.allowed = torch.full((rows, words), -1, dtype=torch.int32, device=self._device)
        self._places: WeakKeyDictionary[SampledSequence, list[int]] = WeakKeyDictionary()  # slot, tokens of the output

    def load(self, sequences: Sequence[SampledSequence], upload: Upload) -> list[int]:
        """The slot of each sequence. A sequence is uploaded if it is new, or has got tokens from other steps."""
        others = [each for each in self._places if each not in sequences]
        free = [*set(range(self.slots)).difference(slot for slot, _ in self._places.values())]
        found = []
        for sequence in sequences:
            place = self._places.pop(sequence, None)
            if place is None and not free:
                free.append(self._places.pop(others.pop(0))[0])
            if place is None or place[1] != len(sequence.output_ids):
                place = [free.pop() if place is None else place[0], len(sequence.output_ids)]
                self._upload(place[0], sequence, upload)
            self._places[sequence] = place  # at the end of the order
            found.append(place[0])
        return found

    def launched(self, sequences: Sequence[SampledSequence]) -> None:
        """Notes that a step was launched, which adds its token to each sequence's history."""
        for sequence in sequences:
            self._places[sequence][1] += 1

    def adjust(self, logits: Tensor, slots: Tensor, settings: Tensor) -> Tensor:
        """Logits [R, V] after penalties, biases and masks, with the same bits as from penalties.penalise. ``slots``:
        [R] int64. ``settings``: the last rows of drawing.settings_of."""
        return ops.penalise(logits, slots, settings, self.history, self.bias, self.allowed)

    def count(self, tokens: Tensor, slots: Tensor, moves: Tensor) -> None:
        """Adds drawn tokens [R] to the histories of the rows whose ``moves`` [R] int32 is 1. It is 0 in other rows."""
        at = slots * self._vocabulary + tokens
        self.history.view(-1).scatter_add_(0, at, moves * ONCE)

    def _upload(self, slot: int, sequence: SampledSequence, upload: Upload) -> None:
        ids, counts = sequence.history.of(sequence.prompt_ids, sequence.output_ids)
        history = torch.zeros(self._vocabulary, dtype=torch.int32, device="cpu")
        history[ids] = counts.int() * ONCE + SEEN
        history[list(sequence.end_ids)] |= IS_END
        bias = torch.zeros(self._vocabulary, dtype=torch.float32, device="cpu")
        ids, values = sequence.params.biases
        bias[ids] = values
        upload(self.history[slot], history)
        upload(self.bias[slot], bias)

"""Allocates the quantised matrices of a model that is being loaded. q, k and v are adjacent in memory, and so are gate
and up, so that packing joins them without a copy."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from qwenkern.allocation import Pool
from qwenkern.config import Config
from qwenkern.kernels import Weight
from qwenkern.kernels.weights import as_weight

from .packing import slots


class Adjacent:
    """Allocates each matrix once, by Hugging Face's name."""

    def __init__(self, formats: Mapping[str, Weight], config: Config, dtype: torch.dtype) -> None:
        """``formats``: all matrices, without memory. ``dtype``: of the activations."""
        self._formats, self._dtype = formats, dtype
        self._pool = Pool(sum(weight.nbytes for weight in formats.values()))
        self._ready: dict[str, Weight] = {}  # allocated together with another matrix, not requested yet
        self._slots = slots(config)
        self._together: dict[Hashable, list[str]] = {}  # the matrices of a parameter that have the same format
        for name in sorted(formats, key=lambda name: self._slots[name].start):
            self._together.setdefault(self._kind(name), []).append(name)

    def __call__(self, name: str) -> Weight:
        """A weight in the matrix's format, with undefined values."""
        if name not in self._ready:
            names, like = self._together[self._kind(name)], self._formats[name]
            parts = zip(*[self._formats[each].tensors[:-1] for each in names], strict=True)
            tensors = [self._pool((sum(map(len, each)), *each[0].shape[1:]), each[0].dtype) for each in parts]
            whole, start = as_weight([*tensors, torch.empty(0, dtype=self._dtype, device="cpu")], like.format), 0
            for each in names:
                stop = start + len(self._formats[each])
                self._ready[each], start = whole.rows(start, stop), stop
        return self._ready.pop(name)

    def _kind(self, name: str) -> Hashable:
        weight = self._formats[name]
        tensors = tuple((tensor.shape[1:], tensor.dtype) for tensor in weight.tensors[:-1])
        return self._slots[name].parameter, weight.format, tensors

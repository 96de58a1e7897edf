"""Memory for the quantised matrices that a checkpoint repacks. Those of q, k and v, and of gate and up, follow each
other in it, so that packing joins them without a copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qwenkern.allocation import Pool
from qwenkern.config import Config
from qwenkern.kernels.weights import Grouped

from .packing import slots


class Adjacent:
    """Allocates each matrix once, by Hugging Face's name."""

    def __init__(self, formats: Mapping[str, Grouped], config: Config, dtype: torch.dtype) -> None:
        """``formats``: those of all matrices. ``dtype``: that of x."""
        self._formats, self._dtype = formats, dtype
        self._pool = Pool(sum(weight.nbytes for weight in formats.values()))
        self._ready: dict[str, Grouped] = {}  # allocated with another matrix
        self._slots = slots(config)
        self._together: dict[tuple[str, str], list[str]] = {}  # the matrices of a parameter that have one format
        for name in sorted(formats, key=lambda name: self._slots[name].start):
            self._together.setdefault(self._key(name), []).append(name)

    def __call__(self, name: str) -> Grouped:
        """A weight in its format, with undefined values."""
        if name not in self._ready:
            names = self._together[self._key(name)]
            rows = [len(self._formats[each]) for each in names]
            form, columns = type(self._formats[name]), self._formats[name].shape[1]
            whole, start = form.allocate(sum(rows), columns, self._dtype, self._pool), 0
            for each, count in zip(names, rows, strict=True):
                self._ready[each] = whole.rows(start, start + count)
                start += count
        return self._ready.pop(name)

    def _key(self, name: str) -> tuple[str, str]:
        return self._slots[name].parameter, self._formats[name].format

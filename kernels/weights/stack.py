"""A weight whose rows have several formats: parts of one format each, one below the other.

A checkpoint may store q and k in one format and v in another. The graph multiplies by all three at once, so they are
one weight. Its format is the formats of its parts, such as "q4_k+q6_k"."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .base import FORMATS, Weight


class Stack(Weight, is_format=False):
    """Parts [N1, K], [N2, K], ... as one matrix [N1 + N2 + ..., K]."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        self.parts = tuple(parts)

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], form: str) -> Stack:
        """The stack of the format ``form``. The tensors of its parts follow each other. Raises ValueError for an
        unknown format or a wrong number of tensors."""
        left, parts = list(tensors), []
        for name in form.split("+"):
            if name not in FORMATS:
                raise ValueError(f"weights have no format {name!r}; expected one of {', '.join(FORMATS)}")
            count = len(FORMATS[name].names)
            parts.append(FORMATS[name](*left[:count]))
            left = left[count:]
        if left:
            raise ValueError(f"a weight of the format {form!r} has {len(tensors)} tensors; {len(left)} are too many")
        return cls(parts)

    @property
    def format(self) -> str:  # type: ignore[override]  # it depends on the parts
        return "+".join(part.format for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{name}_{i}" for i, part in enumerate(self.parts) for name in part.names)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(map(len, self.parts)), self.parts[0].shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def check(self, op: str, name: str, shape: tuple[int | str, int | str], like: Tensor | None = None) -> None:
        for i, part in enumerate(self.parts):
            part.check(op, f"{name}, part {i}", ("N", shape[1]), like)
        for one, other in pairwise(self.parts):
            if one.shape[1] != other.shape[1] or one.dtype != other.dtype:
                raise ValueError(
                    f"{op}: {name} has parts of {list(one.shape)} {one.dtype} and {list(other.shape)} {other.dtype}; "
                    "expected one number of columns and one dtype"
                )
        if not isinstance(shape[0], str) and shape[0] != len(self):
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, and has {list(self.shape)}")

    def dequantise(self) -> Tensor:
        return torch.cat([part.dequantise() for part in self.parts])

    def rows(self, start: int, stop: int) -> Weight:
        found, before = [], 0
        for part in self.parts:
            low, high = max(start - before, 0), min(stop - before, len(part))
            if low < high:
                found.append(part.rows(low, high))
            before += len(part)
        return found[0] if len(found) == 1 else Stack(found)

    def take(self, ids: Tensor) -> Tensor:
        out = torch.empty(len(ids), self.shape[1], dtype=self.dtype, device=self.device)
        before = 0
        for part in self.parts:
            mine = (ids >= before) & (ids < before + len(part))
            out[mine] = part.take(ids[mine] - before)
            before += len(part)
        return out

    def copy_(self, matrix: Tensor) -> None:
        for part, rows in zip(self.parts, matrix.split([len(part) for part in self.parts]), strict=True):
            part.copy_(rows)


def joined(parts: Sequence[Weight]) -> Weight:
    """Weights with the same number of columns as one weight, one below the other. Neighbours of the same format and
    group size become one weight of that format; if several weights remain, the result is a Stack. Copies the tensors
    that it joins, unless they follow each other in memory, as in a mapped file."""
    runs: list[list[Weight]] = []
    for part in parts:
        if runs and _are_alike(runs[-1][0], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    merged = [run[0] if len(run) == 1 else _one_below_the_other(run) for run in runs]
    return merged[0] if len(merged) == 1 else Stack(merged)


def _are_alike(one: Weight, other: Weight) -> bool:
    return one.format == other.format and all(
        a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in zip(one.tensors, other.tensors, strict=True)
    )


def _one_below_the_other(parts: Sequence[Weight]) -> Weight:
    tensors = zip(*[part.tensors for part in parts], strict=True)
    return FORMATS[parts[0].format](*[each[0] if not each[0].numel() else _cat(each) for each in tensors])


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """torch.cat of tensors that differ only in their first size; a view if they follow each other in memory."""
    first, end = tensors[0], tensors[0].storage_offset()
    memory = first.untyped_storage().data_ptr()
    for each in tensors:
        follows = each.storage_offset() == end and each.untyped_storage().data_ptr() == memory
        if not follows or not each.is_contiguous():
            return torch.cat(list(tensors))
        end += each.numel()
    return first.as_strided((end - first.storage_offset(),), (1,)).view(-1, *first.shape[1:])

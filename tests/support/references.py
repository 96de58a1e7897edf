"""Compares a kernel with its torch reference, in guarded memory, by the rule of tolerances.py."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from support.tolerances import assert_as_close_as, assert_nearly_equal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwenkern.kernels import Pages, Weight, reference
from qwenkern.kernels.weights import Stack

GUARD = 4096  # elements on each side of a buffer
CANARY = 77
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}


class guarded_allocations(TorchDispatchMode, AbstractContextManager):
    """In this context, memory that an op allocates is full of poison (NaN, or the least integer) and lies between
    canaries, which must be intact afterwards. A canary is a finite number, so that NaN written there shows."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in _ALLOCATIONS:
            return out
        buffer = out.new_full((out.numel() + 2 * GUARD,), CANARY)
        buffer[GUARD : GUARD + out.numel()] = _poison(out.dtype)
        self.buffers.append((buffer, out.numel()))
        return buffer.as_strided(out.shape, out.stride(), GUARD)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for buffer, size in self.buffers:
            for side in (buffer[:GUARD], buffer[GUARD + size :]):
                assert (side == CANARY).all(), "a kernel wrote outside its output"


def assert_rounds_like_reference(ops: ModuleType, name: str, *args: Any) -> None:
    """The op rounds where the reference rounds: hardly any element differs. One rounding more or less would change many
    elements."""
    outs, peers = getattr(ops, name)(*(own(ops, arg) for arg in args)), getattr(reference, name)(*args)
    for out, peer in zip(*((each if isinstance(each, tuple) else (each,)) for each in (outs, peers)), strict=True):
        assert_nearly_equal(out, peer)


def tensors_left_behind(call: Callable[[], Any]) -> list[tuple[int, ...]]:
    """The shapes of the tensors that a call leaves behind after its result is gone. An op must not keep tensors,
    because their memory may belong to its caller: torch.compile reuses it."""

    def living() -> dict[int, Tensor]:
        gc.collect()
        return {id(each): each for each in gc.get_objects() if type(each) is Tensor}

    before = living()
    call()
    return [tuple(each.shape) for key, each in living().items() if key not in before]


def mapped(function: Callable[[Tensor], Tensor], arg: Any) -> Any:
    """An argument of an op, with ``function`` applied to it or to each tensor of a weight, of pages, or of a pair."""
    if isinstance(arg, Tensor):
        return function(arg)
    if isinstance(arg, Stack):
        return Stack.of_tensors([function(each) for each in arg.tensors], arg.format)
    if isinstance(arg, (Weight, Pages)):
        return type(arg)(*map(function, arg.tensors))
    return type(arg)(map(function, arg)) if isinstance(arg, (list, tuple)) else arg


def tensors_of(arg: Any) -> Sequence[Tensor]:
    """The tensors of an op's argument; a number has none."""
    if isinstance(arg, (Weight, Pages)):
        return arg.tensors
    return arg if isinstance(arg, (list, tuple)) else [arg] if isinstance(arg, Tensor) else []


def own(ops: ModuleType, arg: Any) -> Any:
    """An argument in the classes of ``ops``, which may be a broken copy of the kernels with classes of its own."""
    if isinstance(arg, Weight):
        return ops.weights.as_weight(list(arg.tensors), arg.format)
    return ops.pages.FORMATS[arg.format](*arg.tensors) if isinstance(arg, Pages) else arg


def guard(tensor: Tensor, padding: int = 0) -> Tensor:
    """A copy inside a larger buffer full of poison, with ``padding`` poisoned elements after each row."""
    if not tensor.numel():  # an empty tensor stands for its dtype
        return tensor.clone()
    rows, width = tensor.numel() // tensor.shape[-1], tensor.shape[-1]
    stride = width + padding
    buffer = tensor.new_full((rows * stride + 2 * GUARD,), _poison(tensor.dtype))
    strides = [1]
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * size if len(strides) > 1 else stride)
    view = buffer.as_strided(tensor.shape, strides if tensor.dim() > 1 else [1], GUARD)
    return view.copy_(tensor)


def assert_matches_reference(
    ops: ModuleType, name: str, *args: Any, changed: Sequence[int] = (), padding: int = 0, **keywords: Any
) -> Any:
    """Runs an op on guarded copies of its arguments. Every float result, and every argument at the positions
    ``changed``, must be as close to the reference in float64 as the reference in the same dtype is. Returns the op's
    result."""
    mine = [mapped(lambda each: guard(each, padding if each.dim() > 1 else 0), arg) for arg in args]
    with guarded_allocations():
        outs = getattr(ops, name)(*(own(ops, arg) for arg in mine), **keywords)
    copies = [mapped(Tensor.clone, arg) for arg in args]
    peers = getattr(reference, name)(*copies, **keywords)
    wide = [mapped(lambda each: each.double() if each.is_floating_point() else each, arg) for arg in args]
    wide = [mapped(Tensor.clone, arg) for arg in wide]
    truths = getattr(reference, name)(*wide, **keywords)
    if isinstance(outs, Tensor):
        outs, peers, truths = (outs,), (peers,), (truths,)
    outs, peers, truths = (
        [*results, *(each for at in changed for each in tensors_of(given[at]))]
        for results, given in ((outs, mine), (peers, copies), (truths, wide))
    )
    for out, peer, truth in zip(outs, peers, truths, strict=True):
        assert out.dtype == peer.dtype
        if out.is_floating_point():
            assert_as_close_as(out, peer, truth)
        else:
            assert torch.equal(out, truth)
    return outs[0] if len(outs) == 1 else tuple(outs)


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(hash((shape, seed)))
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def exact(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, steps: int = 64) -> Tensor:
    """Integers up to ``steps``, divided by 64. Their products and sums have fewer bits than float32 keeps, so any order
    of summation gives the same bits, and a test may compare bits, which no matrix library guarantees otherwise."""
    generator = torch.Generator().manual_seed(hash((shape, seed)))
    return (torch.randint(-steps, steps + 1, shape, generator=generator) / 64).to(device, dtype)


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min

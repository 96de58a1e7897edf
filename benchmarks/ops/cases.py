"""The cases of the benchmarks: each op at each of its places in the model, with its inputs, bytes and operations.

A case is an op at one place. The sizes come from a Config. The formulas count each input as read once and each output
as written once, as the kernels' docstrings do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwenkern import Config, kernels
from qwenkern.cache import PAGE_SIZE
from qwenkern.kernels import Pages, Weight
from qwenkern.kernels.pages import DensePages

FEW, MANY = (1, 16), (512,)


@dataclass(frozen=True)
class Size:
    """The size at which a case is measured. For decode attention, ``tokens`` is the number of sequences."""

    tokens: int
    context: int = 8192  # cached tokens of a sequence
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Case:
    """One op at one place. ``inputs`` makes random arguments or, on the device "meta", only their shapes."""

    name: str
    op: str  # its name in qwenkern.kernels and in qwenkern.kernels.reference
    inputs: Callable[[Config, Size], tuple[Any, ...]]
    bytes_moved: Callable[[Config, Size], int]
    operations: Callable[[Config, Size], int]  # floating-point operations; a multiply-add is two
    tokens: tuple[int, ...] = FEW + MANY

    def run(self, *inputs: Any) -> Any:
        return getattr(kernels, self.op)(*inputs)


def mapped(function: Callable[[Tensor], Tensor], inputs: Iterable[Any]) -> tuple[Any, ...]:
    """Inputs with ``function`` applied to each tensor, those of weights and pages included."""

    def one(each: Any) -> Any:
        if isinstance(each, Tensor):
            return function(each)
        return type(each)(*map(function, each.tensors)) if isinstance(each, (Weight, Pages)) else each

    return tuple(map(one, inputs))


def _normal(size: Size, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=size.dtype, device=size.device).normal_(0, scale)


def _weight(size: Size, rows: int, columns: int) -> Tensor:
    return _normal(size, rows, columns, scale=columns**-0.5)


def _ones(size: Size, length: int) -> Tensor:
    return torch.ones(length, dtype=size.dtype, device=size.device)


def _stream(config: Config, size: Size) -> tuple[Tensor, Tensor, float]:
    """x, norm_weight, eps."""
    return _normal(size, size.tokens, config.hidden_size), _ones(size, config.hidden_size), config.rms_norm_eps


def _add_rms_norm(config: Config, size: Size) -> tuple[Tensor, Tensor, Tensor, float]:
    """x, residual, norm_weight, eps."""
    return _normal(size, size.tokens, config.hidden_size), *_stream(config, size)


def _projection(config: Config, size: Size, columns: int) -> tuple[Tensor, Tensor, None, Tensor]:
    """x, weight, no bias, and as the addend the residual stream."""
    x, weight = _normal(size, size.tokens, columns), _weight(size, config.hidden_size, columns)
    return x, weight, None, _normal(size, size.tokens, config.hidden_size)


def _cache(config: Config, size: Size, sequences: int) -> tuple[DensePages, Tensor, Tensor]:
    """pages, block_tables, lengths of sequences with ``context`` tokens each."""
    pages = -(-size.context // PAGE_SIZE)
    shape = (sequences * pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
    order = torch.randperm(sequences * pages, dtype=torch.int32) if size.device != "meta" else None
    tables = torch.empty(sequences, pages, dtype=torch.int32, device="meta")
    tables = tables if order is None else order.view(sequences, pages).to(size.device)
    lengths = torch.full((sequences,), size.context, dtype=torch.int32, device=size.device)
    return DensePages(_normal(size, *shape), _normal(size, *shape)), tables, lengths


def _rotation(config: Config, size: Size) -> tuple[Tensor, Tensor]:
    """positions and cos_sin."""
    positions = torch.arange(size.tokens, device=size.device)
    return positions, torch.ones(config.context_length, config.head_dim, device=size.device)


def _logits(config: Config, size: Size) -> Tensor:
    return torch.empty(size.tokens, config.vocab_size, dtype=torch.float32, device=size.device).normal_(0, 3)


def _rows(size: Size, *numbers: float) -> Tensor:
    """A row for each number, with a column for each token."""
    column = torch.tensor(numbers, dtype=torch.float32, device=None if size.device == "meta" else size.device)
    return column.to(size.device)[:, None].expand(-1, size.tokens).contiguous()


def _penalise(config: Config, size: Size) -> tuple[Any, ...]:
    """Tokens that were seen and others, a few of them ends."""
    logits, slots = _logits(config, size), torch.arange(size.tokens, device=size.device)
    history = torch.randint(0, 16, logits.shape, dtype=torch.int32, device=size.device)
    allowed = torch.full((size.tokens, -(-config.vocab_size // 32)), -1, dtype=torch.int32, device=size.device)
    return logits, slots, _rows(size, 1.05, 0.1, 0.1, 0.0), history, torch.zeros_like(logits), allowed


def _draw(config: Config, size: Size) -> tuple[Any, ...]:
    """Without top_k, so that all of the vocabulary counts."""
    logits = _logits(config, size)
    return logits, logits.amax(-1), _rows(size, 0.8, math.inf, 0.95, 0.0), _rows(size, 0.5)[0]


def _heads(config: Config, size: Size, heads: int) -> Tensor:
    return _normal(size, size.tokens, heads, config.head_dim)


def _embedding(config: Config, size: Size) -> tuple[Any, ...]:
    """One row for each token, of lm_head's table if they are tied."""
    ids = torch.randint(config.vocab_size, (size.tokens,), device=size.device)
    return ids, _weight(size, config.vocab_size, config.hidden_size)


def _apply_rope(config: Config, size: Size) -> tuple[Any, ...]:
    positions, cos_sin = _rotation(config, size)
    q, k = (_heads(config, size, heads) for heads in (config.num_attention_heads, config.num_key_value_heads))
    return q, k, cos_sin, positions


def _rms_norm_backward(config: Config, size: Size) -> tuple[Any, ...]:
    """For add_rms_norm: the gradients of its two results, the new residual, norm_weight and eps."""
    x, residual, weight, eps = _add_rms_norm(config, size)
    return x, residual, _normal(size, size.tokens, config.hidden_size), weight, eps


def _rope_and_cache(config: Config, size: Size) -> tuple[Any, ...]:
    positions, cos_sin = _rotation(config, size)
    pages, *_ = _cache(config, Size(size.tokens, size.tokens, size.dtype, size.device), 1)
    return _normal(size, size.tokens, config.qkv_size), positions, cos_sin, pages, positions


def _norm_qkv_rope(config: Config, size: Size) -> tuple[Any, ...]:
    weights = _weight(size, config.qkv_size, config.hidden_size), _normal(size, config.qkv_size)
    return *_stream(config, size), *weights, *_rope_and_cache(config, size)[1:]


def _decode_attention(config: Config, size: Size) -> tuple[Any, ...]:
    return _heads(config, size, config.num_attention_heads), *_cache(config, size, size.tokens), config.head_dim**-0.5


def _dense_attention(config: Config, size: Size) -> tuple[Any, ...]:
    """One query for each sequence, with keys and values as transformers stores them."""
    q = _normal(size, size.tokens, config.num_attention_heads, 1, config.head_dim)
    k, v = (_normal(size, size.tokens, config.num_key_value_heads, size.context, config.head_dim) for _ in range(2))
    return q, k, v, config.head_dim**-0.5


def _prefill_attention(config: Config, size: Size) -> tuple[Any, ...]:
    """A prompt from its start, with as many cached tokens as queries."""
    cache = _cache(config, Size(size.tokens, size.tokens, size.dtype, size.device), 1)
    starts = torch.tensor([0, size.tokens], dtype=torch.int32, device=size.device)
    return _heads(config, size, config.num_attention_heads), *cache, starts, config.head_dim**-0.5


def _elements(formula: Callable[[Config, int], int]) -> Callable[[Config, Size], int]:
    """The bytes of a formula that counts elements."""
    return lambda config, size: formula(config, size.tokens) * size.itemsize


def _table(config: Config, size: Size) -> int:
    return 4 * size.tokens * config.head_dim  # bytes of cosines and sines


def _matrix(rows: Callable[[Config], int], columns: Callable[[Config], int]) -> Callable[[Config, Size], int]:
    """Operations of a linear layer."""
    return lambda config, size: 2 * size.tokens * rows(config) * columns(config)


def _hidden(config: Config) -> int:
    return config.hidden_size


CASES = [
    Case(
        "embedding",
        "embedding",
        _embedding,
        _elements(lambda c, t: 2 * t * c.hidden_size),
        lambda c, s: 0,
    ),
    Case(
        "rms_norm",
        "rms_norm",
        _stream,
        _elements(lambda c, t: 2 * t * c.hidden_size + c.hidden_size),
        lambda c, s: 4 * s.tokens * c.hidden_size,
    ),
    Case(
        "add_rms_norm",
        "add_rms_norm",
        _add_rms_norm,
        _elements(lambda c, t: 4 * t * c.hidden_size + c.hidden_size),
        lambda c, s: 5 * s.tokens * c.hidden_size,
    ),
    Case(
        "rms_norm_backward",
        "rms_norm_backward",
        _rms_norm_backward,
        _elements(lambda c, t: 4 * t * c.hidden_size + 2 * c.hidden_size),
        lambda c, s: 13 * s.tokens * c.hidden_size,
        MANY,
    ),
    Case(
        "qkv",
        "norm_linear",
        lambda c, s: (*_stream(c, s), _weight(s, c.qkv_size, c.hidden_size), _normal(s, c.qkv_size)),
        _elements(lambda c, t: (c.qkv_size + t + 1) * c.hidden_size + (t + 1) * c.qkv_size),
        _matrix(lambda c: c.qkv_size, _hidden),
    ),
    Case(
        "qkv_rope",
        "norm_qkv_rope",
        _norm_qkv_rope,
        lambda c, s: (
            ((c.qkv_size + s.tokens + 1) * c.hidden_size + (s.tokens + 1) * c.qkv_size) * s.itemsize + _table(c, s)
        ),
        _matrix(lambda c: c.qkv_size, _hidden),
    ),
    Case(
        "apply_rope",
        "apply_rope",
        _apply_rope,
        lambda c, s: 2 * s.tokens * (c.q_size + c.kv_size) * s.itemsize + _table(c, s),
        lambda c, s: 3 * s.tokens * (c.q_size + c.kv_size),
    ),
    Case(
        "apply_rope_backward",
        "apply_rope",
        lambda c, s: (*_apply_rope(c, s), True),
        lambda c, s: 2 * s.tokens * (c.q_size + c.kv_size) * s.itemsize + _table(c, s),
        lambda c, s: 3 * s.tokens * (c.q_size + c.kv_size),
        MANY,
    ),
    Case(
        "rope_and_cache",
        "rope_and_cache",
        _rope_and_cache,
        lambda c, s: 2 * s.tokens * c.qkv_size * s.itemsize + _table(c, s),
        lambda c, s: 3 * s.tokens * (c.q_size + c.kv_size),
    ),
    Case(
        "decode_attention",
        "decode_attention",
        _decode_attention,
        lambda c, s: s.tokens * 2 * (s.context * c.kv_size + c.q_size) * s.itemsize,
        lambda c, s: 4 * s.tokens * s.context * c.q_size,
        FEW,
    ),
    Case(
        "prefill_attention",
        "prefill_attention",
        _prefill_attention,
        _elements(lambda c, t: 2 * t * (c.q_size + c.kv_size)),
        lambda c, s: 2 * s.tokens * (s.tokens + 1) * c.q_size,
        (512, 2048),
    ),
    Case(
        "attention",
        "attention",
        _dense_attention,
        lambda c, s: s.tokens * 2 * (s.context * c.kv_size + c.q_size) * s.itemsize,
        lambda c, s: 4 * s.tokens * s.context * c.q_size,
        FEW,
    ),
    Case(
        "o_proj",
        "linear",
        lambda c, s: _projection(c, s, c.q_size),
        _elements(lambda c, t: (c.hidden_size + t) * c.q_size + 2 * t * c.hidden_size),
        _matrix(_hidden, lambda c: c.q_size),
        FEW,
    ),
    Case(
        "gate_up",
        "norm_swiglu_linear",
        lambda c, s: (*_stream(c, s), _weight(s, 2 * c.intermediate_size, c.hidden_size)),
        _elements(lambda c, t: (2 * c.intermediate_size + t + 1) * c.hidden_size + t * c.intermediate_size),
        _matrix(lambda c: 2 * c.intermediate_size, _hidden),
    ),
    Case(
        "swiglu",
        "swiglu",
        lambda c, s: (_normal(s, s.tokens, 2 * c.intermediate_size),),
        _elements(lambda c, t: 3 * t * c.intermediate_size),
        lambda c, s: 5 * s.tokens * c.intermediate_size,
    ),
    Case(
        "silu_mul",
        "silu_mul",
        lambda c, s: tuple(_normal(s, s.tokens, c.intermediate_size) for _ in range(2)),
        _elements(lambda c, t: 3 * t * c.intermediate_size),
        lambda c, s: 5 * s.tokens * c.intermediate_size,
    ),
    Case(
        "swiglu_backward",
        "swiglu_backward",
        lambda c, s: (_normal(s, s.tokens, c.intermediate_size), _normal(s, s.tokens, 2 * c.intermediate_size)),
        _elements(lambda c, t: 5 * t * c.intermediate_size),
        lambda c, s: 11 * s.tokens * c.intermediate_size,
        MANY,
    ),
    Case(
        "silu_mul_backward",
        "silu_mul_backward",
        lambda c, s: tuple(_normal(s, s.tokens, c.intermediate_size) for _ in range(3)),
        _elements(lambda c, t: 5 * t * c.intermediate_size),
        lambda c, s: 11 * s.tokens * c.intermediate_size,
        MANY,
    ),
    Case(
        "down",
        "linear",
        lambda c, s: _projection(c, s, c.intermediate_size),
        _elements(lambda c, t: (c.hidden_size + t) * c.intermediate_size + 2 * t * c.hidden_size),
        _matrix(_hidden, lambda c: c.intermediate_size),
        FEW,
    ),
    Case(
        "lm_head",
        "lm_head",
        lambda c, s: (*_stream(c, s), _weight(s, c.vocab_size, c.hidden_size)),
        lambda c, s: (c.vocab_size + s.tokens + 1) * c.hidden_size * s.itemsize + 4 * s.tokens * c.vocab_size,
        _matrix(lambda c: c.vocab_size, _hidden),
        FEW,
    ),
    Case(
        "lm_head_top_k",
        "lm_head_top_k",
        lambda c, s: (*_stream(c, s), _weight(s, c.vocab_size, c.hidden_size), 1),
        _elements(lambda c, t: (c.vocab_size + t + 1) * c.hidden_size),
        _matrix(lambda c: c.vocab_size, _hidden),
        FEW,
    ),
    Case(
        "penalise",
        "penalise",
        _penalise,
        lambda c, s: s.tokens * (16 * c.vocab_size + 4 * -(-c.vocab_size // 32)),
        lambda c, s: 6 * s.tokens * c.vocab_size,
        FEW,
    ),
    Case(
        "draw",
        "draw",
        _draw,
        lambda c, s: 4 * s.tokens * c.vocab_size,
        lambda c, s: 4 * s.tokens * c.vocab_size,
        FEW,
    ),
]

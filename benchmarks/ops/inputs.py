"""The inputs of the benchmarks' cases: random tensors of the sizes that a model gives an op, and their bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwenkern import Config
from qwenkern.cache import PAGE_SIZE
from qwenkern.kernels import Pages, Weight
from qwenkern.kernels.pages import FORMATS as PAGES
from qwenkern.kernels.pages import DensePages
from qwenkern.kernels.weights import FORMATS as WEIGHTS
from qwenkern.kernels.weights import Dense

DENSE = Dense.format  # the name of the dense format of weights, and of pages
ROUNDED = 64  # rows of a quantised matrix that are quantised; a multiple of the rows of a tile


@dataclass(frozen=True)
class Size:
    """The size at which a case is measured. For decode attention, ``tokens`` is the number of sequences."""

    tokens: int
    context: int = 8192  # cached tokens of a sequence
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    weights: str = DENSE  # the format of the matrices
    pages: str = DENSE  # the format of the cache

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        return self.weights == self.pages == DENSE


def qkv_shape(config: Config) -> tuple[int, int]:
    return config.qkv_size, config.hidden_size


def o_shape(config: Config) -> tuple[int, int]:
    return config.hidden_size, config.q_size


def gate_up_shape(config: Config) -> tuple[int, int]:
    return 2 * config.intermediate_size, config.hidden_size


def down_shape(config: Config) -> tuple[int, int]:
    return config.hidden_size, config.intermediate_size


def head_shape(config: Config) -> tuple[int, int]:
    return config.vocab_size, config.hidden_size


def normal(size: Size, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=size.dtype, device=size.device).normal_(0, scale)


def matrix(size: Size, rows: int, columns: int) -> Tensor | Weight:
    """A random matrix. In a quantised format, a few rows are repeated to fill it, because quantising takes long."""
    if size.weights == DENSE:
        return normal(size, rows, columns, scale=columns**-0.5)
    if size.device == "meta":
        return allocated(size, rows, columns, "meta")
    made = allocated(size, min(rows, ROUNDED), columns, size.device)
    made.copy_(normal(size, len(made), columns, scale=columns**-0.5))
    times = -(-rows // len(made))
    repeated = [each.repeat(times, *[1] * (each.dim() - 1)) if each.numel() else each for each in made.tensors]
    return type(made)(*repeated).rows(0, rows)


def allocated(size: Size, rows: int, columns: int, device: str) -> Weight:
    form = WEIGHTS[size.weights]
    return form.allocate(rows, columns, size.dtype, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))


def matrix_bytes(size: Size, rows: int, columns: int) -> int:
    """The bytes of a matrix in the format of ``size``. Raises ValueError if the format has no matrix of that size."""
    return allocated(size, rows, columns, "meta").nbytes


def token_bytes(config: Config, size: Size) -> int:
    """The bytes of a cached token in one layer."""
    return PAGES[size.pages].bytes_per_token(config.num_key_value_heads, config.head_dim, size.dtype)


def dequantised(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs with quantised matrices and pages dequantised."""
    return tuple(_dequantised(each) for each in inputs)


def _dequantised(value: Any) -> Any:
    if isinstance(value, Weight):
        return value.dequantise()
    if not isinstance(value, Pages):
        return value
    pages, page_size, num_kv_heads, head_dim = value.shape
    every = torch.arange(pages, dtype=torch.int32, device=value.device)
    k, v = (each.transpose(0, 1).contiguous() for each in value.gather(every, pages * page_size))
    shape = pages, page_size, num_kv_heads, head_dim
    return DensePages(k.view(shape), v.view(shape))


def ones(size: Size, length: int) -> Tensor:
    return torch.ones(length, dtype=size.dtype, device=size.device)


def stream(config: Config, size: Size) -> tuple[Tensor, Tensor, float]:
    """x, norm_weight, eps."""
    return normal(size, size.tokens, config.hidden_size), ones(size, config.hidden_size), config.rms_norm_eps


def add_rms_norm(config: Config, size: Size) -> tuple[Tensor, Tensor, Tensor, float]:
    """x, residual, norm_weight, eps."""
    return normal(size, size.tokens, config.hidden_size), *stream(config, size)


def projection(config: Config, size: Size, columns: int) -> tuple[Tensor, Tensor | Weight, None, Tensor]:
    """x, weight, no bias, and as the addend the residual stream."""
    x, weight = normal(size, size.tokens, columns), matrix(size, config.hidden_size, columns)
    return x, weight, None, normal(size, size.tokens, config.hidden_size)


def paged(config: Config, size: Size, sequences: int) -> tuple[Pages, Tensor, Tensor]:
    """pages, block_tables, lengths of sequences with ``context`` tokens each."""
    pages = -(-size.context // PAGE_SIZE)
    shape = (sequences * pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
    form, heads = PAGES[size.pages], (-1, *shape[2:])
    made = form.allocate(*shape, size.dtype, torch.device(size.device))
    if size.device != "meta":
        slots = torch.arange(shape[0] * PAGE_SIZE, device=size.device)
        made.store(slots, normal(size, *shape).view(heads), normal(size, *shape).view(heads))
    order = torch.randperm(sequences * pages, dtype=torch.int32) if size.device != "meta" else None
    tables = torch.empty(sequences, pages, dtype=torch.int32, device="meta")
    tables = tables if order is None else order.view(sequences, pages).to(size.device)
    lengths = torch.full((sequences,), size.context, dtype=torch.int32, device=size.device)
    return made, tables, lengths


def rotation(config: Config, size: Size) -> tuple[Tensor, Tensor]:
    """positions and cos_sin."""
    positions = torch.arange(size.tokens, device=size.device)
    return positions, torch.ones(config.context_length, config.head_dim, device=size.device)


def some_logits(config: Config, size: Size) -> Tensor:
    return torch.empty(size.tokens, config.vocab_size, dtype=torch.float32, device=size.device).normal_(0, 3)


def rows(size: Size, *numbers: float) -> Tensor:
    """A row for each number, with a column for each token."""
    column = torch.tensor(numbers, dtype=torch.float32, device=None if size.device == "meta" else size.device)
    return column.to(size.device)[:, None].expand(-1, size.tokens).contiguous()


def penalise(config: Config, size: Size) -> tuple[Any, ...]:
    """Inputs with tokens that were seen and others; a few tokens end a text."""
    logits, slots = some_logits(config, size), torch.arange(size.tokens, device=size.device)
    history = torch.randint(0, 16, logits.shape, dtype=torch.int32, device=size.device)
    allowed = torch.full((size.tokens, -(-config.vocab_size // 32)), -1, dtype=torch.int32, device=size.device)
    return logits, slots, rows(size, 1.05, 0.1, 0.1, 0.0), history, torch.zeros_like(logits), allowed


def draw(config: Config, size: Size) -> tuple[Any, ...]:
    """Inputs without top_k, so that the whole vocabulary counts."""
    logits = some_logits(config, size)
    return logits, logits.amax(-1), rows(size, 0.8, math.inf, 0.95, 0.0), rows(size, 0.5)[0]


def in_heads(config: Config, size: Size, heads: int) -> Tensor:
    return normal(size, size.tokens, heads, config.head_dim)


def embedding(config: Config, size: Size) -> tuple[Any, ...]:
    """Inputs for one row per token; the table is lm_head's if the two are tied."""
    ids = torch.randint(config.vocab_size, (size.tokens,), device=size.device)
    return ids, matrix(size, *head_shape(config))


def apply_rope(config: Config, size: Size) -> tuple[Any, ...]:
    positions, cos_sin = rotation(config, size)
    q, k = (in_heads(config, size, heads) for heads in (config.num_attention_heads, config.num_key_value_heads))
    return q, k, cos_sin, positions


def rms_norm_backward(config: Config, size: Size) -> tuple[Any, ...]:
    """For add_rms_norm: the gradients of its two results, the new residual, norm_weight and eps."""
    x, residual, weight, eps = add_rms_norm(config, size)
    return x, residual, normal(size, size.tokens, config.hidden_size), weight, eps


def rope_and_cache(config: Config, size: Size) -> tuple[Any, ...]:
    positions, cos_sin = rotation(config, size)
    pages, *_ = paged(config, replace(size, context=size.tokens), 1)
    return normal(size, size.tokens, config.qkv_size), positions, cos_sin, pages, positions


def norm_qkv_rope(config: Config, size: Size) -> tuple[Any, ...]:
    weights = matrix(size, *qkv_shape(config)), normal(size, config.qkv_size)
    return *stream(config, size), *weights, *rope_and_cache(config, size)[1:]


def decode_attention(config: Config, size: Size) -> tuple[Any, ...]:
    return in_heads(config, size, config.num_attention_heads), *paged(config, size, size.tokens), config.head_dim**-0.5


def dense_attention(config: Config, size: Size) -> tuple[Any, ...]:
    """One query for each sequence, with keys and values as transformers stores them."""
    q = normal(size, size.tokens, config.num_attention_heads, 1, config.head_dim)
    k, v = (normal(size, size.tokens, config.num_key_value_heads, size.context, config.head_dim) for _ in range(2))
    return q, k, v, config.head_dim**-0.5


def prefill_attention(config: Config, size: Size) -> tuple[Any, ...]:
    """A prompt from its start, with as many cached tokens as queries."""
    cache = paged(config, replace(size, context=size.tokens), 1)
    starts = torch.tensor([0, size.tokens], dtype=torch.int32, device=size.device)
    return in_heads(config, size, config.num_attention_heads), *cache, starts, config.head_dim**-0.5

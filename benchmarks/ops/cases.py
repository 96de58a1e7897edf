"""The cases of the benchmarks: each op at each of its places in the model, with its inputs, bytes and operations.

A case is an op at one place. The sizes come from a Config. The formulas count each input as read once and each output
as written once, as the kernels' docstrings do. A Size may name a format of weights, or of the cache's pages. Then the
case's weights or pages have this format, and their bytes are those of the packed tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qwenkern import Config, kernels
from qwenkern.benchmarks.ops import inputs
from qwenkern.benchmarks.ops.inputs import Size, matrix_bytes, token_bytes
from qwenkern.kernels import Pages, Weight

FEW, MANY = (1, 16), (512,)


@dataclass(frozen=True)
class Case:
    """One op at one place. ``inputs`` makes random arguments or, on the device "meta", only their shapes."""

    name: str
    op: str  # its name in qwenkern.kernels and in qwenkern.kernels.reference
    inputs: Callable[[Config, Size], tuple[Any, ...]]
    bytes_moved: Callable[[Config, Size], int]  # raises ValueError if the format has no matrix of that size
    operations: Callable[[Config, Size], int]  # floating-point operations; a multiply-add is two
    tokens: tuple[int, ...] = FEW + MANY
    takes: tuple[str, ...] = ()  # the formats of a Size that the case uses: "weights", "pages"

    def run(self, *inputs: Any) -> Any:
        return getattr(kernels, self.op)(*inputs)


def mapped(function: Callable[[Tensor], Tensor], inputs: Iterable[Any]) -> tuple[Any, ...]:
    """Inputs with ``function`` applied to each tensor, those of weights and pages included."""

    def one(each: Any) -> Any:
        if isinstance(each, Tensor):
            return function(each)
        return type(each)(*map(function, each.tensors)) if isinstance(each, (Weight, Pages)) else each

    return tuple(map(one, inputs))


def _elements(formula: Callable[[Config, int], int]) -> Callable[[Config, Size], int]:
    """The bytes of a formula that counts elements."""
    return lambda config, size: formula(config, size.tokens) * size.itemsize


def _table(config: Config, size: Size) -> int:
    return 4 * size.tokens * config.head_dim  # bytes of cosines and sines


def _stored(config: Config, size: Size) -> int:
    return size.tokens * token_bytes(config, size)  # bytes of the keys and values of all tokens


Shape = Callable[[Config], tuple[int, int]]


def _matrix(shape: Shape) -> Callable[[Config, Size], int]:
    """Operations of a linear layer."""
    return lambda config, size: 2 * size.tokens * math.prod(shape(config))


def _read_once(shape: Shape, rest: Callable[[Config, Size], int]) -> Callable[[Config, Size], int]:
    """The bytes of a matrix, and those of everything else."""
    return lambda config, size: matrix_bytes(size, *shape(config)) + rest(config, size)


CASES = [
    Case(
        "embedding",
        "embedding",
        inputs.embedding,
        lambda c, s: s.tokens * (matrix_bytes(s, *inputs.head_shape(c)) // c.vocab_size + c.hidden_size * s.itemsize),
        lambda c, s: 0,
        takes=("weights",),
    ),
    Case(
        "rms_norm",
        "rms_norm",
        inputs.stream,
        _elements(lambda c, t: 2 * t * c.hidden_size + c.hidden_size),
        lambda c, s: 4 * s.tokens * c.hidden_size,
    ),
    Case(
        "add_rms_norm",
        "add_rms_norm",
        inputs.add_rms_norm,
        _elements(lambda c, t: 4 * t * c.hidden_size + c.hidden_size),
        lambda c, s: 5 * s.tokens * c.hidden_size,
    ),
    Case(
        "rms_norm_backward",
        "rms_norm_backward",
        inputs.rms_norm_backward,
        _elements(lambda c, t: 4 * t * c.hidden_size + 2 * c.hidden_size),
        lambda c, s: 13 * s.tokens * c.hidden_size,
        MANY,
    ),
    Case(
        "qkv",
        "norm_linear",
        lambda c, s: (*inputs.stream(c, s), inputs.matrix(s, *inputs.qkv_shape(c)), inputs.normal(s, c.qkv_size)),
        _read_once(inputs.qkv_shape, _elements(lambda c, t: (t + 1) * (c.hidden_size + c.qkv_size))),
        _matrix(inputs.qkv_shape),
        takes=("weights",),
    ),
    Case(
        "qkv_rope",
        "norm_qkv_rope",
        inputs.norm_qkv_rope,
        _read_once(
            inputs.qkv_shape,
            lambda c, s: (
                ((s.tokens + 1) * c.hidden_size + c.qkv_size + s.tokens * c.q_size) * s.itemsize
                + _stored(c, s)
                + _table(c, s)
            ),
        ),
        _matrix(inputs.qkv_shape),
        takes=("weights", "pages"),
    ),
    Case(
        "apply_rope",
        "apply_rope",
        inputs.apply_rope,
        lambda c, s: 2 * s.tokens * (c.q_size + c.kv_size) * s.itemsize + _table(c, s),
        lambda c, s: 3 * s.tokens * (c.q_size + c.kv_size),
    ),
    Case(
        "apply_rope_backward",
        "apply_rope",
        lambda c, s: (*inputs.apply_rope(c, s), True),
        lambda c, s: 2 * s.tokens * (c.q_size + c.kv_size) * s.itemsize + _table(c, s),
        lambda c, s: 3 * s.tokens * (c.q_size + c.kv_size),
        MANY,
    ),
    Case(
        "rope_and_cache",
        "rope_and_cache",
        inputs.rope_and_cache,
        lambda c, s: s.tokens * (c.qkv_size + c.q_size) * s.itemsize + _stored(c, s) + _table(c, s),
        lambda c, s: 3 * s.tokens * (c.q_size + c.kv_size),
        takes=("pages",),
    ),
    Case(
        "decode_attention",
        "decode_attention",
        inputs.decode_attention,
        lambda c, s: s.tokens * (s.context * token_bytes(c, s) + 2 * c.q_size * s.itemsize),
        lambda c, s: 4 * s.tokens * s.context * c.q_size,
        FEW,
        ("pages",),
    ),
    Case(
        "prefill_attention",
        "prefill_attention",
        inputs.prefill_attention,
        lambda c, s: 2 * s.tokens * c.q_size * s.itemsize + _stored(c, s),
        lambda c, s: 2 * s.tokens * (s.tokens + 1) * c.q_size,
        (512, 2048),
        ("pages",),
    ),
    Case(
        "attention",
        "attention",
        inputs.dense_attention,
        lambda c, s: s.tokens * 2 * (s.context * c.kv_size + c.q_size) * s.itemsize,
        lambda c, s: 4 * s.tokens * s.context * c.q_size,
        FEW,
    ),
    Case(
        "o_proj",
        "linear",
        lambda c, s: inputs.projection(c, s, c.q_size),
        _read_once(inputs.o_shape, _elements(lambda c, t: t * (c.q_size + 2 * c.hidden_size))),
        _matrix(inputs.o_shape),
        FEW,
        ("weights",),
    ),
    Case(
        "gate_up",
        "norm_swiglu_linear",
        lambda c, s: (*inputs.stream(c, s), inputs.matrix(s, *inputs.gate_up_shape(c))),
        _read_once(inputs.gate_up_shape, _elements(lambda c, t: (t + 1) * c.hidden_size + t * c.intermediate_size)),
        _matrix(inputs.gate_up_shape),
        takes=("weights",),
    ),
    Case(
        "swiglu",
        "swiglu",
        lambda c, s: (inputs.normal(s, s.tokens, 2 * c.intermediate_size),),
        _elements(lambda c, t: 3 * t * c.intermediate_size),
        lambda c, s: 5 * s.tokens * c.intermediate_size,
    ),
    Case(
        "silu_mul",
        "silu_mul",
        lambda c, s: tuple(inputs.normal(s, s.tokens, c.intermediate_size) for _ in range(2)),
        _elements(lambda c, t: 3 * t * c.intermediate_size),
        lambda c, s: 5 * s.tokens * c.intermediate_size,
    ),
    Case(
        "swiglu_backward",
        "swiglu_backward",
        lambda c, s: (
            inputs.normal(s, s.tokens, c.intermediate_size),
            inputs.normal(s, s.tokens, 2 * c.intermediate_size),
        ),
        _elements(lambda c, t: 5 * t * c.intermediate_size),
        lambda c, s: 11 * s.tokens * c.intermediate_size,
        MANY,
    ),
    Case(
        "silu_mul_backward",
        "silu_mul_backward",
        lambda c, s: tuple(inputs.normal(s, s.tokens, c.intermediate_size) for _ in range(3)),
        _elements(lambda c, t: 5 * t * c.intermediate_size),
        lambda c, s: 11 * s.tokens * c.intermediate_size,
        MANY,
    ),
    Case(
        "down",
        "linear",
        lambda c, s: inputs.projection(c, s, c.intermediate_size),
        _read_once(inputs.down_shape, _elements(lambda c, t: t * (c.intermediate_size + 2 * c.hidden_size))),
        _matrix(inputs.down_shape),
        FEW,
        ("weights",),
    ),
    Case(
        "lm_head",
        "lm_head",
        lambda c, s: (*inputs.stream(c, s), inputs.matrix(s, *inputs.head_shape(c))),
        _read_once(
            inputs.head_shape, lambda c, s: (s.tokens + 1) * c.hidden_size * s.itemsize + 4 * s.tokens * c.vocab_size
        ),
        _matrix(inputs.head_shape),
        FEW,
        ("weights",),
    ),
    Case(
        "lm_head_top_k",
        "lm_head_top_k",
        lambda c, s: (*inputs.stream(c, s), inputs.matrix(s, *inputs.head_shape(c)), 1),
        _read_once(inputs.head_shape, _elements(lambda c, t: (t + 1) * c.hidden_size)),
        _matrix(inputs.head_shape),
        FEW,
        ("weights",),
    ),
    Case(
        "penalise",
        "penalise",
        inputs.penalise,
        lambda c, s: s.tokens * (16 * c.vocab_size + 4 * -(-c.vocab_size // 32)),
        lambda c, s: 6 * s.tokens * c.vocab_size,
        FEW,
    ),
    Case(
        "draw",
        "draw",
        inputs.draw,
        lambda c, s: 4 * s.tokens * c.vocab_size,
        lambda c, s: 4 * s.tokens * c.vocab_size,
        FEW,
    ),
]

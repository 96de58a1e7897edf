"""Pages of one byte per value (int8, fp8): the stored codes and scales, against the formulas of scaled.py in float64,
and attention over unusual ones. test_pages.py has the tests of all formats."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from support.models import TINY, tiny_model
from support.mutations import Mutation
from support.references import assert_matches_reference, random
from support.tolerances import CODE_STEPS, assert_nearly_equal
from torch import Tensor

from qwenkern import NonFiniteError
from qwenkern.kernels import reference
from qwenkern.kernels.pages import FORMATS
from qwenkern.kernels.pages.scaled import ScaledPages

FORMS = [name for name, form in FORMATS.items() if issubclass(form, ScaledPages)]
DIM, HEADS, TOKENS = 64, 2, 20
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
both = pytest.mark.parametrize("form", FORMS)


def e4m3() -> Tensor:
    """The 127 values from 0 on, by the table of the OCP specification (8-bit floating point, revision 1.0)."""
    fractions = torch.arange(8, dtype=torch.float64) / 8
    normal = torch.cat([(1 + fractions) * 2.0 ** (e - 7) for e in range(1, 16)])
    return torch.cat([fractions * 2.0**-6, normal])[:127]


def nearest(form: str, x: Tensor) -> Tensor:
    """x (float64, up to the largest code) rounded to the values of codes, ties to even codes."""
    if form == "int8":
        return x.round()
    table = e4m3()
    above = torch.searchsorted(table, x.abs()).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - x.abs(), x.abs() - table[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return table[code] * x.sign()


def made(form: str, dtype: torch.dtype, device: torch.device, bias: Tensor | None = None, size: int = 64):
    """Empty pages: every scale is NaN."""
    pages = FORMATS[form].allocate(6, size, HEADS, DIM, dtype, device)
    if bias is not None:
        pages.adapt(bias.to(device))
    pages.k.fill_(0), pages.v.fill_(0)
    pages.k_scales.fill_(math.nan), pages.v_scales.fill_(math.nan)
    return pages


def bias() -> Tensor:
    """Of k: two channels of each head are large, in different halves."""
    values = random(HEADS, DIM, dtype=torch.float32, device=torch.device("cpu"), seed=1, scale=0.1)
    values[0, 3], values[1, DIM - 5] = 160.0, -90.0
    return values


def stored(ops, form: str, dtype: torch.dtype, device: torch.device, k: Tensor, v: Tensor, **keywords):
    """Pages to which an op has written k and v [T, HEADS, DIM], at position 0, where nothing is rotated."""
    pages = made(form, dtype, device, **keywords)
    qkv = torch.cat([each.flatten(1).to(device, dtype) for each in (k, k, v)], 1)
    slots = torch.arange(3, 3 + len(k), device=device)
    upright = torch.tensor([[1.0] * (DIM // 2) + [0.0] * (DIM // 2)], device=device)
    places = torch.zeros(len(k), dtype=torch.int64, device=device), upright
    ops.rope_and_cache(qkv, *places, ops.pages.FORMATS[form](*pages.tensors), slots)
    return pages


def given(dtype: torch.dtype, seed: int) -> Tensor:
    values = random(TOKENS, HEADS, DIM, dtype=torch.float32, device=torch.device("cpu"), seed=seed)
    values[..., 6:12] *= 2.0 ** -torch.arange(13, 19)  # subnormal codes of e4m3
    values = values.to(dtype)
    return values * (2.0 ** torch.arange(-12, TOKENS - 12))[:, None, None].to(dtype)  # each token has its own size


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_nearest_and_scales_of_the_largest(ops, device, form, dtype):
    largest = {"int8": 127.0, "fp8": 448.0}[form]
    k, v = given(dtype, 2), given(dtype, 3)
    pages = stored(ops, form, dtype, device, k, v, bias=bias())
    channels = pages.like.double().cpu() if form == "int8" else torch.ones(HEADS, DIM, dtype=torch.float64)
    for codes, scales, x in ((pages.k, pages.k_scales, k.double() / channels), (pages.v, pages.v_scales, v.double())):
        codes, scales = (each[0, 3 : 3 + TOKENS].cpu() for each in (codes, scales))
        exact = x.abs().amax(-1) / largest
        torch.testing.assert_close(scales.double(), exact, rtol=CODE_STEPS["scale"], atol=0)
        values = codes.double() if form == "int8" else codes.view(torch.float8_e4m3fn).double()
        assert_nearly_equal(values, nearest(form, x / exact[..., None]))
        error = (values * scales.double()[..., None] - x).abs() / exact[..., None]
        allowed = CODE_STEPS[form] * ((x / exact[..., None]).abs().clamp(min=2.0**-6) if form == "fp8" else 1.0)
        assert (error <= allowed).all()


@both
def test_the_kernels_store_what_the_reference_stores(ops, device, form):
    dtype = torch.float32
    k, v = given(dtype, 4), given(dtype, 5)
    theirs = stored(type("Of", (), {"rope_and_cache": reference.rope_and_cache, "pages": ops.pages}),
                    form, dtype, device, k, v, bias=bias())  # fmt: skip
    mine = stored(ops, form, dtype, device, k, v, bias=bias())
    assert torch.equal(mine.k_scales.nan_to_num(-1), theirs.k_scales.nan_to_num(-1))
    assert torch.equal(mine.v_scales.nan_to_num(-1), theirs.v_scales.nan_to_num(-1))
    assert_nearly_equal(mine.k, theirs.k)
    assert_nearly_equal(mine.v, theirs.v)


@both
@pytest.mark.parametrize("by", ["kernels", "reference"])
def test_what_is_not_finite_or_tiny(ops, device, form, by):
    """A NaN or an infinity makes its head NaN, and no other; the largest finite values stay finite, tiny ones are 0."""
    x = torch.ones(6, HEADS, DIM)
    x[0, 0, 5], x[1, 1, 40], x[2, 0, 63], x[3, 0], x[4, 0] = math.nan, math.inf, -math.inf, 3e38, 1e-39
    x[5, 0] = 0.0
    owner = ops if by == "kernels" else type("Of", (), {"rope_and_cache": reference.rope_and_cache, "pages": ops.pages})
    pages = stored(owner, form, torch.float32, device, x, x)
    table = torch.tensor([0], device=device)
    for out in pages.gather(table, 9):
        out = out[:, 3:].transpose(0, 1).cpu()
        wrong = torch.zeros(6, HEADS, dtype=torch.bool)
        wrong[0, 0] = wrong[1, 1] = wrong[2, 0] = True
        assert torch.equal(out.isnan().all(-1), wrong)
        assert torch.equal(out.isfinite().all(-1), ~wrong)
        assert (out[3, 0] / 3e38 - 1).abs().max() < 1e-6
        assert not out[4:, 0].any()
        assert torch.equal(out[4:, 1], torch.ones(2, DIM))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 64])
def test_attention_over_unusual_sizes(ops, device, form, dtype, size):
    """Tokens of very different size, channels of different size, values near float16's smallest, and NaN in the scales
    of what may not be read."""
    pages = made(form, dtype, device, bias(), size)
    lengths = [1, size - 1, size + 5]
    tables = torch.tensor([[4, 0], [5, 0], [2, 3]], dtype=torch.int32, device=device)
    for row, length in enumerate(lengths):
        slots = tables[row, torch.arange(length) // size].long() * size + torch.arange(length, device=device) % size
        k, v = (random(length, HEADS, DIM, dtype=dtype, device=device, seed=seed + row) for seed in (10, 20))
        weights = 2.0 ** (torch.arange(length, device=device) % 4 - 12)[:, None, None]
        pages.store(slots, k + bias().to(device, dtype) / 8, (v * weights).to(dtype))
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    q = random(3, 2 * HEADS, DIM, dtype=dtype, device=device, seed=30, scale=0.2)
    assert_matches_reference(ops, "decode_attention", q, pages, tables, lengths, DIM**-0.5)
    q = random(8, 2 * HEADS, DIM, dtype=dtype, device=device, seed=31, scale=0.2)
    starts = torch.tensor([0, 1, 4, 8], dtype=torch.int32, device=device)
    assert_matches_reference(ops, "prefill_attention", q, pages, tables, lengths, starts, DIM**-0.5)


@both
def test_a_sequence_decodes_to_the_same_bits_alone(ops, device, form):
    """Two splits of two tiles, among other sequences and by itself; and it is what float64 says."""
    pages, tables = made(form, torch.bfloat16, device, bias()), torch.tensor([[4, 0, 3, 1], [5, 2, 2, 2]])
    for page in range(6):
        k, v = (random(64, HEADS, DIM, dtype=torch.bfloat16, device=device, seed=seed + page) for seed in (40, 50))
        pages.store(torch.arange(64 * page, 64 * page + 64, device=device), k + bias().to(k) / 8, v)
    tables, lengths = (each.to(device, torch.int32) for each in (tables, torch.tensor([200, 70])))
    q = random(2, 2 * HEADS, DIM, dtype=torch.bfloat16, device=device, seed=60, scale=0.2)
    tuning = importlib.import_module(f"{ops.__name__}.triton.tuning")
    with tuning.trying("decode_attention", {"MIN_TOKENS": 128}):
        together = ops.decode_attention(q, pages, tables, lengths, DIM**-0.5)
        for row, width in ((0, 4), (1, 2)):
            own = tables[row : row + 1, :width].contiguous()
            alone = ops.decode_attention(q[row : row + 1], pages, own, lengths[row : row + 1], DIM**-0.5)
            assert torch.equal(alone[0], together[row])
        assert_matches_reference(ops, "decode_attention", q, pages, tables, lengths, DIM**-0.5)


def test_channels_are_powers_of_two_of_the_bias():
    pages = made("int8", torch.bfloat16, torch.device("cpu"), bias())
    channels = pages.like.float()
    assert channels.dtype == torch.float32
    assert torch.equal(channels.log2().round(), channels.log2())
    assert torch.equal(channels[:, : DIM // 2], channels[:, DIM // 2 :])  # what the rotation mixes
    assert (channels[0, 3], channels[1, DIM // 2 - 5]) == (32, 16)  # (160 + 6) / 6 and (90 + 6) / 6, about
    channels[0, [3, 3 + DIM // 2]] = channels[1, [DIM // 2 - 5, DIM - 5]] = 1
    assert (channels == 1).all()


def test_large_biases_cost_the_other_channels_nothing():
    """The largest error of the channels without a large bias, with and without ``adapt``."""
    k = random(50, HEADS, DIM, dtype=torch.float32, device=torch.device("cpu"), seed=7) + bias()
    others = (bias().unflatten(-1, (2, -1)).abs().amax(-2) < 50).repeat(1, 2)[:, None].expand(-1, 50, -1)
    errors = []
    for of in (None, bias()):
        pages = made("int8", torch.float32, torch.device("cpu"), of)
        pages.store(torch.arange(50), k, k)
        found, _ = pages.gather(torch.tensor([0]), 50)
        errors.append((found - k.transpose(0, 1))[others].abs().max())
    assert errors[1] < errors[0] / 10


@both
def test_a_model_adapts_them_and_reports_what_is_not_finite(form):
    model = tiny_model(kv_cache_dtype=form)
    with torch.no_grad():
        model.module.model.layers[0].self_attn.qkv_proj.bias[-1] = math.nan
    with pytest.raises(NonFiniteError):
        model.generate([1, 2, 3], max_tokens=2)
    if form == "int8":
        module = model.module
        with torch.no_grad():
            bias = module.model.layers[1].self_attn.qkv_proj.bias
            bias[TINY.q_size + 5] = 100.0
        again = type(model)(module, None, cache_tokens=64, kv_cache_dtype=form)
        assert again.cache.pages[1].like[0, 5] == again.cache.pages[1].like[0, 5 + TINY.head_dim // 2] == 16
        assert again.cache.pages[1].like[1].eq(1).all()


_USUAL = {"form": "int8", "dtype": torch.bfloat16, "size": 16}
_CODES = {"form": "int8", "dtype": torch.float32}
_FP8 = {"form": "fp8", "dtype": torch.float32}
_ODD = {"form": "fp8", "by": "kernels"}
DECODE, PREFILL, SCALED = "triton/decode_attention.py", "triton/prefill_attention.py", "pages/scaled.py"
attention, codes, odd = (
    test_attention_over_unusual_sizes,
    test_codes_are_nearest_and_scales_of_the_largest,
    test_what_is_not_finite_or_tiny,
)
MUTATIONS = [
    Mutation("scales of k", DECODE, "scores *= SCALE_K(", "scores += 0 * SCALE_K(", attention, _USUAL),
    Mutation("scales of v", DECODE, "weights *= SCALE_V(", "weights += 0 * SCALE_V(", attention, _USUAL),
    Mutation("the whole tile's scales", DECODE, "+ tl.arange(0, BLOCK_N) < end\n", "+ tl.arange(0, BLOCK_N) >= 0\n",
             attention, _USUAL),
    Mutation("channels", DECODE, "q = QUERY(pages, kv_head, q, column)", "q = q", attention, _USUAL),
    Mutation("channels of another head", DECODE, "QUERY(pages, kv_head,", "QUERY(pages, 1 - kv_head,", attention,
             _USUAL),
    Mutation("scales of k in prefill", PREFILL, "scores *= SCALE_K(", "scores += 0 * SCALE_K(", attention, _USUAL),
    Mutation("scales of v in prefill", PREFILL, "weights *= SCALE_V(", "weights += 0 * SCALE_V(", attention, _USUAL),
    Mutation("the first page's scales", PREFILL, "tl.where(row < SIZE, first, next_one)", "first + 0 * row", attention,
             _USUAL),
    Mutation("channels in prefill", PREFILL, "QUERY(pages, head // GROUP,", "QUERY(pages, 0,", attention, _USUAL),
    Mutation("float16 weights become subnormal", SCALED, "UNIT = tl.constexpr(128.0)", "UNIT = tl.constexpr(0.0078125)",
             attention, _USUAL | {"dtype": torch.float16}),
    Mutation("scales of the first half", SCALED, "tl.maximum(of_low, of_high)", "of_low", codes, _CODES),
    Mutation("NaN is ignored", SCALED, "bits < _BITS_OF_INFINITY", "bits >= 0", odd, _ODD),
    Mutation("tiny values", SCALED, "bits >= _BITS_OF_SMALLEST", "bits > 0", odd, _ODD),
    Mutation("channels are not divided out", "pages/int8.py", "tl.div_rn(low.to(tl.float32), of_low)",
             "low.to(tl.float32)", codes, _CODES),
    Mutation("rounded down", "pages/int8.py", "(x + _ROUND)", "(x - 0.25 + _ROUND)", codes, _CODES),
    Mutation("subnormal codes", "pages/fp8.py", "tl.where(size < 0.015625, small, bits)", "bits", codes, _FP8),
    Mutation("truncated", "pages/fp8.py", "bits + 0x7FFFF + ((bits >> 20) & 1)", "bits", codes, _FP8),
    Mutation("no sign", "pages/fp8.py", "bits) | sign)", "bits))", codes, _FP8),
]  # fmt: skip

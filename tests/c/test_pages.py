"""Cache pages of every format in C, on every target and as plain loops, for activations in bfloat16 and float32."""

from __future__ import annotations

import pytest
import torch
from c import emulated
from c.test_ops import angles, fast, in_c, refusal, tensor, torchs  # noqa: F401  # the fixture runs by itself
from support.references import guarded_allocations, mapped
from support.tolerances import assert_as_close_as, assert_nearly_equal, assert_roughly_equal

from qwenkern.kernels import c as c_backend
from qwenkern.kernels.c import build
from qwenkern.kernels.pages import FORMATS, Pages

PAGE = 16
pytestmark = [
    pytest.mark.parametrize("dtype", build.DTYPES, ids=str),
    pytest.mark.parametrize("form", FORMATS),
]


def filled(form: str, dtype: torch.dtype, lengths: list[int], kv_heads: int, dim: int) -> tuple:
    """Pages in a shuffled order with NaN or the largest code in every token that may not be read, tables, lengths."""
    counts = [-(-length // PAGE) for length in lengths]
    pages = FORMATS[form].allocate(sum(counts) + 1, PAGE, kv_heads, dim, dtype, torch.device("cpu"))
    for each in pages.tensors[:4]:
        if each.numel():
            each.view(-1).view(torch.uint8).fill_(0xFF if each.is_floating_point() else 0x7F)
    pages.adapt(tensor(kv_heads, dim, seed=9, scale=40.0).float())
    order = (1 + torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1))).int().split(counts)
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, (length, numbers) in enumerate(zip(lengths, order, strict=True)):
        tables[row, : len(numbers)] = numbers
        tokens = torch.arange(length)
        slots = tables[row].long()[tokens // PAGE] * PAGE + tokens % PAGE
        k, v = (tensor(length, kv_heads, dim, seed=2 * row + side, dtype=dtype) for side in range(2))
        pages.store(slots, k, v)
    return pages, tables, torch.tensor(lengths, dtype=torch.int32)


def run(name: str, *args: object) -> torch.Tensor:
    """The op in C, which must take it, with canaries around what it allocates."""
    assert refusal(name, *args) is None
    if emulated.is_emulated():
        return getattr(fast, name)(*args)
    with guarded_allocations():
        return getattr(fast, name)(*args)


def assert_close(name: str, *args: object) -> torch.Tensor:
    """As close to float64 as torch is, over the same pages: what a format loses is lost on both sides."""
    out = run(name, *args)
    wide = [mapped(lambda each: each.double() if each.is_floating_point() else each, arg) for arg in args]
    assert_as_close_as(out, getattr(torchs, name)(*args), getattr(torchs, name)(*wide))
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (3, 3, 32), (16, 1, 128)])
def test_attention_is_as_close_to_float64_as_torch(form, dtype, heads: int, kv_heads: int, dim: int) -> None:
    lengths, queries = [1, 17, 64, 65, 200], [1, 3, 64, 1, 20]
    pages, tables, counts = filled(form, dtype, lengths, kv_heads, dim)
    q = tensor(len(lengths), heads, dim, seed=4, dtype=dtype)
    out = assert_close("decode_attention", q, pages, tables, counts, dim**-0.5)
    for row in range(len(lengths)):
        mine = (tables[row : row + 1], counts[row : row + 1], dim**-0.5)
        assert torch.equal(fast.decode_attention(q[row : row + 1], pages, *mine)[0], out[row])
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    q = tensor(sum(queries), heads, dim, seed=5, dtype=dtype)
    assert_close("prefill_attention", q, pages, tables, counts, starts, dim**-0.5)


def each_code(pages: Pages) -> torch.Tensor:
    """Every code that a format stores but not as NaN, as values."""
    if pages.v.is_floating_point():
        return pages.v
    bits = 8 * pages.v.element_size()
    codes = torch.arange(pages.v.numel()) % 2**bits
    if pages.format == "fp8":
        codes[codes % 128 == 127] = 0
    return codes.to(torch.uint8 if bits == 8 else torch.int32).view(pages.v.shape)


def test_each_code_is_read_as_torch_reads_it(form, dtype) -> None:
    """A token that sees itself only returns its value, to the bit."""
    tokens, dim = 1024, 64
    pages = FORMATS[form].allocate(tokens, 1, 1, dim, dtype, torch.device("cpu"))
    k, v = (tensor(tokens, 1, dim, seed=seed, dtype=dtype) for seed in (0, 1))
    pages.store(torch.arange(tokens), k, v)
    if form != "dense":
        pages.v.view(-1).view(torch.uint8).copy_(each_code(pages).to(pages.v.dtype).view(-1).view(torch.uint8))
    out = run(
        "decode_attention",
        tensor(tokens, 1, dim, seed=2, dtype=dtype),
        pages,
        torch.arange(tokens, dtype=torch.int32)[:, None],
        torch.ones(tokens, dtype=torch.int32),
        0.125,
    )
    expected = pages.gather(torch.arange(tokens), tokens)[1].transpose(0, 1)
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(out.isnan(), expected.isnan())


def test_keys_and_values_are_stored_as_torch_stores_them(form, dtype) -> None:
    """Of all sizes, with zeros, infinities and NaN. A code differs where float32 rounds a quotient to a tie."""
    heads, dim, tokens = 2, 64, 200
    pages, same = (FORMATS[form].allocate(20, PAGE, heads, dim, dtype, torch.device("cpu")) for _ in range(2))
    for each in (pages, same):
        each.adapt(tensor(heads, dim, seed=9, scale=40.0).float())
        every = torch.zeros(20 * PAGE, heads, dim, dtype=dtype)
        each.store(torch.arange(20 * PAGE), every, every)
    qkv = tensor(tokens, 8 * dim, seed=3, dtype=torch.float32)
    for row, scale in enumerate((0.0, 1e-40, 1e-30, 1e-6, 1e3, 65504.0, 1e6, 1e30)):
        qkv[20 * row : 20 * row + 10] *= scale
    qkv[10:20] *= 0.5 ** torch.arange(8 * dim).remainder(40).float()
    qkv[190, 5 * dim], qkv[191, 6 * dim + 3], qkv[192, 7 * dim + 9] = torch.inf, torch.nan, -torch.inf
    unrotated = torch.cat((torch.ones(9, dim // 2), torch.zeros(9, dim // 2)), dim=-1)
    given = (qkv.to(dtype), torch.arange(tokens) % 9, unrotated)
    slots = torch.randperm(20 * PAGE, generator=torch.Generator().manual_seed(2))[:tokens]
    q = run("rope_and_cache", *given, pages, slots)
    assert_nearly_equal(q[:190], torchs.rope_and_cache(*given, same, slots)[:190])
    for mine, theirs in zip(*(each.gather(torch.arange(20), 20 * PAGE) for each in (pages, same)), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.isinf(), theirs.isinf())
        if form in ("dense", "float16"):
            assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
            continue
        assert_nearly_equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
        for token in theirs.isfinite().all(-1).all(0).nonzero().flatten():
            assert_roughly_equal(mine[:, token], theirs[:, token])


def test_a_step_of_these_pages_is_recorded(form, dtype) -> None:
    pages, tables, counts = filled(form, dtype, [70, 300], 2, 64)
    qkv, cos_sin = tensor(2, 18 * 64, seed=7, dtype=dtype), angles(512, 64)
    positions, slots = torch.tensor([69, 299]), tables[torch.arange(2), torch.tensor([4, 18])].long() * PAGE
    others = type(pages)(*(each.clone() for each in pages.tensors))

    def step(to: Pages) -> torch.Tensor:
        q = fast.rope_and_cache(qkv, positions, cos_sin, to, slots)
        return fast.decode_attention(q, to, tables, counts, 0.125)

    recorded = c_backend.RecordedCalls()
    with recorded.record():
        out = step(pages)
    recorded.replay()
    assert torch.equal(out, step(others))
    assert out.isfinite().all()

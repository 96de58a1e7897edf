"""The kernel that dequantises rows, for products with many tokens and for the embedding. Its bits are those of
Weight.dequantise, which test_grouped.py and test_fp8.py compare with the formats' definitions."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support.mutations import Mutation
from support.references import assert_matches_reference, guard, guarded_allocations, mapped, own, random
from test_weights import made
from torch import Tensor

from qwenkern.kernels import Weight
from qwenkern.kernels.weights import FORMATS, Stack
from qwenkern.kernels.weights.fp8 import Fp8

FORMS = [name for name, form in FORMATS.items() if form.triton_dequantise is not None]
CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_bits(form: str, rows: int, columns: int, dtype: torch.dtype, device=CPU, seed: int = 0, **sizes) -> Weight:
    """Random bits in every tensor, with finite scales. Of fp8 every code occurs, those of NaN excepted."""
    generator = torch.Generator().manual_seed(seed)

    def bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point:
            return torch.empty(shape, dtype=dtype, device=device)
        if dtype == torch.int16:
            return (torch.randn(shape, generator=generator) / 16).half().view(dtype).to(device)
        if form == "fp8":
            if dtype == torch.int32:
                return (torch.randn(shape, generator=generator) / 16).view(dtype).to(device)
            codes = torch.randint(0, 127, shape, generator=generator)
            return (codes + 128 * torch.randint(0, 2, shape, generator=generator)).to(dtype).to(device)
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, shape, dtype=dtype, generator=generator).to(device)

    return FORMATS[form].allocate(rows, columns, dtype, bits, **sizes)


def rows_of(ops, weight: Weight, first: int, stop: int) -> Tensor:
    """By the kernel, of guarded copies into a guarded result."""
    mine = own(ops, mapped(guard, weight))
    with guarded_allocations():
        out = torch.empty(stop - first, weight.shape[1], dtype=weight.dtype, device=weight.device)
        ops.triton.dequantise.dequantise_rows(out, mine, first)
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_the_format(ops, device, form, dtype):
    """Two programs along K, and two of rows."""
    weight = random_bits(form, 48, 512, dtype, device)
    matrix = weight.dequantise()
    assert not matrix.isnan().any()
    assert torch.equal(rows_of(ops, weight, 0, 32), matrix[:32])
    assert torch.equal(rows_of(ops, weight, 16, 48), matrix[16:])


@pytest.mark.parametrize("form", [form for form in FORMS if form == "fp8" or not FORMATS[form].super_scales])
def test_columns_that_are_no_multiple_of_a_block(ops, device, form):
    columns = 20 if form == "fp8" else 288
    weight = random_bits(form, 16, columns, torch.bfloat16, device)
    assert torch.equal(rows_of(ops, weight, 0, 16), weight.dequantise())


@pytest.mark.parametrize("group", [32, 96, 288, 1152])
def test_groups_of_any_size(ops, device, group):
    weight = random_bits("int4", 16, 1152, torch.bfloat16, device, group=group)
    assert weight.values_of_group == group
    assert torch.equal(rows_of(ops, weight, 0, 16), weight.dequantise())


def test_float32_scales(ops, device):
    weight = random_bits("int8", 16, 256, torch.bfloat16, device)
    weight.scales = weight.scales.view(torch.float16).float().mul(1.0001).view(torch.int32)
    assert torch.equal(rows_of(ops, weight, 0, 16), weight.dequantise())


def test_rows_of_fp8_are_any(ops, device):
    """No multiple of a program's rows, and not beside each other in memory. A code of NaN is NaN."""
    wide = random_bits("fp8", 37, 272, torch.bfloat16, device)
    wide.codes[3, 20], wide.codes[4, 21] = 127, 255
    weight = own(ops, Fp8(wide.codes[:, 16:], wide.scales, wide.like))
    out = torch.empty(34, 256, dtype=torch.bfloat16, device=device)
    ops.triton.dequantise.dequantise_rows(out, weight, 3)
    matrix = weight.dequantise()[3:]
    assert torch.equal(out.isnan(), matrix.isnan())
    assert out.isnan().nonzero().tolist() == [[0, 4], [1, 5]]
    assert torch.equal(out.nan_to_num(), matrix.nan_to_num())


@pytest.mark.parametrize("form", FORMS)
def test_embedding(ops, device, form):
    weight = random_bits(form, 48, 512, torch.bfloat16, device)
    for kind in (torch.int64, torch.int32):
        ids = torch.tensor([47, 0, 17, 17, 16], dtype=kind, device=device)
        out = assert_matches_reference(ops, "embedding", ids, weight)
        assert torch.equal(out, weight.dequantise()[ids.long()])


def test_ids_that_there_are_not(ops):
    """The host looks at a CPU's ids only. On a GPU a negative id counts from the end, as in torch's indexing, and
    test_kernels.py shows the trap behind another one."""
    weight = random_bits("int4", 48, 64, torch.bfloat16)
    for wrong in (-1, 48):
        with pytest.raises(ValueError, match=f"embedding: ids must be within 0 and 47, and one is {wrong}"):
            ops.embedding(torch.tensor([3, wrong]), weight)
    out = torch.empty(2, 64, dtype=torch.bfloat16)
    ops.triton.dequantise.dequantise_ids(out, weight, torch.tensor([-1, -48]))
    assert torch.equal(out, weight.dequantise()[[-1, -48]])


@pytest.mark.parametrize("form", ["int4", "fp8"])
def test_products_in_turns(ops, device, form):
    """Three turns, the last of which is shorter, with all that a product adds."""
    weight = made(form, rows=304, device=device)
    x = random(49, 256, dtype=torch.bfloat16, device=device, seed=2)
    bias = random(304, dtype=x.dtype, device=device, seed=3)
    addend = random(49, 304, dtype=x.dtype, device=device, seed=4)
    norm = 1 + random(256, dtype=x.dtype, device=device, seed=5, scale=0.1)
    with mock.patch.object(ops.triton.many_tokens, "SCRATCH", 128 * 512):
        assert ops.triton.many_tokens.rows_of_a_turn(304, 256, 2) == 128
        for added in ((), (bias,), (None, addend), (bias, addend)):
            assert_matches_reference(ops, "linear", x, weight, *added)
        assert_matches_reference(ops, "norm_linear", x, norm, 1e-6, weight, bias)
        assert_matches_reference(ops, "lm_head", x, norm, 1e-6, weight)


def test_products_with_rows_of_several_formats(ops, device):
    sizes = {"q4_k": 48, "q6_k": 16, "fp8": 32}  # no part fills the scratch of the longest
    weight = Stack([made(form, rows=rows, device=device) for form, rows in sizes.items()])
    for tokens in (20, 49):
        x = random(tokens, 256, dtype=torch.bfloat16, device=device, seed=2)
        bias, addend = (random(*size, 96, dtype=x.dtype, device=device, seed=4) for size in ((), (tokens,)))
        assert_matches_reference(ops, "linear", x, weight, bias, addend)
        assert_matches_reference(ops, "linear", x, weight, None, addend)


@pytest.mark.parametrize(
    ("rows", "columns", "turns"),
    [(22016, 2048, 2), (151936, 2048, 10), (59136, 8192, 15), (1000, 3584, 1), (33000, 1024, 2), (48, 64, 1)],
)
def test_turns_are_even_and_within_the_scratch(ops, rows, columns, turns):
    many = ops.triton.many_tokens
    turn = many.rows_of_a_turn(rows, columns, 2)
    assert -(-rows // turn) == turns
    assert turn * columns * 2 <= many.SCRATCH
    assert turn == rows or turn % 128 == 0
    assert turns * turn - rows < 128 * turns, "turns are as long as each other"


@pytest.mark.parametrize("tokens", [17, 33, 48])
@pytest.mark.parametrize("form", ["int4", "fp8"])
def test_slices_have_the_bits_of_a_few_tokens(ops, device, form, tokens):
    """Up to 48 tokens a packed weight is read by the few-token kernel, 16 tokens at a time."""
    weight = made(form, rows=64, device=device)
    x = random(tokens, 256, dtype=torch.bfloat16, device=device, seed=2)
    bias, norm = (random(size, dtype=x.dtype, device=device, seed=3) for size in (64, 256))
    addend = random(tokens, 64, dtype=x.dtype, device=device, seed=4)
    assert_matches_reference(ops, "linear", x, weight, bias, addend)
    together = ops.linear(x, weight, bias, addend)
    assert torch.equal(together[16:], ops.linear(x[16:], weight, bias, addend[16:]))
    for name, args in (("norm_linear", (weight, bias)), ("norm_swiglu_linear", (weight,)), ("lm_head", (weight,))):
        assert_matches_reference(ops, name, x, norm, 1e-6, *args)
    values, ids = ops.lm_head_top_k(x, norm, 1e-6, weight, 3)
    logits = ops.lm_head(x, norm, 1e-6, weight)
    assert torch.equal(values, logits.topk(3).values)
    assert torch.equal(logits.gather(1, ids), values)


def test_every_packed_format_has_the_function():
    assert {name for name, form in FORMATS.items() if form.triton_load is not None} == {"dense", *FORMS}


_INT4 = {"form": "int4", "dtype": torch.float32}
MUTATIONS = [
    Mutation(
        "the first row of a program for all",
        "triton/dequantise.py",
        "rows = first + at",
        "rows = first + at // 16 * 16",
        test_the_bits_are_those_of_the_format,
        _INT4,
    ),
    Mutation(
        "rows counted from the first of the weight",
        "triton/dequantise.py",
        "rows = first + at",
        "rows = at",
        test_the_bits_are_those_of_the_format,
        _INT4,
    ),
    Mutation(
        "ids of the program before",
        "triton/dequantise.py",
        "tl.load(ids_ptr + at,",
        "tl.load(ids_ptr + at // 2 * 2,",
        test_embedding,
        {"form": "q8_0"},
    ),
    Mutation(
        "codes of the wrong half",
        "weights/group_rows.py",
        ">> (byte + 4 * half), 0xF, magic)",
        ">> (byte + 4 - 4 * half), 0xF, magic)",
        test_the_bits_are_those_of_the_format,
        {"form": "q4_k", "dtype": torch.float32},
    ),
    Mutation(
        "fifth bits of the first half for both",
        "weights/group_rows.py",
        ">> (byte + 4 * half + word)",
        ">> (byte + word)",
        test_the_bits_are_those_of_the_format,
        {"form": "q5_0", "dtype": torch.float32},
    ),
    Mutation(
        "upper bits of the wrong word",
        "weights/group_rows.py",
        ">> (byte + 2 * word)",
        ">> (byte + 6 - 2 * word)",
        test_the_bits_are_those_of_the_format,
        {"form": "q6_k", "dtype": torch.float32},
    ),
    Mutation(
        "the scale of the first group for all",
        "weights/group_rows.py",
        "k // FORM.group * 16",
        "k * 0",
        test_the_bits_are_those_of_the_format,
        {"form": "q8_0", "dtype": torch.float32},
    ),
    Mutation(
        "minima added",
        "weights/group_rows.py",
        "offset *= -tl.load(",
        "offset *= tl.load(",
        test_the_bits_are_those_of_the_format,
        {"form": "q5_k", "dtype": torch.float32},
    ),
    Mutation(
        "NaN of fp8 a number",
        "weights/fp8_products.py",
        'tl.where((codes & NAN) == NAN, float("nan"), _number(codes))',
        "_number(codes)",
        test_rows_of_fp8_are_any,
        {},
    ),
    Mutation(
        "every turn the first rows",
        "triton/many_tokens.py",
        "dequantise_rows(rows, part, start)",
        "dequantise_rows(rows, part, 0)",
        test_products_in_turns,
        {"form": "int4"},
    ),
    Mutation(
        "every turn the first columns of the addend",
        "triton/many_tokens.py",
        "torch.addmm(added[..., columns],",
        "torch.addmm(added[..., : len(rows)],",
        test_products_in_turns,
        {"form": "int4"},
    ),
    Mutation(
        "every slice the first tokens",
        "triton/many_tokens.py",
        "None if each is None else each[start : start + MAX_TOKENS]",
        "None if each is None else each[:MAX_TOKENS]",
        test_slices_have_the_bits_of_a_few_tokens,
        {"form": "int4", "tokens": 48},
    ),
]

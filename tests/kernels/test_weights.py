"""Requirements on every format of weights. The tests run for all formats in kernels/weights/, so a new one needs no
line here; its own test says how large its errors are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import TINY, tiny_model
from support.mutations import Mutation
from support.planes import assert_product_of_planes
from support.references import assert_matches_reference, random
from support.tolerances import MEAN_KL_FLOAT32, MEAN_KL_PLANES, divergences

from qwenkern.kernels import Weight
from qwenkern.kernels.c.backend import C
from qwenkern.kernels.dispatch import serving
from qwenkern.kernels.weights import FORMATS, Grouped, as_weight

CPU = torch.device("cpu")
ROWS, COLUMNS, EPS = 48, 256, 1e-6
CONFIG = replace(  # multiples of a block of any format
    TINY, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4
)
pytestmark = pytest.mark.parametrize("form", FORMATS)


def allocated(form: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Weight:
    return FORMATS[form].allocate(
        rows, columns, dtype, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)
    )


def made(form: str, rows: int = ROWS, dtype=torch.bfloat16, device=CPU, seed: int = 1) -> Weight:
    weight = allocated(form, rows, COLUMNS, dtype, device)
    weight.copy_(random(rows, COLUMNS, dtype=dtype, device=device, seed=seed, scale=COLUMNS**-0.5))
    return weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_stands_for_a_matrix(form, dtype):
    weight, matrix = made(form, dtype=dtype), made(form, dtype=dtype).dequantise()
    assert weight.shape == matrix.shape == (ROWS, COLUMNS)
    assert weight.dtype == matrix.dtype == dtype
    assert len(weight) == ROWS
    assert weight.device == matrix.device == CPU
    assert matrix.isfinite().all()
    assert weight.nbytes == sum(each.nbytes for each in weight.tensors)
    again = as_weight(list(weight.tensors), form)  # as torch.ops has it
    assert type(again) is FORMATS[form]
    assert torch.equal(again.dequantise(), matrix)
    assert len(weight.names) == len(weight.tensors)


def test_it_takes_values_and_rows_of_them(form):
    """Row by row, as a checkpoint's q, k and v come, the same bits as at once; and nothing of the rows beside."""
    whole, parts = made(form), allocated(form, ROWS, COLUMNS, torch.bfloat16, CPU)
    matrix = random(ROWS, COLUMNS, dtype=torch.bfloat16, device=CPU, seed=1, scale=COLUMNS**-0.5)
    for start, stop in ((0, 16), (32, ROWS), (16, 32)):
        parts.rows(start, stop).copy_(matrix[start:stop])
    assert torch.equal(parts.dequantise(), whole.dequantise())
    assert torch.equal(whole.rows(16, 32).dequantise(), whole.dequantise()[16:32])
    if issubclass(FORMATS[form], Grouped):
        with pytest.raises(ValueError, match="rows 5 to 16; expected multiples of 16"):
            whole.rows(5, 16)
    else:
        assert torch.equal(whole.rows(5, 9).dequantise(), whole.dequantise()[5:9])
    ids = torch.tensor([3, 0, ROWS - 1, 3])
    assert torch.equal(whole.take(ids), whole.dequantise()[ids])
    zeros = allocated(form, ROWS, COLUMNS, torch.bfloat16, CPU)
    zeros.copy_(torch.zeros(ROWS, COLUMNS))
    assert not zeros.dequantise().any()


def test_what_does_not_fit_is_refused(ops, form):
    weight, x = made(form), torch.ones(2, COLUMNS).bfloat16()
    for wrong, message in (
        (x[:, 1:], rf"linear: weight.* must have shape \[N, {COLUMNS - 1}\]"),
        (x.float(), "linear: weight.* must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ops.linear(wrong, weight)
    with pytest.raises((ValueError, TypeError), match="linear: bias"):
        ops.linear(x, weight, torch.ones(ROWS + 1).bfloat16())


def test_torch_has_it_as_tensors(ops, form):
    weight, x = made(form), random(2, COLUMNS, dtype=torch.bfloat16, device=CPU)
    out = torch.ops.qwenkern.linear(x, list(weight.tensors), weight_format=form)
    assert torch.equal(out, ops.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 17, 49])
def test_the_linears(ops, device, form, tokens, dtype):
    """As it is packed, and dequantised for the library's product. C's products have their own bound in float32."""
    weight = made(form, rows=64, dtype=dtype, device=device)
    x = random(tokens, COLUMNS, dtype=dtype, device=device, seed=2)
    norm = 1 + random(COLUMNS, dtype=dtype, device=device, seed=4, scale=0.1)
    for name, args in (
        ("linear", (x, weight)),
        *((name, (x, norm, EPS, weight)) for name in ("norm_linear", "norm_swiglu_linear", "lm_head")),
    ):
        served = serving(name, x, *args)
        if isinstance(weight, Grouped) and dtype == torch.float32 and served is not None and served.backend is C:
            assert_product_of_planes(getattr(ops, name)(*args), name, *args)
        else:
            assert_matches_reference(ops, name, *args)
    out, ids = ops.lm_head_top_k(x, norm, EPS, weight, 3)
    assert torch.equal(out, ops.lm_head(x, norm, EPS, weight).gather(1, ids))


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_tile_of_gate_and_up(ops, device, form, tokens):
    """Two programs, and a batch of products in each: with one token, and with several."""
    weight = made(form, rows=64, device=device)
    x = random(tokens, COLUMNS, dtype=torch.bfloat16, device=device, seed=2)
    norm = 1 + random(COLUMNS, dtype=torch.bfloat16, device=device, seed=4, scale=0.1)
    assert_matches_reference(ops, "norm_swiglu_linear", x, norm, EPS, weight)


def test_q_k_and_v(ops, device, form):
    x = random(3, COLUMNS, dtype=torch.bfloat16, device=device, seed=2)
    norm = 1 + random(COLUMNS, dtype=torch.bfloat16, device=device, seed=4, scale=0.1)
    weight = made(form, rows=8 * 32, device=device)
    angles = torch.rand(8, 32, device=device)
    pages = [torch.zeros(2, 16, 2, 32, dtype=torch.bfloat16, device=device) for _ in range(2)]
    places = torch.arange(3, device=device), angles, pages, torch.tensor([3, 20, 17], device=device)
    assert_matches_reference(ops, "norm_qkv_rope", x, norm, EPS, weight, None, *places, changed=(7,))


def test_a_model_computes_what_its_dequantised_weights_say(form, monkeypatch):
    """The same logits as a dense model of the dequantised weights, on the reference and through the kernels."""
    model, dense = tiny_model(CONFIG), tiny_model(CONFIG)
    for mine, theirs in zip(model.module.linears().values(), dense.module.linears().values(), strict=True):
        if mine.rows % 16 == 0:
            mine.allocate(FORMATS[form]).copy_(theirs.value.dequantise())
            assert type(mine.value) is FORMATS[form]
            theirs.value.copy_(mine.value.dequantise())
    prompt, two = [7, 3, 300, 41], {"max_tokens": 2, "temperature": 0}  # of the prompt's pass, and of a decode step
    expected = dense.generate(prompt, **two)
    truth = dense.forward(prompt).double()
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("QWENKERN_KERNELS", kernels)
        allowed = MEAN_KL_FLOAT32 if kernels == "reference" else MEAN_KL_PLANES
        assert divergences(truth, model.forward(prompt)).mean() <= allowed
        assert model.generate(prompt, **two).token_ids == expected.token_ids


def members(form: str, but: str) -> dict[str, object]:
    bases = [each for each in FORMATS[form].__mro__[::-1] if issubclass(each, Weight) and each is not Weight]
    found = {name: value for each in bases for name, value in vars(each).items()}
    return {name: value for name, value in found.items() if name not in (but, "__slots__", "__init_subclass__")}


@pytest.mark.parametrize("but", ["names", "allocate", "tensors", "check", "dequantise", "rows", "take", "copy_"])
def test_a_member_that_is_missing_is_named(form, but):
    with pytest.raises(TypeError, match=f"the format Partial of Weight does not define {but}$"):
        type("Partial", (Weight,), members(form, but) | {"format": "partial"})


@pytest.mark.parametrize(
    "but", ["load", "load_groups", "operand", "multiply", "prefetch", "arguments"], ids=lambda but: f"triton_{but}"
)
def test_a_piece_for_triton_that_is_missing_is_named(form, but):
    if FORMATS[form].triton_load is None:
        pytest.skip("has none of them")
    with pytest.raises(TypeError, match=f"does not define triton_{but}; expected all of triton_load, .* or none"):
        type("Partial", (Weight,), members(form, f"triton_{but}") | {"format": "partial"})


def test_a_name_belongs_to_one_format(form):
    with pytest.raises(TypeError, match=f"is called '{form}', as .*weights.* is"):
        type("Same", (Weight,), members(form, ""))
    with pytest.raises(TypeError, match="does not define format; expected a name of its own"):
        type("Nameless", (FORMATS[form],), {})


def test_a_format_that_there_is_not(form):
    with pytest.raises(ValueError, match=f"weights have no format 'int5'; expected one of .*{form}"):
        as_weight(list(made(form).tensors), "int5")


_F32 = {"tokens": 1, "dtype": torch.float32}
MUTATIONS = [
    Mutation(
        "the zero point of a group forgotten",
        "weights/group_products.py",
        "-(zero + BASE) * sums",
        "-BASE * sums",
        test_the_linears,
        {"form": "int4"} | _F32,
    ),
    Mutation(
        "minima subtracted",
        "weights/group_products.py",
        "factor = offset - scale",
        "factor = -offset - scale",
        test_the_linears,
        {"form": "q4_1"} | _F32,
    ),
    Mutation(
        "x in another order than the codes",
        "weights/group_products.py",
        "[3, 0, 2, 4, 7, 6, 5, 1]",
        "[3, 0, 2, 4, 7, 5, 6, 1]",
        test_the_linears,
        {"form": "q8_0"} | _F32,
    ),
    Mutation(
        "the first group's scale for all",
        "weights/group_products.py",
        "k // FORM.group * 16 + (local",
        "k * 0 + (local",
        test_the_linears,
        {"form": "q4_0"} | _F32,
    ),
    Mutation(
        "fifth bits of the first half for both",
        "weights/group_products.py",
        "_right(bits, 8 * PLACE + 4 * HALF - 4)",
        "_right(bits, 8 * PLACE - 4)",
        test_the_linears,
        {"form": "q5_0"} | _F32,
    ),
    Mutation(
        "upper bits of the wrong half",
        "weights/group_products.py",
        "(up if HALF else low)",
        "(low if HALF else up)",
        test_the_linears,
        {"form": "q6_k"} | _F32,
    ),
]

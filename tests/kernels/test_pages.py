"""Requirements on every format of cache pages. The tests run for all formats in kernels/pages/, so a new one needs no
line here; its own test says how large its errors are."""

from __future__ import annotations

import pytest
import torch
from support.models import TINY, tiny_model
from support.references import assert_matches_reference, random
from support.tolerances import COARSEST, MEAN_KL_FLOAT32, assert_nearly_equal, assert_roughly_equal, divergences
from torch import Tensor

from qwenkern import Model, RequestError
from qwenkern.device import check_cache_dtype, choose_pages
from qwenkern.kernels import Pages, reference
from qwenkern.kernels.pages import FORMATS, as_pages

PAGE, HEADS, DIM = 16, 2, 32
LENGTHS = [1, 15, 16, 17, 40]
TABLES = torch.tensor([[4, 0, 0], [7, 0, 0], [2, 0, 0], [9, 1, 0], [3, 8, 5]], dtype=torch.int32)
DTYPES = [torch.bfloat16, torch.float32]
pytestmark = pytest.mark.parametrize("form", FORMATS)


def slots_of(row: int, length: int) -> Tensor:
    tokens = torch.arange(length)
    return TABLES[row].long()[tokens // PAGE] * PAGE + tokens % PAGE


def filled(form: str, dtype: torch.dtype, device: torch.device) -> tuple[Pages, list[tuple[Tensor, Tensor]]]:
    """Pages with the sequences of LENGTHS, and the keys and values [tokens, heads, size] that were stored."""
    pages, stored = allocated(form, dtype, device), []
    zeros = torch.zeros(10 * PAGE, HEADS, DIM, dtype=dtype, device=device)
    pages.store(torch.arange(10 * PAGE, device=device), zeros, zeros)
    for row, length in enumerate(LENGTHS):
        k, v = (random(length, HEADS, DIM, dtype=dtype, device=device, seed=2 * row + side) for side in range(2))
        pages.store(slots_of(row, length).to(device), k, v)
        stored.append((k, v))
    return pages, stored


def named(form: str) -> str:
    """As kv_cache_dtype names it for a model that computes in float32."""
    return "float32" if form == "dense" else form


def allocated(form: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Pages:
    return FORMATS[form].allocate(10, PAGE, HEADS, DIM, dtype, torch.device(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_they_say_what_they_are(form, dtype):
    pages = allocated(form, dtype)
    assert tuple(pages.shape) == (10, PAGE, HEADS, DIM)
    assert (pages.page_size, pages.num_kv_heads, pages.head_dim) == (PAGE, HEADS, DIM)
    assert pages.dtype == dtype
    assert pages.device == torch.device("cpu")
    again = as_pages(list(pages.tensors), form)  # as torch.ops has them
    assert type(again) is FORMATS[form]
    assert (again.shape, again.dtype) == (pages.shape, dtype)
    each = pages.bytes_per_token(HEADS, DIM, dtype)
    assert each <= 2 * HEADS * DIM * dtype.itemsize
    assert 10 * PAGE * (each - 1) <= pages.nbytes  # what belongs to no token is not counted with the first ones


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_stored_is_gathered(form, dtype):
    """In the order of the table, of any length; zeros stay zeros."""
    pages, stored = filled(form, dtype, torch.device("cpu"))
    for row, length in enumerate(LENGTHS):
        for out, given in zip(pages.gather(TABLES[row], length), stored[row], strict=True):
            assert_roughly_equal(out, given.transpose(0, 1))
        for out, whole in zip(pages.gather(TABLES[row], 1), pages.gather(TABLES[row], length), strict=True):
            assert torch.equal(out, whole[:, :1])
    zeros = torch.zeros(1, HEADS, DIM, dtype=dtype)
    pages.store(torch.tensor([3]), zeros, zeros)
    assert not any(each[:, 3].any() for each in pages.gather(torch.tensor([0]), 4))


def test_a_page_is_copied_whole(form):
    pages, _ = filled(form, torch.bfloat16, torch.device("cpu"))
    before = [[each.clone() for each in pages.gather(TABLES[row], length)] for row, length in enumerate(LENGTHS)]
    pages.copy_page(6, 8)
    copied, source = (pages.gather(torch.tensor([number]), PAGE) for number in (6, 8))
    assert all(torch.equal(*pair) for pair in zip(copied, source, strict=True))
    for row, length in enumerate(LENGTHS):
        for out, was in zip(pages.gather(TABLES[row], length), before[row], strict=True):
            assert torch.equal(out, was)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(ops, device, form, dtype):
    pages, _ = filled(form, dtype, device)
    tables, lengths = TABLES.to(device), torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    q = random(len(LENGTHS), 4, DIM, dtype=dtype, device=device, seed=20)
    assert_matches_reference(ops, "decode_attention", q, pages, tables, lengths, DIM**-0.5)
    q = random(15, 4, DIM, dtype=dtype, device=device, seed=21)
    starts = torch.tensor([0, 1, 3, 6, 7, 15], dtype=torch.int32, device=device)
    assert_matches_reference(ops, "prefill_attention", q, pages, tables, lengths, starts, DIM**-0.5)


def test_keys_and_values_are_stored_alike(ops, device, form):
    """By the kernels and by the reference; and no slot beside theirs is written to."""
    dtype = torch.bfloat16
    slots = torch.tensor([3, 20, 159], device=device)
    places = torch.arange(3, device=device), torch.rand(8, DIM, device=device)
    qkv = random(3, 8 * DIM, dtype=dtype, device=device, seed=5)
    x, weight = (random(*shape, dtype=dtype, device=device, seed=6) for shape in ((3, 128), (8 * DIM, 128)))
    for name, first in (("rope_and_cache", (qkv,)), ("norm_qkv_rope", (x, x[0] + 2, 1e-6, weight, None))):
        mine, theirs = filled(form, dtype, device)[0], filled(form, dtype, device)[0]
        getattr(ops, name)(*first, *places, mine, slots)
        getattr(reference, name)(*first, *places, theirs, slots)
        for out, peer in zip(
            *(each.gather(torch.arange(10, device=device), 10 * PAGE) for each in (mine, theirs)), strict=True
        ):
            assert_nearly_equal(out[:, slots], peer[:, slots])
            kept = torch.ones(10 * PAGE, dtype=torch.bool).index_fill(0, slots.cpu(), False)
            assert torch.equal(out[:, kept], peer[:, kept])


@pytest.mark.parametrize("name", ["rope_and_cache", "decode_attention"])
def test_pages_that_do_not_fit_are_refused(ops, form, name):
    pages = allocated(form, torch.bfloat16)
    inputs = {
        "rope_and_cache": lambda dtype, dim: (
            (torch.ones(1, 4 * HEADS * dim, dtype=dtype), torch.tensor([0]), torch.ones(4, dim)),
            (torch.tensor([0]),),
        ),
        "decode_attention": lambda dtype, dim: (
            (torch.ones(1, HEADS, dim, dtype=dtype),),
            (torch.tensor([[0]]), torch.tensor([1]), 1.0),
        ),
    }[name]
    for dtype, dim in ((torch.float32, DIM), (torch.bfloat16, DIM // 2)):
        before, after = inputs(dtype, dim)
        with pytest.raises((ValueError, TypeError), match=f"{name}: "):
            getattr(ops, name)(*before, pages, *after)
    with pytest.raises(ValueError, match=f"pages have no format 'int5'; expected one of .*{form}"):
        as_pages(list(pages.tensors), "int5")


def test_a_model_decodes_over_them(form):
    """The same text whether tokens were cached one by one or by chunks, in two completions that share a page, and where
    a full cache takes pages away and gives them back."""
    model = tiny_model(kv_cache_dtype=named(form))
    assert type(model.cache.pages[0]) is FORMATS[form]
    prompt = [n * 7 % 503 for n in range(70)]
    once = model.generate(prompt, max_tokens=4, temperature=0)
    both = model.generate(prompt, max_tokens=4, temperature=0, n=2)
    assert [each.token_ids for each in both] == [once.token_ids] * 2
    other = tiny_model(kv_cache_dtype=named(form), prefill_chunk=33, cache_tokens=128)
    together = other.generate([prompt, prompt[:66]], max_tokens=4, temperature=0)
    assert together[0].token_ids == once.token_ids


def test_a_model_decodes_through_the_kernels(ops, form):
    prompt, model = [7, 3, 300, 41], tiny_model(kv_cache_dtype=named(form))
    token_ids = model.generate(prompt, max_tokens=3, temperature=0).token_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENKERN_KERNELS", "reference")
        assert model.generate(prompt, max_tokens=3, temperature=0).token_ids == token_ids


def test_a_model_of_these_pages_is_near_a_dense_one(form):
    prompt = [n * 7 % 503 for n in range(70)]
    dense, other = (tiny_model(kv_cache_dtype=named(each)).forward(prompt) for each in ("dense", form))
    allowed = MEAN_KL_FLOAT32 if form == "dense" else COARSEST
    assert divergences(dense.double(), other).mean() <= allowed
    with pytest.raises(RequestError, match=rf"kv_cache_dtype is 'int5'; expected one of 'auto', .*'{named(form)}'"):
        Model.from_config(TINY, device="cpu", kv_cache_dtype="int5")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_a_user_names_it(form, dtype):
    """The model's own dtype is dense pages, and any other dtype a format of that name."""
    own = str(dtype).removeprefix("torch.")
    if form == "dense":
        for name in ("auto", own, dtype):
            assert choose_pages(name, dtype) is FORMATS["dense"]
        for other in {"bfloat16", "float32"} - {own}:
            with pytest.raises(RequestError, match=f"kv_cache_dtype is '{other}', and the model computes in {own}; "):
                choose_pages(other, dtype)
    else:
        assert choose_pages(form, dtype) is FORMATS["dense" if form == own else form]
    assert check_cache_dtype(named(form)) == named(form)
    for wrong in ("dense", "int5", 8, torch.int16):
        with pytest.raises(RequestError, match=r"kv_cache_dtype is .*; expected one of 'auto', 'bfloat16', 'float16'"):
            check_cache_dtype(wrong)


def test_quantised_weights_have_a_cache_of_any_format(form):
    assert tiny_model(quantize="int8").cache.pages[0].format == "dense"
    assert tiny_model(quantize="int8", kv_cache_dtype=named(form)).cache.pages[0].format == form


def members(form: str, but: str) -> dict[str, object]:
    bases = [each for each in FORMATS[form].__mro__[::-1] if issubclass(each, Pages) and each is not Pages]
    slots = {name for each in bases for name in each.__slots__}  # which a class without them must not have twice
    found = {name: value for each in bases for name, value in vars(each).items()}
    return {name: value for name, value in found.items() if name not in (but, "__slots__", *slots)}


@pytest.mark.parametrize(
    "but", ["names", "allocate", "tensors", "shape", "dtype", "check", "store", "gather", "copy_page"]
)
def test_a_member_that_is_missing_is_named(form, but):
    with pytest.raises(TypeError, match=f"the format Partial of Pages does not define {but}$"):
        type("Partial", (Pages,), members(form, but) | {"format": "partial"})


@pytest.mark.parametrize("but", ["triton_load_k", "triton_load_v", "triton_store_k", "triton_store_v"])
def test_a_piece_for_triton_that_is_missing_is_named(form, but):
    if FORMATS[form].triton_load_k is None:
        pytest.skip("has none of them")
    with pytest.raises(TypeError, match=f"does not define {but}; expected all of triton_load_k, .* or none"):
        type("Partial", (Pages,), members(form, but) | {"format": "partial"})

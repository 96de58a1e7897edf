"""The ops in C against float64 and against torch in the same dtype, and recorded calls.

The plain ops (plain.c) are one more variant of the fast ops, with the same tests. A last test compares the two."""

import ctypes
import inspect
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from c import emulated
from support.sharing import one_worker_at_a_time
from support.tolerances import assert_as_close_as

from qwenkern import kernels
from qwenkern.checkpoint.integers import Words
from qwenkern.kernels import c as c_backend
from qwenkern.kernels import reference, weights
from qwenkern.kernels.c import build, choose, ops, recorded_calls, repack, repack_words, targets
from qwenkern.kernels.c.backend import C
from qwenkern.kernels.environment import CPU_TARGET
from qwenkern.kernels.pages import FORMATS as pages_formats
from qwenkern.kernels.pages import DensePages
from qwenkern.kernels.weights import FORMATS, Dense

EPS = 1e-6
C_WEIGHTS = "dense, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, q2_k, q3_k, int4, int8"


# The fixed targets that this processor has or that can be emulated, vectors of 4 floats, the narrowest, and the plain
# loops. Each with the distance in bytes at which weights are prefetched, so that the tests run both ways of it.
VARIANTS = {target.name: 0 if target.floats else 4096 for target in targets.TARGETS} | {"narrow": 0, "plain": 0}
FEW = 16  # tokens that read a weight row by row, as a test below holds against the library


@pytest.fixture(autouse=True, params=VARIANTS)
def in_c(request, monkeypatch, tmp_path_factory):
    name = request.param
    if name == "narrow":
        if targets.machine() != "x86_64":
            pytest.skip("vectors have one width here")
        monkeypatch.setenv("CC", "gcc -mno-avx")
    if name == "plain":
        emulated.skip_large(request)
    if name in ("narrow", "plain"):
        monkeypatch.setenv(CPU_TARGET.name, "native")
    elif name in [target.name for target in targets.usable()]:
        monkeypatch.setenv(CPU_TARGET.name, name)
    else:
        emulated.use(name, request, monkeypatch)
    monkeypatch.delenv("QWENKERN_KERNELS", raising=False)
    monkeypatch.setattr(choose, "prefetch", lambda *_: VARIANTS[name])
    monkeypatch.setattr(choose, "prefetch_of_codes", lambda *_: VARIANTS[name])
    monkeypatch.setattr(choose, "multiplies", lambda *_: True)
    build.forget()
    with one_worker_at_a_time(tmp_path_factory, "library"):  # the first one may compile it
        assert c_backend.prepare() is None
    if name == "plain":
        build._found = c_backend.prepared()._replace(library=Plain(c_backend.library()))  # until it is forgotten
    yield
    build.forget()


class Plain:
    """A library whose calls run as plain loops."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.run = library.run_plain
        self.run.argtypes, self.run.restype = library.run.argtypes, None


class Ops:
    """A module's ops by name, without the checks of the public ones. A tensor is a dense weight to them, and two of
    them dense pages."""

    def __init__(self, room: ModuleType) -> None:
        self._room = room

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **keywords: getattr(self._room, name)(*values(name, args), **keywords)


fast, torchs = Ops(ops), Ops(reference)


def values(name: str, args: tuple) -> tuple:
    """The arguments of an op with weights and pages as values."""
    for at, parameter in enumerate(inspect.signature(getattr(kernels, name)).parameters):
        if at < len(args) and isinstance(args[at], torch.Tensor):
            if parameter == "weight" and name not in ("rms_norm", "add_rms_norm"):
                args = (*args[:at], Dense(args[at]), *args[at + 1 :])
            elif parameter == "pages":
                args = (*args[:at], DensePages(*args[at : at + 2]), *args[at + 2 :])
    return args


def refusal(name: str, *args: object) -> str | None:
    """Why C does not take these arguments, as the dispatch asks it."""
    args = values(name, args)
    return C.refuses(args[0]) or C.implementations[name].refuses(*args)


def tensor(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("tokens", [*range(1, FEW + 1), 17, 18, 21, 64, 100])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (7, 64), (1152, 896), (130, 4864), (131, 2048)])
def test_every_form_is_as_close_to_float64_as_torch(tokens: int, n: int, k: int) -> None:
    assert_every_form_is_close(torch.bfloat16, tokens, n, k)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, FEW])
@pytest.mark.parametrize(("n", "k"), [(7, 64), (131, 2048)])
def test_every_form_of_float32_is_as_close_to_float64_as_torch(tokens: int, n: int, k: int) -> None:
    assert_every_form_is_close(torch.float32, tokens, n, k)


def assert_every_form_is_close(dtype: torch.dtype, tokens: int, n: int, k: int) -> None:
    x, norm = tensor(tokens, k, seed=0, dtype=dtype), tensor(k, seed=2, dtype=dtype)
    w, up = (tensor(n, k, seed=seed, scale=k**-0.5, dtype=dtype) for seed in (3, 4))
    bias, addend = tensor(n, seed=5, dtype=dtype), tensor(tokens, n, seed=6, dtype=dtype)

    def compare(call, expected, *args):
        out = call()
        truth = expected(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        assert_as_close_as(out, expected(*args), truth)

    compare(lambda: fast.linear(x, w, bias, addend), torchs.linear, x, w, bias, addend)
    normed, both = (x, norm, EPS), torch.cat((w, up))
    compare(lambda: fast.norm_linear(*normed, w, bias), torchs.norm_linear, *normed, w, bias)
    compare(lambda: fast.norm_swiglu_linear(*normed, both), torchs.norm_swiglu_linear, *normed, both)
    compare(lambda: fast.lm_head(*normed, w), torchs.lm_head, *normed, w)


@pytest.mark.parametrize("k", [96, 896, 2048, 4864])
def test_a_tokens_bits_depend_on_neither_batch_nor_threads(k: int) -> None:
    x, w = tensor(FEW, k, seed=0), tensor(131, k, seed=1)
    together = fast.linear(x, w)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for row in range(len(x)):
            assert torch.equal(fast.linear(x[row : row + 1], w)[0], together[row])
    finally:
        torch.set_num_threads(threads)


def test_scratch_memory_does_not_follow_torchs_defaults() -> None:
    x, w = tensor(300, 896, seed=0), tensor(70, 896, seed=1)
    expected = fast.linear(x, w)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            recorded_calls._of_thread.__dict__.pop("scratch", None)
            out = fast.linear(x, w)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, expected)


def test_rows_may_have_any_stride() -> None:
    x, w = tensor(3, 200, seed=0)[:, :64], tensor(9, 100, seed=1)[:, :64]
    assert torch.equal(fast.linear(x, w), fast.linear(x.contiguous(), w.contiguous()))


def cached(lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    """q, pages in a shuffled order with NaN in every token that may not be read, block tables, lengths."""
    pages_of = [-(-length // 16) for length in lengths]
    order = torch.randperm(sum(pages_of), generator=torch.Generator().manual_seed(1)).int().split(pages_of)
    tables = torch.zeros(len(lengths), max(pages_of), dtype=torch.int32)
    k, v = (tensor(sum(pages_of), 16, kv_heads, dim, seed=seed, dtype=dtype) for seed in (2, 3))
    for row, (length, pages) in enumerate(zip(lengths, order, strict=True)):
        tables[row, : len(pages)] = pages
        k[pages[-1], (length - 1) % 16 + 1 :] = v[pages[-1], (length - 1) % 16 + 1 :] = torch.nan
    q = tensor(len(lengths), heads, dim, seed=4, scale=2.0, dtype=dtype)
    return q, k, v, tables, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("dtype", build.DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (16, 2, 128), (5, 5, 32), (16, 1, 96)])
def test_decode_attention_is_as_close_to_float64_as_torch(heads, kv_heads, dim, dtype) -> None:
    lengths = [1, 15, 16, 17, 255, 256, 257, 1000]
    q, k, v, tables, counts = cached(lengths, heads, kv_heads, dim, dtype)
    given = (q, k, v, tables, counts, dim**-0.5)
    assert refusal("decode_attention", *given) is None
    out = fast.decode_attention(*given)
    expected = torchs.decode_attention(q, k, v, tables, counts, dim**-0.5)
    truth = torchs.decode_attention(q.double(), k.double(), v.double(), tables, counts, dim**-0.5)
    assert_as_close_as(out, expected, truth)
    for row in range(len(lengths)):
        single = fast.decode_attention(
            *(q[row : row + 1], k, v, tables[row : row + 1], counts[row : row + 1], dim**-0.5)
        )
        assert torch.equal(single[0], out[row])


@pytest.mark.parametrize("dtype", build.DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (16, 2, 128), (3, 3, 64), (16, 1, 128)])
def test_prefill_attention_is_as_close_to_float64_as_torch(heads, kv_heads, dim, dtype) -> None:
    """Whole prompts, chunks behind a cached prefix, single tokens, and a sequence without a query."""
    lengths, counts = [1, 63, 64, 65, 300, 700, 200, 130], [1, 63, 64, 65, 300, 37, 1, 0]
    _, k, v, tables, ends = cached(lengths, heads, kv_heads, dim, dtype)
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    q = tensor(sum(counts), heads * dim + 8, seed=5, scale=2.0, dtype=dtype)[:, :-8].unflatten(1, (heads, dim))
    given = (q, k, v, tables, ends, starts, dim**-0.5)
    assert refusal("prefill_attention", *given) is None
    out = fast.prefill_attention(*given)
    expected = torchs.prefill_attention(q, k, v, tables, ends, starts, dim**-0.5)
    truth = torchs.prefill_attention(q.double(), k.double(), v.double(), tables, ends, starts, dim**-0.5)
    assert_as_close_as(out, expected, truth)
    for row, (first, last) in enumerate(pairwise(starts.tolist())):
        if first < last:
            mine = (tables[row : row + 1], ends[row : row + 1], torch.tensor([0, last - first]))
            assert torch.equal(fast.prefill_attention(q[first:last], k, v, *mine, dim**-0.5), out[first:last])


def test_queries_far_apart_do_not_overflow() -> None:
    _, k, v, tables, lengths = cached([300], 14, 2, 64)
    q, starts = tensor(300, 14, 64, seed=6, scale=200.0), torch.tensor([0, 300])
    out = fast.prefill_attention(q, k, v, tables, lengths, starts, 1.0)
    truth = torchs.prefill_attention(q.double(), k.double(), v.double(), tables, lengths, starts, 1.0)
    assert_as_close_as(out, torchs.prefill_attention(q, k, v, tables, lengths, starts, 1.0), truth)


def test_a_block_table_may_be_part_of_a_wider_one() -> None:
    q, k, v, tables, counts = cached([40, 70], 14, 2, 64)
    wider = torch.cat((tables, torch.full((2, 11), 1 << 30, dtype=torch.int32)), dim=1)[:, : tables.shape[1]]
    expected = fast.decode_attention(q, k, v, tables, counts, 0.125)
    assert torch.equal(fast.decode_attention(q, k, v, wider, counts, 0.125), expected)


def test_a_key_that_is_no_number_is_not_hidden() -> None:
    q, k, v, tables, counts = cached([40, 70], 14, 2, 64)
    k[tables[1, 0], 3, 1, 5] = torch.nan
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    expected = torch.zeros(2, 14, dtype=torch.bool)
    expected[1, 7:] = True  # the heads of the second key-value head
    for out in (
        fast.decode_attention(q, k, v, tables, counts, 0.125),
        fast.prefill_attention(q, k, v, tables, counts, starts, 0.125),
    ):
        assert torch.equal(out.isnan().all(-1), expected)
        assert torch.equal(out.isnan().any(-1), expected)


def softmax_attention(q, k, v, tables, counts, scale: float) -> torch.Tensor:
    """decode_attention in float64, by its formula."""
    rows = []
    for query, table, count in zip(q.double(), tables.long(), counts.tolist(), strict=True):
        keys, values = (pages.double()[table].flatten(0, 1)[:count] for pages in (k, v))
        group = len(query) // keys.shape[1]
        keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
        weights = torch.einsum("hd,thd->ht", query, keys).mul(scale).softmax(-1)
        rows.append(torch.einsum("ht,thd->hd", weights, values))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", build.DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_attention_is_as_finite_as_its_formula(where: str, value: float, dtype: torch.dtype) -> None:
    """One such number among those that are seen, in a first block of tokens and in a later one."""
    for token in (3, 150):
        q, k, v, tables, counts = cached([40, 200], 14, 2, 64, dtype)
        if where == "q":
            q[1, 9, 5] = value
        else:
            {"k": k, "v": v}[where][tables[1, token // 16], token % 16, 1, 5] = value
        truth = softmax_attention(q, k, v, tables, counts, 0.125)
        starts = torch.tensor([0, 1, 2], dtype=torch.int32)
        for out in (
            fast.decode_attention(q, k, v, tables, counts, 0.125),
            fast.prefill_attention(q, k, v, tables, counts, starts, 0.125),
        ):
            assert_same_where_not_finite(out, truth)


def test_a_block_of_keys_that_weigh_nothing_hides_no_other() -> None:
    """All scores of the first block are -infinity, as they are before anything is seen."""
    q, k, v, tables, counts = cached([200, 200], 14, 2, 64)
    q[:, :, 5] = 1.0
    for length in (64, 128, 200):
        k[tables[1].long().repeat_interleave(16)[:length], torch.arange(length) % 16, :, 5] = -torch.inf
        truth = softmax_attention(q, k, v, tables, counts, 0.125)
        assert truth[1].isnan().all() == (length == 200)
        starts = torch.tensor([0, 1, 2], dtype=torch.int32)
        for out in (
            fast.decode_attention(q, k, v, tables, counts, 0.125),
            fast.prefill_attention(q, k, v, tables, counts, starts, 0.125),
        ):
            assert_same_where_not_finite(out, truth)


def assert_same_where_not_finite(out: torch.Tensor, truth: torch.Tensor) -> None:
    """NaN and the infinities stand in the same places; what else there is, is close."""
    out, truth = out.double(), truth.double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(out), kind(truth)), kind.__name__
    finite = truth.isfinite()
    assert_as_close_as(out[finite].bfloat16(), truth[finite].bfloat16(), truth[finite])


@pytest.mark.parametrize("dtype", build.DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("tokens", [3, 21])
def test_what_is_not_finite_stays_so(monkeypatch, tokens: int, value: float, dtype: torch.dtype) -> None:
    """One such number in each argument of each op."""
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", False)
    shapes = (tokens, 96), (tokens, 96), (96,), (14, 96), (14,), (tokens, 14), (tokens, 3, 32)
    x, residual, norm, w, bias, addend, heads = (tensor(*s, seed=at, dtype=dtype) for at, s in enumerate(shapes))
    calls = {
        "linear": (x, w, bias, addend),
        "norm_linear": (x, norm, EPS, w, bias),
        "norm_swiglu_linear": (x, norm, EPS, w),
        "lm_head": (x, norm, EPS, w),
        "add_rms_norm": (x, residual, norm, EPS),
        "rms_norm": (x, norm, EPS),
        "silu_mul": (x, residual),
        "apply_rope": (heads, heads + 1, angles(tokens, 32), torch.arange(tokens)),
        "embedding": (torch.arange(tokens) % 14, w),
    }
    for name, given in calls.items():
        for place, spoiled in enumerate(given):
            if not isinstance(spoiled, torch.Tensor) or not spoiled.is_floating_point():
                continue
            args = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
            args[place].view(-1)[args[place].numel() // 2 + 1] = value
            outs, expected = getattr(kernels, name)(*args), getattr(torchs, name)(*args)
            for out, peer in zip(
                *(each if isinstance(each, tuple) else (each,) for each in (outs, expected)), strict=True
            ):
                for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                    assert torch.equal(kind(out), kind(peer)), (name, place, kind.__name__)


@pytest.mark.parametrize("dtype", build.DTYPES, ids=str)
def test_zeros_keep_their_sign(dtype) -> None:
    x = tensor(3, 64, seed=0, dtype=dtype)
    x[:, ::2] = -0.0
    weight, tiny = tensor(64, seed=1, dtype=dtype), torch.full((3, 64), 1e-39, dtype=dtype)  # subnormal
    for name, args in {"rms_norm": (x, weight, EPS), "silu_mul": (x, tiny + 1)}.items():
        out, expected = getattr(fast, name)(*args), getattr(torchs, name)(*args)
        assert torch.equal(out.signbit(), expected.signbit())
        assert torch.equal(out == 0, expected == 0)
    assert torch.equal(fast.rms_norm(tiny, weight, EPS), torchs.rms_norm(tiny, weight, EPS))


def test_scores_far_apart_do_not_overflow() -> None:
    q, k, v, tables, counts = cached([300], 14, 2, 64)
    q = q * 100
    out = fast.decode_attention(q, k, v, tables, counts, 1.0)
    truth = torchs.decode_attention(q.double(), k.double(), v.double(), tables, counts, 1.0)
    assert_as_close_as(out, torchs.decode_attention(q, k, v, tables, counts, 1.0), truth)


@pytest.mark.parametrize("dtype", build.DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (16, 2, 128), (5, 5, 32)])
def test_rope_and_cache_is_as_close_to_float64_as_torch(heads: int, kv_heads: int, dim: int, dtype) -> None:
    qkv = tensor(5, (heads + 2 * kv_heads) * dim + 8, seed=0, dtype=dtype)[:, :-8]
    cos_sin = angles(64, dim)
    positions, slots = torch.tensor([3, 0, 63, 9, 9]), torch.tensor([31, 2, 0, 17, 5])
    pages = torch.zeros(2, 2, 16, kv_heads, dim, dtype=dtype)
    out = fast.rope_and_cache(qkv, positions, cos_sin, *pages, slots)
    same, wide = torch.zeros_like(pages), torch.zeros_like(pages, dtype=torch.float64)
    expected = torchs.rope_and_cache(qkv, positions, cos_sin, *same, slots)
    truth = torchs.rope_and_cache(qkv.double(), positions, cos_sin.double(), *wide, slots)
    assert_as_close_as(out, expected, truth)
    assert_as_close_as(pages[0], same[0], wide[0])
    assert torch.equal(pages[1], same[1])


def test_norm_qkv_rope_is_its_two_halves(monkeypatch) -> None:
    """Bit for bit; they are public ops, which here run in C."""
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", False)
    x, norm, bias = tensor(3, 64, seed=0), tensor(64, seed=2), tensor(4 * 32, seed=3)
    weight, cos_sin = tensor(4 * 32, 64, seed=4), angles(64, 32)
    positions, slots = torch.tensor([3, 0, 63]), torch.tensor([31, 2, 17])
    pages, same = (torch.zeros(2, 2, 16, 1, 32, dtype=torch.bfloat16) for _ in range(2))
    q = fast.norm_qkv_rope(x, norm, EPS, weight, bias, positions, cos_sin, *pages, slots)
    qkv = fast.norm_linear(x, norm, EPS, weight, bias)
    assert torch.equal(q, fast.rope_and_cache(qkv, positions, cos_sin, *same, slots))
    assert torch.equal(pages, same)


def as_close_as_torch(name: str, *args, threads: int = 2):
    """The op in C, whose bits may not depend on the number of threads."""
    outs, expected = getattr(fast, name)(*args), getattr(torchs, name)(*args)
    truths = getattr(torchs, name)(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        again = getattr(fast, name)(*args)
    finally:
        torch.set_num_threads(before)
    for all_of_it in zip(*(x if isinstance(x, tuple) else (x,) for x in (outs, expected, truths, again)), strict=True):
        out, peer, truth, other = all_of_it
        assert out.is_contiguous()
        assert_as_close_as(out, peer, truth)
        assert torch.equal(out, other)
    return outs


@pytest.mark.parametrize("dtype", build.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 896), (2, 5, 2048), (300, 896), (896,)], ids=str)
def test_norms_are_as_close_to_float64_as_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = tensor(*shape, seed=0, dtype=dtype), tensor(*shape, seed=1, scale=3.0, dtype=dtype)
    weight = tensor(shape[-1], seed=2, dtype=dtype)
    assert refusal("rms_norm", x, weight, EPS) is None
    as_close_as_torch("rms_norm", x, weight, EPS)
    _, new_residual = as_close_as_torch("add_rms_norm", x, residual, weight, EPS)
    assert torch.equal(new_residual, residual + x)
    tiny = x * 1e-4
    as_close_as_torch("rms_norm", tiny, weight, 1e-5)


@pytest.mark.parametrize("dtype", build.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 4864), (5, 77), (2, 3, 2049), (100, 896), (33,)], ids=str)
def test_swiglu_is_as_close_to_float64_as_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up = tensor(*shape[:-1], 2 * shape[-1], seed=0, scale=4.0, dtype=dtype)
    assert refusal("swiglu", gate_up) is None
    out = as_close_as_torch("swiglu", gate_up)
    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    assert torch.equal(as_close_as_torch("silu_mul", gate, up), out)


def test_silu_far_from_zero() -> None:
    gate = torch.tensor([-300.0, -89.0, -88.0, -20.0, -0.0, 0.0, 20.0, 300.0, torch.inf, torch.nan]).bfloat16()
    expected = torch.nn.functional.silu(gate)
    torch.testing.assert_close(fast.silu_mul(gate, torch.ones_like(gate)), expected, rtol=0, atol=1e-30, equal_nan=True)


def test_rows_of_norms_and_swiglu_may_have_any_stride() -> None:
    x, residual, weight = tensor(5, 70, seed=0)[:, 3:67], tensor(5, 64, seed=1), tensor(64, seed=2)
    dense = x.contiguous()
    assert torch.equal(fast.rms_norm(x, weight, EPS), fast.rms_norm(dense, weight, EPS))
    for mixed, plain in zip(
        fast.add_rms_norm(x, residual, weight, EPS),
        fast.add_rms_norm(dense, residual, weight, EPS),
        strict=True,
    ):
        assert torch.equal(mixed, plain)
    assert torch.equal(fast.silu_mul(x, residual), fast.silu_mul(dense, residual))
    assert torch.equal(fast.swiglu(x), fast.swiglu(dense))
    turned = tensor(4, 3, 64, seed=3).transpose(0, 1)
    assert torch.equal(fast.rms_norm(turned, weight, EPS), fast.rms_norm(turned.contiguous(), weight, EPS))


def angles(context: int, dim: int) -> torch.Tensor:
    """A table of cosines and sines."""
    radians = torch.rand(context, dim // 2, generator=torch.Generator().manual_seed(1)) * 6.3
    return torch.cat((radians.cos(), radians.sin()), dim=-1)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (16, 2, 128), (5, 5, 32), (3, 1, 96)])
@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("dtype", build.DTYPES, ids=str)
def test_apply_rope_is_as_close_to_float64_as_torch(dtype, tokens: int, heads: int, kv_heads: int, dim: int) -> None:
    packed = tensor(tokens, (heads + kv_heads) * dim + 8, seed=0, dtype=dtype)[:, :-8].unflatten(1, (-1, dim))
    q, k = packed.split((heads, kv_heads), dim=1)
    cos_sin, positions = angles(100, dim), torch.arange(tokens).flip(0) + 20
    assert refusal("apply_rope", q, k, cos_sin, positions) is None
    out = fast.apply_rope(q, k, cos_sin, positions)
    expected = torchs.apply_rope(q, k, cos_sin, positions)
    truth = torchs.apply_rope(q.double(), k.double(), cos_sin.double(), positions)
    for mine, peer, exact in zip(out, expected, truth, strict=True):
        assert mine.is_contiguous()
        assert_as_close_as(mine, peer, exact)
    backwards = fast.apply_rope(q, k, cos_sin, positions, inverse=True)
    mirrored = torch.cat((cos_sin[:, : dim // 2], -cos_sin[:, dim // 2 :]), dim=-1)
    turned = q.transpose(0, 1).contiguous().transpose(0, 1)  # heads that are not dense
    for mine, peer in zip(backwards, fast.apply_rope(turned, k, mirrored, positions), strict=True):
        assert torch.equal(mine, peer)


@pytest.mark.parametrize("dtype", build.DTYPES, ids=str)
def test_the_public_ops_run_in_c(monkeypatch, dtype) -> None:
    """Nothing else can be recorded."""
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", False)
    x, weight, heads = (tensor(*s, seed=0, dtype=dtype) for s in ((3, 64), (64,), (3, 2, 32)))
    calls = {
        "rms_norm": (x, weight, EPS),
        "add_rms_norm": (x, x, weight, EPS),
        "silu_mul": (x, x),
        "swiglu": (x,),
        "apply_rope": (heads, heads, angles(8, 32), torch.tensor([7, 0, 3])),
    }
    for name, args in calls.items():
        recorded = c_backend.RecordedCalls()
        with recorded.record():
            outs = getattr(kernels, name)(*args)
        recorded.replay()
        direct = getattr(fast, name)(*args)
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (outs, direct)), strict=True):
            assert torch.equal(one, other)


def test_a_refusal_says_why() -> None:
    """In the words of the ops' own arguments. The limits are the library's."""
    x, w, norm = tensor(1, 32, seed=0), tensor(8, 32, seed=1), tensor(32, seed=2)
    heads, pages = tensor(1, 2, 48, seed=0), torch.zeros(1, 16, 1, 48).bfloat16()
    many = (tensor(1, 17, 64, seed=0), torch.zeros(1, 16, 1, 64).bfloat16())
    cos_sin, first = angles(8, 48), torch.tensor([0])
    assert refusal("linear", x, w) is None
    odd = tensor(1, 24, seed=0)
    of = "a multiple of"
    for reason, said in (
        (refusal("linear", odd, odd), f"rows of 24 values ({of} 32)"),
        (refusal("norm_linear", odd, odd[0], EPS, odd), f"rows of 24 values ({of} 32)"),
        (refusal("norm_swiglu_linear", odd, odd[0], EPS, odd), f"rows of 24 values ({of} 32)"),
        (refusal("lm_head", odd, odd[0], EPS, odd), f"rows of 24 values ({of} 32)"),
        (refusal("linear", x.half(), w.half()), "float16 (C takes bfloat16 and float32)"),
        (refusal("rms_norm", odd, odd[0], EPS), f"rows of 24 values ({of} 16)"),
        (refusal("add_rms_norm", odd, odd, odd[0], EPS), f"rows of 24 values ({of} 16)"),
        (refusal("silu_mul", norm.half(), norm.half()), "float16 (C takes bfloat16 and float32)"),
        (refusal("swiglu", norm.double()), "float64 (C takes bfloat16 and float32)"),
        (refusal("apply_rope", heads, heads, cos_sin, first), f"heads of 48 values ({of} 32 up to 128)"),
        (
            refusal("rope_and_cache", heads.flatten(1), first, cos_sin, pages, pages, first),
            f"heads of 48 values ({of} 32 up to 128)",
        ),
        (
            refusal("decode_attention", many[0], many[1], many[1], first[None], first, 1.0),
            "17 query heads for each of the cache's (at most 16)",
        ),
        (
            refusal("prefill_attention", heads, pages, pages, first[None], first, first, 1.0),
            f"heads of 48 values ({of} 32 up to 128)",
        ),
    ):
        assert reason == said


def test_what_torch_multiplies_faster_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(build, "_found", c_backend.prepared()._replace(multiplies=False))
    assert c_backend.prepared().limits.max_few_tokens == FEW
    x = tensor(FEW + 1, 32, seed=0)
    assert refusal("linear", x[:FEW], x) is None
    assert refusal("linear", x, x) == "17 tokens of bfloat16, which torch multiplies faster on this processor"
    q, k, v, tables, counts = cached([40], 14, 2, 64)
    assert refusal("decode_attention", q, k, v, tables, counts, 0.125) is None
    said = refusal("prefill_attention", q, k, v, tables, counts, torch.tensor([0, 1]), 0.125)
    assert said == "several tokens a sequence, which torch multiplies faster here"


def test_many_tokens_of_float32_are_left_to_torch() -> None:
    x = tensor(FEW + 1, 32, seed=0, dtype=torch.float32)
    assert refusal("linear", x[:FEW], x) is None
    assert refusal("linear", x, x) == "17 tokens of float32, which torch multiplies faster on this processor"


def test_a_refusal_prepares_nothing(monkeypatch) -> None:
    build.forget()
    monkeypatch.setattr(build, "_prepared", None)
    x = tensor(2, 32, seed=0)
    assert refusal("linear", x, x) == build.NOT_PREPARED
    assert refusal("linear", x.half(), x.half()) == "float16 (C takes bfloat16 and float32)"


def test_what_has_no_backend_of_its_own_here_is_refused_by_its_format() -> None:
    class Other(Dense):
        format = "other of test_ops"

    del weights.FORMATS[Other.format]
    x = tensor(1, 32, seed=0)
    assert refusal("linear", x, Other(x)) == f"weights of the format other of test_ops (C has {C_WEIGHTS})"

    class OtherPages(DensePages):
        format = "other of test_ops"

    del pages_formats[OtherPages.format]
    q, k, v, tables, counts = cached([40], 14, 2, 64)
    said = refusal("decode_attention", q, OtherPages(k, v), tables, counts, 0.125)
    assert said == "pages of the format other of test_ops (C has dense, float16, int8, fp8)"


def test_recorded_calls_run_on_new_values() -> None:
    w, ids = tensor(8, 64, seed=1), torch.tensor([3, 1])
    recorded = c_backend.RecordedCalls()
    with recorded.record():
        out = fast.linear(fast.embedding(ids, w), w)[:, :4]
    for chosen in ([3, 1], [0, 7]):
        ids.copy_(torch.tensor(chosen))
        recorded.replay()
        assert torch.equal(out, fast.linear(w[ids], w)[:, :4])
    assert not c_backend.is_recording()


def test_recording_may_be_what_first_needs_the_library(monkeypatch) -> None:
    """They are loaded, and what is not yet known is measured, while it records."""
    monkeypatch.undo()
    monkeypatch.delenv("QWENKERN_KERNELS", raising=False)
    monkeypatch.setattr(choose, "WEIGHTS", 1 << 20)
    monkeypatch.setattr(choose, "remembered", lambda *_: None)
    monkeypatch.setattr(choose, "remember", lambda *_: None)
    few, many = tensor(2, 64, seed=0), tensor(FEW + 1, 64, seed=1)
    build.forget()
    recorded = c_backend.RecordedCalls()
    with recorded.record():
        refusal("linear", many, many)
        out = fast.linear(few, few)
    recorded.replay()
    assert torch.equal(out, fast.linear(few, few))


@pytest.mark.parametrize("compute", [lambda x: x + 1, lambda x: x.float(), lambda x: x.sum().item()])
def test_what_torch_computes_cannot_be_recorded(compute: Callable) -> None:
    x = tensor(2, 64, seed=0)
    with pytest.raises(c_backend.CannotRecord, match=r"is not in C"), c_backend.RecordedCalls().record():
        compute(x)
    assert not c_backend.is_recording()
    assert fast.linear(x, x).isfinite().all()


def test_recorded_calls_of_the_other_ops_match_them() -> None:
    q, k, v, tables, lengths = cached([70, 300], 14, 2, 64)
    positions, slots = torch.tensor([69, 299]), torch.tensor([5, 9])
    qkv, cos_sin = tensor(2, 18 * 64, seed=7), torch.rand(512, 64)
    recorded, pages, others = c_backend.RecordedCalls(), torch.zeros_like(k), torch.zeros_like(k)
    with recorded.record():
        out = fast.decode_attention(q, k, v, tables, lengths, 0.125)
        rotated = fast.rope_and_cache(qkv, positions, cos_sin, pages, others, slots)
    recorded.replay()
    assert torch.equal(out, fast.decode_attention(q, k, v, tables, lengths, 0.125))
    again = torch.zeros_like(k), torch.zeros_like(k)
    assert torch.equal(rotated, fast.rope_and_cache(qkv, positions, cos_sin, *again, slots))
    assert torch.equal(pages, again[0])
    assert torch.equal(others, again[1])


@pytest.mark.parametrize("form", repack.FORMATS)
def test_blocks_of_a_file_are_repacked(form: str) -> None:
    """In every byte as torch does it, whose values are compared with the gguf library's elsewhere."""
    gguf = pytest.importorskip("gguf")
    from qwenkern.checkpoint.repack import _in_torch

    kind = gguf.GGMLQuantizationType[form.upper()]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = torch.randint(0, 256, (48, 512 // values * size), generator=torch.Generator().manual_seed(0)).byte()
    made, expected = (
        FORMATS[form].allocate(48, 512, torch.float32, lambda shape, dtype: torch.full(shape, 77).to(dtype))
        for _ in range(2)
    )
    assert repack.repack([(blocks, made)]) == [_in_torch(blocks.numpy(), kind, expected)]
    assert all(map(torch.equal, made.tensors, expected.tensors))


@pytest.mark.parametrize(
    ("order", "bits"),
    [
        (repack_words.ROWS, 4),
        (repack_words.ROWS, 8),
        (repack_words.COLUMNS, 4),
        (repack_words.COLUMNS, 8),
        (repack_words.AWQ, 4),
    ],
)
def test_words_of_codes_are_repacked(order: int, bits: int) -> None:
    """In every byte as torch does it, whose values are compared with the formats' specifications elsewhere."""
    rows, columns, each = 48, 160, 32 // bits
    shape = {
        repack_words.ROWS: (rows, columns // each),
        repack_words.COLUMNS: (columns // each, rows),
        repack_words.AWQ: (columns, rows // 8),
    }[order]
    words = torch.randint(-(1 << 31), 1 << 31, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    of_groups = {"scales": torch.ones(rows, 1).half(), "zeros": torch.zeros(rows, 1)}
    for flip in (0, -0x7F7F7F80):
        made = torch.full((rows // 16, columns // 32, bits, 16), 77, dtype=torch.int32)
        repack_words.repack_words(words, order, made, bits, flip)
        codes = Words(words, order, bits, flip).codes()
        assert torch.equal(made, FORMATS[f"int{bits}"].from_codes(codes, torch.float32, **of_groups).codes)


@pytest.mark.parametrize("dtype", build.DTYPES, ids=str)
def test_plain_loops_compute_the_same(request, dtype) -> None:
    """Each op by both: they differ by the order of their sums, which is a rounding here and there."""
    if isinstance(c_backend.library(), Plain) or emulated.is_emulated():
        pytest.skip("needs a library with both")
    shapes = (5, 96), (5, 96), (96,), (14, 96), (14,), (5, 14), (5, 3, 32)
    x, residual, norm, w, bias, addend, heads = (tensor(*s, seed=at, dtype=dtype) for at, s in enumerate(shapes))
    cos_sin, positions = angles(9, 32), torch.tensor([8, 0, 3, 3, 1])
    q, k, v, tables, lengths = cached([70, 300], 14, 2, 64, dtype)
    starts = torch.tensor([0, 1, 2])
    calls = {
        "linear": (x, w, bias, addend),
        "norm_linear": (x, norm, EPS, w, bias),
        "norm_swiglu_linear": (x, norm, EPS, w),
        "lm_head": (x, norm, EPS, w),
        "embedding": (positions, w),
        "add_rms_norm": (x, residual, norm, EPS),
        "silu_mul": (x, residual),
        "apply_rope": (heads, heads[:, :1], cos_sin, positions, True),
        "decode_attention": (q, k, v, tables, lengths, 0.125),
        "prefill_attention": (q, k, v, tables, lengths, starts, 0.125),
    }
    here = c_backend.prepared()
    for name, args in calls.items():
        op, truth = getattr(fast, name), getattr(torchs, name)
        outs = op(*args)
        build._found = here._replace(library=Plain(here.library))
        plain = op(*args)
        build._found = here
        peers, exact = truth(*args), truth(*(each.double() if _is_real(each) else each for each in args))
        for one, other, peer, right in zip(
            *(each if isinstance(each, tuple) else (each,) for each in (outs, plain, peers, exact)), strict=True
        ):
            assert_as_close_as(one, [other, peer], right)
            assert_as_close_as(other, [one, peer], right)


def _is_real(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()

"""The kernels' own tests on the PTX that Triton compiles for several GPUs, on a machine without them. test_pieces.py
shows that the runner reports what is missing in a kernel.

All tests run in a second process, in which Triton compiles (on_ptx.py)."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import test_decode_attention
import test_dequantise
import test_draw
import test_float16_pages
import test_linear
import test_lm_head
import test_penalise
import test_prefill_attention
import test_qkv_rope
import test_rms_norm
import test_rms_norm_backward
import test_rope
import test_scaled_pages
import test_swiglu
import test_swiglu_backward
import test_weights
import torch
from ptx import on_ptx
from ptx.compiling import compiling_process

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED = 1
# Their code differs: kernels are launched dependently from sm_90 on, and store matrices; sm_120 has pairs of float32.
ALL = ("sm_80", "sm_90", "sm_120")
HOPPER = ("sm_90",)
PARAM = type(pytest.param())
# On sm_90 prefill attention has one loop. Triton 3.7.1 puts the loop's fence.proxy.async before the wait for the copies
# of the values, which the runner reports. Triton 3.6.0 puts no such fence there; on an H100 the results are right.
NOT_HOPPER = ("sm_80", "sm_120")

TESTS: list[tuple[tuple[str, ...], Callable[..., None], dict[str, Any]]] = [
    (HOPPER, test_linear.test_programs_share_a_tile, {"tokens": 1}),  # split K, in two launches
    (ALL, test_linear.test_norm_linear, {"n": 97, "k": 896, "tokens": 7, "dtype": BF16}),
    (ALL, test_linear.test_norm_linear, {"n": 97, "k": 896, "tokens": 2, "dtype": F32}),
    (ALL, test_linear.test_odd_sizes, {"n": 17, "k": 257}),
    (ALL, test_linear.test_odd_sizes, {"n": 5, "k": 7}),
    (ALL, test_linear.test_linear_with_bias_and_addend, {"tokens": 16, "dtype": F16}),
    (ALL, test_linear.test_norm_swiglu_linear, {"tokens": 5, "dtype": BF16}),
    (HOPPER, test_linear.test_strided_rows, {}),
    (ALL, test_weights.test_a_tile_of_gate_and_up, {"form": "int4", "tokens": 1}),
    (HOPPER, test_weights.test_a_tile_of_gate_and_up, {"form": "q6_k", "tokens": 5}),
    (HOPPER, test_weights.test_a_tile_of_gate_and_up, {"form": "q5_1", "tokens": 1}),
    (HOPPER, test_weights.test_a_tile_of_gate_and_up, {"form": "q8_0", "tokens": 1}),
    (ALL, test_weights.test_a_tile_of_gate_and_up, {"form": "fp8", "tokens": 1}),
    (HOPPER, test_weights.test_a_tile_of_gate_and_up, {"form": "fp8", "tokens": 5}),
    (ALL, test_dequantise.test_the_bits_are_those_of_the_format, {"form": "q6_k", "dtype": BF16}),
    (HOPPER, test_dequantise.test_the_bits_are_those_of_the_format, {"form": "q5_k", "dtype": F16}),
    (HOPPER, test_dequantise.test_the_bits_are_those_of_the_format, {"form": "q8_0", "dtype": F32}),
    (ALL, test_dequantise.test_rows_of_fp8_are_any, {}),
    (HOPPER, test_dequantise.test_columns_that_are_no_multiple_of_a_block, {"form": "q5_1"}),
    (ALL, test_dequantise.test_embedding, {"form": "q4_k"}),
    (HOPPER, test_dequantise.test_embedding, {"form": "fp8"}),
    (HOPPER, test_dequantise.test_products_in_turns, {"form": "int4"}),
    (ALL, test_decode_attention.test_heads_of_the_family, {"heads": (16, 2, 128)}),
    (ALL, test_decode_attention.test_heads_of_the_family, {"heads": (14, 2, 64)}),
    (HOPPER, test_decode_attention.test_several_splits_a_program, {}),
    (HOPPER, test_decode_attention.test_bits_are_batch_invariant, {}),
    (HOPPER, test_decode_attention.test_rows_of_one_sequence_are_as_one_by_one, {}),
    (ALL, test_decode_attention.test_one_split, {"length": 40, "spare_pages": 0}),
    (HOPPER, test_decode_attention.test_ragged_lengths, {"page_size": 64, "dtype": F32}),
    (ALL, test_lm_head.test_lm_head, {"tokens": 5, "dtype": BF16}),
    (ALL, test_lm_head.test_top_k, {"tokens": 5, "vocabulary": 40, "k": 2}),
    (ALL, test_lm_head.test_top_k, {"tokens": 1, "vocabulary": 403, "k": 16}),
    (ALL, test_qkv_rope.test_norm_qkv_rope, {"tokens": 7, "heads": (5, 3, 32), "dtype": BF16}),
    (ALL, test_qkv_rope.test_v_is_not_rotated, {}),
    (ALL, test_rope.test_rope_and_cache, {"tokens": 7, "heads": (5, 3, 32), "dtype": BF16}),
    (ALL, test_rope.test_apply_rope, {"heads": (5, 3, 32), "dtype": F16}),
    (ALL, test_rms_norm.test_rms_norm, {"rows": 7, "hidden": 896, "dtype": BF16}),
    (ALL, test_rms_norm.test_add_rms_norm, {"rows": 7, "hidden": 77, "dtype": F16}),
    (ALL, test_rms_norm_backward.test_add_rms_norm, {"rows": 7, "hidden": 77, "dtype": BF16}),
    (ALL, test_rms_norm_backward.test_many_programs, {"rows": 259}),
    (ALL, test_swiglu.test_swiglu, {"columns": 257, "rows": 7, "dtype": BF16}),
    (ALL, test_swiglu_backward.test_swiglu_backward, {"columns": 257, "rows": 7, "dtype": BF16}),
    (ALL, test_penalise.test_the_bits_are_those_of_torch, {"rows": 2, "vocabulary": 503}),
    (ALL, test_draw.test_a_draw_is_that_of_sorting, {"vocabulary": 700, "seed": 0}),
    (NOT_HOPPER, test_prefill_attention.test_ragged_batch, {}),
    (ALL, test_prefill_attention.test_cached_prefixes, {"page_size": 16, "prefix": 1, "dtype": F32}),
    (NOT_HOPPER, test_prefill_attention.test_heads_of_the_family, {"heads": (3, 3, 32)}),
    (HOPPER, test_prefill_attention.test_loops, {"one_loop": 0}),
    (ALL, test_float16_pages.test_the_bits_are_those_of_numpy, {"name": "kernels", "dtype": BF16}),
    (ALL, test_scaled_pages.test_codes_are_nearest_and_scales_of_the_largest, {"form": "int8", "dtype": BF16}),
    (ALL, test_scaled_pages.test_codes_are_nearest_and_scales_of_the_largest, {"form": "fp8", "dtype": BF16}),
    (HOPPER, test_scaled_pages.test_what_is_not_finite_or_tiny, {"form": "int8", "by": "kernels"}),
    (HOPPER, test_scaled_pages.test_a_sequence_decodes_to_the_same_bits_alone, {"form": "int8"}),
    (HOPPER, test_scaled_pages.test_a_sequence_decodes_to_the_same_bits_alone, {"form": "fp8"}),
    (NOT_HOPPER, test_scaled_pages.test_attention_over_unusual_sizes, {"form": "int8", "dtype": BF16, "size": 64}),
    (NOT_HOPPER, test_scaled_pages.test_attention_over_unusual_sizes, {"form": "fp8", "dtype": BF16, "size": 16}),
    (NOT_HOPPER, test_scaled_pages.test_attention_over_unusual_sizes, {"form": "int8", "dtype": F16, "size": 16}),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "parameters" in metafunc.fixturenames:
        chosen = [*every_test()] if metafunc.config.getoption("ptx_all") else TESTS
        metafunc.parametrize(("key", "test", "parameters"), list(cases(chosen)))


def every_test() -> Iterator[tuple[tuple[str, ...], Callable[..., None], dict[str, Any]]]:
    """All tests of the files of TESTS that run an op on a device, with all their parameters."""
    for module in dict.fromkeys(sys.modules[test.__module__] for _, test, _ in TESTS):
        for name, test in vars(module).items():
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name in ("gpu", "slow")]
            if not name.startswith("test_") or marks or re.search("bad_|registration|beyond_two", name):
                continue
            for parameters in parametrized(test):
                if set(inspect.signature(test).parameters) - set(parameters) == {"ops", "device"}:
                    yield ALL, test, parameters


def parametrized(test: Callable[..., None]) -> list[dict[str, Any]]:
    """Each combination of the parameters that its marks give it."""
    sets: list[dict[str, Any]] = [{}]
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, given = mark.args
            several = not isinstance(names, str)
            rows = [each.values if isinstance(each, PARAM) else each if several else (each,) for each in given]
            sets = [
                known | dict(zip(names if several else [names], row, strict=True)) for known in sets for row in rows
            ]
    return sets


def cases(chosen: Iterable[tuple[tuple[str, ...], Callable[..., None], dict[str, Any]]]) -> Iterator[Any]:
    for keys, test, parameters in chosen:
        values = [str(value).removeprefix("torch.") for value in parameters.values()]
        name = "-".join([f"{test.__module__}.{test.__name__}".replace("test_", ""), *values])
        for key in keys:
            yield pytest.param(key, test, parameters, id=f"{key}-{name}-seed{SEED}", marks=group(key))


def group(key: str) -> pytest.MarkDecorator:
    """One process compiles for an architecture, and keeps what it has compiled."""
    return pytest.mark.xdist_group(f"ptx {key}")


on_all = pytest.mark.parametrize("key", [pytest.param(key, marks=group(key)) for key in ALL])


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with compiling_process() as process:
        yield process


def test_a_kernel_passes_its_test(process, key, test, parameters):
    """CTAs and warps in an order by the seed, and none of what the runner reports."""
    process.submit(on_ptx.run, key, SEED, test, parameters).result()


@on_all
@pytest.mark.parametrize("op", ["linear", "norm_linear", "norm_swiglu_linear", "lm_head"])
def test_bits_are_batch_invariant(process, key, op):
    assert process.submit(on_ptx.counts_with_other_bits, key, SEED, op, (1, 2, 3, 5, 8)).result() == []


@pytest.mark.parametrize("key", [pytest.param(key, marks=group(key)) for key in HOPPER])
@pytest.mark.parametrize(
    ("form", "op", "k"),
    [
        ("int4", "norm_swiglu_linear", 256),  # x in registers
        ("int4", "linear", 4096),  # and streamed, with two programs a tile
        ("q6_k", "norm_linear", 512),  # groups of 16
        ("fp8", "linear", 256),
    ],
)
def test_bits_are_batch_invariant_over_quantised_weights(process, key, form, op, k):
    assert process.submit(on_ptx.counts_with_other_bits_over_quantised, key, form, op, k, (1, 5)).result() == []


@on_all
@pytest.mark.parametrize("form", ["int4", "q2_k", "fp8"])
def test_bits_over_quantised_weights_are_batch_invariant(process, key, form):
    assert process.submit(on_ptx.counts_with_other_bits_of, form, key, SEED, (1, 2, 3, 5, 8)).result() == []


@on_all
def test_an_id_that_there_is_not_ends_the_kernel(process, key):
    """As torch's indexing on a GPU does. There are 48 rows, and negative ids count from the end."""
    assert process.submit(on_ptx.fault_of_ids, key, [3, 47, -48]).result() == ""
    for wrong in (48, -49, 1 << 40):
        assert "trap" in process.submit(on_ptx.fault_of_ids, key, [3, wrong, 0]).result()

"""The cases of the benchmarks: their byte counts, and a case for every kernel of the model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.references import mapped, tensors_of
from support.tolerances import assert_as_close_as

from qwenkern import Config
from qwenkern.benchmarks.ops.cases import CASES, Size
from qwenkern.kernels import Pages, Weight, reference
from qwenkern.kernels.dispatch import OPS

QWEN_3B = Config.from_name("qwen2.5-3b")
TINY = Config(97, 64, 96, 1, 4, 2, 16, max_position_embeddings=128)
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    ("name", "megabytes"), [("qkv", 10.5), ("o_proj", 8.4), ("gate_up", 90.2), ("down", 45.1), ("lm_head", 622.3)]
)
def test_one_token_reads_the_weights_of_3b(name, megabytes):
    """The byte counts equal those of the model card: 2 bytes times rows times columns."""
    moved = BY_NAME[name].bytes_moved(QWEN_3B, Size(1))
    assert moved / 1e6 == pytest.approx(megabytes, rel=0.005)


@pytest.mark.parametrize(
    ("name", "form", "bits"),  # of a weight: its code, and its share of a group's scale, zero point and minimum
    [
        ("gate_up", "int4", 4 + (16 + 8) / 128),
        ("o_proj", "int8", 8 + (16 + 8) / 128),
        ("down", "q4_k", 4 + (16 + 16) / 256 + (8 + 8) / 32),
        ("qkv", "q5_0", 5 + 16 / 32),
        ("lm_head_top_k", "q6_k", 6 + 16 / 256 + 8 / 16),
    ],
)
def test_quantised_weights_count_as_they_are_packed(name, form, bits):
    case, dense, packed = BY_NAME[name], Size(1), Size(1, weights=form)
    weights = case.operations(QWEN_3B, dense) // 2
    saved = case.bytes_moved(QWEN_3B, dense) - case.bytes_moved(QWEN_3B, packed)
    assert saved == weights * (16 - bits) / 8
    assert case.operations(QWEN_3B, packed) == 2 * weights


def test_an_embedding_counts_rows():
    packed = BY_NAME["embedding"].bytes_moved(QWEN_3B, Size(3, weights="q8_0"))
    assert packed == 3 * (2048 * 8.5 / 8 + 2048 * 2)


@pytest.mark.parametrize(("form", "size"), [("float16", 512), ("int8", 256 + 4 * 2), ("fp8", 256 + 4 * 2)])
def test_cached_tokens_count_in_their_format(form, size):
    """Of 3B: two heads of 128 values, and in 8 bits a float32 for each."""
    case = BY_NAME["decode_attention"]
    one, two = (case.bytes_moved(QWEN_3B, Size(1, context, pages=form)) for context in (1000, 2000))
    assert two - one == 2 * 1000 * size
    stored = BY_NAME["rope_and_cache"].bytes_moved(QWEN_3B, Size(1)) - 2 * 512
    assert BY_NAME["rope_and_cache"].bytes_moved(QWEN_3B, Size(1, pages=form)) == stored + 2 * size


def test_a_format_that_has_no_such_matrix_is_said():
    with pytest.raises(ValueError, match=r"q4_k has matrices whose .* multiple of 256, not \[1152, 896\]"):
        BY_NAME["qkv"].bytes_moved(Config.from_name("qwen2.5-0.5b"), Size(1, weights="q4_k"))


def test_attention_reads_the_cache():
    """A cached token of 3B has 36,864 bytes over the 36 layers."""
    case = BY_NAME["decode_attention"]
    one, two = (case.bytes_moved(QWEN_3B, Size(1, context=context)) for context in (1000, 2000))
    assert (two - one) * 36 == 36864 * 1000


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_are_those_of_the_tensors(case):
    """The byte counts equal those of the inputs and outputs. The caches of attention count up to the length."""
    size = Size(5, context=64, device="cpu")
    config = QWEN_3B if case.name not in ("lm_head", "lm_head_top_k", "gate_up", "down") else TINY
    inputs = case.inputs(config, size)
    outputs = case.run(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    moved = case.bytes_moved(config, size)
    if case.op in (
        "embedding",
        "prefill_attention",
        "norm_qkv_rope",
        "rope_and_cache",
        "apply_rope",
    ):  # these do not read all of their inputs
        used = {
            "embedding": 2 * 5 * config.hidden_size * 2,
            "norm_qkv_rope": sum(
                each.numel() * 2 for each in inputs[:2] + inputs[3:5] if isinstance(each, torch.Tensor)
            )
            + 2 * 5 * config.qkv_size
            + 4 * 5 * config.head_dim,
            "prefill_attention": 2 * 5 * (config.q_size + config.kv_size) * 2,
        }.get(case.op)
        used = used or 5 * (
            2 * 2 * (config.qkv_size - config.kv_size * (case.op == "apply_rope")) + 4 * config.head_dim
        )
        assert moved == used
        return
    big = [each for value in (*inputs, *outputs) for each in tensors_of(value) if each.is_floating_point()]
    if case.op in ("penalise", "draw"):  # rows and integers of the vocabulary's size, not the few numbers a row
        big = [each for each in (*inputs, *outputs) if each.shape[-1] >= config.vocab_size // 32]
    counted = sum(each.numel() * each.element_size() for each in big)
    if case.name in ("lm_head", "lm_head_top_k"):  # the logits are float32; the few best are not worth counting
        counted -= 0 if case.name == "lm_head" else outputs[0].numel() * 4
    assert moved == counted


def in_formats(weights, pages):
    """Each case with dense arguments, and each that takes weights or pages with these formats of them."""
    for case in CASES:
        yield pytest.param(case, {}, id=case.name)
        for field, forms in (("weights", weights), ("pages", pages)):
            for form in forms if field in case.takes else ():
                yield pytest.param(case, {field: form}, id=f"{case.name}-{form}")


@pytest.mark.parametrize(("case", "formats"), list(in_formats(("int4", "q8_0"), ("float16", "int8", "fp8"))))
def test_inputs_suit_the_op_and_its_reference(case, formats):
    config = TINY if not formats else replace(TINY, vocab_size=112)  # quantised rows are a multiple of 16
    inputs = case.inputs(config, Size(3, context=70, device="cpu", **formats))
    found = {each.format for each in inputs if isinstance(each, (Weight, Pages))} - {"dense"}
    assert found == set(formats.values())
    peers = [mapped(torch.Tensor.clone, each) for each in inputs]
    wide = [mapped(lambda each: each.double() if each.is_floating_point() else each, value) for value in peers]
    out, peer, truth = case.run(*inputs), getattr(reference, case.op)(*peers), getattr(reference, case.op)(*wide)
    if isinstance(out, tuple):
        out, peer, truth = out[0], peer[0], truth[0]
    if case.op == "draw":  # ids
        assert torch.equal(out, truth)
    else:
        assert_as_close_as(out, peer, truth)


def test_every_op_has_a_case():
    assert {case.op for case in CASES} == set(OPS)


GRAPH = """
import torch
from dataclasses import replace
from qwenkern import Config
from qwenkern.benchmarks.ops.cases import CASES, Size
from qwenkern.benchmarks.offline.machine_code import launches
from qwenkern.cache import Batch
from qwenkern.kernels.pages import DensePages
from qwenkern.qwen2 import Qwen2

config = replace(Config.from_name("qwen2.5-3b"), num_hidden_layers=2)
shape = lambda *sizes, dtype=torch.bfloat16: torch.empty(sizes, dtype=dtype, device="meta")

class Cache:
    pages = [DensePages.allocate(128, 64, config.num_key_value_heads, config.head_dim, torch.bfloat16, "meta")] * 2
    class rope:
        cos_sin = shape(8192, config.head_dim, dtype=torch.float32)

def name(launch):
    return launch.name, launch.grid, launch.kernel.metadata.shared, launch.kernel.metadata.num_warps

def graph(tokens, sequences):
    integers = lambda *sizes: shape(*sizes, dtype=torch.int32)
    batch = Batch(integers(tokens).long(), integers(tokens).long(), integers(tokens).long(), integers(sequences, 128),
                  integers(sequences), integers(sequences + 1), tokens == sequences)
    model = Qwen2(config, torch.bfloat16, torch.device("meta"))
    rows = torch.zeros(sequences, dtype=torch.int64, device="meta")
    return {name(each) for each in launches("sm_90", lambda: model(batch, Cache, rows))}

def cases(tokens):
    return {
        name(each)
        for case in CASES
        for each in launches("sm_90", lambda: case.run(*case.inputs(config, Size(tokens, device="meta"))))
    }

known = {tokens: cases(tokens) for tokens in (1, 16, 512)}
for tokens, sequences in ((1, 1), (16, 16), (512, 1)):
    unknown = {each[0] for each in graph(tokens, sequences) - known[tokens] - known[sequences]}
    print(tokens, sorted(unknown), sorted({each[0] for each in graph(tokens, sequences)}))
"""


@pytest.mark.slow
def test_the_cases_launch_every_kernel_of_the_graph(compiling):
    done = subprocess.run([sys.executable, "-c", GRAPH], capture_output=True, text=True, env=compiling, check=False)
    assert done.returncode == 0, done.stderr
    decode = (
        "['_combine_kernel', '_decode_attention_kernel', '_linear_kernel', '_lm_head_kernel', '_norm_qkv_rope_kernel']"
    )
    prefill = "['_lm_head_kernel', '_prefill_attention_kernel', '_rms_norm_kernel', '_rope_kernel', '_swiglu_kernel']"
    assert done.stdout.splitlines() == [f"1 [] {decode}", f"16 [] {decode}", f"512 [] {prefill}"]

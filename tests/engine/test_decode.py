"""The captured decode step: the same text as without capture, on every device, and no wait for the device."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from support import engines
from support.engines import check_pages, with_capture
from support.models import TINY, tiny_model
from support.toy_tokenizer import byte_tokenizer

from qwenkern import NonFiniteError, SamplingParams
from qwenkern.engine import Engine, Limits
from qwenkern.engine.capture import CallCapture, GraphCapture
from qwenkern.engine.captured_step import CapturedStep
from qwenkern.engine.scheduler import Scheduler
from qwenkern.kernels import c as c_backend
from qwenkern.kernels import waits_for_host
from qwenkern.kernels.pages import DensePages

PROMPTS = [[n * 7 % 503 for n in range(start, start + length)] for start, length in ((0, 1), (9, 63), (3, 64), (2, 17))]
pytestmark = pytest.mark.processor
IN_C = replace(TINY, intermediate_size=192)  # a multiple of the block size of the C functions


@pytest.fixture
def in_c(monkeypatch):
    monkeypatch.delenv("QWENKERN_KERNELS", raising=False)
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", False)


class Fake:
    """Imitates a GPU with torch on a CPU: steps are recorded at their launch, and run when their tokens are read."""

    steps_in_flight = 1

    def __init__(self) -> None:
        self.log: list[str] = []
        self.sizes: list[int] = []
        self._queue: list = []
        self.running = False

    def padded(self, sequences: int) -> int:
        return -(-sequences // 4) * 4

    def padded_prompt(self, tokens: int) -> None:
        """None: prompts run op by op. test_captured_prefill.py tests captured ones."""

    def capture(self, function, has_run=False):
        out = function()
        self.sizes.append(len(out))

        def replay() -> None:
            self.log.append("launch")
            self._queue.append(lambda: out.copy_(function()))
            if out.dtype == torch.float32:  # logits, which the host reads next
                self.run_until(lambda: False)

        return replay, out

    def upload(self, target, values) -> None:
        values = torch.as_tensor(values, dtype=target.dtype)
        self._queue.append(lambda: target.copy_(values))

    def download(self, source):
        arrived: list[list[int]] = []
        self._queue.append(lambda: arrived.append(source.tolist()))

        def read() -> list[int]:
            self.log.append("read")
            self.run_until(lambda: arrived)
            return arrived[0]

        return read

    def run_until(self, done) -> None:
        self.running = True
        with torch.inference_mode():
            while self._queue and not done():
                self._queue.pop(0)()
        self.running = False


class StepsOnly(GraphCapture):
    """Captures decode steps only: padded prompts may change the bits of cuBLAS's products."""

    def padded_prompt(self, tokens: int) -> None:
        return None


class NotCaptured(CallCapture):
    def run_until(self, done) -> None:
        """Does nothing: there is no queue."""

    def padded(self, sequences: int) -> None:
        return None


def run(model, requests):
    return engines.run(Engine(model._runner, Limits(512, finds_prefixes=False)), requests)


def ids_of(completions):
    return [completion.token_ids for completion in completions]


@pytest.fixture
def plain():
    model = tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size))
    return with_capture(model, NotCaptured())


@pytest.fixture
def pipelined(monkeypatch):
    load = CapturedStep.load

    def in_order(step, batch):  # a GPU runs torch's own operations in order with launched steps
        step._capture.run_until(lambda: False)
        load(step, batch)

    monkeypatch.setattr(CapturedStep, "load", in_order)
    return with_capture(tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size)), Fake())


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 2},
        {"temperature": 0.8, "seed": 3, "n": 3},
        {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "seed": 4},
    ],
)
def test_the_text_is_that_of_steps_not_captured(pipelined, plain, how):
    expected = plain.generate(PROMPTS, max_tokens=40, ignore_eos=True, **how)
    assert ids_of(pipelined.generate(PROMPTS, max_tokens=40, ignore_eos=True, **how)) == ids_of(expected)
    check_pages(pipelined)


DIFFERENT = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 1},
    {"temperature": 1.1, "repetition_penalty": 1.3, "presence_penalty": 0.4, "seed": 2},
    {"temperature": 0, "frequency_penalty": 0.7, "logprobs": 3},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.05, "logprobs": 0, "seed": 3},
    {
        "temperature": 0.7,
        "logit_bias": {7: 4.0, 9: -float("inf")},
        "min_tokens": 12,
        "stop_token_ids": list(range(250)),
    },
    {"temperature": 1.5, "top_p": 0.7, "min_p": 0.02, "seed": 4, "logprobs": 30},
    {"temperature": 0, "repetition_penalty": 0.8, "min_tokens": 5, "stop_token_ids": list(range(0, 503, 3))},
]


def drawn(model, counts=(30,)):
    """Runs requests with these parameters together. Returns them when they have ended."""
    rows = []
    for at, how in enumerate(DIFFERENT):
        prompt = [n * 7 % 503 for n in range(at, at + 3 + 11 * at)]
        most = counts[at % len(counts)]
        rows += model._requests([prompt], SamplingParams(max_tokens=most, ignore_eos=True, **{"seed": at} | how))
    for _ in run(model, rows):
        pass
    return rows


def assert_same_outcomes(rows, expected):
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine.output_ids == theirs.output_ids
        assert (mine.finish_reason, mine.stop_reason) == (theirs.finish_reason, theirs.stop_reason)
        for one, other in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert (one.token_id, list(one.top)) == (other.token_id, list(other.top))
            # the last bits depend on the number of rows that torch multiplies
            assert [one.logprob, *one.top.values()] == pytest.approx([other.logprob, *other.top.values()], abs=1e-4)


@pytest.mark.parametrize("counts", [(30,), (9, 26, 17)])
def test_each_of_a_batch_is_drawn_by_its_own_parameters(pipelined, plain, counts):
    """Requests end at different times, so the rows of the step change. The first token comes from the prompt's pass."""
    expected = drawn(plain, counts)
    assert "stop" in [row.finish_reason for row in expected]
    assert_same_outcomes(drawn(pipelined, counts), expected)
    log = pipelined._runner.captured.capture.log
    assert log.count("launch") == log.count("read")
    assert not [drawing for _, drawing in pipelined._runner.captured._steps if drawing is None]


def test_each_is_drawn_by_its_own_parameters_after_a_preemption(plain):
    expected = drawn(plain)
    small = with_capture(tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size), cache_tokens=256), Fake())
    preempted = []
    preempt = Scheduler._preempt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "_preempt", lambda *args: preempted.append(1) or preempt(*args))
        assert_same_outcomes(drawn(small), expected)
    assert preempted


def test_an_error_of_one_ends_that_one(pipelined, plain):
    """Among others, a request has a penalty that makes a logit infinite once its text repeats a token."""
    outcome = []
    for model in (plain, pipelined):
        errors, rows = [], []
        for how in ({"repetition_penalty": 1e-200}, {"repetition_penalty": 1.2}, {}):
            params = SamplingParams(max_tokens=25, temperature=0, ignore_eos=True, **how)
            rows += model._requests([[4]], params)
        with Engine(model._runner, Limits(512)) as engine:
            for row in rows:
                engine.add(row)
            while engine.has_requests:
                errors += [str(output.error) for output in engine.step() if output.error]
        outcome.append((errors, [row.output_ids for row in rows]))
    assert outcome[0] == outcome[1]
    assert "repetition_penalty 1e-200 makes a logit inf" in outcome[0][0][0]
    assert outcome[0][1][0], "it failed before the first captured step"


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "repetition_penalty": 1.1, "logprobs": 2}])
def test_a_step_is_launched_before_the_last_one_is_read(pipelined, how):
    log = pipelined._runner.captured.capture.log
    pipelined.generate(PROMPTS[1], max_tokens=10, ignore_eos=True, **how)
    assert log == ["launch"] + ["launch", "read"] * 8 + ["read"]  # the pass over the prompt gave the first token


def test_nothing_else_waits(pipelined, monkeypatch):
    """Reading the values of a tensor waits for a GPU. From the prompt to the last token, only `download` may do so."""
    waits, device = [], pipelined._runner.captured.capture

    def spy(name):
        actual = getattr(torch.Tensor, name)

        def call(*args):
            if not device.running:
                waits.append(name)
            return actual(*args)

        return call

    requests = pipelined._requests([PROMPTS[1]], SamplingParams(max_tokens=10, temperature=1, ignore_eos=True))
    tokens = run(pipelined, requests)
    next(tokens)
    next(tokens)  # the step is captured now
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, spy(name))
    assert len(list(tokens)) == 8
    assert waits == []
    torch.ones(1).item()
    assert waits == ["item"]


def test_stops_are_exact_although_one_token_more_was_decoded(pipelined, plain):
    full = plain.generate(PROMPTS[1], max_tokens=30, temperature=0, ignore_eos=True)
    stop = full.token_ids[7]
    first = full.token_ids.index(stop)
    one = pipelined.generate(PROMPTS[1], max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    assert one.token_ids == full.token_ids[: first + 1]
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)
    several = pipelined.generate(PROMPTS, max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    expected = plain.generate(PROMPTS, max_tokens=30, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    assert ids_of(several) == ids_of(expected)
    check_pages(pipelined)


def test_rows_without_a_sequence_change_nothing_and_stay_in_place(pipelined):
    """Three sequences run in a step of four rows. The fourth row writes to the spare page."""
    for pages in pipelined.cache.pages:
        pages.k.zero_()
    pipelined.generate(PROMPTS[:3], max_tokens=10, temperature=0, ignore_eos=True)
    assert pipelined._runner.captured.capture.sizes == [4]
    [step] = pipelined._runner.captured._steps.values()
    assert step._batch.positions[3] == 0
    assert step._batch.lengths[3] == 1
    used = (torch.stack([pages.k for pages in pipelined.cache.pages]) != 0).flatten(2).any(-1).any(0).sum()
    assert used == 1 + 2 + 2 + 1  # the pages of the three sequences, and the spare page


@pytest.mark.parametrize("how", [{"logprobs": 0}, {}])
def test_a_sequence_that_has_ended_changes_no_other(pipelined, plain, how):
    """Another sequence soon gets its pages. Its row of the step must not write there any more."""

    def texts(model):
        rows = []
        for start, length, count in ((9, 50, 60), (3, 50, 60), (20, 50, 60), (5, 3, 6)):
            params = SamplingParams(max_tokens=count, ignore_eos=True, **{"temperature": 0} | how)
            rows += model._requests([[n * 7 % 503 for n in range(start, start + length)]], params)
        for _ in run(model, rows):
            pass
        return [row.output_ids for row in rows]

    assert texts(pipelined) == texts(plain)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.0, "top_k": 20, "seed": 1}])
def test_what_is_not_finite_ends_the_pipeline(pipelined, plain, how):
    """The error comes at the same token as without capture, although another step was launched already."""
    full = plain.generate(PROMPTS[1], max_tokens=30, ignore_eos=True, **how).token_ids
    at = next(index for index in range(5, 30) if full[index] not in PROMPTS[1] + full[:index])
    messages = []
    for model in (plain, pipelined):
        with torch.no_grad():
            model.module.model.embed_tokens.weight[full[at]] = float("nan")
        with pytest.raises(NonFiniteError, match=f"after position {len(PROMPTS[1]) + at} ") as raised:
            model.generate(PROMPTS[1], max_tokens=30, ignore_eos=True, **how)
        messages.append(str(raised.value))
        check_pages(model)
    assert messages[0] == messages[1]


def test_a_full_cache_ends_the_pipeline_and_preempts(plain):
    expected = ids_of(plain.generate(PROMPTS, max_tokens=100, temperature=0, ignore_eos=True))
    small = with_capture(tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size), cache_tokens=384), Fake())
    assert ids_of(small.generate(PROMPTS, max_tokens=100, temperature=0, ignore_eos=True)) == expected


def test_a_closed_stream_gives_its_pages_back(pipelined):
    stream = pipelined.stream(PROMPTS[1], max_tokens=50, ignore_eos=True)
    next(stream), next(stream)
    stream.close()
    check_pages(pipelined)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_recorded_calls_give_the_same_bits_as_the_ops_one_by_one(in_c, dtype):
    model = tiny_model(IN_C, dtype, tokenizer=byte_tokenizer(TINY.vocab_size), speculate=False)
    recorded = ids_of(model.generate(PROMPTS, max_tokens=20, temperature=0, ignore_eos=True, logprobs=1))
    assert sorted(size for (size, _), step in model._runner.captured._steps.items() if step) == [
        1,
        4,
    ]  # the shortest prompt starts last and ends last
    with_capture(model, NotCaptured())
    assert ids_of(model.generate(PROMPTS, max_tokens=20, temperature=0, ignore_eos=True, logprobs=1)) == recorded
    single = [model.generate(prompt, max_tokens=20, temperature=0, ignore_eos=True) for prompt in PROMPTS]
    assert ids_of(single) == recorded


@pytest.mark.parametrize(("config", "dtype"), [(TINY, torch.bfloat16), (IN_C, torch.float16)])
def test_what_c_does_not_take_is_not_recorded(in_c, config, dtype):
    model = tiny_model(config, dtype, tokenizer=byte_tokenizer(TINY.vocab_size))
    assert model.generate(PROMPTS[0], max_tokens=4, ignore_eos=True).num_tokens == 4
    assert set(model._runner.captured._steps.values()) == {None}


MANY = [[n * 11 % 503 for n in range(start, start + length)] for start, length in enumerate(range(1, 40, 2))]


def logprobs_of(model, prompts, **how):
    """The tokens and their log-probabilities, to compare to the last bit."""
    done = model.generate(prompts, max_tokens=12, temperature=1, seed=3, ignore_eos=True, logprobs=0, **how)
    return [[(token.token_id, token.logprob) for token in completion.logprobs] for completion in done]


def test_deterministic_gives_a_prompt_the_same_bits_in_any_batch(in_c):
    """20 prompts with two completions each are more than decode together. They run together, or one by one."""
    single = tiny_model(IN_C, torch.bfloat16, deterministic=True)
    expected = [pair for prompt in MANY for pair in logprobs_of(single, [prompt], n=2)]
    assert logprobs_of(single, MANY, n=2) == expected
    small = tiny_model(IN_C, torch.bfloat16, deterministic=True, cache_tokens=384)
    assert logprobs_of(small, MANY, n=2) == expected
    check_pages(small)
    usual = tiny_model(IN_C, torch.bfloat16)
    assert logprobs_of(usual, MANY, n=2) != expected, "without it, too, so this shows nothing"


def test_deterministic_on_torch_decodes_one_by_one():
    model = tiny_model(deterministic=True)
    sizes = []
    forward = type(model.module).forward

    def spy(module, batch, *args):
        sizes.append(len(batch.lengths))
        return forward(module, batch, *args)

    model.module.forward = spy.__get__(model.module)
    expected = [pair for prompt in MANY[:4] for pair in logprobs_of(model, [prompt], n=2)]
    assert logprobs_of(model, MANY[:4], n=2) == expected
    assert set(sizes) == {1}


def test_threads_take_turns_on_one_recording(in_c):
    model = tiny_model(IN_C, torch.bfloat16, tokenizer=byte_tokenizer(TINY.vocab_size))
    expected = ids_of(model.generate([prompt], max_tokens=30, temperature=0, ignore_eos=True)[0] for prompt in PROMPTS)
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        done = model.generate(PROMPTS[index], max_tokens=30, temperature=0, ignore_eos=True)
        found[index] = done.token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(PROMPTS))] == expected


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"top_k": 20, "seed": 1},
        {"seed": 2},
        {"logprobs": 1, "seed": 3},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "seed": 4},
        {"presence_penalty": 0.3, "frequency_penalty": 0.1, "logit_bias": {7: 2.5}, "min_p": 0.02, "seed": 5},
    ],
)
@pytest.mark.parametrize("sequences", [1, 3, 16, 24])
def test_a_captured_step_writes_the_same_text_on_a_gpu(how, sequences):
    """With dependent launches, with replays before the host has read the last tokens, and with rows that end at
    different times. Runs twice to find races."""
    config = replace(TINY, head_dim=128, num_attention_heads=8, num_key_value_heads=1, hidden_size=256)
    _assert_captured_text(config, how, sequences)


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [1, 3, 16])
def test_programs_that_share_a_tile_are_captured_too(sequences):
    """With the sizes of 0.5B, two programs split K of the down projection, and each counts the arrival of the other."""
    from qwenkern.kernels.triton import tuning

    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "head_dim": 64}
    config = replace(TINY, **sizes)
    with tuning.trying("linear", {"SPLIT_K": 2}) as trial:
        _assert_captured_text(config, {"temperature": 0}, sequences)
    assert 4864 in {seen["k"] for seen, _ in trial.seen}


def _assert_captured_text(config, how, sequences):
    model = tiny_model(config, torch.bfloat16, device="cuda")
    prompts = [[(7 * at + row) % 503 for at in range(1 + 5 * row)] for row in range(sequences)]

    def texts():
        rows = []
        for row, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=200 - 7 * row, ignore_eos=True, **{"temperature": 0.9} | how)
            rows += model._requests([prompt], params)
        for _ in run(model, rows):
            pass
        return [row.output_ids for row in rows]

    with_capture(model, NotCaptured())
    one_by_one = texts()
    with_capture(model, StepsOnly(torch.device("cuda")))
    captured = texts()
    assert any(step for step in model._runner.captured._steps.values())
    assert texts() == captured
    if sequences <= 16:  # for more, cuBLAS's bits depend on the number of rows
        assert captured == one_by_one


def test_what_waits_for_the_host_is_not_captured(monkeypatch):
    def waits(page_size: int = 64, head_dim: int = 64) -> bool:
        pages = torch.empty(4, page_size, 2, head_dim, dtype=torch.float16)  # C does not run it in Triton's place
        return waits_for_host(4, DensePages(pages, pages))

    monkeypatch.setenv("QWENKERN_KERNELS", "triton")
    assert not waits()
    assert waits(head_dim=48)
    assert waits(page_size=24)
    monkeypatch.setenv("QWENKERN_KERNELS", "reference")
    assert waits()


def test_c_was_there(in_c):
    assert c_backend.library() is not None

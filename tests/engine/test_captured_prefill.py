"""Forward passes over prompts at padded lengths: the same text as without padding, and each graph keeps to its own
memory."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.engines import check_pages, with_capture
from support.models import TINY, tiny_model

from qwenkern import SamplingParams
from qwenkern.engine import Engine, Limits
from qwenkern.engine.capture import PROMPT_LENGTHS, CallCapture, GraphCapture
from qwenkern.engine.captured_prefill import MOST_PROMPTS
from qwenkern.errors import EngineError
from qwenkern.kernels.dispatch import kept_tensors, launches_dependently


class Fake(CallCapture):
    """Imitates a GPU with torch on a CPU: a replay runs the captured function again, on the same tensors."""

    def __init__(self, lengths: tuple[int, ...] = (8, 16, 40)) -> None:
        self.lengths = lengths
        self.log: list[str] = []

    def padded(self, sequences: int) -> None:
        return None

    def padded_prompt(self, tokens: int) -> int | None:
        return next((length for length in self.lengths if tokens <= length), None)

    def capture(self, function, has_run=False):
        assert has_run
        self.log.append("capture")
        out = torch.full_like(function(), float("nan"))

        def replay() -> None:
            self.log.append("replay")
            out.copy_(function())

        return replay, out


@pytest.fixture(autouse=True)
def reference(monkeypatch, request):
    """Uses the reference ops, except in one test: Triton's interpreter is slow."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("QWENKERN_KERNELS", "reference")


@pytest.fixture
def captured():
    return with_capture(tiny_model(), Fake())


@pytest.fixture
def plain():
    return with_capture(tiny_model(), Fake(lengths=()))


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed + 7 * at) % 503 for at in range(length)]


def texts(model, prompts, **how):
    how = {"max_tokens": 2, "temperature": 0, "ignore_eos": True} | how
    return [completion.token_ids for completion in model.generate(prompts, **how)]


BATCHES = [
    [prompt(5)],
    [prompt(8, 1)],
    [prompt(3, 2), prompt(1, 3), prompt(11, 4)],
    [prompt(40, 5)],
    [prompt(length, length) for length in range(1, 1 + MOST_PROMPTS)],
    [prompt(1, 9)],
]


def test_the_text_is_that_of_passes_without_padding(captured, plain):
    expected = [texts(plain, batch) for batch in BATCHES]
    for _ in range(3):  # runs op by op, captured, and replayed after other passes
        assert [texts(captured, batch) for batch in BATCHES] == expected
    assert captured._runner.captured.capture.log.count("capture") == 3
    check_pages(captured)


def test_the_kernels_take_prompts_without_tokens_and_padding(captured, plain, monkeypatch):
    monkeypatch.setenv("QWENKERN_KERNELS", "triton")
    batch = [prompt(3, 2), prompt(1, 3)]
    assert [texts(captured, batch, max_tokens=1) for _ in range(2)] == [texts(plain, batch, max_tokens=1)] * 2


def test_the_first_pass_of_a_length_runs_op_by_op_and_the_second_is_captured(captured):
    log = captured._runner.captured.capture.log
    for length, expected in [
        (5, []),
        (7, ["capture", "replay"]),
        (12, []),
        (8, ["replay"]),
        (9, ["capture", "replay"]),
    ]:
        log.clear()
        texts(captured, [prompt(length)], max_tokens=1)
        assert log == expected


@pytest.mark.parametrize(
    "batch", [[prompt(41)], [prompt(1, seed) for seed in range(MOST_PROMPTS + 1)]], ids=["too long", "too many"]
)
def test_what_no_length_takes_runs_op_by_op(captured, plain, batch):
    expected = texts(plain, batch)
    assert [texts(captured, batch) for _ in range(3)] == [expected] * 3
    assert captured._runner.captured.capture.log == []


def test_a_prompt_in_several_chunks(captured, plain):
    """From the second chunk on, a pass continues from cached tokens. 75 tokens are more than a page."""
    for model in (captured, plain):
        model.prefill_chunk = 13
    expected = texts(plain, [prompt(75), prompt(20, 1)], n=2)
    for _ in range(2):
        assert texts(captured, [prompt(75), prompt(20, 1)], n=2) == expected
    assert "replay" in captured._runner.captured.capture.log


def test_padding_is_written_to_the_spare_page_alone(captured):
    tensors = [tensor for pages in captured.cache.pages for tensor in pages.tensors]
    for _ in range(3):
        for tensor in tensors:
            tensor.fill_(7.0)
        with Engine(captured._runner, Limits(512)) as engine:
            [request] = captured._requests([prompt(17)], SamplingParams(max_tokens=3))
            engine.add(request)
            engine.step()
            [page] = request.table.pages
        for tensor in tensors:
            written = (tensor != 7).flatten(2).any(-1)
            assert written[page].tolist() == [True] * 17 + [False] * (64 - 17)
            assert written.any(-1).nonzero().flatten().tolist() == [page, captured.cache.spare_page]


def test_the_host_prepares_a_pass_on_the_cpu_whatever_the_default_device_is(captured, plain):
    expected = texts(plain, [prompt(5)])
    texts(captured, [prompt(5)])
    with torch.device("meta"):
        assert texts(captured, [prompt(5)]) == expected


def test_a_capture_that_fails_is_tried_again(captured, plain, monkeypatch):
    texts(captured, [prompt(5)])
    capture = captured._runner.captured.capture

    def fail(function, has_run=False):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(capture, "capture", fail)
        with pytest.raises(EngineError, match="OutOfMemoryError: no memory"):
            texts(captured, [prompt(5)])
    check_pages(captured)
    assert texts(captured, [prompt(5)]) == texts(plain, [prompt(5)])


def test_deterministic_pads_each_prompt_by_its_own_length(monkeypatch):
    """A prompt has the same number of rows after and beside any other prompts, captured or not."""
    model = with_capture(tiny_model(deterministic=True), Fake())
    rows = []
    forward = type(model.module).forward

    def spy(module, batch, *args):
        rows.append(len(batch.ids))
        return forward(module, batch, *args)

    monkeypatch.setattr(type(model.module), "forward", spy)
    for batch in ([prompt(5)], [prompt(12), prompt(5)], [prompt(5), prompt(9)]):
        rows.clear()
        texts(model, batch, max_tokens=1)
        expected = [8 if len(each) <= 8 else 16 for each in batch]
        assert [each for each, after in zip(rows, [*rows[1:], None], strict=True) if each != after] == expected


def test_a_prompt_gets_the_shortest_length_that_takes_it():
    capture = GraphCapture.__new__(GraphCapture)  # skips __init__, which needs a GPU
    for tokens in (1, 15, 16, 17, 97, 128, 500, 512, 513, 1025, 2048):
        rows = capture.padded_prompt(tokens)
        assert rows == min(length for length in PROMPT_LENGTHS if length >= tokens)
        assert rows <= max(16, 2 * tokens - 2)
    assert capture.padded_prompt(2049) is None


@pytest.mark.parametrize("has_run", [False, True])
def test_a_graph_has_the_workspace_of_cublas_in_its_own_pool(monkeypatch, has_run):
    """torch.compile frees all workspaces. If a workspace were outside the pool, others would use its memory when the
    graph is replayed. The test imitates torch.cuda and logs its calls."""
    log: list[str] = []

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        log.append(f"begin in {pool}")
        yield
        log.append("end")

    def function() -> torch.Tensor:
        log.append(f"run, dependent: {launches_dependently()}, keeps: {kept_tensors() is not None}")
        return torch.zeros(1)

    stream = SimpleNamespace(device="cuda:0", wait_stream=lambda other: None)
    fakes = {
        "graph_pool_handle": lambda: "its own pool",
        "Stream": lambda device: stream,
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: stream,
        "current_blas_handle": lambda: log.append("handle"),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: log.append("clear"), raising=False)
    GraphCapture(torch.device("cuda")).capture(function, has_run)
    run = f"run, dependent: {not has_run}, keeps: {not has_run}"
    assert log == ["handle" if has_run else run, "clear", "begin in its own pool", run, "end", "clear"]


WIDE = replace(TINY, head_dim=128, num_attention_heads=8, num_key_value_heads=1, hidden_size=256)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 16, 17, 100, 300, 512])
def test_a_captured_prompt_has_the_bits_of_one_that_is_not(length):
    model = tiny_model(WIDE, torch.bfloat16, device="cuda", prefix_cache=False)
    found = [model.generate([prompt(length)], max_tokens=1, logprobs=5, temperature=0)[0].logprobs for _ in range(4)]
    [this] = model._runner.prefills._passes.values()
    assert this._captured is not None
    assert found[1:] == found[:1] * 3


@pytest.mark.gpu
def test_a_graph_outlives_the_workspaces_of_cublas():
    """torch.compile frees them, and other tensors then overwrite the memory."""
    model = tiny_model(WIDE, torch.bfloat16, device="cuda")

    def text() -> list[int]:
        return model.generate([prompt(30, seed) for seed in range(24)], max_tokens=20, temperature=0, ignore_eos=True)[
            7
        ].token_ids

    expected = [text() for _ in range(3)][-1]
    for _ in range(3):
        torch._C._cuda_clearCublasWorkspaces()
        taken = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
        assert text() == expected
        assert all(bool(each.isnan().all()) for each in taken), "a graph wrote into memory of others"

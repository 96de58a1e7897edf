"""Many callers at once: every engine gets the same work, and the figures follow from the timed tokens."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import typer
from support.models import TINY, save_checkpoint, tiny_model

from qwenkern import Model
from qwenkern.benchmarks import engine, serving
from qwenkern.benchmarks.models import services
from qwenkern.benchmarks.serving import ANSWERS, PROMPTS, Ask, Timed


def test_the_work_is_the_same_each_time_and_within_its_limits():
    work = serving.workload(5, 3, 1000)
    assert work == serving.workload(5, 3, 1000)
    assert [len(asks) for asks in work] == [3] * 5
    for ask in (ask for asks in work for ask in asks):
        assert PROMPTS[0] <= len(ask.prompt) <= PROMPTS[1]
        assert ANSWERS[0] <= ask.new <= ANSWERS[1]
        assert max(ask.prompt) < 1000


def test_figures_of_known_times():
    work = [[Ask([1] * 10, 3), Ask([1] * 20, 2)]]
    found = serving.figures([Timed(0.0, [1.0, 1.5, 3.5]), Timed(4.0, [4.5, 5.0])], work)
    assert found == {
        "seconds": 5.0,
        "tokens_per_second": 1.0,
        "all_tokens_per_second": 7.0,
        "first_token_p50": 0.75,
        "first_token_p99": 1.0,
        "gap_p50": 0.5,
        "gap_p99": 2.0,
    }
    assert [serving.percentile(list(range(200, 0, -1)), share) for share in (50, 99)] == [101, 199]


class Counting:
    def __init__(self) -> None:
        self.most = self._now = 0

    async def stream(self, prompt, new):
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(0.05)
        for _ in range(new - 1):
            yield 1
        self._now -= 1
        yield 1


def test_callers_run_at_once_and_each_sends_one_request_after_the_other():
    service, work = Counting(), [[Ask([1], 3), Ask([2], 2)] for _ in range(4)]
    found = serving.serve(service, work, stagger=0.0)
    assert service.most == 4
    assert sorted(len(each.tokens) for each in found) == [2] * 4 + [3] * 4

    class Short(Counting):
        async def stream(self, prompt, new):
            yield 1

    with pytest.raises(RuntimeError, match="a request for 3 tokens got 1"):
        serving.serve(Short(), work, stagger=0.0)


def counts(service, prompt, new):
    """The numbers of tokens that come, in a new event loop."""

    async def all_of_them():
        return [count async for count in service.stream(prompt, new)]

    return asyncio.run(all_of_them())


def test_qwenkern_gives_the_tokens_of_generate():
    model = tiny_model()
    prompt = [5, 6, 7]
    assert sum(counts(services.Qwenkern(model), prompt, 9)) == 9


@pytest.mark.slow
def test_qwenkern_serve_gives_as_many_tokens_as_asked_for(tmp_path):
    """In a process of its own, from the command line."""
    save_checkpoint(tiny_model(), tmp_path / "tiny")
    with services.qwenkern_server(str(tmp_path / "tiny"), "cpu", 1, 1024) as service:
        assert sum(counts(service, [5, 6, 7], 9)) == 9
        [timed] = serving.serve(service, [[Ask([8] * 20, 5)]], stagger=0.0)
        assert len(timed.tokens) == 5
        with pytest.raises(RuntimeError, match="/v1/completions answered 400"):
            counts(service, [10**6], 3)


@pytest.mark.slow
def test_a_server_with_random_weights_gives_tokens_as_they_come():
    with services.qwenkern_random_server("qwen2.5-0.5b", "cpu", 1, 1024) as service:
        # Although there is no tokenizer. On a busy machine two tokens may come in one event.
        assert any(counts(service, [5, 6, 7], 3) == [1, 1, 1] for _ in range(4))
    with pytest.raises(typer.BadParameter, match=r"llama.cpp server: expected a model with a file, on a CPU"):
        serving.engines(tiny_model(), "qwen2.5-0.5b", ["llama.cpp server"], 1)


def test_numbers_of_callers():
    assert serving.numbers("1,4, 16") == [1, 4, 16]
    for text in ("", "0", "4,", "a", "-1", "1000"):
        with pytest.raises(typer.BadParameter, match="numbers from 1 to 999"):
            serving.numbers(text)


def test_events_of_llama_cpp_are_counted():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200 if asked["prompt"] == [1, 2] else 400)
            self.end_headers()
            assert asked["timings_per_token"]
            assert asked["n_predict"] == 3
            for generated in (1, 3, 3):  # a token in the middle of a character has no event; the last one has no token
                event = {"content": "x", "timings": {"predicted_n": generated}}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        service = services.LlamaServer(server.server_address[1])
        assert counts(service, [1, 2], 3) == [1, 2]
        with pytest.raises(RuntimeError, match="/completion answered 400"):
            counts(service, [9], 3)
    finally:
        server.shutdown()


def test_transformers_generates_as_many_tokens_as_asked():
    model = tiny_model(dtype=torch.bfloat16)
    with services.transformers(model) as service:
        assert sum(counts(service, [5, 6, 7], 6)) == 6


def test_the_engines_own_work_is_measured_around_an_empty_model():
    assert 0 < engine.own_work(2, 5, steps=5) < 1000


def test_a_changed_text_is_an_error(monkeypatch):
    fast, plain = Model.from_config(TINY, seed=1, device="cpu"), Model.from_config(TINY, seed=2, device="cpu")
    monkeypatch.setattr(engine, "tasks", lambda: {"a": ["b"]})
    monkeypatch.setattr(engine, "chat", lambda question: [5, 6, 7])
    with pytest.raises(RuntimeError, match="a, greedy: speculation has changed a text"):
        engine.speculation(fast, plain, 4, 1)
    assert [row["case"] for row in engine.speculation(fast, fast, 4, 1)] == ["a, greedy", "a, sampled", engine.TOGETHER]

"""/health: 200 as long as the engines make progress, otherwise 503 with the reason."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref

import httpx
import pytest
from support.engines import check_pages, eventually
from support.servers import serving, toy

from qwenkern import EngineError, Model
from qwenkern.server import health
from qwenkern.server.errors import ApiError
from qwenkern.server.models import Models
from qwenkern.server.settings import Settings
from qwenkern.server.source import Size, Source


@pytest.fixture
def model():
    with toy() as model:
        yield model


def get(url: str) -> httpx.Response:
    begun = time.monotonic()
    answer = httpx.get(f"{url}/health", timeout=30)
    assert time.monotonic() - begun < health.ANSWERS + 5
    return answer


def test_an_idle_and_a_busy_server_are_well(model):
    with serving(model) as url:
        assert (get(url).status_code, get(url).json()) == (200, {"status": "ok", "reason": None})
        with model.stream([1, 2, 3], max_tokens=400, ignore_eos=True) as stream:
            next(stream._call)
            assert get(url).status_code == 200
        check_pages(model)


def test_it_needs_no_key(model):
    with serving(model, Settings(api_keys=("secret",))) as url:
        assert get(url).status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401


def test_an_engine_that_has_stopped(model):
    with serving(model) as url:
        assert get(url).status_code == 200
        model._loop.engine.stop(EngineError("the engine has stopped: /secret/path"))
        answer = get(url)
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")
        assert "secret" not in answer.text


class Reloads:
    """A source that makes a new toy for each load. Loads after the first wait for the gate, and fail on demand."""

    def __init__(self) -> None:
        self.made: list[weakref.ref] = []
        self.gate, self.fails = threading.Event(), False
        self.models = Models({"toy": self.load})

    def load(self) -> Model:
        assert not self.made or self.gate.wait(60)
        if self.fails:
            raise RuntimeError("/secret/path")
        self.made.append(weakref.ref(model := toy()))
        return model

    def break_engine(self) -> None:
        def fail(*arguments, **keywords):
            raise RuntimeError("CUDA error: /secret/path")

        self.made[0]()._loop.engine.runner.logits = fail


ASK = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}


def test_a_model_whose_engine_has_stopped_is_loaded_again(caplog):
    reloads = Reloads()
    with serving(reloads.models) as url, httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=ASK | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            reloads.break_engine()
            rest = "".join(lines)
        assert "engine_error" in rest
        assert rest.endswith("data: [DONE]")
        eventually(lambda: "loaded again" in (get(url).json()["reason"] or ""))
        assert get(url).status_code == 503
        answers: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=ASK)))
        waiting.start()
        reloads.gate.set()
        waiting.join()
        assert answers[0].json()["usage"]["completion_tokens"] == 400, "a request that comes meanwhile waits"
        assert get(url).json() == {"status": "ok", "reason": None}
        assert len(reloads.made) == 2
        eventually(lambda: reloads.made[0]() is None, "somebody keeps the model that has stopped")
    assert "secret" not in rest
    assert "the engine of toy has stopped" in caplog.text
    assert "CUDA error: /secret/path" in caplog.text


def test_a_fault_that_nobody_waits_for_is_mended_too():
    reloads = Reloads()
    reloads.gate.set()
    with serving(reloads.models) as url:
        reloads.made[0]()._loop.engine.stop(EngineError("the engine has stopped"))
        assert get(url).status_code == 503
        eventually(lambda: get(url).status_code == 200)
        assert len(reloads.made) == 2


def test_a_server_whose_model_cannot_be_loaded_again_ends():
    reloads = Reloads()
    reloads.gate.set()
    with serving(reloads.models) as url:
        reloads.fails = True
        reloads.break_engine()
        failed = httpx.post(f"{url}/v1/completions", json=ASK, timeout=60)
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "engine_error")
        with pytest.raises(httpx.TransportError):
            eventually(lambda: get(url).status_code == 200)


def test_a_closed_model(model):
    with serving(model) as url:
        model.close()
        assert get(url).status_code == 503


def test_a_pass_that_hangs(model, monkeypatch):
    monkeypatch.setattr(health, "HANGS", 0.3)
    release, has_come = threading.Event(), threading.Event()
    runner = model._loop.engine.runner
    logits = runner.logits

    def hang(*args, **keywords):
        has_come.set()
        release.wait()
        return logits(*args, **keywords)

    monkeypatch.setattr(runner, "logits", hang)
    with serving(model) as url:
        stream = model.stream([1, 2, 3], max_tokens=2)
        try:
            assert has_come.wait(60)
            eventually(lambda: get(url).status_code == 503)
            assert "takes longer than 0.3 s" in get(url).json()["reason"]
        finally:
            release.set()
        list(stream)
        eventually(lambda: get(url).status_code == 200)


def test_a_thread_that_does_nothing(model, monkeypatch):
    monkeypatch.setattr(health, "ANSWERS", 0.2)
    monkeypatch.setattr(model._loop, "_run", lambda: None)  # so the thread never runs
    with serving(model) as url:
        for _ in range(3):
            answer = get(url)
            assert answer.status_code == 503
            assert "does not answer" in answer.json()["reason"]
        assert len(model._loop.engine._works) == 1, "questions pile up"


def test_a_model_that_loads_and_one_that_cannot(model):
    gate, wrong = threading.Event(), []

    def load(tokens, progress):
        progress("load", 1, 2)
        assert gate.wait(60)
        if wrong:
            raise wrong[0]
        return model

    def models() -> Models:
        found = Models({"toy": Source(lambda most, progress: Size(0, None), load)})
        found.close = lambda: None
        return found

    first = models()
    is_ready = first.is_ready
    assert not is_ready
    with serving(first, wait=False) as url:
        eventually(lambda: "(50%)" in get(url).text)
        assert get(url).json()["status"] == "loading"
        assert get(url).status_code == 503
        assert get(url).headers["Retry-After"] == "5"
        refused = httpx.post(f"{url}/tokenize", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        gate.set()
        eventually(lambda: get(url).status_code == 200)
    wrong.append(RuntimeError("/secret/path"))

    async def failed() -> health.Health:
        last = models()
        with pytest.raises(ApiError):
            await last.start()
        return await health.health_of(last)

    found = asyncio.run(failed())  # `qwenkern serve` then ends
    assert found.status == "failed"
    assert "secret" not in found.reason

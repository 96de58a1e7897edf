"""/health: 200 as long as the engines make progress, and 503 with the reason when not."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest
from support.engines import check_pages, eventually
from support.servers import serving, toy

from qwenkern import EngineError
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
    monkeypatch.setattr(model._loop, "_run", lambda: None)  # nobody starts or wakes the thread
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

    found = asyncio.run(failed())  # `qwenkern serve` ends then
    assert found.status == "failed"
    assert "secret" not in found.reason

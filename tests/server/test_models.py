"""Several models in one server: loaded when a request names them, within a budget of memory, and unloaded."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from pathlib import Path

import httpx
import pytest
import torch
from support.memory import in_a_process, needs_resident, resident
from support.models import TINY, save_checkpoint, tiny_model
from support.servers import serving, toy

from qwenkern import CheckpointError, EngineError, RequestError
from qwenkern.config import Config
from qwenkern.server.errors import ApiError
from qwenkern.server.models import Models
from qwenkern.server.service import Threads
from qwenkern.server.source import Size, Source, size_of, source


class Loads:
    """Makes sources of toys with a given size, and counts how often each was loaded."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.alive: dict[str, weakref.ref] = {}
        self.gate: threading.Event | None = None  # if set, loading waits for it
        self.error: Exception | None = None

    def source(self, name: str, size: int = 10) -> Source:
        def load(tokens, progress):
            self.names.append(name)
            progress("load", 1, 4)
            if self.gate:
                assert self.gate.wait(60)
            if self.error:
                raise self.error
            model = toy()
            self.alive[name] = weakref.ref(model)
            return model

        return Source(lambda most, progress: Size(size, None), load)

    def models(self, *names: str, **keywords) -> Models:
        return Models({name: self.source(name) for name in names}, **keywords)


@pytest.fixture
def loads():
    return Loads()


def states(models: Models) -> list[str]:
    return [entry.state for entry in models.entries.values()]


async def touch(models: Models, name: str | None = None) -> None:
    async with models.use(name):
        pass


def ran(coroutine) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


def test_the_end_of_the_server_is_no_loss_of_a_model_that_loads_again(loads):
    async def body():
        models, lost = loads.models("a"), []
        models.on_loss = lost.append
        await touch(models)
        entry = models.entry("a")
        entry.model._loop.engine.stop(EngineError("the engine has stopped"))
        loads.gate, loads.error = threading.Event(), EngineError("the server stops")
        models.mend(entry)
        again = entry.loading
        while len(loads.names) < 2:
            await asyncio.sleep(0.01)
        loads.gate.set()
        models.close()
        with pytest.raises(ApiError):
            await again
        assert lost == []

    ran(body())


def test_a_model_gets_the_memory_of_one_whose_engine_has_stopped(loads):
    """The stopped model is loaded again after the other one, which waits for its memory."""

    async def body():
        models = loads.models("a", "b", memory=15)
        entry, leave = models.entry("a"), asyncio.Event()

        async def use():
            async with models.use("a") as model:
                await leave.wait()
                model._loop.engine.stop(EngineError("the engine has stopped"))

        using = asyncio.ensure_future(use())
        while not entry.model:
            await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(touch(models, "b"))
        while not models._one.locked():
            await asyncio.sleep(0.01)
        leave.set()
        await using
        assert entry.has_stopped
        await asyncio.wait_for(waiting, 30)
        await touch(models, "a")
        assert loads.names == ["a", "b", "a"]
        models.close()

    ran(body())


def test_what_waits_for_a_thread_is_dropped_with_its_caller():
    """Otherwise, large bodies of cancelled callers would stay in memory without being counted."""

    class Large:
        pass

    async def body():
        threads, gate = Threads("test", 1), threading.Event()
        first = asyncio.ensure_future(threads.do(gate.wait, 60))
        await asyncio.sleep(0)
        large = Large()
        found = weakref.ref(large)
        second = asyncio.ensure_future(threads.do(repr, large))
        del large
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait({second})
        del second
        gc.collect()
        assert found() is None
        gate.set()
        assert await first
        assert await threads.do(max, 1, 2) == 2
        threads.close()

    ran(body())


def test_a_model_is_loaded_when_it_is_asked_for_and_once(loads):
    async def body():
        models = loads.models("a", "b")
        assert states(models) == ["unloaded", "unloaded"]
        await asyncio.gather(*(touch(models, "b") for _ in range(20)))
        assert loads.names == ["b"]
        async with models.use("b") as first, models.use("b") as second:
            assert first is second
        assert states(models) == ["unloaded", "loaded"]
        models.close()

    ran(body())


def test_the_least_recently_used_model_makes_room(loads):
    async def body():
        models = loads.models("a", "b", "c", memory=25)
        for name in ("a", "b", "a", "c"):
            await touch(models, name)
        assert states(models) == ["loaded", "unloaded", "loaded"]
        gc.collect()
        assert loads.alive["b"]() is None, "somebody keeps a model that was unloaded"
        await touch(models, "b")
        assert states(models) == ["unloaded", "loaded", "loaded"]
        assert loads.names == ["a", "b", "c", "b"]
        models.close()

    ran(body())


def test_a_model_in_use_is_never_unloaded(loads):
    async def body():
        models = loads.models("a", "b", "c", memory=20)
        async with models.use("a") as a:
            await touch(models, "b")
            await touch(models, "c")  # replaces b, which has no users; a was used earlier, but is in use
            assert states(models) == ["loaded", "unloaded", "loaded"]
            models._patience = 0.2
            async with models.use("c"):
                with pytest.raises(ApiError) as refused:
                    await touch(models, "b")
            assert refused.value.status == 503
            assert "Retry-After" in refused.value.headers
            assert (await a.agenerate([1, 2, 3], max_tokens=3)).num_tokens == 3
        models.close()

    ran(body())


def test_a_model_waits_until_another_is_idle(loads):
    async def body():
        models = loads.models("a", "b", memory=10, patience=30)
        async with models.use("a"):
            waits = asyncio.ensure_future(touch(models, "b"))
            await asyncio.sleep(0.1)
            assert not waits.done()
            assert states(models) == ["loaded", "loading"]
        await waits
        assert states(models) == ["unloaded", "loaded"]
        models.close()

    ran(body())


def test_a_model_that_is_too_large_unloads_nobody(loads):
    async def body():
        sources = {"a": loads.source("a"), "big": source_too_large(loads)}
        models = Models(sources, memory=15)
        await touch(models, "a")
        with pytest.raises(ApiError) as refused:
            await touch(models, "big")
        assert refused.value.status == 503
        assert states(models) == ["loaded", "failed"]
        models.close()

    ran(body())


def source_too_large(loads: Loads) -> Source:
    def size(most, progress):
        raise RequestError("the model takes too much")

    return Source(size, loads.source("big").load)


def test_a_failure_is_told_without_its_reason_and_tried_again_later(loads, monkeypatch, caplog):
    async def body():
        models = loads.models("a", "b")
        loads.error = CheckpointError("/secret/place/model.safetensors: is damaged")
        for _ in range(3):
            with pytest.raises(ApiError) as failed:
                await touch(models, "a")
            assert failed.value.status == 503
            assert "secret" not in failed.value.message
        assert loads.names == ["a"], "it is not tried again at once"
        assert states(models) == ["failed", "unloaded"]
        loads.error = None
        await touch(models, "b")  # other models are not affected
        monkeypatch.setattr("qwenkern.server.models.RETRY", 0.0)
        await touch(models, "a")
        assert states(models) == ["loaded", "loaded"]
        models.close()

    ran(body())
    assert "/secret/place/model.safetensors: is damaged" in caplog.text


def test_callers_that_leave_do_not_end_the_loading(loads):
    async def body():
        loads.gate = threading.Event()
        models, message = loads.models("a", patience=0.05), ""
        while "25%" not in message:  # the first callers may leave before the loading has begun
            with pytest.raises(ApiError) as slow:
                await touch(models, "a")
            assert slow.value.status == 503
            message = slow.value.message
        leaves = asyncio.ensure_future(touch(models, "a"))
        await asyncio.sleep(0.01)
        leaves.cancel()
        assert states(models) == ["loading"]
        loads.gate.set()
        while states(models) == ["loading"]:
            await asyncio.sleep(0.01)
        assert states(models) == ["loaded"]
        assert models.entries["a"].users == 0
        assert loads.names == ["a"]
        models.close()

    ran(body())


def test_only_so_many_wait_for_a_model(loads):
    async def body():
        loads.gate = threading.Event()
        models = loads.models("a", most_waiting=3)
        waiting = [asyncio.ensure_future(touch(models, "a")) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError) as refused:
            await touch(models, "a")
        assert refused.value.status == 429
        loads.gate.set()
        await asyncio.gather(*waiting)
        models.close()

    ran(body())


def test_a_server_that_starts_answers_503_at_once(loads):
    async def body():
        loads.gate = threading.Event()
        models = loads.models("a", "b")
        starting = asyncio.ensure_future(models.start())
        while not loads.names:
            await asyncio.sleep(0.01)
        begun = time.monotonic()
        with pytest.raises(ApiError) as refused:
            await touch(models)
        assert refused.value.status == 503
        assert time.monotonic() - begun < 5
        assert not models.is_ready
        loads.gate.set()
        await starting
        assert models.is_ready
        await touch(models)
        models.close()

    ran(body())


def test_a_server_that_stops_ends_a_loading():
    async def body():
        begun = threading.Event()

        def load(tokens, progress):
            for _ in range(6000):
                begun.set()
                progress("load", 1, 2)
                time.sleep(0.01)
            raise AssertionError("nobody ended it")

        models = Models({"a": Source(lambda most, progress: Size(1, None), load)})
        starting = asyncio.ensure_future(models.start())
        while not begun.is_set():
            await asyncio.sleep(0.01)
        models.close()
        with pytest.raises(ApiError):
            await starting

    ran(body())


def test_counts_outlive_an_unloaded_model(loads):
    async def body():
        models = loads.models("a", "b", memory=10)
        for name in ("a", "b", "a"):
            async with models.use(name) as model:
                await model.agenerate([1, 2, 3], max_tokens=4, ignore_eos=True)
        assert models.entries["a"].counts.generated == 8
        assert models.entries["b"].counts.generated == 4
        models.close()

    ran(body())


LARGE = Config(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=4096,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=4096,
)  # 115 MB in float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    save_checkpoint(tiny_model(LARGE), folder)
    return folder


def loads_three_times(folder: str) -> None:
    async def body() -> None:
        models = Models({"a": source(Path(folder), device="cpu", cache_tokens=512)})
        unloaded = []
        for _ in range(3):
            async with models.use("a") as model:
                await model.agenerate([1, 2, 3], max_tokens=2)
                del model
            loaded = resident()
            await models._unload(models.entries["a"])
            unloaded.append(resident())
            assert loaded - unloaded[-1] > 0.8 * 100e6
        models.close()
        assert unloaded[-1] - unloaded[0] < 20e6, "memory grows with each load"

    asyncio.run(body())


@needs_resident
def test_an_unloaded_model_gives_its_memory_back(checkpoint):
    in_a_process(__file__, f"loads_three_times({str(checkpoint)!r})")


def test_the_size_is_that_of_the_loaded_model(checkpoint):
    size = size_of(checkpoint, device="cpu", cache_tokens=1000)
    with source(checkpoint, device="cpu").load(1000, lambda *_: None) as model:
        weights = sum(parameter.nbytes for parameter in model.module.parameters())
        pages = sum(each.nbytes for each in model.cache.pages)
    assert size.tokens is None or size.tokens == 1000
    assert weights + pages < size.bytes < weights + pages + 100e6, "weights, pages and an allowance for activations"


def test_the_cache_of_a_model_takes_what_the_budget_leaves(checkpoint):
    whole = size_of(checkpoint, 1 << 40, device="cpu")
    assert whole.tokens == LARGE.max_position_embeddings, "one context, if there is room"
    page = (
        size_of(checkpoint, device="cpu", cache_tokens=128).bytes
        - size_of(checkpoint, device="cpu", cache_tokens=64).bytes
    )
    less = size_of(checkpoint, whole.bytes - 10 * page, device="cpu")
    assert 0 < less.tokens < LARGE.max_position_embeddings
    assert less.tokens % 64 == 0
    assert whole.bytes - 12 * page < less.bytes <= whole.bytes - 10 * page
    with pytest.raises(RequestError, match="expected a smaller model or cache"):
        size_of(checkpoint, 10**6, device="cpu")
    with pytest.raises(RequestError, match="with a cache of 4096 tokens"):
        size_of(checkpoint, less.bytes, device="cpu", cache_tokens=4096)


def test_a_draft_counts(checkpoint):
    alone = size_of(checkpoint, device="cpu", cache_tokens=64).bytes
    assert size_of(checkpoint, device="cpu", cache_tokens=64, draft=checkpoint).bytes == 2 * alone


def test_models_are_listed_over_http():
    with toy() as one, tiny_model(TINY, torch.float32) as two, serving({"one": one, "org/two": two}) as url:
        listed = httpx.get(f"{url}/v1/models").json()
        assert listed["object"] == "list"
        assert [(each["id"], each["state"]) for each in listed["data"]] == [("one", "loaded"), ("org/two", "unloaded")]
        assert listed["data"][0]["max_model_len"] == min(one.config.context_length, one.cache.num_tokens)
        assert httpx.get(f"{url}/v1/models/org/two").json()["id"] == "org/two"
        missing = httpx.get(f"{url}/v1/models/three")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"

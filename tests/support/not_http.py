"""Bytes that are no HTTP/1.1 request, or a request that a server should not take."""

from __future__ import annotations

import random
from collections.abc import Iterator

GET, POST, HOST = b"GET /health HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\n", b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
CHUNKED = POST + HOST + JSON + b"Transfer-Encoding: chunked\r\n"
LINES = [b"GET", b"GET /", b"POST  /", b" GET / HTTP/1.1", b"G\x00T / HTTP/1.1", b"GET / HTTP/11", b"GET / FTP/1.1"]
OTHERS = [b"\x16\x03\x01\x02\x00\x01", b"SSH-2.0-x\r\n", b"EHLO x\r\n", b"*1\r\n$4\r\nPING\r\n"]
LENGTHS = [b"x", b"-5", b"+5", b"5, 6", b"1e3", b"0x5", b"5 5", b"9" * 99]
CHUNKS = [b"zz", b"-1", b"f" * 25, b"5 5", b"", b"0x1"]
PROXIED = [b"CONNECT a:1", b"GET http://a/b", b"OPTIONS *"]


def not_http(count: int, seed: int = 1) -> Iterator[tuple[str, bytes]]:
    """``count`` byte strings, each with the name of its kind."""
    choose = random.Random(seed)
    for _ in range(count):
        yield choose.choice(list(_of_each_kind(choose).items()))


def _of_each_kind(choose: random.Random) -> dict[str, bytes]:
    noise = choose.randbytes(choose.randrange(4, 400))
    number, few, long = b"%d" % choose.randrange(10**6), choose.randrange(1, 99), choose.randrange(40_000, 200_000)
    return {
        "noise": noise + b"\r\n\r\n",
        "no request line": choose.choice(LINES) + b"\r\n" + HOST + b"\r\n",
        "another protocol": choose.choice(OTHERS) + noise + b"\r\n\r\n",
        "no host": POST + b"\r\n",
        "two hosts": POST + HOST + b"Host: y" + number + b"\r\n\r\n",
        "no colon": POST + HOST + b"x" * few + b"\r\n\r\n",
        "a space in a name": POST + HOST + b"a b" + number + b": c\r\n\r\n",
        "zeros in a value": POST + HOST + b"a: " + b"\x00" * few + b"\r\n\r\n",
        "no number as a length": POST + HOST + b"Content-Length: " + choose.choice(LENGTHS) + b"\r\n\r\n",
        "two lengths": POST + HOST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        "an unknown coding": POST + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        "no number as a chunk": CHUNKED + b"\r\n" + choose.choice(CHUNKS) + b"\r\n\r\n",
        "a length and chunks": CHUNKED + b"Content-Length: 5\r\n\r\n1\r\n{\r\n0\r\n\r\n",
        "a long line": b"GET /" + b"a" * long + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        "a long header": GET + HOST + b"a: " + b"b" * long + b"\r\n\r\n",
        "many headers": GET + HOST + b"a: b\r\n" * (long // 6) + b"\r\n",
        "headers up to the limit": b"GET /v1 HTTP/1.1\r\n" + HOST + b"a: b\r\n" * (4000 + few) + b"\r\n",
        "websocket": GET.replace(b"health", b"v1/completions")
        + HOST
        + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        "a large body announced": POST
        + HOST
        + JSON
        + b"Expect: 100-continue\r\nContent-Length: 9"
        + number
        + b"9\r\n\r\n",
        "for a proxy": choose.choice(PROXIED) + number + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    }

"""Requests that a server must refuse: any number, the same for the same seed, no two equal."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from support.wrong_fields import ROUTES, TOOL, Route

JSON = (("content-type", "application/json"),)
BAD_REQUEST = (400,)
NOT_JSON = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "01", "1.", ".5", "0x10", "+1", "1_000", "--1", "1e", "nan",
    "undefined", "True", "None", "'x'", '"\\x41"', '"\\u12"',
]  # fmt: skip
LIMITS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Malformed:
    """A request, and the answers that are right for it."""

    kind: str
    path: str
    body: bytes = b""
    method: str = "POST"
    headers: Headers = JSON
    statuses: tuple[int, ...] = BAD_REQUEST
    names: str = ""  # what the message or `param` must name
    is_anthropic: bool = field(default=False)  # errors have the format of Anthropic's API


def malformed(count: int, max_body_bytes: int, seed: int = 0) -> Iterator[Malformed]:
    """``count`` requests. Some bodies are longer than ``max_body_bytes``."""
    choose, seen = random.Random(seed), set()
    makers: list[Callable[[], Malformed]] = [
        *[lambda: _field(choose)] * 12,
        *[lambda: _unknown(choose)] * 2,
        *[lambda: _absent(choose)],
        *[lambda: _text(choose)] * 6,
        *[lambda: _encoding(choose)] * 2,
        *[lambda: _content_type(choose)],
        *[lambda: _method(choose)],
        *[lambda: _path(choose)] * 2,
        *[lambda: _too_large(choose, max_body_bytes)],
    ]
    while len(seen) < count:
        case = choose.choice(makers)()
        key = (case.method, case.path, case.headers, case.body)
        if key not in seen:
            seen.add(key)
            yield case


def _some_body(choose: random.Random) -> tuple[Route, dict[str, Any]]:
    route = choose.choice(ROUTES)
    return route, _salted(choose, choose.choice(route.bodies))


def _salted(choose: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """A copy of a body with unique text, so that requests with the same fault differ."""
    body = copy.deepcopy(body)
    turns = body.get("messages") or body.get("input")
    if isinstance(turns, list):
        turns[-1]["content"] += f" {choose.randrange(10**9)}"
    elif "prompt" in body:
        body["prompt"] = f"hi {choose.randrange(10**9)}"
    elif "tokens" in body:
        body["tokens"] = [choose.randrange(256) for _ in range(6)]
    return body


def _case(kind: str, route: Route, body: bytes, **others: Any) -> Malformed:
    return Malformed(kind, route.path, body, is_anthropic=route.is_anthropic, **others)


def _dumped(choose: random.Random, body: Any) -> bytes:
    """The body as JSON, in one of the styles that clients use."""
    options = {"ensure_ascii": choose.random() < 0.5, "indent": choose.choice([None, None, 1])}
    return json.dumps(body, **options).encode()


def _field(choose: random.Random) -> Malformed:
    """A field with a value that it does not take."""
    route, body = _some_body(choose)
    name = choose.choice(list(route.wrong))
    body[name] = choose.choice(route.wrong[name])(choose)
    if name in ("prompt", "messages") and route.path == "/tokenize":
        body = {name: body[name]}
    if name == "top_logprobs":
        body["logprobs"] = True
    if name == "tool_choice":
        body["tools"] = body.get("tools") or [copy.deepcopy(TOOL)]
        if route.is_anthropic or route.path == "/v1/responses":
            given = body["tools"][0]["function"]
            schema = "input_schema" if route.is_anthropic else "parameters"
            body["tools"] = [{"name": given["name"], schema: given["parameters"]}]
            body["tools"][0] |= {} if route.is_anthropic else {"type": "function"}
    if name in LIMITS:
        for other in LIMITS - {name}:
            body.pop(other, None)
    statuses = (400, 404) if name in ("model", "previous_response_id") else BAD_REQUEST
    said = "token" if name in LIMITS or name == "tokens" else name  # the message about tokens always has this word
    return _case(f"field {name}", route, _dumped(choose, body), statuses=statuses, names=said)


def _unknown(choose: random.Random) -> Malformed:
    """A field that the API does not have."""
    route, body = _some_body(choose)
    known = choose.choice(list(route.wrong))
    name = choose.choice([known + "s_", known.upper(), "_" + known, f"x_{choose.randrange(10**6)}", "__proto__", "é"])
    body[name] = choose.choice([1, "x", 0.5, [], {}, True])  # null: absent
    return _case("unknown field", route, _dumped(choose, body), names=name)


def _absent(choose: random.Random) -> Malformed:
    """A body without a required field, or with null for it."""
    route = choose.choice([route for route in ROUTES if route.needed])
    body, name = _salted(choose, choose.choice(route.bodies)), choose.choice(route.needed)
    if choose.random() < 0.5:
        del body[name]
    else:
        body[name] = None
    return _case("absent field", route, _dumped(choose, body), names=name)


def _text(choose: random.Random) -> Malformed:
    """Text that is not JSON, or JSON that means different things to different readers."""
    route, body = _some_body(choose)
    text = json.dumps(body)
    name = choose.choice(list(body))
    depth = choose.randrange(200, 5000)
    middle = choose.randrange(1, len(text))
    bad_value = choose.choice([*NOT_JSON, "9" * choose.randrange(4500, 9000)])
    surrogate = choose.choice(["\\ud800", "\\udfff", "\\udc00\\ud800", "x\\ud83d", "\\ud83dx", "\\uDBFF\\u0041"])
    makers: dict[str, Callable[[], str]] = {
        "bad value": lambda: text[:-1] + f', "seed": {bad_value}}}',
        "bad value in a list": lambda: text[:-1] + f', "stop": ["x", {bad_value}]}}',
        "bad value alone": lambda: bad_value,
        "lone surrogate": lambda: text[:-1] + f', "user": "{surrogate}"}}',
        "lone surrogate as a key": lambda: text[:-1] + f', "{surrogate}": 1}}',
        "lone surrogate in the prompt": lambda: text.replace("hi", "hi" + surrogate),
        "twice": lambda: text[:-1] + f', "{name}": {json.dumps(body[name])}}}',
        "twice within": lambda: text[:-1] + ', "metadata": {"a": 1, "a": 2}}',
        "deep list": lambda: text[:-1] + f', "metadata": {"[" * depth}{"]" * depth}}}',
        "deep dict": lambda: text[:-1] + f', "metadata": {_deep(depth)}}}',
        "deep and never closed": lambda: choose.choice(["[", '{"a":', '[{"a":[']) * depth,
        "truncated": lambda: text[:middle],
        "trailing": lambda: text + choose.choice(["x", "}", "]", ",", text, "\x00", "//", "#", '"']),
        "comment": lambda: text[:-1] + "/* x */}",
        "trailing comma": lambda: text[:-1] + ",}",
        "unquoted key": lambda: text.replace(f'"{name}"', name, 1),
        "single quotes": lambda: text.replace('"', "'"),
        "control character": lambda: text.replace("hi", "hi" + chr(choose.randrange(32))) + " ",
        "not an object": lambda: json.dumps(choose.choice([None, True, "x", [body], [], 5, 1.5, text])),
        "nothing": lambda: " " * choose.randrange(9),
        "form": lambda: "&".join(f"{key}=x" for key in body),
    }
    kind = choose.choice(list(makers))
    if kind in ("control character", "lone surrogate in the prompt") and "hi" not in text:
        kind = "truncated"
    return _case(kind, route, makers[kind]().encode())


def _deep(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def _encoding(choose: random.Random) -> Malformed:
    """Bytes that are not UTF-8, or a compressed body."""
    route, body = _some_body(choose)
    body["user" if "user" in route.wrong else "model"] = "é𝄞" * choose.randrange(1, 9)
    text = json.dumps(body, ensure_ascii=False)
    encoded, others = text.encode(), {}
    kind = choose.choice(["utf-16", "utf-32", "latin-1", "utf-16-le", "mark", "cut", "overlong", "surrogate", "gzip"])
    if kind == "latin-1":
        encoded = text.replace("𝄞", "").encode("latin-1")
    elif kind == "mark":
        encoded = b"\xef\xbb\xbf" + encoded
    elif kind == "cut":
        encoded = encoded.replace("𝄞".encode(), "𝄞".encode()[: choose.randrange(1, 4)])
    elif kind == "overlong":
        encoded = encoded.replace("é".encode(), choose.choice([b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf8\x88\x80\x80\x80"]))
    elif kind == "surrogate":
        encoded = encoded.replace("é".encode(), choose.choice([b"\xed\xa0\x80", b"\xed\xbf\xbf"]))
    elif kind == "gzip":
        coding = choose.choice(["gzip", "deflate", "br", "zstd", "x"])
        others = {"headers": (*JSON, ("content-encoding", coding)), "statuses": (400, 415)}
    else:
        encoded = text.encode(kind)
    return _case(f"encoding {kind}", route, encoded, **others)


def _content_type(choose: random.Random) -> Malformed:
    route, body = _some_body(choose)
    types = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json", "x", ""]
    types += ["application/xml", "application/octet-stream", "application/jsonx", "application/json-seq"]
    headers = (("content-type", choose.choice(types)),) if choose.random() < 0.9 else ()
    return _case("content type", route, _dumped(choose, body), headers=headers, statuses=(400, 415))


def _method(choose: random.Random) -> Malformed:
    route, body = _some_body(choose)
    method = choose.choice(["GET", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PROPFIND", "post", "X" * 50])
    return _case("method", route, _dumped(choose, body), method=method, statuses=(405,))


def _path(choose: random.Random) -> Malformed:
    known = choose.choice([*(route.path for route in ROUTES), "/v1/models", "/health", "/metrics"])
    number = choose.randrange(10**6)
    path = choose.choice(
        [
            f"{known}/{number}/x", f"//{number}{known}", f"{known}{number}", known.upper() + str(number), f"/{number}",
            f"/../../etc/passwd{number}", f"/..%2f..%2fetc%2fpasswd{number}", f"/%00{number}", f"/v2{known}/{number}",
            f"/.env{number}", "/" + "a" * (number % 5000 + 9), f"/%ff%fe{number}", f"/v1/embeddings/{number}",
            f"/{number}?{known}", f"/v1/models/absent{number}", f"/v1/models/..%2f{number}", f"/;{number}",
            f"/{number}\\..\\x",
        ]
    )  # fmt: skip
    method = "GET" if "models" in path else choose.choice(["GET", "POST", "PUT", "DELETE"])
    return Malformed("path", path, b"" if method == "GET" else b"{}", method, statuses=(404,))


def _too_large(choose: random.Random, most: int) -> Malformed:
    """A body over the limit: with its length, with a header that only claims such a length, or in chunks."""
    route, body = _some_body(choose)
    kind = choose.choice(["length", "said", "chunks"])
    if kind == "said":
        size = most + 1 + choose.randrange(10 ** choose.randrange(1, 18))
        headers = (*JSON, ("content-length", str(size)))
        return _case("too large, said", route, _dumped(choose, body), headers=headers, statuses=(413,))
    text = _dumped(choose, body)
    text += b" " * (most + 1 + choose.randrange(3000) - len(text))
    headers = (*JSON, ("transfer-encoding", "chunked")) if kind == "chunks" else JSON
    return _case(f"too large, {kind}", route, text, headers=headers, statuses=(413,))

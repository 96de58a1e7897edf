"""Values that the fields of the server's APIs must refuse: for each route, every field with its wrong values."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Maker = Callable[[random.Random], Any]  # makes a wrong value
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@dataclass(frozen=True)
class Route:
    """A route that takes JSON, bodies that it would answer, and wrong values for each of their fields."""

    path: str
    bodies: list[dict[str, Any]]
    wrong: dict[str, list[Maker]]
    needed: list[str]  # fields that must be there
    is_anthropic: bool = field(default=False)


def among(values: Iterable[Any]) -> list[Maker]:
    return [lambda _, value=value: value for value in values]


def not_a(*kinds: type) -> list[Maker]:
    """Values of JSON's other types, without null, which means that the field is absent."""
    values: list[tuple[type, Maker]] = [
        (str, lambda choose: choose.choice(["", "x", "1", "true", "null", "1e3", "\u202e", "𝔘" * 5])),
        (bool, lambda choose: choose.random() < 0.5),
        (int, lambda choose: choose.randrange(-3, 5)),
        (float, lambda choose: choose.random() + 0.1),
        (list, lambda choose: choose.choice([[], [[]], [1, "x"], [{}], [None]])),
        (dict, lambda choose: choose.choice([{}, {"": {}}, {"x": 1}, {"type": "x"}])),
    ]
    return [maker for kind, maker in values if kind not in kinds]


def whole(least: int, most: int) -> list[Maker]:
    return [
        *not_a(int),
        lambda choose: least - 1 - choose.randrange(10**6),
        lambda choose: most + 1 + choose.randrange(10 ** choose.randrange(1, 30)),
        lambda choose: least + choose.randrange(5) + 0.5,
        lambda choose: 10 ** choose.randrange(20, 60),
        lambda choose: -(10 ** choose.randrange(20, 60)),
    ]


def at_least(least: int) -> list[Maker]:
    return [*not_a(int), lambda choose: least - 1 - choose.randrange(10**6), lambda choose: choose.randrange(5) + 0.5]


def number(least: float, most: float) -> list[Maker]:
    return [
        *not_a(int, float),
        lambda choose: least - choose.random() * 10 ** choose.randrange(300) - 0.001,
        lambda choose: most + choose.random() * 10 ** choose.randrange(300) + 0.001,
        lambda choose: 10 ** choose.randrange(310, 400),
    ]


FLAG = not_a(bool)
TEXT = not_a(str)
WORDS = ["x" * 5000, ["x"] * 200, [""], [5], [None], [["x"]], [{}], ["x", 7]]
STOPS = [*not_a(str, list), *among([*WORDS, ""])]
BIASES = [
    *not_a(dict),
    *among([{"x": 1}, {"-1": 1}, {"1.5": 1}, {"1": "1"}, {"1": None}, {"1": True}, {"1": [1]}, {"1": 5000}, {"": 1}]),
    lambda choose: {str(10 ** choose.randrange(6, 30)): 1},
]
SAMPLING = {
    "temperature": number(0, 100),
    "top_p": number(0, 1),
    "min_p": number(0, 1),
    "top_k": at_least(0),
    "repetition_penalty": number(0, 100),
    "presence_penalty": number(-100, 100),
    "frequency_penalty": number(-100, 100),
    "seed": whole(-(2**63), 2**64),
    "min_tokens": whole(0, 10**6),
    "ignore_eos": FLAG,
    "skip_special_tokens": FLAG,
    "stop_token_ids": [*not_a(list), *among([["1"], [1.5], [-1], [None], [True], [10**9], [[1]]])],
    "logit_bias": BIASES,
    "priority": whole(-1000, 1000),
    "cache_salt": [*TEXT, *among(["", "x" * 2000])],
    "n": whole(1, 128),
    "stop": STOPS,
    "stream": FLAG,
    "stream_options": [*not_a(dict), *among([{"include_usage": "x"}, {"include_usage": 1}, {"x": True}])],
    "user": TEXT,
    "guided_regex": [*TEXT, *among(["(", "[z-a]", "a{2,1}", "*"])],
    "guided_choice": [*not_a(list), *among([[5], [None], [[]], [""] * 0])],
    "guided_grammar": [*TEXT, *among(["stop: 'x'", "%%%", "start: absent"])],
    "guided_json": [
        *not_a(dict, str, bool),
        *among(["{", "nonsense", {"type": "nonsense"}, {"$ref": "#/absent"}, {"type": 5}, {"properties": []}]),
    ],
}

TURNS = [
    *among([5, "x", True, 1.5, {}, [], [5], ["x"], [None], [[]], [{}], [{"role": "user"}], [{"content": "x"}]]),
    *among([[{"role": role, "content": "x"}] for role in (5, None, [], {}, True)]),
    *among([[{"role": "user", "content": said}] for said in (5, True, 1.5, {}, [5], ["x"], [[]], [None], [{}])]),
    *among([[{"role": "user", "content": [part]}] for part in ({"type": "text"}, {"type": "x"}, {"text": "x"})]),
    *among([[{"role": "user", "content": [{"type": "text", "text": said}]}] for said in (5, None, [], {})]),
    lambda choose: [{"role": "user", "content": "x"}] * (100 + choose.randrange(99)),
]
ROLES = among([[{"role": role, "content": "x"}] for role in ("", "nobody", "User")])  # some templates show them
PICTURES = among(
    [
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}]}],
        [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}],
    ]
)
CALLS = among(
    [
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": calls}]
        for calls in (5, "x", {}, [5], [{}], [{"id": "1", "type": "function"}], [{"type": "function", "function": {}}])
    ]
)
TOOLS = [
    *not_a(list),
    *among([[5], ["x"], [None], [{}], [[]], [{"type": "x"}], [{"type": "function"}], [{"function": {"name": "x"}}]]),
    *among([[{"type": "function", "function": given}] for given in (5, "x", [], {}, {"description": "x"})]),
    *among([[{"type": "function", "function": {"name": name}}] for name in (5, None, [], {}, "", "a b", "x" * 500)]),
    *among([[{"type": "function", "function": {"name": "x", "parameters": given}}] for given in (5, "x", [], True)]),
]
CHOICES = [
    *not_a(dict, str),
    *among(["", "sometimes", "AUTO", {}, {"type": "x"}, {"type": "function"}, {"function": {"name": "weather"}}]),
    *among([{"type": "function", "function": given} for given in (5, "x", [], {}, {"name": 5}, {"name": "absent"})]),
]
FORMATS = [
    *not_a(dict),
    *among([{}, {"type": "x"}, {"type": 5}, {"type": "json_schema"}, {"type": "text", "x": 1}]),
    *among([{"type": "json_schema", "json_schema": given} for given in (5, "x", [], {}, {"schema": 5, "name": "x"})]),
    *among(
        [
            {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            for schema in (5, "x", [], {"type": "x"}, {"type": 5}, {"$ref": "#/absent"}, {"properties": 5})
        ]
    ),
]
PROMPTS = [
    *among(
        [5, True, 1.5, {}, [], [[]], [{}], [None], ["x", 5], [1, "x"], [[1], 5], [[1], "x"], [1.5], [[1.5]], [[[1]]]]
    ),
    *among([[-1], [[-1]], [10**9], [[10**30]], [True], [["x"]]]),
    lambda choose: ["x"] * (20 + choose.randrange(99)),
    lambda choose: "x" * (5000 + choose.randrange(999)),
]


CHAT = Route(
    "/v1/chat/completions",
    [
        {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
        {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True},
        {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 2, "n": 2},
        {
            "model": "toy",
            "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}],
            "max_tokens": 2,
            "tools": [TOOL],
        },
    ],
    {
        **SAMPLING,
        "model": [*TEXT, *among(["absent", "", "../toy", "/etc/passwd", "x" * 5000, "toy\x00"])],
        "messages": [*TURNS, *ROLES, *PICTURES, *CALLS],
        "max_tokens": whole(1, 10**6),
        "max_completion_tokens": whole(1, 10**6),
        "logprobs": FLAG,
        "top_logprobs": whole(0, 100),
        "tools": TOOLS,
        "tool_choice": CHOICES,
        "parallel_tool_calls": FLAG,
        "response_format": FORMATS,
        "audio": among([{"voice": "alloy", "format": "wav"}, 5, "x"]),
        "modalities": among([["audio"], ["text", "audio"], "x", 5, [5], {}]),
        "prediction": among([{"type": "content", "content": "x"}, 5, "x"]),
        "web_search_options": among([{}, {"search_context_size": "low"}, 5]),
        "functions": among([[{"name": "x", "parameters": {}}], 5, "x"]),
        "function_call": among([5, {"name": "x"}, "x"]),
        "best_of": among([2, "x", 5.5]),
        "echo": FLAG,
        "prompt": among(["x", [1]]),
        "input": among(["x", []]),
    },
    ["messages"],
)
COMPLETIONS = Route(
    "/v1/completions",
    [
        {"model": "toy", "prompt": "hi", "max_tokens": 2},
        {"model": "toy", "prompt": ["hi", "you"], "max_tokens": 2, "stream": True},
        {"model": "toy", "prompt": [1, 2, 3], "max_tokens": 2, "echo": True, "logprobs": 1},
    ],
    {
        **SAMPLING,
        "model": [*TEXT, *among(["absent", "", "..\\toy", "x" * 5000])],
        "prompt": PROMPTS,
        "max_tokens": whole(0, 10**6),
        "logprobs": whole(0, 100),
        "echo": FLAG,
        "suffix": [*TEXT],
        "best_of": [*whole(1, 128)],
        "messages": among([[{"role": "user", "content": "x"}], 5]),
        "tools": among([[TOOL], 5]),
        "max_completion_tokens": among([5, "x"]),
    },
    ["prompt"],
)
RESPONSES = Route(
    "/v1/responses",
    [
        {"model": "toy", "input": "hi", "max_output_tokens": 2},
        {"model": "toy", "input": [{"role": "user", "content": "hi"}], "max_output_tokens": 2, "stream": True},
    ],
    {
        "model": [*TEXT, *among(["absent", "x" * 5000])],
        "input": among(
            [5, True, 1.5, {}, [], [5], ["x"], [None], [{}], [{"role": 5, "content": "x"}], [{"role": "user"}]]
        ),
        "instructions": not_a(str, list),
        "max_output_tokens": whole(1, 10**6),
        "temperature": number(0, 100),
        "top_p": number(0, 1),
        "stream": FLAG,
        "parallel_tool_calls": FLAG,
        "tools": among([5, "x", {}, [5], [{}], [{"type": "x"}], [{"type": "function"}], [{"type": "web_search"}]]),
        "tool_choice": among([5, "sometimes", [], {}, {"type": "x"}, {"type": "function", "name": "absent"}]),
        "text": [*not_a(dict), *among([{"format": 5}, {"format": {"type": "x"}}, {"format": {"type": "json_schema"}}])],
        "previous_response_id": among([5, [], "resp_absent"]),
        "background": among([True, 5, "x"]),
        "messages": among([[{"role": "user", "content": "x"}]]),
        "max_tokens": among([5]),
    },
    ["input"],
)
MESSAGES = Route(
    "/v1/messages",
    [
        {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
        {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True},
    ],
    {
        "model": [*TEXT, *among(["absent", "x" * 5000])],
        "messages": [*TURNS, *ROLES],
        "max_tokens": at_least(1),  # one beyond the context is reduced
        "temperature": number(0, 100),
        "top_p": number(0, 1),
        "top_k": at_least(0),
        "stream": FLAG,
        "stop_sequences": [*not_a(list), *among(WORDS[1:])],
        "system": [*not_a(str, list), *among([[5], [{}], [{"type": "image"}]])],
        "tools": among([5, "x", {}, [5], [{}], [{"name": 5}], [{"name": "x", "input_schema": 5}]]),
        "tool_choice": among([5, "auto", [], {}, {"type": "x"}, {"type": "tool"}, {"type": "tool", "name": "absent"}]),
        "n": among([2]),
        "logprobs": among([True]),
    },
    ["messages", "max_tokens"],
    is_anthropic=True,
)
TOKENIZE = Route(
    "/tokenize",
    [{"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]}],
    {
        "prompt": among([5, True, {}, [], ["x"], [1]]),
        "messages": TURNS,
        "add_special_tokens": FLAG,
        "return_token_strs": FLAG,
        "model": [*TEXT, *among(["absent"])],
    },
    [],
)
DETOKENIZE = Route(
    "/detokenize",
    [{"tokens": [1, 2, 3]}],
    {"tokens": among([5, "x", True, {}, ["1"], [1.5], [-1], [10**9], [None], [[1]]]), "model": among([5, "absent"])},
    ["tokens"],
)
ROUTES = [CHAT, COMPLETIONS, RESPONSES, MESSAGES, TOKENIZE, DETOKENIZE]

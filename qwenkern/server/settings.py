"""The settings of a server: where it listens, who may call it, and its limits."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bounds:
    """The limits on requests and on their waits. A request beyond a limit gets an error that names the limit."""

    connections: int = 1024  # more get 503
    body_bytes: int = 16 * 2**20
    bodies_bytes: int = 64 * 2**20  # of all bodies in memory, beyond the first 64 KiB of each; more get 429
    body_seconds: float = 30.0  # for a body to arrive
    depth: int = 64  # levels of nesting in a body
    values: int = 2**18  # numbers, texts, lists and objects in a body
    messages: int = 4096
    prompts: int = 256  # of a request to /v1/completions
    n: int = 64  # answers of each prompt
    scored_tokens: int = 2**17  # tokens of all prompts of a request that asks for their log-probabilities
    answers: int = 512  # n times the number of prompts of a request
    stops: int = 16
    top_logprobs: int = 20
    tools: int = 128
    waiting: int = 256  # requests that wait to start, and as many again that need only the tokenizer; more get 429
    grammars: int = 32  # waiting requests with a new grammar to compile; more get 429
    waiting_seconds: float = 120.0  # a request that has not started by then gets 503
    drain_seconds: float = 30.0  # after SIGTERM, for running requests to end


@dataclass(frozen=True)
class Settings:
    """Settings of a server."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()  # empty: everybody who reaches the port may call
    cors_origins: tuple[str, ...] = ()  # origins of web pages that may call, such as "https://example.org", or "*"
    log_prompts: bool = False
    bounds: Bounds = field(default_factory=Bounds)

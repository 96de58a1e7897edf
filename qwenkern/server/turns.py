"""What all APIs have in common: a turn that a client asks for, and the events of its answers.

    body of a request ─► Turn ─► engine ─► events ─► body of the response, or server-sent events

Each API has a file that reads its bodies into turns, and writes events in its own form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..prompts import Prompt
from ..sampling import SamplingParams, TokenLogprob


@dataclass(frozen=True)
class Turn:
    """One call of a client: n answers to each of its prompts."""

    prompts: list[Prompt]  # several for /v1/completions only
    params: SamplingParams
    tools: list[dict[str, Any]] = field(default_factory=list)  # {"type": "function", "function": {...}} each
    continues: bool = False  # the answers continue the last message
    shortens: bool = False  # max_tokens is reduced to the room that the context has after the prompt
    is_streamed: bool = False  # the client reads the text as it comes


@dataclass(frozen=True)
class Started:
    """The first event of an answer, when its first token has been drawn."""

    index: int  # of the answer: prompt_index * n + sample_index
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt


@dataclass(frozen=True)
class Text:
    """More text of an answer."""

    index: int  # of the answer
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of these tokens, if requested


@dataclass(frozen=True)
class CallBegun:
    """A call of a function begins. Its arguments follow, and at last either the ToolCall or CallBroken."""

    index: int  # of the answer
    id: str  # "call_..."
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the arguments of the call that has begun: so far the beginning of a JSON object."""

    index: int  # of the answer
    text: str


@dataclass(frozen=True)
class CallBroken:
    """What has begun is no call, and its arguments have no end. Its text follows."""

    index: int  # of the answer


@dataclass(frozen=True)
class ToolCall:
    """The end of a call, and all of it."""

    index: int  # of the answer
    id: str  # "call_..."
    name: str
    arguments: str  # a JSON object as text


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    index: int
    reason: str  # "stop", "length" or "tool_calls"
    stop_reason: int | str | None  # the token id or stop string that ended the text
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt
    num_tokens: int  # of the answer


CallEvent = CallBegun | CallArguments | CallBroken | ToolCall
Event = Started | Text | CallEvent | Finished

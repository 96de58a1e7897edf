"""The types that all APIs share: a turn, which is one call of a client, and the events of its answers.

    body of a request ─► Turn ─► engine ─► events ─► body of the response, or server-sent events

Each API has a module that makes turns of its bodies, and writes events in its own format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..prompts import Prompt
from ..sampling import SamplingParams, TokenLogprob


@dataclass(frozen=True)
class Turn:
    """One call of a client: n answers to each of its prompts."""

    prompts: list[Prompt]  # only /v1/completions may have several
    params: SamplingParams
    tools: list[dict[str, Any]] = field(default_factory=list)  # {"type": "function", "function": {...}} each
    continues: bool = False  # the answers continue the last message
    shortens: bool = False  # reduces max_tokens to the tokens that the context has left after the prompt
    is_streamed: bool = False  # whether the client reads the text as it is generated


@dataclass(frozen=True)
class Started:
    """The first event of an answer, after its first token has been drawn."""

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
    """The beginning of a function call. Its arguments follow, and then either ToolCall or CallBroken."""

    index: int  # of the answer
    id: str  # "call_..."
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More text of the arguments of the call that has begun. The text so far is the beginning of a JSON object."""

    index: int  # of the answer
    text: str


@dataclass(frozen=True)
class CallBroken:
    """The call that has begun is malformed, so its arguments stay incomplete. Its text follows as Text."""

    index: int  # of the answer


@dataclass(frozen=True)
class ToolCall:
    """The end of a call. It has the whole call."""

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

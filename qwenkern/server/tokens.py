"""POST /tokenize and /detokenize, GET /tokenizer_info, with the bodies that vLLM has defined for them.

Source: vllm/entrypoints/serve/tokenize/protocol.py of the vLLM project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import RequestError, shown
from ..Model import Model
from ..text.tokenizer import Tokenizer
from .admission import check_length
from .bodies import Body, Some
from .chat import Message, Tool, conversation
from .endpoints import Endpoint
from .errors import ApiError
from .functions import Functions
from .service import Service
from .settings import Bounds

_NOT_OURS = "templates come from the checkpoint alone"


class TokenizeBody(Body):
    """A text (`prompt`), or the messages of a chat."""

    REFUSED: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "chat_template": ((), _NOT_OURS),
        "chat_template_kwargs": (({},), _NOT_OURS),
        "mm_processor_kwargs": (({},), "there are no images"),
    }

    model: str | None = None
    prompt: str | None = None
    messages: Some[Message] | None = None  # messages and tools as in /v1/chat/completions
    tools: Some[Tool] | None = None
    add_special_tokens: bool | None = None  # adds the checkpoint's ids before a text; default: true for prompt only
    add_generation_prompt: bool | None = None  # whether the beginning of an answer follows the messages; default: true
    continue_final_message: bool | None = None  # the tokens end within the last message instead
    return_token_strs: bool = False

    def check(self, bounds: Bounds) -> None:
        """Raises ApiError unless the body has either a prompt or messages, within the limits."""
        if (self.prompt is None) == (self.messages is None):
            found = "neither prompt nor messages" if self.prompt is None else "prompt and messages"
            raise _wrong(f"the body has {found}; expected one of the two", "prompt")
        for name in ("tools", "add_generation_prompt", "continue_final_message"):
            if getattr(self, name) is not None and self.messages is None:
                raise _wrong(f"{name} needs messages, found a prompt", name)
        if self.continue_final_message and self.add_generation_prompt:
            name = "add_generation_prompt"
            raise _wrong(f"{name} and continue_final_message are true; expected one of them", name)
        if len(self.messages or ()) > bounds.messages:
            raise _wrong(f"messages has {len(self.messages or ())}; expected at most {bounds.messages}", "messages")

    def ids(self, tokenizer: Tokenizer, bounds: Bounds) -> list[int]:
        """The token ids. Raises ApiError or RequestError."""
        if self.messages is None:
            assert self.prompt is not None
            return (
                tokenizer.encode(self.prompt)
                if self.add_special_tokens is False
                else tokenizer.encode_prompt(self.prompt)
            )
        functions = Functions.of([tool.function for tool in self.tools or []], None, None, bounds)
        ids = tokenizer.encode_chat(
            conversation(self.messages),
            functions.tools or None,
            self.add_generation_prompt is not False,
            bool(self.continue_final_message),
        )
        return [*tokenizer.beginning_ids, *ids] if self.add_special_tokens else ids


class Tokenized(BaseModel):
    """The token ids of a text or a chat. token_strs: the tokens as the vocabulary spells them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Body):
    """Token ids to decode."""

    model: str | None = None
    tokens: Some[int]


class Detokenized(BaseModel):
    """The text of token ids, special tokens included."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The checkpoint's description of its tokenizer. Further fields are special tokens by name, such as bos_token."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    model_max_length: int
    vocab_size: int
    added_tokens_decoder: dict[int, dict[str, Any]]
    chat_template: str | list[dict[str, str]] | None = None


async def tokenize(service: Service, request: Request, body: TokenizeBody) -> Response:
    """Tokenizes a text, or a chat with its template."""
    body.check(service.settings.bounds)
    async with service.models.use(body.model) as model:
        tokenizer = _tokenizer(model)
        longest = _longest(model)

        def tokenized() -> Response:
            check_length(model, body.model_dump(include={"prompt", "messages", "tools"}))
            ids = body.ids(tokenizer, service.settings.bounds)
            spelled = list(map(tokenizer.spelling_of, ids)) if body.return_token_strs else None
            found = Tokenized(count=len(ids), max_model_len=longest, tokens=ids, token_strs=spelled)
            return JSONResponse(found.model_dump())

        return await service.aside(tokenized)


async def detokenize(service: Service, request: Request, body: DetokenizeBody) -> Response:
    """Decodes token ids, special tokens included."""
    async with service.models.use(body.model) as model:
        text = await service.aside(lambda: _tokenizer(model).decode(body.tokens, skip_special=False))
    return JSONResponse(Detokenized(prompt=text).model_dump())


async def tokenizer_info(service: Service, request: Request, body: None) -> Response:
    """Describes the tokenizer as the checkpoint does. The model must be loaded: this request does not load it."""
    if unknown := [name for name in request.query_params if name not in _QUERY]:
        raise RequestError(f"query has {shown(unknown[0])}; expected {' or '.join(_QUERY)}")
    async with service.models.use(request.query_params.get("model"), may_load=False) as model:
        tokenizer = _tokenizer(model)
        settings = tokenizer.settings()
        templates = settings.get("chat_template")
        if templates and [each["name"] for each in templates] == ["default"]:
            settings["chat_template"] = templates[0]["template"]
        info = TokenizerInfo(
            tokenizer_class="Qwen2Tokenizer",
            model_max_length=_longest(model),
            vocab_size=tokenizer.vocab_size,
            added_tokens_decoder={
                token_id: {"content": token, "special": token_id in tokenizer.special_ids}
                for token_id, token in tokenizer.added_tokens().items()
            },
            **settings,
        )
    return JSONResponse(info.model_dump(mode="json"))


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise RequestError("model: it has no tokenizer; expected one that has")
    return model.tokenizer


def _longest(model: Model) -> int:
    """The most tokens of a request with its answer."""
    return min(model.config.context_length, model.cache.num_tokens)


def _wrong(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


_QUERY = {"model": {"type": "string"}}
ENDPOINTS = [
    Endpoint("/tokenize", "POST", tokenize, TokenizeBody, "Gives the token ids of a text or a chat", answer=Tokenized),
    Endpoint("/detokenize", "POST", detokenize, DetokenizeBody, "Gives the text of token ids", answer=Detokenized),
    Endpoint(
        "/tokenizer_info", "GET", tokenizer_info, None, "Describes the tokenizer", answer=TokenizerInfo, query=_QUERY
    ),
]

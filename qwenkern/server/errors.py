"""Errors as HTTP responses: a status, and a body in the format of the API that was called."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from ..errors import EngineError, Error, NonFiniteError, RequestError

log = logging.getLogger("qwenkern.server")

KINDS = {  # the same in both APIs
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An error that a client gets to see. param: the wrong field of the body. code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


def of(error: Exception, names: Mapping[str, str] | None = None) -> ApiError:
    """The error that a client gets to see for this one. It never has a path or a trace: only an ApiError or a
    RequestError keeps its message.

    names: the name of an argument, such as a field of SamplingParams -> the field of the body that it came from."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return _of_request(str(error), names or {})
    if isinstance(error, NonFiniteError):
        return ApiError(500, "the model computed logits that are not finite", code="non_finite")
    if isinstance(error, EngineError):
        return ApiError(503, "the model cannot compute this now", code="engine_error", headers={"Retry-After": "5"})
    if isinstance(error, Error):  # in the checkpoint, such as a chat template that fails; its message may have a path
        return ApiError(500, "the checkpoint of this model is damaged, or not supported", code="checkpoint_error")
    return ApiError(500, "internal error", code="internal_error")


def note(error: Exception, told: ApiError, request_id: str) -> None:
    """Writes to the log what the client does not get to see."""
    if told.status == 500:
        log.error("%s: %s", request_id, type(error).__name__, exc_info=error)
    elif isinstance(error, EngineError):
        log.error("%s: %s", request_id, str(error))  # not the error itself: its frames keep the model in memory


def _of_request(message: str, names: Mapping[str, str]) -> ApiError:
    """The error for a RequestError. If its message begins with a name of ``names``, it names the field instead."""
    found = re.match("[a-z_]+", message)
    if found and found[0] in names:
        param = names[found[0]]
        return ApiError(400, param + message[found.end() :], param=param, code="invalid_value")
    is_length = message.startswith("the prompt") and " tokens" in message
    return ApiError(400, message, code="context_length_exceeded" if is_length else "invalid_value")


def shutting_down() -> ApiError:
    """The error of a request that the server aborts because it shuts down."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})


def openai_body(error: ApiError) -> dict[str, Any]:
    """The body of an error in the format of OpenAI's API."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}

"""GET /openapi.json: the OpenAPI 3.1 document of a server, made of its endpoints and pydantic's schemas.

Source: https://spec.openapis.org/oas/v3.1.0"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import errors
from .endpoints import Endpoint
from .service import Service

JSON = "application/json"
REFERENCE = "#/components/schemas/"
_TEXT_OR_NULL = {"type": ["string", "null"]}
_EVENT = {
    "type": "object",
    "description": 'An event, if "stream" is true.',
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}
_FORMS = {  # the bodies of errors
    "Error": {
        "type": "object",
        "description": "An error in the format of OpenAI's API.",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": _TEXT_OR_NULL,
                    "code": _TEXT_OR_NULL,
                },
            }
        },
    },
    "OtherError": {
        "type": "object",
        "description": "An error in the format of the API that the path belongs to.",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type"],
                "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
            }
        },
    },
}
_ERRORS = {
    401: "The API key is missing or wrong",
    500: "The model or the server failed",
    503: "A model is loading, or the server is busy",
}
_ERRORS_OF_A_MODEL = {404: "There is no such model", 429: "Too many requests wait"}
_ERRORS_OF_A_BODY = {
    400: "A field is wrong, unknown or not supported; `param` names it",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not JSON",
}


async def openapi(service: Service, request: Request, body: None) -> Response:
    """Gives the OpenAPI document of this server."""
    return JSONResponse(request.app.state.openapi)


def document(endpoints: Sequence[Endpoint], has_keys: bool) -> dict[str, Any]:
    """The document of some endpoints. has_keys: whether callers need an API key."""
    used: list[type[BaseModel]] = [each.body for each in endpoints if each.body]
    used += [each.answer for each in endpoints if isinstance(each.answer, type)]
    references, definitions = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(used)], ref_template=REFERENCE + "{model}"
    )
    schemas: dict[Any, Any] = {model: schema for (model, _), schema in references.items()}
    paths: dict[str, dict[str, Any]] = {}
    for each in endpoints:
        path = re.sub(r":\w+}", "}", each.path)  # Starlette's converters are not OpenAPI's
        paths.setdefault(path, {})[each.method.lower()] = _operation(each, path, schemas, has_keys)
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "qwenkern",
            "version": version("qwenkern"),
            "description": "Qwen2.5 language models behind the APIs of OpenAI and Anthropic.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {}) | _FORMS},
    }
    if has_keys:
        found["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        found["security"] = [{"bearer": []}, {"header": []}]
    return found


def _operation(each: Endpoint, path: str, schemas: dict[Any, Any], has_keys: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{each.method.lower()}{path}").strip("_"),
        "summary": each.summary,
        "responses": {"200": {"description": "Success", "content": _content(each, schemas)}},
    }
    if each.handler.__doc__:
        found["description"] = re.sub(r"\s+", " ", each.handler.__doc__).strip()
    names = re.findall(r"{(\w+)}", path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in each.query.items()]
    if parameters:
        found["parameters"] = parameters
    if each.body:
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": schemas[each.body]}}}
    if each.is_open and has_keys:
        found["security"] = []
    told = dict(_ERRORS)
    if each.is_open or not has_keys:
        del told[401]
    if each.body:
        told |= _ERRORS_OF_A_BODY
    if each.query:
        told[400] = "A parameter is wrong or unknown"
    if "model" in each.query:
        told[409] = "The model is not loaded"
    if each.body or names or "model" in each.query:
        told |= _ERRORS_OF_A_MODEL
    form = "Error" if each.as_error is errors.openai_body else "OtherError"
    for status, meaning in sorted(told.items()):
        response: dict[str, Any] = {"description": meaning}
        schema = {"$ref": f"{REFERENCE}{form}"}
        if each.path == "/health" and status == 503:
            schema = schemas[each.answer]
        response["content"] = {JSON: {"schema": schema}}
        if status in (429, 503):
            response["headers"] = {
                "Retry-After": {"description": "Seconds after which to try again", "schema": {"type": "string"}}
            }
        found["responses"][str(status)] = response
    return found


def _content(each: Endpoint, schemas: dict[Any, Any]) -> dict[str, Any]:
    if isinstance(each.answer, str):
        return {each.answer: {"schema": {"type": "string"}}}
    content = {JSON: {"schema": schemas[each.answer] if each.answer else {"type": "object"}}}
    if each.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    return content


ENDPOINTS = [Endpoint("/openapi.json", "GET", openapi, None, "Describes this server")]

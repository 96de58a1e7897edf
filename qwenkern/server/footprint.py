"""`GET /footprint`: the memory that a model of a given size takes, and the cards that it fits. Loads no model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..config import FAMILY
from ..errors import RequestError, shown
from ..footprint.cards import CARDS, MACHINES
from ..footprint.case import DTYPES, IN_CACHE, QUANTISED, case_of
from .endpoints import Endpoint
from .service import Service

# The values of each parameter; the first is the default.
_CHOICES = {
    "size": [*FAMILY],
    "quantize": [*DTYPES, *QUANTISED],
    "kv_cache_dtype": ["auto", *(name for name in IN_CACHE if name not in ("bfloat16", "float32"))],  # with any weights
    "device": ["cuda", "cpu"],
}
_NUMBERS = {"context": 4096, "sequences": 1}


async def footprint(service: Service, request: Request, _body: None) -> Response:
    """Computes what `qwenkern footprint --json` prints for one model. `choices` lists the values of the parameters."""
    return JSONResponse(await service.aside(_described, dict(request.query_params)))


def _described(asked: Mapping[str, str]) -> dict[str, Any]:
    for name in asked:
        if name not in _CHOICES and name not in _NUMBERS:
            expected = ", ".join([*_CHOICES, *_NUMBERS])
            raise RequestError(f"query has {shown(name)}; expected some of {expected}")
    words = {name: _word(name, asked.get(name, known[0]), known) for name, known in _CHOICES.items()}
    numbers = {name: _number(name, asked.get(name, str(default))) for name, default in _NUMBERS.items()}
    size, device = words["size"], words["device"]
    case = case_of(
        FAMILY[size],
        device,
        context=numbers["context"],
        quantize=words["quantize"],
        sequences=numbers["sequences"],
        kv_cache_dtype=words["kv_cache_dtype"],
    )
    choices = {name: known for name, known in _CHOICES.items() if name != "size"}
    sizes = [
        {"name": name, "parameters": config.num_parameters, "context_length": config.context_length}
        for name, config in FAMILY.items()
    ]
    described = case.described(size, MACHINES if device == "cpu" else CARDS)
    return described | {"choices": {"size": sizes, **choices}}


def _word(name: str, text: str, known: list[str]) -> str:
    if text not in known:
        raise RequestError(f"{name} is {shown(text)}; expected one of {', '.join(known)}")
    return text


def _number(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,12}", text):
        raise RequestError(f"{name} is {shown(text)}; expected a whole number")
    return int(text)


_QUERY = {name: {"enum": known, "default": known[0]} for name, known in _CHOICES.items()} | {
    name: {"type": "integer", "minimum": 1, "default": default} for name, default in _NUMBERS.items()
}
ENDPOINTS = [Endpoint("/footprint", "GET", footprint, None, "Computes the memory that a model takes", query=_QUERY)]

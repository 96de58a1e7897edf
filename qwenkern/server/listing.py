"""GET /v1/models: which models there are, and whether they are loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .endpoints import Endpoint
from .entry import Entry
from .models import Models
from .service import Service


class ListedModel(BaseModel):
    """A model. The fields after `owned_by` are not OpenAI's."""

    id: str
    object: Literal["model"]
    created: int  # when the server started, in seconds since 1970
    owned_by: Literal["qwenkern"]
    state: Literal["loaded", "loading", "failed", "unloaded"]
    progress: float | None  # of the loading, 0 to 1
    memory_bytes: int  # its current part of the server's memory budget
    max_model_len: int | None  # most tokens of a request with its answer; None while the model is not loaded


class ModelList(BaseModel):
    """The models of a server."""

    object: Literal["list"]
    data: list[ListedModel]


async def list_models(service: Service, request: Request, body: None) -> Response:
    """Lists all models of the server, loaded or not."""
    data = [_listed(entry, service.models) for entry in service.models.entries.values()]
    return JSONResponse(ModelList(object="list", data=data).model_dump())


async def show_model(service: Service, request: Request, body: None) -> Response:
    """Shows one model, by its name."""
    entry = service.models.entry(request.path_params["model"])
    return JSONResponse(_listed(entry, service.models).model_dump())


def _listed(entry: Entry, models: Models) -> ListedModel:
    model = entry.model
    return ListedModel(
        id=entry.name,
        object="model",
        created=models.created,
        owned_by="qwenkern",
        state=entry.state,
        progress=entry.progress if entry.loading else None,
        memory_bytes=entry.size.bytes,
        max_model_len=min(model.config.context_length, model.cache.num_tokens) if model else None,
    )


ENDPOINTS = [
    Endpoint("/v1/models", "GET", list_models, None, "Lists the models", answer=ModelList),
    Endpoint("/v1/models/{model:path}", "GET", show_model, None, "Shows a model", answer=ListedModel),
]

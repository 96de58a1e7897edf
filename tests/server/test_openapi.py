"""/openapi.json: a valid document, which describes the server. schemathesis makes requests from it."""

from __future__ import annotations

import dataclasses

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as of_openapi
from support.engines import check_pages
from support.models import TINY
from support.servers import serving, toy

from qwenkern.server.app import ENDPOINTS
from qwenkern.server.settings import Bounds, Settings

KEY = "secret"
# status, content type, body and headers of each response must be as in the document
CHECKS = [
    checks.not_a_server_error,
    of_openapi.status_code_conformance,
    of_openapi.content_type_conformance,
    of_openapi.response_schema_conformance,
    of_openapi.response_headers_conformance,
]


@pytest.fixture(scope="module")
def model():
    short = dataclasses.replace(TINY, max_position_embeddings=64)  # answers without max_tokens end there
    with toy(short, cache_tokens=2048) as model:
        yield model


@pytest.fixture(scope="module")
def url(model):
    bounds = Bounds(n=2, answers=4, waiting_seconds=20)
    with serving(model, Settings(api_keys=(KEY,), bounds=bounds)) as url:
        yield url
    check_pages(model)


@pytest.fixture(scope="module")
def document(url):
    answer = httpx.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200
    return answer.json()


@pytest.fixture(scope="module")
def loaded(document, url):
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    return schema


schema = schemathesis.pytest.from_fixture("loaded")


def test_the_document_is_valid(loaded, document):
    loaded.validate()
    assert document["openapi"].startswith("3.1")
    identifiers = [each["operationId"] for path in document["paths"].values() for each in path.values()]
    assert len(identifiers) == len(set(identifiers)) == len(ENDPOINTS)


def test_every_operation_tells_its_errors(document):
    for path, operations in document["paths"].items():
        for operation in operations.values():
            told = operation["responses"].keys()
            assert {"200", "500", "503"} <= told, path
            assert ("401" in told) == (operation.get("security") != []), path
            if "requestBody" in operation:
                assert {"400", "404", "413", "415", "429"} <= told, path


def test_streams_are_in_the_document(document):
    content = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert content.keys() == {"application/json", "text/event-stream"}


def test_keys_are_in_the_document_where_there_are_keys(document, model):
    assert document["security"] == [{"bearer": []}, {"header": []}]
    assert document["paths"]["/health"]["get"]["security"] == []
    with serving(model) as url:
        assert "security" not in httpx.get(f"{url}/openapi.json").json()


@schema.parametrize()
@settings(
    max_examples=5,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_what_the_document_allows_and_what_it_does_not(case):
    response = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
    case.validate_response(response, checks=CHECKS)

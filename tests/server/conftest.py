"""Fixtures for the tests of clients: the server of a module's own ``model``, and OpenAI's client for it."""

from __future__ import annotations

import httpx
import pytest
from openai import OpenAI
from support.engines import PATIENCE
from support.servers import serving

# What a call without a timeout waits for: 5 s by default, in which a busy machine may not answer.
for part in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, part, PATIENCE)


@pytest.fixture(scope="module")
def url(model):
    with serving(model) as url:
        yield url


@pytest.fixture
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client

"""Fixtures for the tests of the page: a browser for each file, and one server of two models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.browser import Browser, Visit, chromium
from support.parrot import parrot
from support.servers import serving, toy

from qwenkern import Model


@pytest.fixture(scope="session")
def model() -> Iterator[Model]:
    with toy() as model:
        yield model


@pytest.fixture(scope="session")
def repeating() -> Iterator[Model]:
    with parrot() as model:
        yield model


@pytest.fixture(scope="session")
def url(model: Model, repeating: Model) -> Iterator[str]:
    with serving({"toy": model, "parrot": repeating}) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Each file has its own browser: Playwright's event loop runs in this thread as long as the browser does, and other
    tests need event loops of their own."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser, url) -> Iterator[Callable[..., Visit]]:
    """Opens the page. Fails at the end if the console has messages, or if another origin got a request."""
    visits = []
    with contextlib.ExitStack() as tabs:

        def opened(at: str = url, settings: dict[str, Any] | None = None, **options: Any) -> Visit:
            visits.append(Visit(tabs.enter_context(browser.tab(**options)), at, settings))
            return visits[-1]

        yield opened
        for each in visits:
            each.leave()
    assert [each.console for each in visits] == [[]] * len(visits)
    assert [each.elsewhere for each in visits] == [[]] * len(visits)

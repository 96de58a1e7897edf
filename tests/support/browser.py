"""Chromium, and the page of a server in it, used as a person uses it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

PATIENCE = 30_000  # milliseconds; the machine may be busy


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium without a window. Skips the test if it is missing, unless the environment requires it."""
    program = shutil.which("chromium")
    if not program:
        _missing("there is no program chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield Browser(browser)
        browser.close()


def _missing(reason: str) -> None:
    if os.environ.get("QWENKERN_REQUIRE_BROWSER") == "1":
        pytest.fail(f"QWENKERN_REQUIRE_BROWSER=1, and {reason}")
    pytest.skip(reason)


class Browser:
    """Chromium's tabs, which tests reuse: to open a tab takes longer than most tests."""

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium
        self._free: dict[str, list[Any]] = {}  # by the options of their contexts

    @contextlib.contextmanager
    def tab(self, **options: Any) -> Iterator[Any]:
        """A tab without the data of earlier tests."""
        free = self._free.setdefault(repr(options), [])
        page = free.pop() if free else self._opened(**options)
        yield page
        if page.is_closed():
            page.context.close()
            return
        page.unroute_all()
        page.evaluate("removeEventListener('pagehide', keep), sessionStorage.clear(), localStorage.clear()")
        page.goto("about:blank")
        page.mouse.move(0, 0)
        page.context.clear_permissions()
        page.emulate_media(color_scheme=options.get("color_scheme"))
        free.append(page)

    def _opened(self, **options: Any) -> Any:
        context = self._chromium.new_context(**{"viewport": {"width": 1100, "height": 800}} | options)
        context.set_default_timeout(PATIENCE)
        return context.new_page()


class Visit:
    """The page in a tab, and notes of everything that it should not do.

    settings: values that a user typed into the page's settings on an earlier visit."""

    def __init__(self, page: Any, url: str, settings: dict[str, Any] | None = None) -> None:
        self.page = page
        self.url = url
        self.console: list[str] = []
        self.elsewhere: list[str] = []
        self.asked: list[dict[str, Any]] = []  # the bodies of questions
        self._heard = {
            "console": lambda message: self.console.append(message.text),
            "pageerror": lambda error: self.console.append(str(error)),
            "dialog": lambda dialog: self.console.append(dialog.message),
            "request": self._note,
        }
        for event, handler in self._heard.items():
            page.on(event, handler)
        page.goto(url)
        for name, value in (settings or {}).items():
            page.locator(f"[data-setting={name}]").evaluate("(field, text) => { field.value = text; }", str(value))

    def leave(self) -> None:
        for event, handler in self._heard.items():
            self.page.remove_listener(event, handler)

    def _note(self, request: Any) -> None:
        if not request.url.startswith((f"{self.url}/", "data:", "blob:")):
            self.elsewhere.append(request.url)
        if request.url.endswith("/v1/chat/completions"):
            self.asked.append(request.post_data_json)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def input(self) -> Any:
        return self.page.get_by_role("textbox", name="Message")

    @property
    def answer(self) -> Any:
        """The text of the last answer."""
        return self.page.locator("#messages > .assistant .body").last

    def ask(self, text: str) -> None:
        self.input.fill(text)
        self.input.press("Enter")

    def is_answered(self, count: int = 1) -> None:
        """Waits until there are ``count`` answers and the last one has ended."""
        self.page.locator("#messages > .assistant .tools:visible").nth(count - 1).wait_for()

    def until(self, expression: str) -> None:
        """Waits until the expression is true. (Playwright's own wait evaluates text in the page, which the page's
        content security policy forbids.)"""
        until = time.monotonic() + PATIENCE / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < until, f"it does not come true: {expression}"
            self.page.wait_for_timeout(10)

    def setting(self, label: str, value: str) -> None:
        self.button("Settings").click()
        self.page.get_by_label(label, exact=True).fill(value)
        self.page.keyboard.press("Escape")

    def is_still(self) -> None:
        """Waits until nothing on the page moves."""
        self.until("document.getAnimations().every((each) => each.playState === 'finished')")

    def messages(self) -> list[dict[str, Any]]:
        """The messages that the page keeps while its tab is open."""
        return json.loads(self.page.evaluate("sessionStorage.getItem('qwenkern.chat')"))["messages"]

    def says(self, text: str) -> None:
        """Makes the server give this answer to every question, a few characters at a time."""
        body = events(*re.findall("(?s).{1,7}", text))
        self.page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
        )


def events(*texts: str) -> str:
    """A streamed answer, like one from a model."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

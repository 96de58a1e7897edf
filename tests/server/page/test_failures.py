"""What the page shows if something fails."""

from __future__ import annotations

import pytest
from support.browser import events
from support.engines import Gate, eventually
from support.servers import serving

from qwenkern.server.settings import Bounds, Settings

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]


def test_a_key_is_asked_for_and_used(visit, model):
    with serving(model, Settings(api_keys=("secret",))) as url:
        page = visit(url)
        page.page.get_by_text("The server wants an API key: it is missing or wrong.").wait_for()
        page.console.clear()  # Chromium logs an answer of 401
        page.button("Enter the key").click()
        page.page.keyboard.type("secret")
        page.page.keyboard.press("Enter")
        page.page.get_by_text("The server wants an API key:").wait_for(state="hidden")
        page.setting("Max tokens", "4")
        page.ask("Hello!")
        page.is_answered()
        assert page.messages()[1]["content"]
        assert page.page.evaluate("Object.values(localStorage).join()") == ""
        assert page.page.evaluate("sessionStorage.getItem('qwenkern.key')") == "secret"


def test_the_calculator_goes_on_with_a_key(visit, model):
    with serving(model, Settings(api_keys=("secret",))) as url:
        page = visit(url)
        page.page.locator("#banner").get_by_text("The server wants an API key:").wait_for()
        page.page.get_by_role("tab", name="Footprint").click()
        page.page.locator("#footprint-wrong").get_by_text("The server wants an API key:").wait_for()
        page.console.clear()
        page.setting("API key", "secret")
        page.page.locator("#cards tr").first.wait_for()


ERRORS = [
    (429, {"Retry-After": "7"}, "The server is busy: Somebody said why. Try again in 7 s."),
    (503, {"Retry-After": "5"}, "The server is not ready: Somebody said why. Try again in 5 s."),
    (400, {}, "The server refused this: Somebody said why."),
    (500, {}, "The server failed: Somebody said why."),
]


def test_an_error_is_shown_with_its_reason(visit):
    page = visit(settings={"max_completion_tokens": 4})
    error = {"error": {"message": "Somebody said why.", "type": "x", "param": None, "code": None}}
    answers = iter([{"status": status, "headers": headers, "json": error} for status, headers, _ in ERRORS])
    page.page.route("**/v1/chat/completions", lambda route: route.fulfill(**next(answers)))
    page.ask("Hello!")
    for i, (_, _, title) in enumerate(ERRORS):
        if i:
            page.button("Try again").click()
        page.page.locator("#messages").get_by_role("alert").get_by_text(title).wait_for()
        assert page.page.locator(".assistant").get_by_role("button").all_inner_texts() == ["Try again"]
    page.console.clear()
    page.page.unroute("**/v1/chat/completions")
    page.button("Try again").click()
    page.page.locator("#messages").get_by_role("alert").wait_for(state="hidden")
    page.is_answered()
    assert [each["role"] for each in page.messages()] == ["user", "assistant"]


def test_a_full_queue_is_said_so(visit, model):
    with serving(model, Settings(bounds=Bounds(waiting=1))) as url, Gate(model) as gate:
        first, page = (visit(url, {"max_completion_tokens": 4}) for _ in range(2))
        first.ask("Hello!")
        first.button("Stop").wait_for()
        eventually(lambda: model._loop._sinks)  # its request has come
        page.ask("Hello!")
        page.page.get_by_text("The server is busy:").wait_for()
        page.console.clear()
        gate.open()
        first.is_answered()


def test_an_error_in_the_middle_leaves_what_was_there(visit):
    page = visit()
    body = events("Half an ").replace("data: [DONE]\n\n", "") + 'data: {"error": {"message": "It broke."}}\n\n'
    page.page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.ask("Hello!")
    assert page.page.locator("#messages .failure p").inner_text() == "The answer broke off: It broke."
    assert page.answer.inner_text() == "Half an "


def test_a_server_that_is_gone_is_said_so(visit, model):
    with serving(model) as url:
        page = visit(url)
        page.page.get_by_text("running").wait_for()
    page.ask("Hello!")
    page.page.get_by_text("The server does not answer.").wait_for()
    page.console.clear()

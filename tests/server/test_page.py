"""The page at /, driven in headless Chromium as a user does: typing, clicking, keys alone, a phone, other colours."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from support.engines import Gate, all_free, eventually
from support.servers import serving, toy

from qwenkern.config import FAMILY
from qwenkern.footprint.cards import CARDS
from qwenkern.footprint.case import case_of
from qwenkern.server.settings import Bounds, Settings

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]
PATIENCE = 30_000  # milliseconds; the machine may be busy


def _missing(reason: str) -> None:
    if os.environ.get("QWENKERN_REQUIRE_BROWSER") == "1":
        pytest.fail(f"QWENKERN_REQUIRE_BROWSER=1, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if not chromium:
        _missing("there is no program chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def model():
    with toy() as model:
        yield model


class Visit:
    """A page in a browser of its own, and what it should not have done."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}} | options)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.url = url
        self.console: list[str] = []
        self.elsewhere: list[str] = []
        self.asked: list[dict[str, Any]] = []  # the bodies of questions
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("dialog", lambda dialog: self.console.append(dialog.message))
        self.page.on("request", self._note)
        self.page.goto(url)

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
        """Waits until so many answers are there, and the last has ended."""
        self.page.locator("#messages > .assistant .tools:visible").nth(count - 1).wait_for()

    def until(self, expression: str) -> None:
        """Waits until it is true. (Playwright's own wait evaluates text inside the page, which the policy forbids.)"""
        until = time.monotonic() + PATIENCE / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < until, f"it does not come true: {expression}"
            self.page.wait_for_timeout(10)

    def setting(self, label: str, value: str) -> None:
        self.button("Settings").click()
        self.page.get_by_label(label, exact=True).fill(value)
        self.page.keyboard.press("Escape")

    def messages(self) -> list[dict[str, Any]]:
        """As the page keeps them while its tab is open."""
        return json.loads(self.page.evaluate("sessionStorage.getItem('qwenkern.chat')"))["messages"]


@pytest.fixture
def visit(browser, url) -> Iterator[Callable[..., Visit]]:
    """Opens the page. At the end nothing may have been said on the console, or asked of another origin."""
    visits = []

    def opened(at: str = url, **options: Any) -> Visit:
        visits.append(Visit(browser, at, **options))
        return visits[-1]

    yield opened
    for each in visits:
        console, elsewhere = each.console, each.elsewhere
        each.context.close()
        assert console == []
        assert elsewhere == []


def events(*texts: str, **more: Any) -> str:
    """A streamed answer, as a model would give it."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]} | more)
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def says(page: Visit, *texts: str) -> None:
    """Has the server give this answer to every question."""
    page.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=events(*texts)),
    )


# What the server gives


def test_nothing_but_the_page_may_run(url):
    found = httpx.get(url)
    policy = dict(part.split(" ", 1) for part in found.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["style-src"])
    assert found.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"(src|href)=[\"'](?!#|data:)|@import|url\(|innerHTML|eval\(", found.text)


def test_a_browser_that_has_the_page_is_told_so(url):
    tag = httpx.get(url).headers["etag"]
    again = httpx.get(url, headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(url, headers={"If-None-Match": '"another"'}).status_code == 200


def test_the_footprint_is_that_of_the_command_line(url):
    found = httpx.get(f"{url}/footprint?size=qwen2.5-7b&quantize=int4&context=32768&sequences=2").json()
    case = case_of(FAMILY["qwen2.5-7b"], "cuda", quantize="int4", context=32768, sequences=2)
    assert {**found, "choices": None} == {**case.described("qwen2.5-7b", CARDS), "choices": None}
    assert [each["name"] for each in found["choices"]["size"]] == list(FAMILY)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("size=/etc/passwd", "size is '/etc/passwd'; expected one of qwen2.5-0.5b"),
        ("context=0", "context is 0; expected a whole number from 1 to 32768"),
        ("context=1e3", "context is '1e3'; expected a whole number"),
        ("sequences=99999999", "sequences is 99999999"),
        ("colour=red", "query has 'colour'"),
    ],
)
def test_what_the_footprint_does_not_know_is_refused(url, query, message):
    found = httpx.get(f"{url}/footprint?{query}")
    assert found.status_code == 400
    assert message in found.json()["error"]["message"]


def test_the_page_needs_no_key_and_its_figures_do(model):
    with serving(model, Settings(api_keys=("secret",))) as url:
        assert httpx.get(url).status_code == 200
        assert httpx.get(f"{url}/footprint").status_code == 401


# Talking


def test_an_answer_comes_as_it_is_made(visit, model):
    page = visit()
    page.setting("Most tokens", "12")
    expected = model.chat([{"role": "user", "content": "Hello!"}], max_tokens=12)
    with Gate(model) as gate:
        page.ask("Hello!")
        gate.steps(6)
        page.until("document.querySelector('.assistant .body').textContent.length > 0")
        assert page.button("Stop").is_visible()
        assert page.page.locator("#scroll").get_attribute("aria-busy") == "true"
        assert not all_free(model)
        gate.open()
        page.is_answered()
    assert page.messages()[1]["content"] == expected.text
    assert page.page.locator(".assistant .note").inner_text() == "The answer reached its most tokens."
    assert re.search(r"[\d.]+ tokens/s · first after [\d.]+ s · 12 tokens · prompt \d+, \d+ from the cache",
                     page.page.locator("#of-answer").inner_text())  # fmt: skip
    assert page.button("Send").is_visible()


@pytest.mark.parametrize("how", ["button", "Escape", "closed"])
def test_a_stop_ends_the_request_in_the_engine(visit, model, how):
    page = visit()
    with Gate(model) as gate:
        page.ask("Hello!")
        gate.steps(4)
        page.until("document.querySelector('.assistant .body').textContent.length > 0")
        if how == "button":
            page.button("Stop").click()
        elif how == "Escape":
            page.page.keyboard.press("Escape")
        else:
            page.page.close()
        if how != "closed":
            page.page.get_by_text("Stopped.").first.wait_for()
            assert page.messages()[1]["ending"] == "stopped"
        eventually(lambda: not model._loop._sinks, "the request goes on")
        gate.open()
    eventually(lambda: all_free(model))


def test_settings_are_honoured(visit, model):
    page = visit()
    values = {
        "Temperature": 1.5,
        "Top p": 0.9,
        "Top k": 40,
        "Min p": 0.01,
        "Repetition penalty": 1.1,
        "Seed": 7,
        "Most tokens": 9,
    }
    page.button("Settings").click()
    for label, value in values.items():
        page.page.get_by_label(label, exact=True).fill(str(value))
    page.page.get_by_label("System prompt").fill("Be brief.")
    page.button("Close settings").click()
    page.ask("Hello!")
    page.is_answered()
    names = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_completion_tokens"]
    [asked] = page.asked
    assert {name: asked[name] for name in names} == dict(zip(names, values.values(), strict=True))
    sampling = dict(zip([*names[:-1], "max_tokens"], values.values(), strict=True))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    assert page.messages()[1]["content"] == model.chat(messages, **sampling).text


def test_a_wrong_setting_is_pointed_out_and_the_message_stays(visit):
    page = visit()
    page.setting("Top p", "2")
    page.ask("Hello!")
    assert page.page.get_by_label("Top p").evaluate("field => document.activeElement === field")
    page.page.get_by_label("Top p").fill("")
    page.page.get_by_label("JSON schema").fill("{no")
    page.page.keyboard.press("Escape")
    page.input.press("Enter")
    assert page.page.locator("#schema-wrong").inner_text().startswith("The schema is not JSON")
    page.page.keyboard.press("Escape")
    assert page.input.input_value() == "Hello!"
    assert page.asked == []


def test_a_schema_is_sent(visit):
    page = visit()
    says(page, '{"a_b": ', '"*x*"}')
    schema = {"type": "object", "properties": {"a_b": {"type": "string"}}}
    page.setting("JSON schema", json.dumps(schema))
    page.ask("Hello!")
    page.is_answered()
    assert page.asked[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    assert page.answer.locator("code").inner_text().strip() == '{"a_b": "*x*"}'


def test_an_answer_is_made_anew_and_the_earlier_one_brought_back(visit):
    page = visit()
    page.setting("Most tokens", "8")
    page.setting("Temperature", "2")
    page.ask("Hello!")
    page.is_answered()
    first = page.messages()
    page.button("Regenerate").click()
    page.button("Undo").wait_for()
    assert len(page.messages()) == 2
    assert page.messages()[1]["content"] != first[1]["content"]
    assert page.asked[0]["messages"] == page.asked[1]["messages"]
    page.button("Undo").click()
    assert page.messages() == first


def test_an_edited_message_is_answered_anew(visit):
    page = visit()
    page.setting("Most tokens", "4")
    for count, text in enumerate(["One", "Two"], 1):
        page.ask(text)
        page.is_answered(count)
    page.button("Edit").first.click()
    area = page.page.get_by_label("Your message")
    assert area.input_value() == "One"
    area.fill("Three")
    page.page.locator(".editor").get_by_role("button", name="Send").click()
    page.button("Undo").wait_for()
    assert [each["content"] for each in page.messages() if each["role"] == "user"] == ["Three"]
    assert page.asked[-1]["messages"] == [{"role": "user", "content": "Three"}]
    page.button("Edit").nth(1).click()
    page.page.get_by_label("The answer").fill("Mine")
    page.button("Save").click()
    assert page.messages()[1]["content"] == "Mine"
    page.ask("Four")
    page.is_answered(2)
    assert page.asked[-1]["messages"][1] == {"role": "assistant", "content": "Mine"}


def test_a_second_turn_finds_its_beginning_in_the_cache(visit):
    page = visit()
    page.setting("Most tokens", "2")
    page.ask("Hello! " * 16)
    page.is_answered()
    page.ask("More")
    page.is_answered(2)
    found = re.search(r"prompt ([\d,]+), (\d+) from the cache", page.page.locator("#of-answer").inner_text())
    assert found
    assert int(found[2]) in range(64, int(found[1]))


def test_a_conversation_stays_when_the_page_is_loaded_again(visit):
    page = visit()
    page.setting("Most tokens", "4")
    page.ask("Hello!")
    page.is_answered()
    before = page.messages()
    page.page.reload()
    page.is_answered()
    assert page.messages() == before
    assert page.page.locator("#messages .user .body").inner_text() == "Hello!"
    page.button("New conversation").click()
    assert page.messages() == []
    page.button("Undo").click()
    assert page.messages() == before


# What stands in an answer


def test_markdown_is_drawn(visit):
    page = visit()
    text = (
        "# Head\n\nOne **bold** and *thin* `code` 2*3*4 snake_case_name.\nNext line\n\n"
        "1. first\n   - inner\n2. second\n\n```python\nif a < b:\n    pass\n```\n\n"
        "| a | b |\n|---|--:|\n| 1 | 2 |\n\n> quoted\n\n[there](https://example.org/x) https://example.org/y."
    )
    says(page, *re.findall("(?s).{1,7}", text))
    page.ask("Hello!")
    page.is_answered()
    answer = page.answer
    assert answer.locator("h3").inner_text() == "Head"
    assert [answer.locator(name).inner_text() for name in ("strong", "em", "p > code")] == ["bold", "thin", "code"]
    assert "2*3*4 snake_case_name.\nNext line" in answer.locator("p").first.text_content()
    assert answer.locator("ol > li").count() == 2
    assert answer.locator("ol > li ul > li").inner_text() == "inner"
    assert answer.locator("figure code").text_content() == "if a < b:\n    pass\n"
    assert answer.locator("figcaption span").inner_text() == "python"
    assert answer.locator("td").all_inner_texts() == ["1", "2"]
    assert answer.locator("blockquote").inner_text() == "quoted"
    links = [link.get_attribute("href") for link in answer.locator("a").all()]
    assert links == ["https://example.org/x", "https://example.org/y"]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.button("Copy code").click()
    assert page.page.evaluate("navigator.clipboard.readText()") == "if a < b:\n    pass\n"


HOSTILE = """<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><svg onload=window.hacked=1>

[click](javascript:window.hacked=1) [click](data:text/html,<script>window.hacked=1</script>)
![x](https://evil.example/steal?q=1) <https://evil.example> <a href="javascript:hacked=1">x</a> <iframe srcdoc="x">

```html" onmouseover="window.hacked=1
</code></pre><script>window.hacked=1</script>
```

| <img src=x onerror=window.hacked=1> | b |
|---|---|
| `<style>*{display:none}</style>` | <link rel=stylesheet href=https://evil.example/x.css> |

- <b onclick=window.hacked=1>x</b>
# <form action=https://evil.example><input autofocus onfocus=window.hacked=1>
"""
INERT = """() => ({
  hacked: "hacked" in window,
  elements: document.querySelectorAll(
    "#messages :is(img, script, iframe, form, input, style, link, object, embed)").length,
  handlers: [...document.querySelectorAll("#messages *")].flatMap((each) => each.getAttributeNames())
    .filter((name) => name.startsWith("on") || name === "srcdoc").length,
  links: [...document.querySelectorAll("#messages a")].filter((link) => !/^https?:/.test(link.href)).length,
})"""


def test_what_a_model_says_is_text_only(visit):
    page = visit()
    says(page, *re.findall("(?s).{1,9}", HOSTILE))
    page.ask(HOSTILE)
    page.is_answered()
    assert page.page.evaluate(INERT) == {"hacked": False, "elements": 0, "handlers": 0, "links": 0}
    assert '<img src=x onerror="window.hacked=1">' in page.answer.inner_text()
    assert page.messages()[0]["content"] == HOSTILE.strip()


def test_an_imported_conversation_is_text_only(visit, tmp_path):
    page = visit()
    file = tmp_path / "conversation.json"
    roles = [{"role": role, "content": HOSTILE, "figures": HOSTILE} for role in ("user", "assistant", "system")]
    settings = {"top_k": "4", "__proto__": {"hacked": 1}, "schema": HOSTILE, "onclick": "hacked"}
    file.write_text(json.dumps({"messages": roles, "settings": settings, "model": HOSTILE}))
    page.button("Settings").click()
    page.page.locator("#file").set_input_files(file)
    page.page.get_by_text("2 messages imported.").wait_for()
    assert page.page.evaluate(INERT) == {"hacked": False, "elements": 0, "handlers": 0, "links": 0}
    assert page.page.evaluate("({}).hacked === undefined")


def test_the_policy_stops_what_the_page_would_let_through(visit):
    page = visit()
    assert (
        page.page.evaluate(
            """() => { try { document.body.innerHTML = "x"; return "set"; } catch (e) { return e.name; } }"""
        )
        == "TypeError"
    )
    assert page.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.name)") == "TypeError"
    refused = [text for text in page.console if "Content Security Policy" in text or "TrustedHTML" in text]
    assert refused == page.console
    page.console.clear()
    page.elsewhere.clear()


def test_no_text_takes_long_to_draw(visit):
    page = visit()
    for piece in ("**a ", "[a", "- + ", "> ", "`", "|-"):
        taken = page.page.evaluate(
            """(text) => {
              const begun = performance.now(), message = { role: "assistant", content: text };
              for (const block of blocks(text, lines(text))) rendered(block, text, textOf(message));
              return performance.now() - begun;
            }""",
            piece * (60_000 // len(piece)),
        )
        assert taken < 6000, piece  # milliseconds


def test_tokens_show_how_likely_they_were(visit, model):
    page = visit()
    page.setting("Most tokens", "6")
    page.setting("Alternatives", "3")
    page.ask("Hello!")
    page.is_answered()
    expected = model.chat([{"role": "user", "content": "Hello!"}], max_tokens=6, logprobs=3).logprobs
    page.answer.locator("[data-token]").first.hover()
    tip = page.page.get_by_role("tooltip")
    tip.wait_for()
    index = int(page.answer.locator("[data-token]").first.get_attribute("data-token"))
    assert f"Log-probability {expected[index].logprob:.3f}" in tip.inner_text()
    assert tip.locator("li").count() == 3
    page.page.mouse.move(5, 5)
    tip.wait_for(state="hidden")
    page.button("Tokens").press("Enter")
    options = page.page.locator(".tokens").get_by_role("option")
    assert page.page.evaluate("document.activeElement.getAttribute('role')") == "option"
    assert options.count() == len(expected)
    for position, each in enumerate(expected):
        assert f"Log-probability {each.logprob:.3f}" in tip.inner_text()
        assert page.page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
        if position + 1 < len(expected):
            page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("Home")
    assert options.first.evaluate("span => document.activeElement === span")
    page.page.keyboard.press("Escape")
    assert tip.is_hidden()


# Files


def test_an_exported_conversation_can_be_imported(visit, tmp_path):
    page = visit()
    page.setting("Most tokens", "4")
    page.setting("System prompt", "Be brief.")
    page.setting("API key", "sk-secret")
    page.ask("Hello!")
    page.is_answered()
    page.button("Settings").click()
    with page.page.expect_download() as download:
        page.button("Export").click()
    file = tmp_path / "conversation.json"
    download.value.save_as(file)
    written = json.loads(file.read_text())
    assert [each["role"] for each in written["messages"]] == ["user", "assistant"]
    assert "sk-secret" not in file.read_text()
    other = visit()
    other.button("Settings").click()
    other.page.locator("#file").set_input_files(file)
    other.page.get_by_text("2 messages imported.").wait_for()
    assert [each["content"] for each in other.messages()] == [each["content"] for each in written["messages"]]
    other.button("Settings").click()
    assert other.page.get_by_label("System prompt").input_value() == "Be brief."


WRONG_FILES = [
    ("{", "it is not JSON"),
    ("{}", "it has no list of messages"),
    ('[{"role": "tool", "content": "x"}]', "message 1 is not of a user, an assistant or a system"),
    ('[{"role": "user", "content": "x"}, {"role": "user", "content": [1]}]', "message 2 has no text"),
    ('{"messages": [], "settings": {"top_k": {"toString": 1}}}', "its setting top_k is not text"),
    ('{"messages": [], "settings": {"temperature": "<script>"}}', "its setting temperature is not a number"),
]


def test_another_file_is_refused(visit, tmp_path):
    page = visit()
    file = tmp_path / "file.json"
    page.button("Settings").click()
    for content, message in WRONG_FILES:
        file.write_text(content)
        page.page.locator("#file").set_input_files(file)
        page.page.get_by_text(f"The file is not a conversation: {message}.").wait_for()


# What goes wrong


def test_a_key_is_asked_for_and_used(visit, model):
    with serving(model, Settings(api_keys=("secret",))) as url:
        page = visit(url)
        page.page.get_by_text("The server wants an API key.").wait_for()
        page.console.clear()  # Chromium says so when an answer is 401
        page.button("Enter the key").click()
        page.page.keyboard.type("secret")
        page.page.keyboard.press("Enter")
        page.page.get_by_text("The server wants an API key.").wait_for(state="hidden")
        page.setting("Most tokens", "4")
        page.ask("Hello!")
        page.is_answered()
        assert page.messages()[1]["content"]
        assert page.page.evaluate("Object.values(localStorage).join()") == ""
        assert page.page.evaluate("sessionStorage.getItem('qwenkern.key')") == "secret"


ERRORS = [
    (429, {"Retry-After": "7"}, "The server is busy. Somebody said why. Try again in 7 s."),
    (503, {"Retry-After": "5"}, "The server is not ready. Somebody said why. Try again in 5 s."),
    (400, {}, "The server refused this. Somebody said why."),
    (500, {}, "The server failed. Somebody said why."),
]


def test_an_error_is_shown_with_its_reason(visit):
    page = visit()
    page.setting("Most tokens", "4")
    error = {"error": {"message": "Somebody said why.", "type": "x", "param": None, "code": None}}
    answers = iter([{"status": status, "headers": headers, "json": error} for status, headers, _ in ERRORS])
    page.page.route("**/v1/chat/completions", lambda route: route.fulfill(**next(answers)))
    page.ask("Hello!")
    for i, (_, _, title) in enumerate(ERRORS):
        if i:
            page.button("Try again").click()
        page.page.locator("#messages").get_by_role("alert").get_by_text(title).wait_for()
    page.console.clear()
    page.page.unroute("**/v1/chat/completions")
    page.button("Try again").click()
    page.page.locator("#messages").get_by_role("alert").wait_for(state="hidden")
    page.is_answered()
    assert [each["role"] for each in page.messages()] == ["user", "assistant"]


def test_a_full_queue_is_said_so(visit, model):
    with serving(model, Settings(bounds=Bounds(waiting=1))) as url, Gate(model) as gate:
        first, page = visit(url), visit(url)
        first.ask("Hello!")
        first.button("Stop").wait_for()
        page.ask("Hello!")
        page.page.get_by_text("The server is busy.").wait_for()
        page.console.clear()
        gate.open()
        first.is_answered()


def test_an_error_in_the_middle_leaves_what_was_there(visit):
    page = visit()
    body = events("Half an ").replace("data: [DONE]\n\n", "") + 'data: {"error": {"message": "It broke."}}\n\n'
    page.page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.ask("Hello!")
    assert page.page.locator("#messages .failure p").inner_text() == "The server failed. It broke."
    assert page.answer.inner_text() == "Half an "


def test_a_server_that_is_gone_is_said_so(visit, model):
    with serving(model) as url:
        page = visit(url)
        page.until("document.getElementById('model').value")
        page.page.wait_for_load_state("networkidle")
    page.ask("Hello!")
    page.page.get_by_text("The server does not answer.").wait_for()
    page.console.clear()


# Who uses it, and how


def test_keys_alone_are_enough(visit):
    page = visit()
    keys = page.page.keyboard
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"

    def go_to(name: str, backwards: bool = False) -> None:
        for _ in range(30):
            if page.page.evaluate(focused) == name:
                outline = page.page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
                assert float(outline.removesuffix("px")) >= 2
                return
            keys.press("Shift+Tab" if backwards else "Tab")
        raise AssertionError(f"no key leads to {name}")

    assert page.input.evaluate("field => document.activeElement === field")
    go_to("Settings", backwards=True)
    keys.press("Enter")
    for _ in range(10):
        if page.page.evaluate("document.activeElement.dataset.setting") == "max_completion_tokens":
            break
        keys.press("Tab")
    keys.type("4")
    keys.press("Enter")
    assert page.page.evaluate(focused) == "Settings"
    page.page.evaluate("document.activeElement.blur()")
    page.input.focus()
    keys.type("Hello!")
    keys.press("Shift+Enter")
    keys.type("You there")
    keys.press("Enter")
    page.is_answered()
    assert page.messages()[0]["content"] == "Hello!\nYou there"
    go_to("Regenerate", backwards=True)
    keys.press("Enter")
    page.button("Undo").wait_for()
    go_to("Chat", backwards=True)
    keys.press("ArrowRight")
    assert page.page.evaluate(focused) == "Footprint"
    page.page.get_by_role("tabpanel", name="Footprint").wait_for()
    keys.press("ArrowLeft")
    assert page.page.get_by_role("tabpanel", name="Chat").is_visible()


PHONE = {"viewport": {"width": 320, "height": 600}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
FITS = """() => {
  const wide = [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility()
    && each.getBoundingClientRect().right > innerWidth + 1 && !each.closest("pre, .table, .unseen, svg"));
  return [document.documentElement.scrollWidth <= innerWidth, wide.map((each) => each.outerHTML.slice(0, 90))];
}"""


def test_a_phone_shows_all_of_it(visit):
    page = visit(**PHONE)
    says(page, "A " + "long" * 60 + "\n\n```\n" + "x" * 200 + "\n```\n\n|" + "head|" * 12 + "\n|" + "---|" * 12 + "\n")
    assert page.page.evaluate(FITS) == [True, []]
    page.input.fill("Hello!")
    page.input.press("Enter")  # begins a line there
    assert page.input.input_value() == "Hello!\n"
    page.button("Send").tap()
    page.is_answered()
    assert page.page.evaluate(FITS) == [True, []]
    page.button("Settings").tap()
    page.until("document.getAnimations().every((each) => each.playState === 'finished')")
    assert page.page.evaluate(FITS) == [True, []]
    page.button("Close settings").tap()
    page.page.get_by_role("tab", name="Footprint").tap()
    page.page.locator("#cards tr").first.wait_for()
    assert page.page.evaluate(FITS) == [True, []]
    small = """() => [...document.querySelectorAll("button, select, input")].filter((each) => each.checkVisibility()
      && Math.min(each.offsetWidth, each.offsetHeight) < 24).map((each) => each.outerHTML)"""
    assert page.page.evaluate(small) == []


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (colours) => {  // what stands behind first
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => rgb.map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility()
      || element.closest(".unseen, option, script, noscript")) continue;
    const grounds = [];
    for (let each = element; each; each = each.parentElement) grounds.unshift(getComputedStyle(each).backgroundColor);
    const [one, other] = [luminance(over(grounds)), luminance(over([...grounds, getComputedStyle(element).color]))];
    const ratio = (Math.max(one, other) + .05) / (Math.min(one, other) + .05);
    found.push({ text: texts.currentNode.data.slice(0, 30), ratio });
  }
  return found;
}"""
UNNAMED = """() => [...document.querySelectorAll(
    "button, input, select, textarea, [role=tab], [role=tabpanel], [role=region]")]
  .filter((each) => !(each.getAttribute("aria-label") || each.labels?.length || each.textContent.trim()
    || document.getElementById(each.getAttribute("aria-labelledby"))))
  .map((each) => each.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_controls_have_names(visit, scheme):
    page = visit(color_scheme=scheme)
    says(page, "Some `code`, a [link](https://example.org) and\n\n> a quotation\n\n```\ncode\n```")
    page.ask("Hello!")
    page.is_answered()

    def check() -> None:
        found = page.page.evaluate(CONTRAST)
        assert len(found) > 5
        assert [each for each in found if each["ratio"] < 4.5] == []
        assert page.page.evaluate(UNNAMED) == []

    check()
    page.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json={}))
    page.ask("Again")
    page.page.get_by_text("The server is busy.").wait_for()
    page.console.clear()
    check()
    page.button("Settings").click()
    page.until("document.getAnimations().every((each) => each.playState === 'finished')")
    check()
    page.page.keyboard.press("Escape")
    page.page.get_by_role("tab", name="Footprint").click()
    page.page.locator("#cards tr").first.wait_for()
    check()


def test_colours_follow_the_system_or_the_switch(visit):
    page = visit(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.page.evaluate(ground)
    page.page.emulate_media(color_scheme="light")
    light = page.page.evaluate(ground)
    assert sum(map(int, re.findall(r"\d+", dark))) < 120
    assert sum(map(int, re.findall(r"\d+", light))) > 700
    page.button("Colours: as the system").click()
    page.button("Colours: light").click()
    assert page.page.evaluate(ground) == dark
    page.page.reload()
    assert page.page.evaluate(ground) == dark
    page.button("Colours: dark").click()
    assert page.page.evaluate(ground) == light


def test_nothing_moves_for_those_who_want_it_still(visit):
    page = visit(reduced_motion="reduce")
    page.button("Settings").click()
    assert page.page.evaluate("document.getAnimations().length") == 0


def test_a_screen_reader_hears_whole_sentences(visit):
    page = visit()
    says(page, "One sen", "tence. Ano", "ther one")
    page.ask("Hello!")
    page.is_answered()
    live = page.page.locator("#live")
    assert (live.get_attribute("role"), live.get_attribute("aria-live")) == ("log", "polite")
    said = live.locator("p").all_inner_texts()
    assert "".join(said[:-1]).replace("\n", "") == "One sentence. Another one".replace(". ", ".") or said[0].startswith(
        "One sentence."
    )
    assert said[-1] == "End of the answer."


# The calculator


def test_the_calculator_shows_memory_and_cards(visit, url):
    page = visit()
    page.page.get_by_role("tab", name="Footprint").click()
    page.page.locator("#cards tr").first.wait_for()

    def shown() -> SimpleNamespace:
        rows = page.page.locator("#cards tr").all()
        fits = {
            row.locator("td").first.inner_text().split("\n")[0]: "fits" in row.get_attribute("class").split()
            for row in rows
        }
        return SimpleNamespace(total=page.page.locator("#total").inner_text(), fits=fits)

    for size, form, context, count in [("qwen2.5-3b", "bfloat16", 4096, 1), ("qwen2.5-72b", "q4_k_m", 32768, 4)]:
        page.page.get_by_label("Qwen2.5 of").select_option(size)
        page.page.get_by_label("Weights").select_option(form)
        page.page.get_by_label("Context, tokens").fill(str(context))
        page.page.get_by_label("Sequences", exact=True).fill(str(count))
        query = {"size": size, "quantize": form, "context": context, "sequences": count}
        expected = httpx.get(f"{url}/footprint", params=query).json()
        total = f"{expected['bytes']['total'] / 1e9:.2f} GB"
        page.page.get_by_text(total, exact=True).first.wait_for()
        assert shown().fits == {f"{card['memory'] >> 30} GB": card["fits"] for card in expected["cards"]}
    page.page.get_by_label("Context, tokens").fill("99999999")
    page.page.get_by_text("Context, tokens:").wait_for()
    assert page.page.locator("#result").is_hidden()
    page.page.get_by_label("Context, tokens").fill("4096")
    page.page.locator("#result").wait_for()

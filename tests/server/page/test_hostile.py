"""The page shows text from a model, a file or a server as text, whatever it contains."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]


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
    page.says(HOSTILE)
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

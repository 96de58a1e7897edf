"""The display of an answer: Markdown, and the probability of each of its tokens."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]


def test_markdown_is_drawn(visit):
    page = visit()
    text = (
        "# Head\n\nOne **bold** and *thin* `code` 2*3*4 snake_case_name.\nNext line\n\n"
        "1. first\n   - inner\n2. second\n\n```python\nif a < b:\n    pass\n```\n\n"
        "| a | b |\n|---|--:|\n| 1 | 2 |\n\nso \\(x\\) holds\n\n> quoted\n\n[there](https://example.org/x) https://example.org/y."
    )
    page.says(text)
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
    aligned = answer.locator("td").evaluate_all("cells => cells.map((each) => getComputedStyle(each).textAlign)")
    assert aligned == ["start", "end"]
    assert answer.locator("p").nth(1).inner_text() == r"so \(x\) holds"
    assert answer.locator("blockquote").inner_text() == "quoted"
    links = [link.get_attribute("href") for link in answer.locator("a").all()]
    assert links == ["https://example.org/x", "https://example.org/y"]
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.button("Copy code").click()
    page.until(r"navigator.clipboard.readText().then((text) => text === 'if a < b:\n    pass\n')")


def test_a_list_that_is_being_written_is_a_list(visit):
    page = visit()
    page.says("Two:\n1. one\n2.")
    page.ask("Hello!")
    page.is_answered()
    assert page.answer.locator("ol > li").all_inner_texts() == ["one", ""]


def test_arabic_and_hebrew_run_from_the_right(visit):
    page = visit()
    page.says("مرحبا English\n\n- שלום\n\n> مرحبا\n\nHello مرحبا\n\n- one\n\n```\nمرحبا\n```")
    page.ask("مرحبا")
    page.is_answered()
    page.page.evaluate("document.querySelector('#messages .body').style.width = '36rem'")
    starts_right = """(parts) => parts.map((each) => {
      const range = document.createRange(), box = each.getBoundingClientRect();
      range.selectNodeContents(each);
      const text = range.getBoundingClientRect();
      return box.right - text.right < text.left - box.left;
    })"""
    assert page.page.locator("#messages .user .body").evaluate_all(starts_right) == [True]
    assert page.answer.locator("> p").evaluate_all(starts_right) == [True, False]
    assert page.answer.locator("ul .line").evaluate_all(starts_right) == [True, False]
    directions = "parts => parts.map((each) => getComputedStyle(each).direction)"
    assert page.answer.locator("> ul, > blockquote, pre").evaluate_all(directions) == ["rtl", "rtl", "ltr", "ltr"]


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
    page = visit(settings={"max_completion_tokens": 6, "top_logprobs": 3})
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

"""Different users of the page: with only a keyboard, on a phone, in other colours, with a screen reader."""

from __future__ import annotations

import re

import pytest
from support.engines import Gate

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]


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
    page.says("A " + "long" * 60 + "\n\n```\n" + "x" * 200 + "\n```\n\n|" + "head|" * 12 + "\n|" + "---|" * 12 + "\n")
    assert page.page.evaluate(FITS) == [True, []]
    assert page.page.get_by_role("heading", level=1).inner_text() == "qwenkern"
    page.input.fill("Hello!")
    page.input.press("Enter")  # on a phone, it adds a line break
    assert page.input.input_value() == "Hello!\n"
    page.button("Send").tap()
    page.is_answered()
    assert page.page.evaluate(FITS) == [True, []]
    page.button("Settings").tap()
    page.is_still()
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
    page.says("Some `code`, a [link](https://example.org) and\n\n> a quotation\n\n```\ncode\n```")
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
    page.page.get_by_text("The server is busy:").wait_for()
    page.console.clear()
    check()
    page.button("Settings").click()
    page.is_still()
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


def test_a_screen_reader_hears_whole_sentences(visit, repeating):
    page = visit()
    page.page.get_by_label("Model").select_option("parrot")
    said = page.page.get_by_role("log", name="Answer as it comes").locator("p")
    with Gate(repeating) as gate:
        page.ask("Say [[One sentence. Another, longer one]]")
        while not said.count():
            gate.steps(1)
            page.page.wait_for_timeout(10)
        assert said.all_text_contents() == ["One sentence."]
        gate.open()
        page.is_answered()
    assert "".join(said.all_text_contents()) == "One sentence. Another, longer oneEnd of the answer."
    assert said.last.text_content() == "End of the answer."

"""A conversation with a model: typing, stopping, settings, another answer, a next turn."""

from __future__ import annotations

import json
import re

import pytest
from support.engines import Gate, all_free, eventually

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]


def test_an_answer_comes_as_it_is_made(visit, model):
    page = visit(settings={"max_completion_tokens": 12})
    expected = model.chat([{"role": "user", "content": "Hello!"}], max_tokens=12)
    height = page.page.locator("#composer").bounding_box()["height"]
    with Gate(model) as gate:
        page.ask("Hello!")
        gate.steps(6)
        page.until("document.querySelector('.assistant .body').textContent.length > 0")
        assert page.button("Stop").is_visible()
        assert page.page.locator("#scroll").get_attribute("aria-busy") == "true"
        assert not all_free(model)
        page.page.get_by_text("1 running").wait_for()
        gate.open()
        page.is_answered()
    assert page.messages()[1]["content"] == expected.text
    assert page.page.locator(".assistant .note").inner_text() == "The answer was cut off at the limit of tokens."
    assert re.search(r"[\d.]+ tokens/s · first after [\d.]+ s · 12 tokens · prompt \d+, \d+ from the cache",
                     page.page.locator("#of-answer").inner_text())  # fmt: skip
    assert page.button("Send").is_visible()
    page.page.get_by_text("0 running").wait_for()
    assert page.page.locator("#composer").bounding_box()["height"] == height


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
        "Max tokens": 9,
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
    page.says('{"a_b": "*x*"}')
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
    # The seeds are given, since an empty answer, which a random model may draw, can't be brought back.
    page = visit(settings={"max_completion_tokens": 8, "temperature": 2, "seed": 1})
    page.ask("Hello!")
    page.is_answered()
    first = page.messages()
    page.setting("Seed", "2")
    page.button("Regenerate").click()
    page.button("Undo").wait_for()
    assert len(page.messages()) == 2
    assert page.messages()[1]["content"] != first[1]["content"]
    assert page.asked[0]["messages"] == page.asked[1]["messages"]
    page.button("Undo").click()
    assert page.messages() == first


@pytest.mark.parametrize("chosen", [None, "parrot"])
def test_a_message_may_be_sent_before_the_list_of_models_comes(visit, chosen):
    page = visit()
    kept = {"settings": {"max_completion_tokens": "4"}} | ({"model": chosen} if chosen else {})
    page.page.goto(f"{page.url}/health")  # the page itself would store its own state when it is left
    page.page.evaluate("kept => sessionStorage.setItem('qwenkern.chat', JSON.stringify(kept))", kept)
    page.page.route("**/v1/models", lambda route: None)  # it never comes
    page.page.goto(page.url)
    page.console.clear()  # /health has no icon
    page.input.fill("Hello!")
    page.input.press("Enter")
    page.is_answered()
    assert page.asked[0].get("model") == chosen
    assert page.messages()[1]["ending"] in ("length", "stop")


def test_an_edited_message_is_answered_anew(visit):
    page = visit(settings={"max_completion_tokens": 4})
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
    page = visit(settings={"max_completion_tokens": 2})
    page.ask("Hello! " * 16)
    page.is_answered()
    page.ask("More")
    page.is_answered(2)
    found = re.search(r"prompt ([\d,]+), (\d+) from the cache", page.page.locator("#of-answer").inner_text())
    assert found
    assert int(found[2]) in range(64, int(found[1]))


def test_a_conversation_stays_when_the_page_is_loaded_again(visit):
    page = visit(settings={"max_completion_tokens": 4})
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


def test_what_has_come_stays_when_the_page_is_loaded_again(visit, repeating):
    page = visit()
    page.page.get_by_label("Model").select_option("parrot")
    with Gate(repeating) as gate:
        page.ask("Say [[a long answer]]")
        gate.steps(4)
        page.until("document.querySelector('.assistant .body').textContent.length > 0")
        page.page.reload()
        page.is_answered()
        gate.open()
    asked, answer = page.messages()
    assert asked["content"] == "Say [[a long answer]]"
    assert "a long answer".startswith(answer["content"].strip() or "nothing")
    assert page.page.locator(".assistant .note").inner_text() == "Stopped."

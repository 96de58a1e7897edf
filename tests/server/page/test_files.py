"""A conversation is saved to a file and loaded from one."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]


def test_an_exported_conversation_can_be_imported(visit, tmp_path):
    page = visit(settings={"max_completion_tokens": 4})
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

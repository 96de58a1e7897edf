"""/tokenize, /detokenize and /tokenizer_info: the tokenizer's results, in vLLM's format."""

from __future__ import annotations

import httpx
import pytest
from support.servers import serving, toy
from support.toy_tokenizer import CHAT_TEMPLATE, byte_library

TEXT = "Hé, 你好!\n"
CHAT = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def model():
    with toy() as model:
        yield model


@pytest.fixture(scope="module")
def client(model):
    with serving(model) as url, httpx.Client(base_url=url) as client:
        yield client


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_text_and_its_ids(client, model):
    expected = byte_library().encode(TEXT).ids
    found = post(client, "/tokenize", prompt=TEXT)
    assert found == {
        "count": len(expected),
        "max_model_len": model.config.context_length,
        "tokens": expected,
        "token_strs": None,
    }
    assert post(client, "/detokenize", tokens=expected) == {"prompt": TEXT}
    assert post(client, "/tokenize", model="toy", prompt=TEXT, add_special_tokens=False)["tokens"] == expected


def test_the_spelling_of_tokens_is_that_of_the_library(client):
    found = post(client, "/tokenize", prompt=TEXT, return_token_strs=True)
    assert found["token_strs"] == byte_library().encode(TEXT).tokens


def test_a_chat(client, model):
    for generation in (True, False):
        found = post(client, "/tokenize", messages=CHAT, add_generation_prompt=generation)
        assert found["tokens"] == model.tokenizer.encode_chat(CHAT, add_generation_prompt=generation)
        begins = f"<|im_start|>user\n{TEXT}<|im_end|>\n"
        text = begins + ("<|im_start|>assistant\n" if generation else "")
        assert post(client, "/detokenize", tokens=found["tokens"]) == {"prompt": text}


def test_a_chat_whose_last_message_goes_on(client):
    messages = [*CHAT, {"role": "assistant", "content": "Well"}]
    for more in ({}, {"add_generation_prompt": False}):
        found = post(client, "/tokenize", messages=messages, continue_final_message=True, **more)
        text = f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\nWell"
        assert post(client, "/detokenize", tokens=found["tokens"]) == {"prompt": text}


def test_the_description(client, model):
    info = client.get("/tokenizer_info").json()
    assert info["chat_template"] == CHAT_TEMPLATE
    assert info["vocab_size"] == 503
    assert info["added_tokens_decoder"]["256"] == {"content": "<|im_end|>", "special": True}
    assert info["model_max_length"] == model.config.context_length
    assert client.get("/tokenizer_info?model=none").status_code == 404
    wrong = client.get("/tokenizer_info?modle=toy")
    assert wrong.status_code == 400
    assert "'modle'" in wrong.json()["error"]["message"]


def test_a_get_loads_no_model(model):
    with toy() as other, serving({"toy": model, "other": other}) as url, httpx.Client(base_url=url) as client:
        refused = client.get("/tokenizer_info?model=other")
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "not_loaded"
        assert [each["state"] for each in client.get("/v1/models").json()["data"]] == ["loaded", "unloaded"]
        post(client, "/tokenize", model="other", prompt="a")
        assert client.get("/tokenizer_info?model=other").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"messages": [CHAT[0] | {"tool_call_id": "a"}]}, "messages.0.tool_call_id"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/tokenize", {"prompt": "a", "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {"prompt": "a", "colour": 1}, "colour"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        (
            "/tokenize",
            {"messages": CHAT, "continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ("/tokenize", {"messages": [{"role": "user"}]}, None),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, None),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 503]}, None),
        ("/detokenize", {"tokens": [-1]}, None),
        ("/detokenize", {"tokens": ["1"]}, None),
    ],
)
def test_a_wrong_body_is_refused(client, path, body, param):
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert param is None or error["param"] == param


def test_a_model_without_a_tokenizer_says_so():
    from support.models import tiny_model

    with tiny_model() as model, serving(model) as url:
        answer = httpx.post(f"{url}/tokenize", json={"prompt": "a"})
        assert answer.status_code == 400
        assert "no tokenizer" in answer.json()["error"]["message"]

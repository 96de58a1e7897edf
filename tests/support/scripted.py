"""A model that gives the answers that a test wants, through the whole engine: a grammar admits only that text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from support.models import TINY, tiny_model
from support.toy_tokenizer import byte_library

from qwenkern import Model
from qwenkern.server import answering
from qwenkern.text.chat_template import ChatTemplate
from qwenkern.text.tokenizer import Tokenizer

TEMPLATE = """{%- for tool in tools or [] %}[{{ tool | tojson }}]{% endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}|{{ message.content or "" }}
{%- for call in message.tool_calls or [] -%}
({{ call.function.name }} {{ call.function.arguments | tojson }}){% endfor -%}
<|im_end|>{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant|{% endif %}"""


def model_with_tools() -> Model:
    """A small random model with a chat template that writes tools and calls."""
    template = ChatTemplate.from_gguf({"tokenizer.chat_template": TEMPLATE}, {}, "toy")
    config = replace(TINY, max_position_embeddings=4096)
    tokenizer = Tokenizer(byte_library(), "toy", config.vocab_size, chat_template=template)
    return tiny_model(config, torch.float32, tokenizer=tokenizer)


@contextlib.contextmanager
def saying(model: Model, *texts: str) -> Iterator[list[str]]:
    """In this context the model answers with these texts, one per call. Yields the list of prompts that it reads. In a
    server's streams each token has an event of its own, also on a busy machine, where several would share one."""
    made, left, read = model._requests, list(texts), list[str]()

    def requests(prompts: Any, params: Any, *more: Any) -> Any:
        forced = replace(params, grammar=f"start: {json.dumps(left.pop(0))}", json_schema=None)
        found = made(prompts, forced, *more)
        read.extend(model.tokenizer.decode(request.prompt_ids, skip_special=False) for request in found)
        return found

    with mock.patch.object(model, "_requests", requests), mock.patch.object(answering, "_joined", list):
        yield read

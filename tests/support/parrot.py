"""A model whose answer a test writes into the prompt: it repeats the text in the last [[double brackets]].

    user: Say [[Hello!]]   ─►   assistant: Hello!

So a test knows the model's answer, whichever client sends the prompt. Penalties, grammars and end ids act on this model
as on any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from support.clockwork import Sums, with_layers
from support.models import TINY, tiny_model
from support.toy_tokenizer import END, byte_library

from qwenkern import Model
from qwenkern.engine.capture import CallCapture
from qwenkern.text.chat_template import ChatTemplate
from qwenkern.text.tokenizer import Tokenizer

SIZES = replace(
    TINY, vocab_size=264, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=8192,
)  # fmt: skip
TEMPLATE = (  # writes tools and calls, like Qwen2.5's template
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Repeats(Sums):
    """Stands in for the layers."""

    def next(self, past: Sequence[int] | np.ndarray) -> int:
        text = "".join(chr(int(token)) for token in past)
        answer = text.rfind(_BEGUN)
        written = text[answer + len(_BEGUN) :] if answer >= 0 else text[text.rfind(_CLOSE) + 2 :]
        asked = text[: answer if answer >= 0 else len(text)]
        wanted = asked[asked.rfind(_OPEN) + 2 : asked.rfind(_CLOSE)] if _OPEN in asked and _CLOSE in asked else ""
        return ord(wanted[len(written)]) if len(written) < len(wanted) else END


class _Uncaptured(CallCapture):
    def padded(self, sequences: int) -> None:
        """No step is captured: there would be no C calls to record."""


def parrot() -> Model:
    """The model, which reads and writes bytes as text."""
    template = ChatTemplate.from_gguf({"tokenizer.chat_template": TEMPLATE}, {"eos_token": "<|im_end|>"}, "parrot")
    tokenizer = Tokenizer(byte_library(), "parrot", SIZES.vocab_size, chat_template=template)
    return with_layers(tiny_model(SIZES, tokenizer=tokenizer), Repeats(SIZES.vocab_size), _Uncaptured())


def _as_ids(text: str) -> str:
    """A text whose characters are token ids."""
    return "".join(map(chr, byte_library().encode(text, add_special_tokens=False).ids))


_OPEN, _CLOSE, _BEGUN = _as_ids("[["), _as_ids("]]"), _as_ids("<|im_start|>assistant\n")

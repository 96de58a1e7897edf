"""A tokenizer of 256 bytes and two special tokens, for models with random weights."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from qwenkern.text.chat_template import ChatTemplate
from qwenkern.text.tokenizer import Tokenizer

END = 256  # <|im_end|>
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_library() -> tokenizers.Tokenizer:
    """Token n is byte n in the order of the byte-level alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    return library


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """The same as a Tokenizer; ids below ``vocab_size`` without a token have no text."""
    template = ChatTemplate.from_gguf({"tokenizer.chat_template": CHAT_TEMPLATE}, {}, "toy")
    return Tokenizer(byte_library(), "toy", vocab_size, chat_template=template)

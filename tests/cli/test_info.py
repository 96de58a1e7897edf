"""`qwenkern info`: parameters, memory, and contradictions between the numbers of a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwenkern import YarnScaling
from qwenkern.checkpoint.packing import slots
from qwenkern.cli.info import contradictions, layout, memory
from qwenkern.config import FAMILY
from qwenkern.footprint import layout_of

SMALL = FAMILY["qwen2.5-3b"]


@pytest.mark.parametrize("name", FAMILY)
def test_the_layout_adds_up(name):
    assert sum(layout(FAMILY[name]).values()) == FAMILY[name].num_parameters


def test_memory_is_weights_and_cache():
    sizes = memory(layout_of(SMALL, torch.device("cuda")))
    assert sizes[32768] == 2 * 3_085_938_688 + (32768 + 64) * 36864, "with a spare page"
    assert list(sizes) == sorted(sizes)
    assert 131072 in memory(layout_of(replace(SMALL, rope_scaling=YarnScaling(4.0, 32768)), torch.device("cuda")))


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_does_not_contradict_itself(name):
    shapes = {tensor: slot.shape for tensor, slot in slots(FAMILY[name]).items()}
    assert contradictions(FAMILY[name], name, shapes, 151665) == []


def test_a_tied_head_alone_is_no_contradiction():
    shapes = {tensor: slot.shape for tensor, slot in slots(SMALL).items()}
    shapes["lm_head.weight"] = shapes.pop("model.embed_tokens.weight")
    assert contradictions(SMALL, shapes=shapes) == []


def test_the_card_that_says_3b_and_means_another():
    """A card in circulation: hidden 2304, 48 query and 8 key-value heads."""
    card = replace(SMALL, hidden_size=2304, num_attention_heads=48, num_key_value_heads=8, head_dim=48)
    found = contradictions(card, "Qwen2.5-3B-Instruct")
    assert any("the name says 3B, and the configuration makes 3,5" in sentence for sentence in found)
    assert "hidden_size is 2304, and Qwen2.5-3B has 2048" in found
    assert "num_key_value_heads is 8, and Qwen2.5-3B has 2" in found


SHAPES = {tensor: slot.shape for tensor, slot in slots(SMALL).items()}


@pytest.mark.parametrize(
    ("config", "arguments", "sentence"),
    [
        (replace(SMALL, head_dim=64), {}, "16 query heads of 64 make 1024; hidden_size is 2048"),
        (
            replace(SMALL, rope_scaling=YarnScaling(4.0, 32768), max_position_embeddings=65536),
            {},
            "max_position_embeddings is 65536; YaRN stretches 32768 to 131072",
        ),
        (SMALL, {"name": "tiny-0B"}, "the name says 0B, and the configuration makes 3,085,938,688 parameters"),
        (SMALL, {"name": "9" * 200 + "B"}, "and the configuration makes 3,085,938,688 parameters"),
        (SMALL, {"num_tokens": 152000}, "the tokenizer has ids up to 151999; vocab_size is 151936"),
        (SMALL, {"shapes": SHAPES | {"lm_head.weight": (1, 1)}}, "1 tensors of the file are not in the configuration"),
        (SMALL, {"shapes": SHAPES | {"model.norm.weight": (7,)}}, "model.norm.weight has shape (7,)"),
        (
            replace(SMALL, num_hidden_layers=37),
            {"shapes": SHAPES},
            "12 tensors of the configuration are not in the file",
        ),
        (replace(SMALL, tie_word_embeddings=False), {"shapes": SHAPES}, "1 tensors of the configuration are not in"),
        (SMALL, {"name": "Qwen2.5-7B"}, "the name says 7B"),
    ],
)
def test_a_sentence_for_each_contradiction(config, arguments, sentence):
    assert any(sentence in found for found in contradictions(config, **arguments))

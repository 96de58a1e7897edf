"""Pages: which sequence has which, the slots of tokens, and no page is lost."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest
import torch
from support.models import TINY
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwenkern import RequestError, YarnScaling
from qwenkern.cache import BlockTable, PagedCache
from qwenkern.rope import inverse_frequencies


@pytest.fixture
def cache():
    return PagedCache(TINY, num_tokens=40, dtype=torch.float32, device=torch.device("cpu"), page_size=4)


def _fill(cache, table, count):
    parts = [(table, list(range(count)))]
    batch = cache.batch(parts)
    marks = (batch.positions[:, None, None].float() + 100 * table.pages[0]).expand(
        -1, TINY.num_key_value_heads, TINY.head_dim
    )
    for pages in cache.pages:
        pages.store(batch.slots, marks, -marks)
    cache.advance(parts)
    return batch


def test_tokens_of_a_batch_go_to_distinct_slots_in_order(cache):
    first, second = BlockTable(), BlockTable()
    _fill(cache, first, 3)
    parts = [(first, [7, 8, 9]), (second, [5])]
    batch = cache.batch(parts)
    assert batch.ids.tolist() == [7, 8, 9, 5]
    assert batch.positions.tolist() == [3, 4, 5, 0]
    assert batch.lengths.tolist() == [6, 1]
    assert batch.query_starts.tolist() == [0, 3, 4]
    assert not batch.is_decode
    page, next_page = first.pages
    assert batch.slots.tolist() == [4 * page + 3, 4 * next_page, 4 * next_page + 1, 4 * second.pages[0]]
    assert batch.block_tables.tolist()[0] == first.pages
    assert len(batch.block_tables[1]) == 2, "the shorter table is padded"


def test_one_token_a_sequence_is_a_decode(cache):
    assert cache.batch([(BlockTable(), [1]), (BlockTable(), [2])]).is_decode


def test_released_pages_come_back(cache):
    tables = [BlockTable() for _ in range(3)]
    for table in tables:
        _fill(cache, table, 5)
    assert cache.num_free_tokens == 40 - 3 * 8
    for table in tables:
        cache.release(table)
        assert (table.pages, table.length) == ([], 0)
    assert cache.num_free_tokens == 40
    cache.release(tables[0])
    assert cache.num_free_tokens == 40, "releasing twice gives nothing twice"


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_a_fork_shares_full_pages_and_keeps_its_own_tail(cache, length):
    table = BlockTable()
    _fill(cache, table, length)
    fork = BlockTable()
    cache.fork(table, fork)
    assert fork.length == length
    assert fork.pages[: length // 4] == table.pages[: length // 4]
    if length % 4:
        assert fork.pages[-1] != table.pages[-1]
        filled = slice(0, length % 4)
        for each in (tensor for pages in cache.pages for tensor in pages.tensors):
            assert torch.equal(each[fork.pages[-1], filled], each[table.pages[-1], filled])
    used = 40 - cache.num_free_tokens
    cache.release(table)
    assert 40 - cache.num_free_tokens == used - (4 if length % 4 else 0), "shared pages stay while the fork uses them"
    cache.release(fork)
    assert cache.num_free_tokens == 40


def test_too_many_tokens_are_refused_and_nothing_is_taken(cache):
    table = BlockTable()
    _fill(cache, table, 30)
    other = BlockTable()
    assert cache.missing_pages(other, 9) == 3 > cache.num_free_pages
    with pytest.raises(RequestError, match=r"room for 8 more tokens of its 40.*needs 9 more.*cache_tokens"):
        cache.extend(other, 9)
    assert other.pages == []
    cache.extend(other, 8)
    assert cache.num_free_pages == 0


@pytest.mark.parametrize("yarn", [None, YarnScaling(8.0, 2048)], ids=["plain", "yarn"])
def test_angles_are_those_of_transformers_as_far_as_sequences_reach(yarn):
    config = replace(TINY, max_position_embeddings=16384, rope_scaling=yarn)
    cache = PagedCache(config, 20_000, torch.float32, torch.device("cpu"), page_size=1000)
    theirs = Qwen2RotaryEmbedding(Qwen2Config(head_dim=config.head_dim, rope_parameters={"rope_theta": 1e6}))
    if yarn:  # other tests check its frequencies
        theirs.inv_freq, theirs.attention_scaling = inverse_frequencies(config), yarn.attention_scale
    table, address = BlockTable(), cache.rope.cos_sin.data_ptr()
    assert cache.rope.cos_sin.shape == (16384, config.head_dim)
    for length in (1, 999, 1000, 1001, 9000, 16384):
        cache.rope.cos_sin[cache.rope._computed :] = torch.nan
        cache.extend(table, length - table.length)
        table.length = length
        angles = [each[0, :, : config.head_dim // 2] for each in theirs(torch.empty(0), torch.arange(length)[None])]
        assert torch.equal(cache.rope.cos_sin[:length], torch.cat(angles, dim=-1))
    assert cache.rope.cos_sin.data_ptr() == address  # captured steps read from this address


def test_no_page_is_given_before_its_angles_are_there(monkeypatch):
    cache = PagedCache(replace(TINY, max_position_embeddings=1 << 20), 1 << 20, torch.float32, torch.device("cpu"))
    table, block = BlockTable(), cache.rope._block

    def interrupt(rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.rope, "reach", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.extend(table, 2 * block)
    cache.rope.cos_sin[block:] = torch.nan
    cache.extend(table, 2 * block)
    assert cache.rope.cos_sin[: 2 * block].isfinite().all()


def test_a_context_of_millions_costs_nothing_until_it_is_used():
    config = replace(TINY, max_position_embeddings=1 << 24, num_hidden_layers=1, num_key_value_heads=1, head_dim=16)
    before = psutil.Process().memory_info().rss
    cache = PagedCache(config, 1 << 24, torch.bfloat16, torch.device("cpu"))
    cache.extend(BlockTable(), 100)
    assert cache.rope.cos_sin.shape == (1 << 24, 16)  # 1 GiB
    assert psutil.Process().memory_info().rss - before < 1 << 28

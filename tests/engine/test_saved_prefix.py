"""A saved prefix gives the same texts as a computed one, and is refused if it is of no use."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import TINY, tiny_model

from qwenkern import CheckpointError, EngineError, RequestError

PROMPT = [n * 7 % 503 for n in range(200)]
HOW = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 1}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "float16", "int8", "fp8"])
def test_a_loaded_prefix_has_the_bits_of_a_computed_one(tmp_path, kv_cache_dtype):
    first, second = (tiny_model(kv_cache_dtype=kv_cache_dtype) for _ in range(2))
    assert first.save_prefix(PROMPT, tmp_path / "p") == 192
    assert second.load_prefix(tmp_path / "p") == 192
    assert second.cache.num_free_pages == second.cache.num_pages
    for prompt in (PROMPT, PROMPT[:150], [*PROMPT[:192], 5, 6]):
        mine, theirs = second.generate(prompt, **HOW), first.generate(prompt, **HOW)
        assert mine.logprobs == theirs.logprobs
        assert mine.num_cached_tokens == len(prompt) // 64 * 64
    assert second.load_prefix(tmp_path / "p") == 192, "pages that are there already are left"


def test_a_prefix_is_found_under_its_salt_only(tmp_path):
    model = tiny_model()
    model.save_prefix(PROMPT, tmp_path / "p", cache_salt="a")
    other = tiny_model()
    other.load_prefix(tmp_path / "p", cache_salt="b")
    found = [other.generate(PROMPT, cache_salt=salt, **HOW).num_cached_tokens for salt in (None, "a", "b")]
    assert found == [0, 0, 192]


def test_deterministic_takes_whole_chunks_of_its_own_length(tmp_path):
    models = [tiny_model(deterministic=True, prefill_chunk=chunk) for chunk in (128, 128, 64)]
    assert models[0].save_prefix(PROMPT, tmp_path / "p") == 128
    assert models[1].load_prefix(tmp_path / "p") == 128
    cold = tiny_model(deterministic=True, prefill_chunk=128, prefix_cache=False)
    warm = models[1].generate(PROMPT, **HOW)
    assert (warm.num_cached_tokens, warm.logprobs) == (128, cold.generate(PROMPT, **HOW).logprobs)
    with pytest.raises(CheckpointError, match="chunk is 128; expected 64"):
        models[2].load_prefix(tmp_path / "p")
    assert tiny_model().load_prefix(tmp_path / "p") == 128
    tiny_model().save_prefix(PROMPT, tmp_path / "q")
    with pytest.raises(CheckpointError, match="chunk is any; expected 128"):
        models[1].load_prefix(tmp_path / "q")


def test_another_model_dtype_or_cache_is_refused(tmp_path):
    model = tiny_model()
    model.save_prefix(PROMPT, file := tmp_path / "p")
    changed = tiny_model()
    with torch.no_grad():
        changed.module.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    for other, message in (
        (changed, "model is .*; expected "),
        (tiny_model(dtype=torch.bfloat16), "model is "),
        (tiny_model(kv_cache_dtype="int8"), "cache is dense; expected int8"),
    ):
        with pytest.raises(CheckpointError, match=f"{file}: {message}"):
            other.load_prefix(file)
        assert other.generate(PROMPT, **HOW).num_cached_tokens == 0


def test_a_damaged_file_is_refused(tmp_path):
    model = tiny_model()
    model.save_prefix(PROMPT, file := tmp_path / "p")
    whole, facts = load_file(file), model._facts_of_pages()
    from qwenkern.cache.saved import VERSION

    def written(change):
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, file, metadata={"format": VERSION, **facts})

    for change, message in (
        (lambda tensors: tensors.pop("layers.1.v_pages"), "layers.1.v_pages is missing; expected torch.float32"),
        (lambda tensors: tensors.update({"layers.0.k_pages": torch.zeros(3, 64, 2, 8)}), r"\[3, 64, 2, 8\]; expected"),
        (lambda tensors: tensors.pop("ids"), "has no token ids of whole pages of 64 tokens"),
        (lambda tensors: tensors.update(ids=torch.zeros(7, dtype=torch.int32)), "has no token ids of whole pages"),
    ):
        written(change)
        with pytest.raises(CheckpointError, match=message):
            model.load_prefix(file)
    for content in (b"", file.read_bytes()[:1000]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"expected a file that Model\.save_prefix has written"):
            model.load_prefix(file)
    save_file(whole, file)
    with pytest.raises(CheckpointError, match="format is None; expected qwenkern prefix 1"):
        model.load_prefix(file)
    with pytest.raises(CheckpointError, match="expected a file that"):
        model.load_prefix(tmp_path / "missing")


def test_a_prefix_without_room_changes_nothing(tmp_path):
    tiny_model().save_prefix(PROMPT, file := tmp_path / "p")
    small = tiny_model(TINY, cache_tokens=128)
    kept = small.generate([1] * 100, **HOW).token_ids
    with pytest.raises(RequestError, match="room for 128 more tokens of its 128"):
        small.load_prefix(file)
    assert small.cache.num_free_pages == 2
    assert small.generate([1] * 100, **HOW).token_ids == kept


def test_a_closed_model_saves_and_loads_nothing(tmp_path):
    model = tiny_model()
    model.save_prefix(PROMPT, file := tmp_path / "p")
    model.close()
    with pytest.raises(EngineError, match="this model is closed"):
        model.load_prefix(file)

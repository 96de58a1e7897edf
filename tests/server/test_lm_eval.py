"""lm-eval's local-completions against the server, with two tasks defined here and the server's tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from support.engines import check_pages
from support.parrot import parrot
from support.servers import serving
from support.told import KEY, SETTINGS

QUESTIONS = [
    {"question": "The sea is [[blue]]", "choices": ["blue", "red"], "answer": 0},
    {"question": "Snow is [[white, or ]]", "choices": ["grey", "white"], "answer": 1},
]


@pytest.fixture(scope="module")
def model():
    with parrot() as model:
        yield model


@pytest.fixture(scope="module")
def results(model) -> dict[str, Any]:
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    shared = {
        "custom_dataset": lambda **_: {"test": Dataset.from_list(QUESTIONS)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    choosing = {
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    writing = {
        "task": "writing",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [","], "max_gen_toks": 20, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    with pytest.MonkeyPatch.context() as patch, serving({"parrot": model}, SETTINGS) as url:
        patch.setenv("OPENAI_API_KEY", KEY)
        arguments = {"model": "parrot", "base_url": f"{url}/v1/completions", "num_concurrent": 2, "max_retries": 1}
        arguments |= {"auth_token": KEY}  # for the tokenizer's paths
        tasks = [ConfigurableTask(config=shared | each) for each in (choosing, writing)]
        found = lm_eval.simple_evaluate("local-completions", arguments, tasks=tasks, bootstrap_iters=0, batch_size=2)
    check_pages(model)
    return found


@pytest.mark.slow
def test_likelihoods_are_those_of_score(model, results):
    for sample in results["samples"]["choosing"]:
        doc = sample["doc"]
        for choice, [[logprob, is_greedy]] in zip(doc["choices"], sample["resps"], strict=True):
            given = model.tokenizer.encode(doc["question"])
            ids = [*given, *model.tokenizer.encode(choice)]
            assert float(logprob) == pytest.approx(sum(model.score(ids).logprobs[len(given) - 1 :]), abs=1e-4)
            assert is_greedy == (model.generate(given, max_tokens=len(choice)).text == choice)
    assert results["results"]["choosing"]["acc,none"] == 1.0


@pytest.mark.slow
def test_texts_end_at_a_stop(results):
    assert [sample["resps"] for sample in results["samples"]["writing"]] == [[["blue"]], [["white"]]]
    assert results["results"]["writing"]["exact_match,none"] == 1.0

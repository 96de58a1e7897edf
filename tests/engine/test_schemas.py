"""Schemas of the kind that people write: every complete answer is valid according to another library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from support.models import TINY, tiny_model
from support.schemas import schemas
from support.toy_tokenizer import byte_library, byte_tokenizer

from qwenkern import RequestError, SamplingParams
from qwenkern.sampling import grammar_compiler

REFUSED = Path(__file__).parents[1] / "data/refused_schemas.json"  # name of a schema -> the reason to refuse it
COUNT = 400
# A model with random weights would write long texts and many blanks. With these, most answers end.
BIASES = {'"': 7.0, "}": 4.0, "]": 4.0, "Ġ": -9.0, "Ċ": -9.0, ",": -1.0, "\\": -2.0}


@pytest.mark.slow
def test_every_completed_answer_validates(monkeypatch):
    monkeypatch.setattr(grammar_compiler, "_try", lambda source: ("", 0))  # a process for each takes half a minute
    model = tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size))
    biases = {byte_library().token_to_id(token): bias for token, bias in BIASES.items()}
    how = SamplingParams(temperature=1.0, seed=1, max_tokens=300, logit_bias=biases)
    refused, requests = {}, {}
    for name, schema in schemas(COUNT):
        try:
            [requests[name]] = model._requests([[5]], replace(how, json_schema=schema))
        except RequestError as error:
            refused[name] = str(error).removeprefix("json_schema is not supported: ")
    done = dict(zip(requests, model._complete(list(requests.values())), strict=True))
    completed = {name: each.text for name, each in done.items() if each.finish_reason == "stop"}
    for name, text in completed.items():
        schema = json.loads(requests[name].params.json_schema)
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
    assert refused == json.loads(REFUSED.read_text(encoding="utf-8"))
    assert len(completed) > 0.9 * len(requests)

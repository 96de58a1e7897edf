"""/metrics: the values that a Prometheus server reads are right."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from support.engines import Gate, check_pages, read
from support.servers import serving, toy

from qwenkern.server.metrics import COUNTERS, GAUGES, HISTOGRAMS
from qwenkern.server.settings import Settings

PROMPT = "What repeats itself is found again. " * 5


@pytest.fixture
def model():
    with toy() as model:
        yield model


def values(url: str) -> dict[str, float]:
    """name and labels of a sample -> its value, without the samples of the server's process."""
    answer = httpx.get(f"{url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        sample.name + "".join(f"|{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in parse(answer.text)
        for sample in family.samples
        if family.name.startswith("qwenkern_")
    }


def test_tokens_requests_and_times(model):
    with serving(model) as url:
        before = values(url)
        assert before["qwenkern_model_loaded|toy"] == 1
        assert before["qwenkern_generation_tokens_total|toy"] == 0
        ask = {"model": "toy", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "ignore_eos": True}
        usages = [httpx.post(f"{url}/v1/chat/completions", json=ask).json()["usage"] for _ in range(2)]
        after = values(url)
        assert after["qwenkern_prompt_tokens_total|toy"] == sum(each["prompt_tokens"] for each in usages)
        assert after["qwenkern_generation_tokens_total|toy"] == 12
        cached = sum(each["prompt_tokens_details"]["cached_tokens"] for each in usages)
        assert after["qwenkern_prefix_cache_hits_total|toy"] == cached > 0
        assert after["qwenkern_request_success_total|length|toy"] == 2
        assert after["qwenkern_time_to_first_token_seconds_count|toy"] == 2
        assert after["qwenkern_inter_token_latency_seconds_count|toy"] == 10
        assert after["qwenkern_e2e_request_latency_seconds_bucket|+Inf|toy"] == 2
        assert after["qwenkern_http_requests_total|POST|/v1/chat/completions|200"] == 2
        assert after["qwenkern_num_requests_running|toy"] == 0


def test_the_documentation_lists_every_metric(model):
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(qwenkern_[a-z0-9_]+)`", text.partition("## Metrics")[2]))
    with serving(model) as url:
        answer = httpx.get(f"{url}/metrics").text
    families = [family for family in parse(answer) if family.name.startswith("qwenkern_")]
    assert documented == {each.name + "_total" * (each.type == "counter") for each in families}


def test_what_runs_now(model):
    with (
        serving(model) as url,
        Gate(model) as gate,
        model.stream(PROMPT, max_tokens=300, ignore_eos=True) as stream,
    ):
        gate.steps(3)
        read(stream, 1)
        found = values(url)
        assert found["qwenkern_num_requests_running|toy"] == 1
        assert found["qwenkern_num_requests_waiting|toy"] == 0
        assert 0 < found["qwenkern_kv_cache_usage_perc|toy"] < 1
        stream.close()
        gate.open()
        check_pages(model)
        assert values(url)["qwenkern_kv_cache_usage_perc|toy"] == 0
        assert values(url)["qwenkern_request_success_total|abort|toy"] == 1


def test_nobody_makes_the_metrics_long(model):
    with serving(model) as url, httpx.Client(base_url=url) as client:
        for n in range(40):
            assert client.get(f"/nothing/{n}").status_code == 404
            assert client.get(f"/v1/models/{n}").status_code == 404
            assert client.request(f"X{n}", "/health").status_code == 405
        found = {name: value for name, value in values(url).items() if name.startswith("qwenkern_http_requests_total")}
        assert found["qwenkern_http_requests_total|GET|other|404"] == 40
        assert found["qwenkern_http_requests_total|GET|/v1/models/{model:path}|404"] == 40
        assert found["qwenkern_http_requests_total|other|/health|405"] == 40
        assert len(found) < 8


def test_a_refusal_for_its_key_counts(model):
    with serving(model, Settings(api_keys=("secret",))) as url:
        assert httpx.get(f"{url}/metrics").status_code == 401
        text = httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer secret"}).text
        assert 'qwenkern_http_requests_total{method="GET",path="other",status="401"} 1.0' in text


def test_two_servers_do_not_share_numbers(model):
    with serving(model) as one, serving(model) as two:
        for _ in range(3):
            httpx.get(f"{one}/nothing")
        assert values(one)["qwenkern_http_requests_total|GET|other|404"] == 3
        assert "qwenkern_http_requests_total|GET|other|404" not in values(two)


def test_the_openmetrics_format(model):
    with serving(model) as url:
        accept = "application/openmetrics-text; version=1.0.0"
        answer = httpx.get(f"{url}/metrics", headers={"Accept": accept})
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        names = {family.name for family in parse_openmetrics(answer.text)}
    assert {f"qwenkern_{name}" for name in (*GAUGES, *COUNTERS, *HISTOGRAMS)} <= names

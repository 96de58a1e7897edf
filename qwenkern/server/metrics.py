"""GET /metrics: metrics in the text format of Prometheus, with vLLM's names after the prefix.

    engines ─► their counts (engine/counts.py) ─┐
    responses ─► CountResponses (by status) ────┴─► Collector, which reads them for each GET /metrics

So this module does no work per token. Each application has a registry of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as PrometheusCollector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine.counts import OUTCOMES, Counts, Histogram
from .endpoints import Endpoint, Served
from .entry import Entry
from .models import Models
from .service import Service

PREFIX = "qwenkern_"
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")

# name -> (help text, function that reads the value). docs/serving.md has the same table; a test compares the two.
COUNTERS = {
    "prompt_tokens": ("Tokens of the prompts of requests that have started", lambda counts: counts.prompt_tokens),
    "generation_tokens": ("Tokens that were generated", lambda counts: counts.generated),
    "prefix_cache_queries": ("Tokens of prompts that were looked up in the cache", lambda counts: counts.looked_up),
    "prefix_cache_hits": ("Tokens of prompts that the cache still had", lambda counts: counts.found),
    "num_preemptions": (
        "How often a request lost its pages because the cache was full",
        lambda counts: counts.preempted,
    ),
    "spec_decode_num_draft_tokens": ("Tokens that speculation guessed", lambda counts: counts.drafted),
    "spec_decode_num_accepted_tokens": ("Guessed tokens that were right", lambda counts: counts.accepted),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token", lambda counts: counts.first_token),
    "inter_token_latency_seconds": ("Between two tokens of an answer", lambda counts: counts.between_tokens),
    "e2e_request_latency_seconds": ("From a request's arrival to the end of its answer", lambda counts: counts.whole),
    "request_queue_time_seconds": ("From a request's arrival to its start", lambda counts: counts.queued),
}
GAUGES = {
    "num_requests_running": ("Requests that run", lambda entry: _running(entry)),
    "num_requests_waiting": ("Requests that have not started, or were preempted", lambda entry: _waiting(entry)),
    "kv_cache_usage_perc": ("The share of the cache's pages in use, 0 to 1", lambda entry: _cache_use(entry)),
    "model_loaded": ("Whether the model is loaded", lambda entry: int(entry.model is not None)),
    "model_memory_bytes": ("The model's part of the memory budget", lambda entry: entry.size.bytes),
}


class Collector(PrometheusCollector):
    """The metrics of a server's models and of its responses."""

    def __init__(self, models: Models, responses: Counter[tuple[str, str, str]]) -> None:
        self._models = models
        self._responses = responses

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics with their current values."""
        entries = list(self._models.entries.values())
        counts = [(entry.name, entry.counts) for entry in entries]
        for name, (meaning, read) in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, meaning, labels=["model_name"])
            for entry in entries:
                gauge.add_metric([entry.name], read(entry))
            yield gauge
        for name, (meaning, read) in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, meaning, labels=["model_name"])
            for model, each in counts:
                counter.add_metric([model], read(each))
            yield counter
        for name, (meaning, read) in HISTOGRAMS.items():
            family = HistogramMetricFamily(PREFIX + name, meaning, labels=["model_name"])
            for model, each in counts:
                family.add_metric([model], *_buckets(read(each)))
            yield family
        yield _outcomes(counts)
        responses = CounterMetricFamily(
            f"{PREFIX}http_requests", "Responses, by path and status", labels=["method", "path", "status"]
        )
        for labels, count in list(self._responses.items()):
            responses.add_metric(labels, count)
        yield responses


def _outcomes(counts: list[tuple[str, Counts]]) -> Metric:
    family = CounterMetricFamily(
        f"{PREFIX}request_success", "Answers, by how they ended", labels=["model_name", "finished_reason"]
    )
    for model, each in counts:
        for outcome in OUTCOMES:
            family.add_metric([model, outcome], each.outcomes[outcome])
    return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """(bound, number of values up to it) for each bound, and the sum of all values."""
    bounds = [*map(str, histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum


def _running(entry: Entry) -> int:
    return len(entry.engine.scheduler.running) if entry.engine else 0


def _waiting(entry: Entry) -> int:
    """Requests that wait in the engine, or for the model to load."""
    if not entry.model:
        return entry.users
    return entry.engine.scheduler.num_waiting if entry.engine else 0


def _cache_use(entry: Entry) -> float:
    return entry.model.cache.num_used_pages / entry.model.cache.num_pages if entry.model else 0.0


class CountResponses:
    """Middleware that counts responses by method, path and status. All paths without an endpoint count as "other", so
    that no client can make the metrics long."""

    def __init__(self, app: ASGIApp, counts: Counter[tuple[str, str, str]]) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "none"  # remains if the client disconnects before the response

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            served = scope.get("endpoint")
            path = served.endpoint.path if isinstance(served, Served) else "other"
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._counts[method, path, status] += 1


class Metrics:
    """The metrics of an application."""

    def __init__(self, models: Models) -> None:
        self.responses: Counter[tuple[str, str, str]] = Counter()
        self.registry = CollectorRegistry()
        self.registry.register(Collector(models, self.responses))
        ProcessCollector(registry=self.registry)


async def metrics(service: Service, request: Request, body: None) -> Response:
    """Gives all metrics, in the text format of Prometheus or in OpenMetrics, by the Accept header."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(request.app.state.metrics.registry), media_type=media_type)


ENDPOINTS = [Endpoint("/metrics", "GET", metrics, None, "Gives metrics for Prometheus", answer="text/plain")]

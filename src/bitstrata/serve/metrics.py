"""What /metrics tells Prometheus. Every server has a registry of its own.

Requests here are the engine's: one for each choice. What was refused before that shows in
`bitstrata_http_responses_total`.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..runtime import Engine

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.responses = Counter(
            "bitstrata_http_responses",
            "Responses by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self.tokens = Counter(
            "bitstrata_tokens_by_bits", "New tokens by the bits that computed them.", ["bits"], registry=self._registry
        )
        self.first_token = Histogram(
            "bitstrata_time_to_first_token_seconds",
            "From when a request enters the queue to its first new token.",
            buckets=FIRST_TOKEN,
            registry=self._registry,
        )
        self.per_token = Histogram(
            "bitstrata_time_per_output_token_seconds",
            "Mean time between the tokens of a finished request.",
            buckets=PER_TOKEN,
            registry=self._registry,
        )

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's own numbers, asked for when they are read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        outcomes = CounterMetricFamily("bitstrata_requests", "Finished requests by outcome.", labels=["outcome"])
        for reason, count in stats.finished.items():
            outcomes.add_metric([reason], count)
        yield outcomes
        yield CounterMetricFamily("bitstrata_prompt_tokens", "Tokens of admitted prompts.", stats.prompt_tokens)
        yield CounterMetricFamily("bitstrata_new_tokens", "Tokens made.", stats.new_tokens)
        yield CounterMetricFamily("bitstrata_batches", "Batches run.", stats.batches)
        yield GaugeMetricFamily("bitstrata_requests_running", "Requests that are being served.", stats.running)
        yield GaugeMetricFamily("bitstrata_requests_waiting", "Requests in the queue.", stats.waiting)
        yield GaugeMetricFamily("bitstrata_cache_tokens", "Room in the cache, in tokens.", stats.cache_tokens)
        yield GaugeMetricFamily("bitstrata_cache_used_tokens", "Of it, reserved now.", stats.cache_used_tokens)
        yield GaugeMetricFamily("bitstrata_cache_bytes", "Memory of the cache.", stats.cache_bytes)

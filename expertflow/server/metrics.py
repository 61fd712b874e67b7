"""Metrics for Prometheus: what requests met, told by the driver; what engine and cache count, asked when scraped.

In a registry of the driver's own, so that two servers in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from expertflow.server.generation import Generation, Token

if TYPE_CHECKING:
    from expertflow.server.driver import EngineDriver

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RECENT = 0.1  # weight of the newest request in the mean


class RequestMetrics:
    """Of requests, by their times and ends."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.mean_seconds: float | None = None  # of requests that ended well, the last ones weighing most
        self.requests = Counter(
            "expertflow_requests",
            "Requests for text, by endpoint and how they ended",
            ("endpoint", "outcome"),
            registry=self.registry,
        )
        self.first_token = self._seconds(
            "time_to_first_token", "From a request's arrival to an answer's first token"
        )
        self.between_tokens = self._seconds("inter_token_latency", "Between two tokens of an answer")
        self.queue_wait = self._seconds(
            "queue_wait", "From a request's arrival to an answer's place in a batch"
        )
        self.longest_wait_seconds = 0.0  # of an answer in the queue
        self._waits, self._waited = 0, 0.0
        self.duration = self._seconds("request_duration", "Of requests that were answered")

    def got_token(self, generation: Generation, token: Token, now: float) -> None:
        last = generation.last_token.get(token.choice)
        if last is None:
            self.first_token.observe(now - generation.started)
            if token.admitted is not None:
                waited = max(0.0, token.admitted - generation.started)
                self.queue_wait.observe(waited)
                self.longest_wait_seconds = max(self.longest_wait_seconds, waited)
                self._waits, self._waited = self._waits + 1, self._waited + waited
        else:
            self.between_tokens.observe(now - last)
        generation.last_token[token.choice] = now

    @property
    def mean_wait_seconds(self) -> float:
        """Of answers in the queue, since the start."""
        return self._waited / self._waits if self._waits else 0.0

    def ended(self, endpoint: str, outcome: str, seconds: float | None = None) -> None:
        """outcome: "ok", "cancelled", or the code of an error. seconds: of a request that was answered."""
        self.requests.labels(endpoint, outcome).inc()
        if seconds is not None:
            self.duration.observe(seconds)
            mean = seconds if self.mean_seconds is None else self.mean_seconds
            self.mean_seconds = (1 - _RECENT) * mean + _RECENT * seconds

    def expose(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _seconds(self, name: str, about: str) -> Histogram:
        return Histogram(f"expertflow_{name}_seconds", about, buckets=_SECONDS, registry=self.registry)


class EngineCollector(Collector):
    """What engine, cache and predictor have counted, read when somebody asks."""

    def __init__(self, driver: EngineDriver):
        self._driver = driver

    def collect(self) -> Iterator[Metric]:
        driver = self._driver
        engine, cache = driver.engine.stats, driver.llm.stats
        yield _counter("prompt_tokens", "Tokens of prompts that were read", engine.prompt_tokens)
        yield _counter("generated_tokens", "Tokens of answers", engine.generated_tokens)
        yield _counter("steps", "Steps of the engine", engine.steps)
        yield _counter("step_seconds", "Time in steps", engine.step_seconds)
        yield _gauge("running", "Answers that are being decoded", engine.running)
        yield _gauge("waiting", "Answers in the queue", engine.waiting)
        yield _gauge(
            "queue_wait_longest_seconds", "The longest an answer waited", driver.metrics.longest_wait_seconds
        )
        yield _gauge("draining", "1 when the server is going down", int(driver.draining))
        yield _counter("cache_hits", "Experts that were there when a layer needed them", cache.hits)
        yield _counter("cache_misses", "Experts that a layer had to wait for", cache.misses)
        yield _counter("cache_read_bytes", "Bytes of experts that were read", cache.bytes_read)
        yield _counter("cache_prefetches", "Loads that began on a forecast", cache.prefetches)
        yield _gauge("cache_slots", "Experts that fit in fast memory", cache.num_slots)
        yield _gauge("cache_slot_bytes", "Size of a slot", cache.slot_bytes)
        stalls = CounterMetricFamily(
            "expertflow_cache_stall_seconds", "Time in which arithmetic waited for experts", labels=["layer"]
        )
        for number, layer in enumerate(cache.layers):
            stalls.add_metric([str(number)], layer.stall_seconds)
        yield stalls
        if (predicting := driver.llm.experts.predicting) is not None:
            yield _gauge(
                "predictor_recall", "Of the experts needed, the share predicted", predicting.stats.recall
            )
            yield _gauge(
                "predictor_precision",
                "Of the experts predicted, the share needed",
                predicting.stats.precision,
            )


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(f"expertflow_{name}", about, value=value)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"expertflow_{name}", about, value=value)

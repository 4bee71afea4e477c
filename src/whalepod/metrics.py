"""Prometheus metrics of one ingress process, under the names dashboards already know.

Names and buckets are vLLM's, so its dashboards and autoscaler triggers work unchanged.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80, 160, 640, 2560),
)
_ITL = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80),
)
_E2E = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960),
    *(1920, 7680),
)


class Metrics:
    """One registry; every sample carries the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self.running = self._gauge("num_requests_running", "Requests that have been submitted")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens taken in")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self._success = Counter(
            "vllm:request_success",
            "Requests by how they ended",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _TTFT
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between one token and the next", _ITL
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", _E2E
        )

    def finished(self, reason: str) -> None:
        """Count an ended request."""
        self._success.labels(self._model, reason).inc()

    def rejected(self, reason: str) -> None:
        """Count a refused request."""
        self._rejections.labels(self._model, reason).inc()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(f"vllm:{name}", text, ["model_name"], registry=self.registry)
        return gauge.labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"vllm:{name}", text, ["model_name"], registry=self.registry)
        return counter.labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", text, ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._model)


@dataclass(slots=True)
class Stopwatch:
    """Times one request and puts what it finds into the histograms."""

    metrics: Metrics
    started: float = field(default_factory=time.perf_counter)
    last: float = 0.0

    def token(self) -> None:
        """A token has come."""
        now = time.perf_counter()
        if self.last:
            self.metrics.between_tokens.observe(now - self.last)
        else:
            self.metrics.first_token.observe(now - self.started)
        self.last = now
        self.metrics.generation_tokens.inc()

    def end(self, reason: str) -> None:
        """The request has ended."""
        self.metrics.whole.observe(time.perf_counter() - self.started)
        self.metrics.finished(reason)

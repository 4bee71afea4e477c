"""Prometheus metrics of one ingress process, under the names dashboards already know.

Names and buckets are vLLM's, so its dashboards and autoscaler triggers work unchanged.
"""

from __future__ import annotations

import time

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
_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))


class Metrics:
    """One registry; every sample carries the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self.running = self._gauge("num_requests_running", "Requests that are getting tokens")
        self.waiting = self._gauge(
            "num_requests_waiting", "Requests taken in that have no first token yet"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked for among known prefixes"
        )
        self.prefix_hits = self._counter(
            "prefix_cache_hits", "Prompt tokens that were known and not computed again"
        )
        self._success = self._by("request_success", "Requests by how they ended", "finished_reason")
        self._rejections = self._by("admission_rejections", "Requests refused", "reason")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _TTFT
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between one token and the next", _ITL
        )
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean over a request's later tokens", _ITL
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", _E2E
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From submission to the first rows in a step", _E2E
        )
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "From the first rows in a step to the first token", _E2E
        )
        self.decode_time = self._histogram(
            "request_decode_time_seconds", "From the first token to the last", _E2E
        )
        self.preemptions = self._counter(
            "num_preemptions", "Times that a request gave its room back, to be computed again"
        )
        self.draft_tokens = self._counter("spec_decode_num_draft_tokens", "Drafts verified")
        self.accepted_tokens = self._counter(
            "spec_decode_num_accepted_tokens", "Drafts that were right"
        )
        self.prompt_size = self._histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self.output_size = self._histogram(
            "request_generation_tokens", "Tokens generated for a request", _TOKENS
        )

    def finished(self, reason: str) -> None:
        """Count an ended request: `stop`, `length`, `abort` (client gone), `deadline` or `error`."""
        self._success.labels(self._model, reason).inc()

    def rejected(self, reason: str) -> None:
        """Count a refused request: `invalid`, `overloaded` or `not_ready`."""
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

    def _by(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"vllm:{name}", text, ["model_name", label], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", text, ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._model)


class Stopwatch:
    """Times one request and puts what it finds into the metrics; begins when it is made."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self._metrics, self._prompt_tokens = metrics, prompt_tokens
        self._started = time.perf_counter()
        self._first = self._last = 0.0
        self.tokens, self.begun = 0, False
        metrics.waiting.inc()

    def token(
        self, *, queued_s: float = 0.0, preempted: int = 0, drafted: int = 0, accepted: int = 0
    ) -> None:
        """A token has come; what the engine says of it is in `TokenEvent`."""
        now, metrics = time.perf_counter(), self._metrics
        metrics.draft_tokens.inc(drafted)
        metrics.accepted_tokens.inc(accepted)
        if self.begun:
            metrics.preemptions.inc(preempted)
            metrics.between_tokens.observe(now - self._last)
        else:
            self.begin(queued_s, preempted)
            self._first = now
            metrics.first_token.observe(now - self._started)
        self._last = now
        self.tokens += 1
        metrics.generation_tokens.inc()

    def begin(self, queued_s: float, preempted: int) -> None:
        """The prompt is computed."""
        self.begun, metrics = True, self._metrics
        metrics.preemptions.inc(preempted)
        metrics.queue_time.observe(queued_s)
        metrics.prefill_time.observe(max(0.0, time.perf_counter() - self._started - queued_s))
        metrics.waiting.dec()
        metrics.running.inc()
        metrics.prompt_tokens.inc(self._prompt_tokens)

    def end(self, reason: str) -> None:
        """The request has ended after it was taken in."""
        metrics = self._metrics
        self._leave()
        metrics.finished(reason)
        metrics.whole.observe(time.perf_counter() - self._started)
        metrics.prompt_size.observe(self._prompt_tokens)
        metrics.output_size.observe(self.tokens)
        if self.tokens:
            metrics.decode_time.observe(self._last - self._first)
        if self.tokens > 1:
            metrics.per_token.observe((self._last - self._first) / (self.tokens - 1))

    def refuse(self, reason: str) -> None:
        """The engine did not take the request in."""
        self._leave()
        self._metrics.rejected(reason)

    def _leave(self) -> None:
        gauge = self._metrics.running if self.begun else self._metrics.waiting
        gauge.dec()

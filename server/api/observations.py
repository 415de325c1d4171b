"""What is observed while requests run, for ``/metrics``: times of requests and of HTTP answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.engine.request import Event, FinishedEvent, TokensEvent

# Seconds, from a small model on a fast machine to a large one on a slow: a CPU takes minutes where a GPU takes moments.
WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


@dataclass
class Answered:
    """What a running request was given: tokens, and when the last of them came (monotonic seconds)."""

    num_tokens: int = 0
    last: float | None = None


class Observations:
    """Histograms and counters in a registry of their own. Lives on the event loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.running: dict[str, Answered] = {}

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"dovetail_{name}", text, buckets=buckets, registry=self.registry)

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", WAITS)
        self.gap = histogram("inter_token_latency_seconds", "From one round's tokens of a request to the next's.", GAPS)
        self.queue = histogram("request_queue_time_seconds", "From arrival to a slot.", WAITS)
        self.prefill = histogram("request_prefill_time_seconds", "From a slot to the first token.", WAITS)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.", WAITS)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", WAITS)
        self.output = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self.finished = Counter(
            "dovetail_request_finished", "Requests that ended, by how.", ["finished_reason"], registry=self.registry
        )
        self.http = Counter(
            "dovetail_http_requests", "HTTP answers.", ["method", "route", "status"], registry=self.registry
        )
        self.http_seconds = Histogram(
            "dovetail_http_request_duration_seconds",
            "Until an answer's last byte, the end of a stream included.",
            ["route"],
            buckets=WAITS,
            registry=self.registry,
        )

    def take(self, events: Sequence[Event]) -> None:
        """One round's events, on their way to whoever waits for them."""
        now = time.monotonic()
        for event in events:
            if isinstance(event, TokensEvent):
                answered = self.running.setdefault(event.request_id, Answered())
                if answered.last is not None:
                    self.gap.observe(now - answered.last)
                answered.last = now
                answered.num_tokens += len(event.token_ids)
            elif isinstance(event, FinishedEvent):
                self._finish(event, self.running.pop(event.request_id, Answered()))

    def _finish(self, event: FinishedEvent, answered: Answered) -> None:
        timings = event.timings
        self.finished.labels(event.reason.value).inc()
        if timings.admitted is not None:
            self.queue.observe(timings.admitted - timings.submitted)
        if timings.first_token is not None:
            self.first_token.observe(timings.first_token - timings.submitted)
            if timings.admitted is not None:
                self.prefill.observe(timings.first_token - timings.admitted)
            self.decode.observe(timings.decode_s)
        if timings.finished is not None:
            self.whole.observe(timings.finished - timings.submitted)
        self.output.observe(answered.num_tokens)

    def answer(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP answer has ended, by the route's own path."""
        self.http.labels(method, route, str(status)).inc()
        self.http_seconds.labels(route).observe(seconds)

"""What is observed while requests run: times of requests and of HTTP answers for ``/metrics``, and spans where a
collector is named."""

from __future__ import annotations

import itertools
import logging
import os
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.request import Event, FinishedEvent, Request, TokensEvent
from server.settings import SettingsError

if TYPE_CHECKING:
    from server.api.tracing import Tracing

logger = logging.getLogger(__name__)

OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"  # as every OpenTelemetry SDK reads it

# Seconds, from a small model on a fast machine to a large one on a slow: a CPU takes minutes where a GPU takes moments.
WAITS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


@dataclass
class Answered:
    """What a running request was given: tokens, and when the last of them came (monotonic seconds)."""

    num_tokens: int = 0
    last: float | None = None


class RoundGaps(Collector):
    """Seconds from one round's tokens of a request to the next's. prometheus-client's own histogram has locks and looks
    at every bucket, for each streamed token."""

    def __init__(self) -> None:
        self.counts = [0] * (len(GAPS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(GAPS, seconds)] += 1
        self.total += seconds

    def collect(self) -> Iterator[Metric]:
        """How many were up to each bound."""
        edges = [*map(str, map(float, GAPS)), "+Inf"]
        buckets = list(zip(edges, itertools.accumulate(self.counts), strict=True))
        text = "From one round's tokens of a request to the next's."
        yield HistogramMetricFamily("dovetail_inter_token_latency_seconds", text, buckets, self.total)


class Observations:
    """Histograms and counters in a registry of their own. Lives on the event loop."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self.tracing = tracing
        self.registry = CollectorRegistry()
        self.running: dict[str, Answered] = {}

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"dovetail_{name}", text, buckets=buckets, registry=self.registry)

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", WAITS)
        self.gap = RoundGaps()
        self.registry.register(self.gap)
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

    def begin(self, requests: Sequence[Request], model: str) -> None:
        """These requests of the engine's begin, for the HTTP request in hand."""
        if self.tracing is not None:
            self.tracing.begin(requests, model)

    def take(self, events: Sequence[Event]) -> None:
        """One round's events, on their way to whoever waits for them."""
        if self.tracing is not None:
            self.tracing.take(events)
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

    def close(self) -> None:
        """Send the last spans."""
        if self.tracing is not None:
            self.tracing.close()


def tracing_to(endpoint: str | None) -> Tracing | None:
    """Spans to the named collector, or to the one that OpenTelemetry's own variable names; None where neither does.

    Errors: SettingsError where a collector is named and the extra is not installed; the variable alone, which may be
    meant for others, only warns.
    """
    address = endpoint or os.environ.get(OTLP_VARIABLE)
    if not address:
        return None
    try:
        from server.api.tracing import Tracing
    except ImportError as error:
        message = f"traces to {address} want OpenTelemetry: pip install 'dovetail-server[otel]'"
        if endpoint:
            raise SettingsError(f"{message}, or leave otlp_endpoint out") from error
        logger.warning("%s is set, and %s; none are sent", OTLP_VARIABLE, message)
        return None
    return Tracing.to(address)

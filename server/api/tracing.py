"""OpenTelemetry spans (extra ``otel``): one for each HTTP request, below it one for each of its choices, with the
engine's waiting, reading and decoding. Imported only where a collector is named.

Names and attributes are OpenTelemetry's semantic conventions for HTTP and for generative AI; what drafting did has
names of our own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry.context import Context, get_current
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from server.engine.request import Event, FinishedEvent, FinishReason, Request, Timings, TokensEvent
from server.installation import own_version

TRACES_PATH = "/v1/traces"
FLUSH_MS = 2000  # what the last spans get at shutdown


@dataclass
class Running:
    """A request of the engine's: the HTTP request it runs for, the model's name, and the tokens it has given."""

    context: Context
    request: Request
    model: str
    num_tokens: int = 0


class Tracing:
    """Makes the spans; an exporter's own thread sends them. Lives on the event loop."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self.tracer = provider.get_tracer("dovetail", own_version())
        self.propagator = TraceContextTextMapPropagator()
        self.running: dict[str, Running] = {}
        # The engine's moments are on the monotonic clock, spans are by the calendar.
        self.epoch_ns = time.time_ns() - time.monotonic_ns()

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """Spans to the OTLP collector at ``endpoint``, over HTTP, in batches."""
        resource = Resource.create({"service.name": "dovetail", "service.version": own_version()})
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint.rstrip("/") + TRACES_PATH)))
        return cls(provider)

    @contextmanager
    def answering(self, scope: Scope, route: str) -> Iterator[Span]:
        """The span of an HTTP request, a child of the caller's where it sent a W3C ``traceparent``."""
        parent = self.propagator.extract(Headers(scope=scope))
        name, told = f"{scope['method']} {route}", {"http.request.method": scope["method"], "http.route": route}
        with self.tracer.start_as_current_span(name, parent, SpanKind.SERVER, told) as span:
            yield span

    def answered(self, span: Span, status: int) -> None:
        """The HTTP request has its answer, to its last byte."""
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))

    def begin(self, requests: Sequence[Request], model: str) -> None:
        """These requests run for the HTTP request that is answered now."""
        context = get_current()
        self.running |= {request.request_id: Running(context, request, model) for request in requests}

    def take(self, events: Sequence[Event]) -> None:
        """One round's events; those that end a request make its spans."""
        for event in events:
            if (running := self.running.get(event.request_id)) is None:
                continue
            if isinstance(event, TokensEvent):
                running.num_tokens += len(event.token_ids)
            elif isinstance(event, FinishedEvent):
                del self.running[event.request_id]
                self._finish(event, running)

    def close(self) -> None:
        """Send what is left, for a moment; then nothing more."""
        self.provider.force_flush(FLUSH_MS)
        self.provider.shutdown()

    def _finish(self, event: FinishedEvent, running: Running) -> None:
        stats, timings, request = event.stats, event.timings, running.request
        span = self.tracer.start_span(
            f"generate_content {running.model}",
            running.context,
            attributes={
                "gen_ai.operation.name": "generate_content",
                "gen_ai.request.model": running.model,
                "gen_ai.request.max_tokens": request.max_tokens,
                "gen_ai.request.temperature": request.sampling.temperature,
                "gen_ai.usage.input_tokens": len(request.prompt_ids),
                "gen_ai.usage.output_tokens": running.num_tokens,
                "gen_ai.response.id": event.request_id,
                "gen_ai.response.finish_reasons": [event.reason.value],
                "dovetail.prompt_tokens_cached": stats.cached,
                "dovetail.rounds": stats.rounds,
                "dovetail.drafted": stats.drafted,
                "dovetail.accepted": stats.accepted,
            },
            start_time=self._ns(timings.submitted),
        )
        if event.reason in (FinishReason.FAILED, FinishReason.STUCK):
            span.set_status(Status(StatusCode.ERROR, event.error))
        below = set_span_in_context(span, running.context)
        for name, start, end in parts(timings):
            self.tracer.start_span(name, below, start_time=self._ns(start)).end(self._ns(end))
        span.end(None if timings.finished is None else self._ns(timings.finished))

    def _ns(self, moment: float) -> int:
        return int(moment * 1e9) + self.epoch_ns


def parts(timings: Timings) -> Iterator[tuple[str, float, float]]:
    """Name, start and end of what a request went through, as far as it came."""
    edges = [timings.submitted, timings.admitted, timings.first_token]
    for name, start, end in zip(("queue", "prefill", "decode"), edges, [*edges[1:], timings.finished], strict=True):
        last = end if end is not None else timings.finished
        if start is not None and last is not None:
            yield name, start, last

"""Spans: what they tell, whose children they are, and that nothing is imported where no collector is named."""

import subprocess
import sys

import pytest

from server.api.observations import OTLP_VARIABLE, tracing_to
from server.settings import SettingsError

pytestmark = pytest.mark.anyio
COMPLETION = {"prompt": "one", "max_tokens": 9, "temperature": 0, "ignore_eos": True}
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter():
    pytest.importorskip("opentelemetry.sdk", reason="not installed (extra otel): opentelemetry-sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


def watched(client, exporter):
    """The client, its server's spans going to ``exporter``."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    from server.api.tracing import Tracing

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    client.app.state.serving.observations.tracing = Tracing(provider)
    return client


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_a_span_with_the_engines_below_it(connect, make_model, exporter, stream):
    async with connect(make_model(size=3)) as opened:
        client = watched(opened, exporter)
        body, caller = COMPLETION | {"stream": stream, "n": 2}, {"traceparent": CALLER}
        assert (await client.post("/v1/completions", json=body, headers=caller)).status_code == 200
        await client.get("/health")
    spans = exporter.get_finished_spans()
    (http,) = [span for span in spans if span.name == "POST /v1/completions"]
    assert (f"{http.context.trace_id:032x}", f"{http.parent.span_id:016x}") == tuple(CALLER.split("-")[1:3])
    assert http.attributes["http.response.status_code"] == 200
    choices = [span for span in spans if span.name == "generate_content tiny"]
    assert [span.parent.span_id for span in choices] == [http.context.span_id] * 2
    assert len(spans) == 1 + 2 + 2 * 3, "health checks are not traced"
    for choice in choices:
        told = choice.attributes
        assert (told["gen_ai.usage.output_tokens"], told["gen_ai.response.finish_reasons"]) == (9, ("length",))
        assert told["dovetail.drafted"] >= told["dovetail.accepted"] > 0 and told["dovetail.rounds"] > 0
        steps = {span.name: span for span in spans if span.parent and span.parent.span_id == choice.context.span_id}
        edges = [
            edge for name in ("queue", "prefill", "decode") for edge in (steps[name].start_time, steps[name].end_time)
        ]
        assert choice.start_time == edges[0] and edges == sorted(edges) and edges[-1] == choice.end_time


async def test_failures_are_told_and_bad_parents_are_passed_over(connect, make_model, exporter):
    async with connect(make_model(script=lambda request: iter([None]))) as opened:
        client = watched(opened, exporter)
        answer = await client.post("/v1/completions", json=COMPLETION, headers={"traceparent": "00-zero-zero-99"})
        assert answer.status_code == 500
        await client.post("/v1/completions", json={"prompt": 7})
    statuses = {span.attributes.get("http.response.status_code"): span for span in exporter.get_finished_spans()}
    assert not statuses[500].status.is_ok and statuses[500].parent is None
    assert not statuses[None].status.is_ok, "the engine's own span"
    assert statuses[400].status.is_unset, "the client's fault"


def test_nothing_of_it_is_imported_where_no_collector_is_named(monkeypatch):
    monkeypatch.delenv(OTLP_VARIABLE, raising=False)
    assert tracing_to(None) is None
    code = "import server.app, sys; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_collector_without_the_extra_is_refused_and_the_variable_alone_only_warns(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setitem(sys.modules, "server.api.tracing", None)
    with pytest.raises(SettingsError, match=r"pip install 'dovetail-server\[otel\]'"):
        tracing_to("http://localhost:4318")
    monkeypatch.setenv(OTLP_VARIABLE, "http://localhost:4318")
    assert tracing_to(None) is None
    assert "none are sent" in caplog.text

"""GET /metrics for Prometheus: what vLLM's and llama.cpp's users watch, under names that begin with ``dovetail_``.

A streamed token costs one observation a round and request. Everything else is counted by the engine anyway and is read
when Prometheus asks.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from server.api.openapi import LOOKING
from server.api.serving import CurrentServing, EngineStatus, ServedModel
from server.engine.figures import EngineFigures
from server.installation import own_version

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)
DRAFTING_STATES = ("on", "off", "failed", "unprofitable")

router = APIRouter(responses=LOOKING)


@dataclass(frozen=True)
class Scrape(Collector):
    """What is true now, and what the engine has counted."""

    model: ServedModel | None

    def collect(self) -> Iterator[Metric]:
        """Every metric."""
        yield InfoMetricFamily("dovetail_build", "What runs here.", value=self._build())
        if self.model is not None:
            engine = self.model.engine
            yield from state(engine.status())
            yield from work(engine.figures())
            yield bus(self.model.placement().get("bus_bytes", {}))

    def _build(self) -> dict[str, str]:
        build = {"version": own_version(), "python": platform.python_version()}
        if self.model is not None:
            build |= {"model": self.model.name, "weights": self.model.info.weights, "drafter": self.model.drafter_name}
        return build


def state(status: EngineStatus) -> Iterator[Metric]:
    """How busy the engine is, and whether it drafts."""
    yield gauge("num_requests_running", "Requests that hold a slot.", status.running)
    yield gauge("num_requests_waiting", "Requests that wait for one.", status.waiting)
    yield gauge("slots", "Requests that can run at once.", status.slots)
    drafting = GaugeMetricFamily("dovetail_drafting", "1 for the state that drafting is in.", labels=["state"])
    for name in DRAFTING_STATES:
        drafting.add_metric([name], status.drafting.state == name)
    yield drafting


def work(figures: EngineFigures) -> Iterator[Metric]:
    """What the engine has done."""
    counts = figures.counts
    used = figures.kv_rows / figures.kv_capacity if figures.kv_capacity else 0.0
    yield gauge("kv_cache_usage_perc", "Share of the slots' rows that running requests hold, 0 to 1.", used)
    yield gauge("prefix_cache_bytes", "Bytes of prompts kept for later.", figures.cache_bytes)
    yield counter("prompt_tokens", "Tokens of prompts, cached ones included.", counts.prompt_tokens)
    yield counter("prefix_cache_queries", "Prompt tokens looked for in the cache.", counts.prompt_tokens)
    yield counter("prefix_cache_hits", "Prompt tokens found in the cache.", counts.cached_tokens)
    yield counter("generation_tokens", "Tokens of answers.", counts.output_tokens)
    yield counter("num_preemptions", "Requests that gave their place back and waited again.", counts.preemptions)
    yield counter("spec_decode_num_drafts", "Trees that were verified.", counts.trees)
    yield counter("spec_decode_num_draft_tokens", "Drafted tokens that were verified.", counts.drafted)
    yield counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.", sum(figures.accepted_at))
    accepted = CounterMetricFamily(
        "dovetail_spec_decode_num_accepted_tokens_per_pos", "Trees accepted to this depth.", labels=["position"]
    )
    for depth, number in enumerate(list(figures.accepted_at)):
        accepted.add_metric([str(depth)], number)
    yield accepted
    passes = counts.passes
    length = counts.pass_tokens / passes if passes else 0.0
    yield gauge("spec_decode_acceptance_length", "Tokens a request got from a verify pass, since the start.", length)
    yield rows_of_rounds(counts.rounds_of.copy())
    seconds = CounterMetricFamily("dovetail_engine_seconds", "Where the engine's time went.", labels=["part"])
    for part, value in figures.seconds.items():
        seconds.add_metric([part], value)
    yield seconds
    curve = GaugeMetricFamily("dovetail_verify_pass_seconds", "T(n): a pass over so many rows.", labels=["rows"])
    for rows, value in figures.verify_curve.items():
        curve.add_metric([str(rows)], value)
    yield curve


def bus(num_bytes: Mapping[str, int]) -> Metric:
    """What went to an accelerator and came from it."""
    family = CounterMetricFamily("dovetail_bus_bytes", "Bytes to and from an accelerator.", labels=["direction"])
    for direction in ("up", "down"):
        family.add_metric([direction], num_bytes.get(direction, 0))
    return family


def gauge(name: str, text: str, value: float) -> Metric:
    """One value that goes up and down."""
    return GaugeMetricFamily(f"dovetail_{name}", text, value)


def counter(name: str, text: str, value: float) -> Metric:
    """One value that only grows."""
    return CounterMetricFamily(f"dovetail_{name}", text, value)


def rows_of_rounds(rounds: Mapping[int, int]) -> Metric:
    """Rounds by the rows that they verified."""
    below = [(str(float(edge)), sum(n for rows, n in rounds.items() if rows <= edge)) for edge in ROWS]
    buckets = [*below, ("+Inf", sum(rounds.values()))]
    total = sum(rows * number for rows, number in rounds.items())
    return HistogramMetricFamily("dovetail_round_rows", "Rows of a verify pass.", buckets=buckets, sum_value=total)


@router.get("/metrics", response_class=Response)
async def read_metrics(serving: CurrentServing) -> Response:
    """Prometheus' text format. It is answered in every state of the server."""
    text = generate_latest(serving.observations.registry) + generate_latest(Scrape(serving.loaded))
    return Response(text, media_type=CONTENT_TYPE_LATEST)

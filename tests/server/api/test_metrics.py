"""/metrics: names, what they count, and that a key guards them."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api.metrics import rows_of_rounds
from server.engine.figures import Counts

pytestmark = pytest.mark.anyio
DASHBOARD = Path(__file__).resolve().parents[3] / "docs" / "grafana.json"
METRIC = re.compile(r"dovetail_\w+")
COMPLETION = {"prompt": "one", "max_tokens": 100, "temperature": 0}
NAMES = """
build_info bus_bytes drafting e2e_request_latency_seconds engine_seconds generation_tokens http_request_duration_seconds
http_requests inter_token_latency_seconds kv_cache_usage_perc num_preemptions num_requests_running num_requests_waiting
prefix_cache_bytes prefix_cache_hits prefix_cache_queries prompt_tokens request_decode_time_seconds request_finished
request_generation_tokens request_prefill_time_seconds request_queue_time_seconds round_rows slots
spec_decode_acceptance_length spec_decode_num_accepted_tokens spec_decode_num_accepted_tokens_per_pos
spec_decode_num_draft_tokens spec_decode_num_drafts time_to_first_token_seconds verify_pass_seconds
"""


async def scrape(client, **headers):
    answer = await client.get("/metrics", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}
    names = {family.name.removeprefix("dovetail_") for family in families if not family.name.endswith("_created")}
    return names, samples


def value(samples, name, **labels):
    return samples[f"dovetail_{name}", tuple(sorted(labels.items()))]


async def test_requests_and_answers_are_counted_once_under_stable_names(connect, make_model):
    async with connect(make_model(size=3)) as client:
        whole = (await client.post("/v1/completions", json=COMPLETION)).json()
        await client.post("/v1/completions", json=COMPLETION | {"stream": True, "max_tokens": 4})
        for path in ("/nowhere/at/all", "/nowhere/else", "/v1/models/tiny"):
            await client.get(path)
        names, samples = await scrape(client)
    assert names == set(NAMES.split())
    tokens = whole["usage"]["completion_tokens"] + 4
    assert value(samples, "request_generation_tokens_sum") == tokens
    assert value(samples, "request_finished_total", finished_reason="stop") == 1
    assert value(samples, "request_finished_total", finished_reason="length") == 1
    for histogram in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_generation_tokens"):
        assert value(samples, f"{histogram}_count") == 2
    rounds = -(-whole["usage"]["completion_tokens"] // 3) + 2
    assert value(samples, "inter_token_latency_seconds_count") == rounds - 2
    assert value(samples, "http_requests_total", method="POST", route="/v1/completions", status="200") == 2
    assert value(samples, "http_requests_total", method="GET", route="unknown", status="404") == 2
    assert value(samples, "http_requests_total", method="GET", route="/v1/models/{model_id:path}", status="200") == 1
    assert value(samples, "num_requests_running") == 0
    assert value(samples, "verify_pass_seconds", rows="8") == 0.006


async def test_the_dashboard_asks_for_metrics_that_are_served(connect, make_model):
    async with connect(make_model()) as client:
        await client.post("/v1/completions", json=COMPLETION)
        _, samples = await scrape(client)
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {name for panel in panels for target in panel["targets"] for name in METRIC.findall(target["expr"])}
    assert len(asked) > 15
    assert asked <= {name for name, _ in samples} | {"dovetail_spec_decode_num_accepted_tokens_per_pos_total"}


async def test_a_key_guards_them_and_refusals_are_counted(connect, make_model):
    async with connect(make_model(), api_key="sesame") as client:
        assert (await client.get("/metrics")).status_code == 401
        _, samples = await scrape(client, authorization="Bearer sesame")
    assert value(samples, "http_requests_total", method="GET", route="/metrics", status="401") == 1


async def test_they_are_there_while_the_model_is_loaded(connect, make_model):
    loading = asyncio.Event()

    def load(_settings, _report):
        loading.set()
        raise ValueError("no such model")

    async with connect(load, ready=False) as client:
        await loading.wait()
        names, samples = await scrape(client)
    assert "num_requests_running" not in names
    assert {"build_info", "http_requests"} <= names
    assert any(name == "dovetail_build_info" for name, _ in samples)


def test_accepted_drafts_are_counted_by_depth_and_rounds_by_rows():
    counts = Counts()
    for nodes, accepted in ((0, 0), (7, 3), (7, 1), (3, 0)):
        counts.verified(nodes, accepted)
        counts.rounds_of[nodes + 1] += 1
    assert (counts.trees, counts.drafted, counts.accepted_at) == (3, 17, [2, 1, 1])
    samples = {(s.name, s.labels.get("le")): s.value for s in rows_of_rounds(counts.rounds_of).samples}
    assert samples["dovetail_round_rows_bucket", "1.0"] == 1
    assert samples["dovetail_round_rows_bucket", "8.0"] == 4 == samples["dovetail_round_rows_bucket", "+Inf"]
    assert samples["dovetail_round_rows_sum", None] == 21

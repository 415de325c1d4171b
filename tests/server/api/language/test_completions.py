import dataclasses
import itertools
import json

import pytest

from server.engine.request import SamplingParams

pytestmark = pytest.mark.anyio
ANSWER = "Grüße 🌍, one two three. STOP and more"


def ask(**fields):
    return {"model": "tiny", "prompt": "one", "max_tokens": 100, "temperature": 0} | fields


async def complete(client, **fields):
    answer = await client.post("/v1/completions", json=ask(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_an_answer_carries_text_usage_and_timings(connect, make_model):
    model = make_model()
    async with connect(model) as client:
        body = await complete(client)
    num_tokens = len(model.codec.encode(ANSWER)) + 1
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "tiny"
    assert body["choices"] == [{"text": ANSWER, "index": 0, "logprobs": None, "finish_reason": "stop"}]
    num_prompt = len(model.codec.encode("one"))
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    rounds = -(-num_tokens // 3)
    timings = body["timings"]
    assert timings["draft_rounds"] == rounds
    assert timings["draft_n"] == 4 * rounds
    assert timings["draft_n_accepted"] == num_tokens - rounds
    assert timings["acceptance_length"] == pytest.approx(num_tokens / rounds, abs=1e-3)
    assert timings["tokens_per_s"] == pytest.approx((num_tokens - 1) / 0.1, rel=1e-2)


async def test_a_fingerprint_names_the_target_and_not_its_drafter(connect, make_model, read_events):
    first, other = make_model(), make_model()
    prints = []
    for model in (first, dataclasses.replace(other, info=dataclasses.replace(other.info, weights="int8"))):
        async with connect(model) as client:
            streamed = await client.post("/v1/completions", json=ask(stream=True))
            told = {chunk["system_fingerprint"] for chunk in read_events(streamed.text)[:-1]}
            prints.append({(await complete(client))["system_fingerprint"], *told})
    assert [len(told) for told in prints] == [1, 1]
    assert prints[0] != prints[1]


@pytest.mark.parametrize("size", [1, 3, 50])
async def test_the_stream_holds_the_same_text(connect, make_model, read_events, size):
    async with connect(make_model(size=size)) as client:
        whole = await complete(client, stop=["STOP"])
        answer = await client.post("/v1/completions", json=ask(stop="STOP", stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"]
    *chunks, done = read_events(answer.text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Grüße 🌍, one two three. "
    assert whole["choices"][0]["text"] == "Grüße 🌍, one two three. "
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["timings"]["draft_rounds"] >= 1
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("size", [1, 3, 50])
async def test_a_stop_string_ends_the_text_and_the_request(connect, make_model, read_events, size):
    model = make_model(size=size)
    used = len(model.codec.encode("Grüße 🌍, one two three. STOP"))
    async with connect(model) as client:
        whole = await complete(client, stop=["never", "STOP"])
        options = {"include_usage": True}
        answer = await client.post("/v1/completions", json=ask(stop="STOP", stream=True, stream_options=options))
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == used
    *chunks, last, _ = read_events(answer.text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert last["timings"].keys() == whole["timings"].keys()
    assert model.engine.status().free_slots == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_cancels_what_would_go_on(connect, make_model, stream):
    burst = tuple(make_model().codec.encode("one STOP two "))
    model = make_model(script=lambda request: itertools.repeat(burst), round_s=0.01)
    async with connect(model) as client:
        answer = await client.post("/v1/completions", json=ask(max_tokens=190, stop="P t", stream=stream))
        assert answer.status_code == 200
    assert len(model.engine.cancelled) == 1


async def test_continuous_usage_counts_up(connect, make_model, read_events):
    async with connect(make_model()) as client:
        options = {"include_usage": True, "continuous_usage_stats": True}
        answer = await client.post("/v1/completions", json=ask(stream=True, stream_options=options))
    counts = [event["usage"]["completion_tokens"] for event in read_events(answer.text)[:-1]]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3


async def test_max_tokens_is_exact_and_defaults_to_sixteen(connect, make_model):
    async with connect(make_model(text="x" * 60)) as client:
        limited = await complete(client, max_tokens=5)
        default = await complete(client, max_tokens=None)
    assert limited["choices"][0] == {"text": "xxxxx", "index": 0, "logprobs": None, "finish_reason": "length"}
    assert limited["usage"]["completion_tokens"] == 5
    assert default["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("one", 1), (["one", "two"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2), ([[5, 6], "two"], 2)],
)
async def test_all_prompt_shapes(connect, make_model, prompt, num_prompts):
    model = make_model()
    async with connect(model) as client:
        body = await complete(client, prompt=prompt, n=2)
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * num_prompts))
    assert {choice["text"] for choice in body["choices"]} == {ANSWER}
    asked = sorted((list(request.prompt_ids), request.choice) for request in model.engine.submitted)
    prompts = [prompt] if num_prompts == 1 else prompt
    ids = [model.codec.encode(p) if isinstance(p, str) else p for p in prompts]
    assert asked == sorted((p, choice) for p in ids for choice in (0, 1))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_choices_are_prompt_major(connect, make_model):
    model = make_model(script=lambda request: [tuple(request.prompt_ids), (request.choice + 40,)])
    async with connect(model) as client:
        body = await complete(client, prompt=[[60, 61], [62]], n=2, max_tokens=10)
    expected = [[60, 61, 40], [60, 61, 41], [62, 40], [62, 41]]
    assert [choice["text"] for choice in body["choices"]] == [model.codec.decode(ids) for ids in expected]


async def test_echo_puts_the_prompt_first(connect, make_model, read_events):
    model = make_model()
    ids = model.codec.encode("two ")
    async with connect(model) as client:
        whole = await complete(client, prompt=ids, echo=True)
        only = await complete(client, prompt=["two ", "é"], echo=True, max_tokens=0, n=2)
        answer = await client.post("/v1/completions", json=ask(prompt=ids, echo=True, stream=True))
    assert whole["choices"][0]["text"] == "two " + ANSWER
    assert [choice["text"] for choice in only["choices"]] == ["two ", "two ", "é", "é"]
    assert only["choices"][0]["finish_reason"] == "length"
    assert only["usage"]["completion_tokens"] == 0
    assert "".join(chunk["choices"][0]["text"] for chunk in read_events(answer.text)[:-1]) == "two " + ANSWER


async def test_sampling_fields_reach_the_engine(connect, make_model):
    model = make_model()
    fields = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": -3, "presence_penalty": 1,
        "frequency_penalty": -1.5, "repetition_penalty": 1.1, "logit_bias": {"7": -100, "8": 2.5},
    }  # fmt: skip
    async with connect(model) as client:
        await complete(client, **fields, stop_token_ids=[9], speculative={"enabled": False})
        await complete(client, ignore_eos=True, top_k=-1, temperature=None, speculative={"enabled": True})
    first, second = model.engine.submitted
    assert {name: getattr(first.sampling, name) for name in fields} == fields | {"logit_bias": {7: -100.0, 8: 2.5}}
    assert first.stop_ids == model.codec.stop_ids | {9}
    assert not first.draft
    assert second.stop_ids == frozenset()
    assert second.draft
    assert (second.sampling.top_k, second.sampling.temperature) == (0, 1.0)


async def test_salt_priority_and_deadline_reach_the_engine_from_every_route(connect, make_model):
    """A salt is a part of what a cached prompt is known by; a longer one is refused, not cut."""
    own = {"cache_salt": "mine", "priority": -3, "deadline_ms": 250}
    model = make_model()
    chat = [{"role": "user", "content": "one"}]
    async with connect(model) as client:
        await complete(client, **own, n=2)
        for path, fields in (
            ("/v1/chat/completions", {"messages": chat}),
            ("/v1/responses", {"input": "one"}),
            ("/v1/messages", {"messages": chat, "max_tokens": 5}),
        ):
            answer = await client.post(path, json=fields | own)
            assert (answer.status_code, answer.headers.get("X-Dovetail-Ignored")) == (200, None), answer.text
            for name, value in (("priority", 2**40), ("deadline_ms", 0)):
                wrong = await client.post(path, json=fields | {name: value})
                assert (wrong.status_code, name in wrong.text) == (400, True), wrong.text
        await complete(client)
        refused = await client.post("/v1/completions", json={"prompt": "one", "cache_salt": "x" * 257})
    seen = [(request.cache_salt, request.priority, request.deadline_s) for request in model.engine.submitted]
    assert seen == [("mine", -3, 0.25)] * 5 + [("", 0, None)]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cache_salt")


async def test_tokens_that_were_known_are_counted_on_every_route(connect, make_model):
    model = make_model()
    model.engine.num_cached = 3
    chat = [{"role": "user", "content": "one"}]
    async with connect(model) as client:
        completion = (await complete(client))["usage"]
        response = (await client.post("/v1/responses", json={"input": "one"})).json()["usage"]
        message = (await client.post("/v1/messages", json={"messages": chat, "max_tokens": 5})).json()["usage"]
    assert completion["prompt_tokens_details"] == response["input_tokens_details"] == {"cached_tokens": 3}
    assert message["cache_read_input_tokens"] == 3
    assert message["input_tokens"] + 3 == response["input_tokens"]


async def test_what_a_request_leaves_out_is_the_models(connect, make_model):
    defaults = SamplingParams(temperature=0.2, top_p=0.9, top_k=7, repetition_penalty=1.2)
    model = dataclasses.replace(make_model(), sampling=defaults)
    async with connect(model) as client:
        await complete(client, temperature=None, top_k=None)
        await complete(client, temperature=0.5, top_k=-1, top_p=1)
    first, second = (request.sampling for request in model.engine.submitted)
    assert first == model.sampling
    assert second == SamplingParams(temperature=0.5, repetition_penalty=1.2)


async def test_fields_that_change_nothing_are_accepted(connect, make_model):
    fields = {
        "user": "me", "suffix": None, "best_of": 1, "logprobs": None, "stop": None, "store": False, "min_tokens": 0,
        "service_tier": "auto", "metadata": {"a": "b"}, "n": None, "stream": None, "stream_options": None,
    }  # fmt: skip
    async with connect(make_model()) as client:
        await complete(client, **fields)
        body = ask(store=True, stream=True, stream_options={"include_obfuscation": True})
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert "x-dovetail-ignored" not in answer.headers


async def test_what_other_clients_send_is_taken(connect, make_model):
    """One type of number in JSON, null for absence, options of a stream that is none, an empty stop string."""
    model = make_model(text="x" * 300)
    async with connect(model) as client:
        await complete(client, max_tokens=6.0, n=1.0, seed=3.0, top_k=5.0, stop=["", "never"], prompt=[5])
        await complete(client, stream_options={"include_usage": True}, unheard_of=None, logit_bias=[[7, -1]], user=5)
        answer = await client.post("/v1/completions", json={"prompt": "one", "max_tokens": 2})
        assert (answer.status_code, answer.json()["model"]) == (200, "tiny")
    assert model.engine.submitted[0].max_tokens == 6


@pytest.mark.parametrize("max_tokens", [-1, 1000, 10**30])
async def test_a_limit_beyond_the_context_is_cut(connect, make_model, max_tokens):
    async with connect(make_model(text="x" * 300)) as client:
        body = await complete(client, prompt=[5] * 150, max_tokens=max_tokens)
    assert body["usage"]["total_tokens"] == 200
    assert body["choices"][0]["finish_reason"] == "length"


async def test_a_count_that_does_not_fit_behind_its_prompt_is_refused(connect, make_model):
    """Smaller than the context of 200 and yet too many; what just fits is taken."""
    async with connect(make_model(text="x" * 300)) as client:
        refused = await client.post("/v1/completions", json=ask(prompt=[[5], [5] * 150], max_tokens=51))
        fits = await complete(client, prompt=[5] * 150, max_tokens=50)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "200 tokens" in error["message"] and "150 tokens" in error["message"] and "51 were" in error["message"]
    assert fits["usage"]["total_tokens"] == 200


async def test_usage_on_every_chunk_needs_usage(connect, make_model):
    options = {"include_usage": False, "continuous_usage_stats": True}
    async with connect(make_model()) as client:
        answer = await client.post("/v1/completions", json=ask(stream=True, stream_options=options))
    assert "usage" not in answer.text


async def test_unknown_fields_are_ignored_and_reported(connect, make_model, caplog):
    fields = {"num_ctx": 1, "a\nb": 1, "stream_options": {"odd": 1}, "top_k": 3}
    async with connect(make_model()) as client:
        for _ in range(2):
            answer = await client.post("/v1/completions", json=ask(**fields))
            assert answer.headers["x-dovetail-ignored"] == "num_ctx, a%0Ab, stream_options.odd"
        assert "x-dovetail-ignored" not in (await client.post("/v1/completions", json=ask())).headers
        known = await client.post("/v1/completions", json=ask(suffix="x", num_ctx=1))
    assert sum("num_ctx" in record.getMessage() for record in caplog.records) == 1
    assert known.json()["error"]["code"] == "unsupported_parameter"


async def test_strict_servers_refuse_unknown_fields(connect, make_model):
    async with connect(make_model(), strict=True) as client:
        await complete(client, unheard_of=None, user="me")
        for fields, param in [({"unheard_of": 1}, "unheard_of"), ({"stream_options": {"a": 1}}, "stream_options.a")]:
            answer = await client.post("/v1/completions", json=ask(**fields))
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "unknown_parameter", param)


LINE_ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh\ri"
SAID = [{"role": "user", "content": "one"}]
PIECES = {
    "/v1/completions": (ask(stream=True), lambda event: event["choices"][0]["text"]),
    "/v1/chat/completions": ({"messages": SAID}, lambda event: event["choices"][0]["delta"].get("content", "")),
    "/v1/responses": ({"input": SAID}, lambda event: event.get("delta", "")),
    "/v1/messages": (
        {"messages": SAID, "max_tokens": 99},
        lambda event: event["delta"].get("text", "") if "delta" in event else "",
    ),
}


@pytest.mark.parametrize("path", PIECES)
async def test_no_text_breaks_the_lines_of_a_stream(connect, make_model, path):
    """For a reader that takes everything for a line's end that Unicode does."""
    body, piece_of = PIECES[path]
    async with connect(make_model(text=LINE_ENDS)) as client:
        answer = await client.post(path, json=body | {"stream": True})
    assert answer.content.isascii()
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    assert answer.text.count("data: ") == len(lines) + answer.text.count("data: [DONE]")
    assert "".join(piece_of(json.loads(line)) for line in lines) == LINE_ENDS


async def test_drafting_is_the_requests_own_affair(connect, make_model):
    model = make_model()
    async with connect(model) as client:
        await complete(client, speculative={"max_rows": 3, "lookup": False})
        await complete(client)
        await complete(client, speculative={"n_max": 4, "n_min": 2, "p_min": 0.7})  # llama.cpp's names
        refused = await client.post("/v1/completions", json=ask(speculative={"max_rows": 0}))
    first, second, third = model.engine.submitted
    assert third.max_rows == 5
    assert (first.draft, first.max_rows, first.lookup) == (True, 3, False)
    assert (second.draft, second.max_rows, second.lookup) == (True, None, True)
    assert refused.json()["error"]["param"] == "speculative.max_rows"


async def test_metrics_are_told_where_they_are_asked_for(connect, make_model, read_events):
    async with connect(make_model()) as client:
        plain = await complete(client)
        told = await complete(client, return_metrics=True)
        several = await complete(client, return_metrics=True, n=2)
        options = {"stream": True, "stream_options": {"include_usage": True}, "return_metrics": True}
        last = read_events((await client.post("/v1/completions", json=ask(**options))).text)[-2]
    assert "metrics" not in plain
    assert "completion_tokens_details" not in plain["usage"]
    timings, drafts = told["timings"], told["metrics"]["speculative_decoding"]
    assert drafts["num_spec_steps"] == timings["draft_rounds"]
    assert drafts["draft_acceptance_rate"] == round(timings["draft_n_accepted"] / timings["draft_n"], 4)
    assert told["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": timings["draft_n_accepted"],
        "rejected_prediction_tokens": timings["draft_n"] - timings["draft_n_accepted"],
    }
    assert told["metrics"]["mean_itl_ms"] > 0
    assert several["metrics"] is None
    assert last["metrics"].keys() == told["metrics"].keys()

import pytest

pytestmark = pytest.mark.anyio
ANSWER = "Grüße 🌍, one two three. STOP and more"


def ask(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "one"}], "temperature": 0} | fields


async def chat(client, **fields):
    answer = await client.post("/v1/chat/completions", json=ask(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_an_answer(connect, make_model):
    model = make_model()
    async with connect(model) as client:
        body = await chat(client, n=2, seed=3)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": ANSWER, "refusal": None}
    assert body["choices"][1] == {"index": 1, "message": message, "logprobs": None, "finish_reason": "stop"}
    prompt = model.codec.chat([{"role": "user", "content": "one"}])
    assert {tuple(request.prompt_ids) for request in model.engine.submitted} == {tuple(prompt)}
    assert sorted(request.choice for request in model.engine.submitted) == [0, 1]
    assert body["usage"]["prompt_tokens"] == len(prompt)
    assert body["timings"]["draft_n_accepted"] > 0


async def test_the_stream_follows_the_grammar(connect, make_model, read_events):
    async with connect(make_model()) as client:
        answer = await client.post(
            "/v1/chat/completions", json=ask(stream=True, stream_options={"include_usage": True})
        )
    role, *content, finish, usage, done = read_events(answer.text)
    assert done == "[DONE]"
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in content)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in content) == ANSWER
    assert (finish["choices"][0]["delta"], finish["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0
    assert {event["object"] for event in (role, *content, finish, usage)} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"]) for event in (role, *content, finish, usage)}) == 1


async def test_choices_of_a_stream_are_told_apart(connect, make_model, read_events):
    async with connect(make_model()) as client:
        answer = await client.post("/v1/chat/completions", json=ask(stream=True, n=3))
    texts, finished = {0: "", 1: "", 2: ""}, []
    events = read_events(answer.text)[:-1]
    for event in events:
        choice = event["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        finished += [choice["index"]] if choice["finish_reason"] else []
    assert set(texts.values()) == {ANSWER}
    assert sorted(finished) == [0, 1, 2]
    assert [("timings" in event) for event in events] == [False] * (len(events) - 1) + [True]


async def test_without_a_limit_the_answer_may_fill_the_context(connect, make_model):
    model = make_model()
    async with connect(model) as client:
        await chat(client)
        limited = await chat(client, max_completion_tokens=4, max_tokens=4)
    first = model.engine.submitted[0]
    assert first.max_tokens == 200 - len(first.prompt_ids)
    assert limited["choices"][0]["finish_reason"] == "length"
    assert limited["usage"]["completion_tokens"] == 4


async def test_turns_are_rendered(connect, make_model):
    model = make_model()
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "", "name": "eve"},
    ]
    async with connect(model) as client:
        await chat(client, messages=messages)
    rendered = model.codec.tokenizer.decode(model.engine.submitted[0].prompt_ids, skip_special_tokens=False)
    assert rendered == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_neutral_values_are_accepted(connect, make_model):
    fields = {
        "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": False,
        "top_logprobs": None, "parallel_tool_calls": True, "reasoning_effort": None, "modalities": ["text"],
        "prediction": None, "safety_identifier": "x", "prompt_cache_key": "y", "verbosity": "medium",
    }  # fmt: skip
    async with connect(make_model()) as client:
        answer = await client.post("/v1/chat/completions", json=ask(**fields))
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER
    assert "x-dovetail-ignored" not in answer.headers


async def test_a_model_without_a_template_says_so(connect, make_model):
    model = make_model()
    bare = type(model.codec)(model.codec.tokenizer)
    async with connect(type(model)(model.engine, bare)) as client:
        answer = await client.post("/v1/chat/completions", json=ask())
    assert answer.status_code == 400
    assert "/v1/completions" in answer.json()["error"]["message"]


async def test_more_than_a_turn_needs_is_taken_and_reported(connect, make_model):
    """What clients send back from earlier answers, and keys of their own, in turns and in parts."""
    part = {"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}, "mine": 1}
    messages = [
        {"role": "user", "content": [part, {"type": "input_text", "text": "three"}], "id": 7, "opts": {}},
        {"role": "assistant"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "reasoning_details": []},
        {"role": "assistant", "content": None, "reasoning_content": "because", "function_call": None},
        {"role": "user", "content": "one", "opts": {}},
    ]
    model = make_model()
    async with connect(model) as client:
        answer = await client.post("/v1/chat/completions", json=ask(messages=messages, reasoning_effort="low"))
        assert answer.status_code == 200, answer.text
    ignored = "messages.*.opts, messages.*.content.*.mine, messages.*.reasoning_details"
    assert answer.headers["x-dovetail-ignored"] == ignored
    rendered = model.codec.tokenizer.decode(model.engine.submitted[0].prompt_ids, skip_special_tokens=False)
    assert "<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\nno<|im_end|>" in rendered


async def test_a_limit_of_nothing_is_refused(connect, make_model):
    async with connect(make_model()) as client:
        answer = await client.post("/v1/chat/completions", json=ask(max_completion_tokens=0))
    assert answer.json()["error"]["param"] == "max_tokens"

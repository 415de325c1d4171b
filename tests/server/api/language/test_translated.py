"""Conversations in the wire formats of responses and of messages."""

import json

import pytest

from server.text import TextCodec

pytestmark = pytest.mark.anyio

ANSWER = "Grüße 🌍, one two three. STOP and more"
CALLING = 'So <tool_call>{"name": "look", "arguments": {"where": "x"}}</tool_call>'
SCHEMA = {"type": "object", "properties": {"where": {"type": "string"}}, "required": ["where"]}


def named_events(text):
    """Every named event; the last of a response is [DONE], which has no name."""
    blocks = [block.split("\n") for block in text.removesuffix("data: [DONE]\n\n").strip().split("\n\n")]
    events = [json.loads(lines[1].removeprefix("data: ")) for lines in blocks]
    assert [lines[0].removeprefix("event: ") for lines in blocks] == [event["type"] for event in events]
    return events


def rendered(model, index=-1):
    return model.codec.tokenizer.decode(model.engine.submitted[index].prompt_ids, skip_special_tokens=False)


async def post(client, path, **fields):
    answer = await client.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    return answer


async def test_a_response_whole_and_streamed(connect, make_model):
    model = make_model()
    async with connect(model) as client:
        whole = (await post(client, "/v1/responses", input="one", instructions="be brief", store=True)).json()
        events = named_events((await post(client, "/v1/responses", input="one", stream=True)).text)
        cut = (await post(client, "/v1/responses", input="one", max_output_tokens=2)).json()
    assert (whole["status"], whole["output"][0]["content"][0]["text"]) == ("completed", ANSWER)
    assert rendered(model, 0).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none")
    assert (cut["status"], cut["incomplete_details"]["reason"]) == ("incomplete", "max_output_tokens")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event["delta"] for event in events[4:-4]) == ANSWER
    assert events[-1]["response"]["usage"] == whole["usage"] | {
        "input_tokens": events[-1]["response"]["usage"]["input_tokens"],
        "total_tokens": events[-1]["response"]["usage"]["total_tokens"],
    }


async def test_a_response_calls_tools(connect, make_model):
    model = make_model(text=CALLING, context=2000)
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"where": "y"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    tools = [{"type": "function", "name": "look", "parameters": SCHEMA}]
    async with connect(model) as client:
        whole = (await post(client, "/v1/responses", input=items, tools=tools)).json()
        events = named_events((await post(client, "/v1/responses", input=items, tools=tools, stream=True)).text)
    assert [item["type"] for item in whole["output"]] == ["message", "function_call"]
    assert json.loads(whole["output"][1]["arguments"]) == {"where": "x"}
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["message", "function_call"]
    assert "response.function_call_arguments.done" in [event["type"] for event in events]
    assert "sunny" in rendered(model)
    assert '{"where": "y"}' in rendered(model)


async def test_a_message_whole_and_streamed(connect, make_model):
    model = make_model()
    fields = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 100, "system": "be brief"}
    async with connect(model) as client:
        whole = (await post(client, "/v1/messages", **fields)).json()
        events = named_events((await post(client, "/v1/messages", **fields, stream=True)).text)
        cut = (await post(client, "/v1/messages", **fields | {"max_tokens": 2})).json()
        count = (await post(client, "/v1/messages/count_tokens", messages=fields["messages"], system="be brief")).json()
    assert (whole["content"], whole["stop_reason"]) == ([{"type": "text", "text": ANSWER}], "end_turn")
    assert (whole["usage"]["input_tokens"], cut["stop_reason"]) == (count["input_tokens"], "max_tokens")
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == ANSWER
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


async def test_a_message_calls_tools(connect, make_model):
    model = make_model(text=CALLING, context=2000)
    fields = {
        "max_tokens": 100,
        "tools": [{"name": "look", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}],
        "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "one"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "c1", "name": "look", "input": {"where": "y"}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}]},
        ],
    }
    async with connect(model) as client:
        whole = (await post(client, "/v1/messages", **fields)).json()
        events = named_events((await post(client, "/v1/messages", **fields, stream=True)).text)
    assert [block["type"] for block in whole["content"]] == ["text", "tool_use"]
    assert (whole["content"][1]["input"], whole["stop_reason"]) == ({"where": "x"}, "tool_use")
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["text", "tool_use"]
    assert "sunny" in rendered(model)


async def test_what_a_model_may_not_know_is_left_to_its_template(connect, make_model):
    """Effort, length and thinking reach the template on every route; fields that change no answer are taken."""
    model = make_model(context=2000)
    source = "{{ reasoning_effort }}|{{ verbosity }}|{{ enable_thinking }}|{{ messages[0].content }}"
    codec = TextCodec(model.codec.tokenizer, stop_ids=model.codec.stop_ids, templates={"default": source})
    told = {"verbosity": "low", "reasoning_effort": "high"}
    turns = [{"role": "user", "content": "one"}]
    neutral = {"store": True, "prediction": {"type": "content", "content": "x"}, "modalities": ["text"]}
    asked = {"include": ["reasoning.encrypted_content"], "max_tool_calls": 3, "stream_options": {"x": 1}, "store": True}
    async with connect(type(model)(model.engine, codec, context_length=2000)) as client:
        answers = [
            await post(client, "/v1/chat/completions", messages=turns, **told, **neutral),
            await post(
                client, "/v1/responses", input="one", text={"verbosity": "low"}, reasoning={"effort": "high"}, **asked
            ),
            await post(client, "/v1/messages", messages=turns, max_tokens=9, thinking={"type": "enabled"}),
            await post(client, "/v1/messages", messages=turns, max_tokens=9, thinking={"type": "adaptive"}),
        ]
    prompts = [codec.tokenizer.decode(request.prompt_ids) for request in model.engine.submitted]
    assert prompts == ["high|low||one", "high|low||one", "||True|one", "|||one"]
    assert not any("x-dovetail-ignored" in answer.headers for answer in answers)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/responses", {"input": "x", "previous_response_id": "r"}, "previous_response_id"),
        ("/v1/responses", {"input": [{"type": "image"}]}, "input.0"),
        ("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ("/v1/responses", {"input": [5]}, "input"),
        ("/v1/responses", {}, "input"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}]}, "max_tokens"),
        (
            "/v1/messages",
            {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages.0.content",
        ),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [7]}]}, "messages.0.content"),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        (
            "/v1/messages",
            {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "temperature": 9},
            "temperature",
        ),
        (
            "/v1/messages",
            {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "thinking": {"type": "much"}},
            "thinking.type",
        ),
    ],
)
async def test_what_is_wrong_is_named(connect, make_model, path, fields, param):
    async with connect(make_model()) as client:
        answer = await client.post(path, json=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)

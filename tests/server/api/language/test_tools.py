"""Tools in chats: what the model is told, and what becomes of its calls."""

import json

import pytest

from server.api.language.pieces import Answer, CallPiece, ReasoningPiece
from server.api.language.tool_calls import FORMATS, GENERIC, HERMES, AnswerParser, call_format
from server.text import TextCodec

CALL = {"name": "look", "arguments": {"where": "Zürich", "deep": [1, {"a": "}"}]}}
OTHER = {"name": "wait", "arguments": {}}
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
TWO = [TOOL, {"type": "function", "function": {"name": "wait"}}]


def written(format, *calls):
    texts = [json.dumps(call) for call in calls]
    if format.name == "mistral":
        return f"{format.begin}[{', '.join(texts)}]"
    return "\n".join(format.begin + text + format.end for text in texts)


def parse(parser, text, size):
    answer = Answer()
    for start in range(0, len(text), size):
        answer.take(parser.push(text[start : start + size]))
    answer.take(parser.flush())
    return answer


@pytest.mark.parametrize("format", [*FORMATS, GENERIC], ids=lambda format: format.name)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_found_however_the_text_comes(format, size):
    calls = (CALL, OTHER) if format.end or format.name == "mistral" else (CALL,)
    answer = parse(AnswerParser(format, ["look", "wait"]), written(format, *calls), size)
    assert [(call.index, call.name, json.loads(call.arguments)) for call in answer.calls] == [
        (index, call["name"], call["arguments"]) for index, call in enumerate(calls)
    ]
    assert answer.text == ""
    assert len({call.call_id for call in answer.calls}) == len(calls)
    assert (answer.finish("stop"), answer.finish("length")) == ("tool_calls", "length")


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("format", "text"),
    [
        (HERMES, "a <tool_call> of no kind </tool_call> b"),
        (HERMES, '<tool_call>{"name": "look"'),
        (HERMES, "1 < 2 and <tool"),
        (HERMES, '{"name": "look"}'),
        (GENERIC, '{"name": "stranger", "arguments": {}} after'),
        (GENERIC, '{"a": 1} after'),
        (GENERIC, "{ not JSON"),
        (GENERIC, ""),
    ],
)
def test_what_only_looks_like_a_call_is_text(format, text, size):
    answer = parse(AnswerParser(format, ["look"]), text, size)
    assert (answer.text, answer.calls) == (text, [])


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_reasoning_text_and_calls_are_told_apart(size):
    text = f"<think>\nwhy <b> so\n</think>\n\nI look.\n{written(HERMES, CALL)}"
    answer = parse(AnswerParser(HERMES, ["look"]), text, size)
    assert (answer.reasoning.strip(), answer.text) == ("why <b> so", "I look.\n")
    assert [call.name for call in answer.calls] == ["look"]
    opened = parse(AnswerParser(HERMES, thinking=True), "because</think>yes", size)
    assert (opened.reasoning, opened.text) == ("because", "yes")
    endless = parse(AnswerParser(HERMES, thinking=True), "because", size)
    assert (endless.reasoning, endless.text) == ("because", "")


def test_one_call_where_only_one_is_wanted():
    answer = parse(AnswerParser(HERMES, ["look"], one_call=True), written(HERMES, CALL, OTHER) + " more", 5)
    assert ([call.name for call in answer.calls], answer.text) == (["look"], "")


def test_pieces_and_formats_are_values():
    assert CallPiece(0, "a", "b", "{}") == CallPiece(0, "a", "b", "{}")
    assert ReasoningPiece("a") != ReasoningPiece("b")
    assert call_format(["... [TOOL_CALLS] ..."]).name == "mistral"
    assert call_format(["{{ messages }}"]) is GENERIC


def ask(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "one"}], "tools": TWO} | fields


@pytest.mark.anyio
async def test_a_call_whole_and_streamed(connect, make_model, read_events):
    model = make_model(text=f"So: {written(HERMES, CALL, OTHER)}", context=2000)
    async with connect(model) as client:
        whole = (await client.post("/v1/chat/completions", json=ask())).json()["choices"][0]
        stream = await client.post("/v1/chat/completions", json=ask(stream=True))
        none = (await client.post("/v1/chat/completions", json=ask(tool_choice="none"))).json()["choices"][0]
        one = (await client.post("/v1/chat/completions", json=ask(parallel_tool_calls=False))).json()["choices"][0]
    assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", "So: ")
    functions = [call["function"] for call in whole["message"]["tool_calls"]]
    assert [json.loads(function["arguments"]) for function in functions] == [CALL["arguments"], {}]
    deltas = [event["choices"][0]["delta"] for event in read_events(stream.text)[:-1]]
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert [part.get("id", "")[:5] for part in parts] == ["call_", "", "call_", ""]
    assert [part["function"].get("name") for part in parts] == ["look", None, "wait", None]
    streamed = ["".join(p["function"]["arguments"] for p in parts if p["index"] == index) for index in (0, 1)]
    assert streamed == [function["arguments"] for function in functions]
    assert read_events(stream.text)[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert (none["finish_reason"], "tool_calls" in none["message"]) == ("stop", False)
    assert len(one["message"]["tool_calls"]) == 1


HISTORY = [
    {"role": "user", "content": "one"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"where": "x"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
]


@pytest.mark.anyio
async def test_a_template_without_tools_is_told_in_text(connect, make_model):
    model = make_model(context=2000)
    async with connect(model) as client:
        assert (await client.post("/v1/chat/completions", json=ask(messages=HISTORY))).status_code == 200
    rendered = model.codec.tokenizer.decode(model.engine.submitted[0].prompt_ids, skip_special_tokens=False)
    assert rendered.startswith("<|im_start|>system\nThese functions can be called")
    assert '"name": "look", "description": "d"' in rendered
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"where": "x"}}\n</tool_call>' in rendered
    assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>" in rendered


TEMPLATE = (
    "{{ tools | tojson }}|{{ mood }}|{{ reasoning_effort }}|"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:[TOOL_CALLS]{% endif %}"
)


@pytest.mark.anyio
async def test_a_template_is_given_what_it_may_use(connect, make_model):
    model = make_model(context=2000)
    codec = TextCodec(model.codec.tokenizer, stop_ids=model.codec.stop_ids, templates={"default": TEMPLATE})
    fields = {"chat_template_kwargs": {"mood": "calm"}, "reasoning_effort": "low", "messages": HISTORY}
    async with connect(type(model)(model.engine, codec, context_length=2000)) as client:
        assert (await client.post("/v1/chat/completions", json=ask(**fields))).status_code == 200
        last = [*HISTORY, {"role": "assistant", "content": "It is "}]
        going_on = ask(messages=last, continue_final_message=True, tools=None)
        assert (await client.post("/v1/chat/completions", json=going_on)).status_code == 200
    first, second = [codec.tokenizer.decode(request.prompt_ids) for request in model.engine.submitted]
    assert '"name": "wait"' in first
    assert "|calm|low|user:one;" in first
    assert '"arguments": {"where": "x"}' in first
    assert "tool:sunny;assistant:" in first
    assert second.endswith("tool:sunny;assistant:It is")

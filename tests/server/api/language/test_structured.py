"""Every spelling of a wish for structure reaches the engine as a grammar."""

import json

import pytest

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": name, "strict": True, "parameters": SCHEMA}} for name in ("f", "g")]


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({"response_format": {"type": "json_object"}}, "{"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, "{"),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, "{"),
        ({"guided_json": json.dumps(SCHEMA)}, "{"),
        ({"guided_regex": "q+"}, "q"),
        ({"guided_choice": ["zoo", "zip"]}, "z"),
        ({"grammar": 'root ::= "k"'}, "k"),
        ({"json_schema": {"const": 7}}, "7"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_the_first_token_is_held_to_it(connect, make_model, path, fields, first):
    model = make_model(text="x")
    body = {"prompt": "one"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "one"}]}
    async with connect(model) as client:
        answer = await client.post(path, json=body | fields | {"n": 2, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        assert "x-dovetail-ignored" not in answer.headers
    one, two = model.engine.submitted
    assert one.grammar is not two.grammar
    assert one.stop_ids == model.codec.stop_ids
    allowed = one.grammar.allowed([]).nonzero()[0].tolist()
    assert {model.codec.decode([token_id])[0] for token_id in allowed} == {first}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g"}}])
async def test_a_forced_call_is_one(connect, make_model, choice):
    model = make_model(text='{"name": "g", "arguments": {"a": 1}}', context=2000)
    async with connect(model) as client:
        body = {"messages": [{"role": "user", "content": "one"}], "tools": TOOLS, "tool_choice": choice}
        answer = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        free = await client.post("/v1/chat/completions", json=body | {"tool_choice": "auto"})
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "g", "arguments": '{"a": 1}'}
    assert model.engine.submitted[0].grammar is not None
    assert free.json()["error"]["param"] == "tools.0.function.strict"


async def test_plain_text_is_free(connect, make_model):
    model = make_model()
    async with connect(model) as client:
        await client.post("/v1/completions", json={"prompt": "one", "response_format": {"type": "text"}, "grammar": ""})
    assert model.engine.submitted[0].grammar is None

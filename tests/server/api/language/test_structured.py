"""Every spelling of a wish for structure reaches the engine as a grammar."""

import json

import pytest

from server.api.language.structured import Calls, free_calls
from server.api.language.tool_calls import FORMATS, GENERIC, HERMES, AnswerParser, CallFormat
from server.api.language.tools import Tool
from server.engine.grammar import GrammarCompiler

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
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "g", "arguments": '{"a": 1}'}
    assert model.engine.submitted[0].grammar is not None


async def test_plain_text_is_free(connect, make_model):
    model = make_model()
    async with connect(model) as client:
        await client.post("/v1/completions", json={"prompt": "one", "response_format": {"type": "text"}, "grammar": ""})
    assert model.engine.submitted[0].grammar is None


HELD, LOOSE = (
    Tool.model_validate({"function": {"name": name, "strict": strict, "parameters": SCHEMA}})
    for name, strict in (("f", True), ("g", False))
)
SPECIAL = CallFormat("special", "<|im_start|>", "<end>")
RIGHT, WRONG = {"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": "x"}}
ANY = {"name": "g", "arguments": {"b": [None]}}


@pytest.fixture(scope="module")
def compiler(codec):
    return GrammarCompiler(codec.tokenizer, codec.stop_ids)


def written(format, *calls):
    texts = [json.dumps(call) for call in calls]
    if format.bare:
        return texts[0]
    inside = [f"[{', '.join(texts)}]"] if format.is_list else [f"\n{text}\n" for text in texts]
    return "".join(format.begin + text + format.end for text in inside)


def may_be(compiler, codec, source, text):
    """Whether a grammar takes a whole text and lets it end there."""
    grammar, ids = compiler.compile("lark", source), codec.encode(text)
    return grammar.follows([], ids) == len(ids) and bool(grammar.allowed(ids)[list(codec.stop_ids)].any())


@pytest.mark.parametrize("format", [*FORMATS, GENERIC, SPECIAL], ids=lambda format: format.name)
def test_strict_tools_are_held_to_their_schemas_and_text_is_free(compiler, codec, format):
    source = free_calls(Calls([HELD, LOOSE], format, False, False), codec, None)
    for text in ("", "no calls, {only} text.\nMore", written(format, RIGHT), written(format, ANY)):
        assert may_be(compiler, codec, source, text), text
        parser = AnswerParser(format, ["f", "g"])
        pieces = parser.push(text) + parser.flush()
        assert ["CallPiece" in str(type(piece)) for piece in pieces].count(True) == text.count('"name"')
    assert not may_be(compiler, codec, source, written(format, WRONG))
    if not format.bare:
        assert may_be(compiler, codec, source, "So: " + written(format, RIGHT, ANY))
        assert not may_be(compiler, codec, source, "So: " + written(format, RIGHT, WRONG))
        once = free_calls(Calls([HELD, LOOSE], format, False, True), codec, None)
        assert may_be(compiler, codec, once, "So: " + written(format, RIGHT))
        assert not may_be(compiler, codec, once, written(format, RIGHT) + written(format, ANY))


@pytest.mark.parametrize("format", [HERMES, GENERIC, SPECIAL], ids=lambda format: format.name)
@pytest.mark.parametrize(
    "answer", [{"type": "object", "properties": {"k": {"const": 1}}, "required": ["k"]}, '{"enum": [2]}']
)
def test_a_call_or_the_answer_that_is_wished_for(compiler, codec, format, answer):
    source = free_calls(Calls([HELD], format, False, False), codec, answer)
    assert may_be(compiler, codec, source, written(format, RIGHT))
    assert may_be(compiler, codec, source, "2" if isinstance(answer, str) else '{"k": 1}')
    for text in ("text", written(format, WRONG), '{"k": 2}'):
        assert not may_be(compiler, codec, source, text)


async def test_strict_tools_and_a_format_reach_the_engine_as_one_grammar(connect, make_model):
    model = make_model(text="free text", context=2000)
    format = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 5}}}
    body = {"messages": [{"role": "user", "content": "one"}], "tools": TOOLS}
    async with connect(model) as client:
        for more in ({}, {"response_format": format}, {"tool_choice": "none", "response_format": format}):
            answer = await client.post("/v1/chat/completions", json=body | more)
            assert answer.status_code == 200, answer.text
    calls, either, alone = (request.grammar for request in model.engine.submitted)
    call, text, five = (model.codec.encode(t) for t in ('<tool_call>{"name": "f"', "free text", "5"))
    assert [grammar.follows([], call) == len(call) for grammar in (calls, either, alone)] == [True, True, False]
    assert [grammar.follows([], text) == len(text) for grammar in (calls, either, alone)] == [True, False, False]
    assert [grammar.follows([], five) == len(five) for grammar in (calls, either, alone)] == [True, True, True]

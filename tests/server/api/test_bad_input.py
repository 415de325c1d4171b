import json

import pytest

pytestmark = pytest.mark.anyio

COMPLETION = {"model": "tiny", "prompt": "one"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALLING, ALLOWED = {"role": "assistant", "tool_calls": [{}]}, {"type": "allowed_tools"}
TEXT_PART = {"type": "text", "text": "one"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "one"}]}


def bad(param, code, **fields):
    return pytest.param(param, code, fields, id=f"{code}-{next(iter(fields))}-{str(next(iter(fields.values())))[:20]}")


BOTH = [
    bad("max_tokens", "invalid_value", max_tokens=-2),
    bad("max_tokens", "invalid_value", max_tokens=0),
    bad("max_tokens", "invalid_type", max_tokens="5"),
    bad("max_tokens", "invalid_type", max_tokens=True),
    bad("max_tokens", "invalid_type", max_tokens=2.5),
    bad("temperature", "invalid_value", temperature=-0.1),
    bad("temperature", "invalid_value", temperature=2.1),
    bad("temperature", "invalid_type", temperature="hot"),
    bad("top_p", "invalid_value", top_p=1.5),
    bad("n", "invalid_value", n=0),
    bad("n", "invalid_value", n=1000000),
    bad("n", "invalid_value", n=9),
    bad("stop", "invalid_value", stop=["x"] * 65),
    bad("stop", "invalid_value", stop="x" * 1025),
    bad("stop", "invalid_value", stop=[1]),
    bad("seed", "invalid_value", seed=2**63),
    bad("presence_penalty", "invalid_value", presence_penalty=3),
    bad("repetition_penalty", "invalid_value", repetition_penalty=0),
    bad("logit_bias", "invalid_value", logit_bias={"x": 1}),
    bad("logit_bias", "invalid_value", logit_bias={"5": 101}),
    bad("logit_bias", "invalid_value", logit_bias={"999999": 1}),
    bad("stop_token_ids", "invalid_value", stop_token_ids=[-1]),
    bad("speculative.enabled", "invalid_type", speculative={"enabled": "no"}),
    bad("speculative.n_max", "invalid_value", speculative={"n_max": -1}),
    bad("temperature", "invalid_type", temperature=10**4000),
    bad(None, "invalid_unicode", **{"\ud800": 1}),
    bad("model", "invalid_type", model=7),
    bad("model", "invalid_unicode", model="\ud800"),
    bad("response_format", "invalid_value", response_format={"type": "sound"}),
    bad("response_format", "invalid_value", response_format={"type": "json_schema"}),
    bad("response_format", "invalid_value", response_format={"type": "json_object", "schema": 123}),
    bad(
        "response_format", "invalid_json_schema", response_format={"type": "json_object", "schema": {"type": "hiccup"}}
    ),
    bad("guided_regex", "invalid_json_schema", guided_regex="(a"),
    bad("guided_regex", "invalid_json_schema", guided_regex="a*" * 1001),
    bad("guided_json", "invalid_json_schema", guided_json={"const": -(2**63)}),  # this one ended the process
    bad("guided_grammar", "invalid_json_schema", guided_grammar='start: %json {"const": -9223372036854775808}'),
    bad("guided_regex", "invalid_value", guided_regex="a", guided_json={}),
    bad("guided_choice", "invalid_value", guided_choice=[]),
    bad("grammar", "invalid_json_schema", grammar="root = = ="),
    bad("structured_outputs", "invalid_value", structured_outputs={"sql": "x"}),
    bad("min_tokens", "invalid_value", min_tokens=-1),
    bad("priority", "invalid_value", priority=2**40),
    bad("deadline_ms", "invalid_value", deadline_ms=0),
]
COMPLETIONS = [
    bad("prompt", "invalid_value", prompt=""),
    bad("prompt", "invalid_value", prompt=[]),
    bad("prompt", "invalid_value", prompt=[[]]),
    bad("prompt", "invalid_value", prompt=["one", ""]),
    bad("prompt", "invalid_value", prompt=["one", 1]),
    bad("prompt", "invalid_value", prompt=[1, True]),
    bad("prompt", "missing_required_parameter", prompt=None),
    bad("prompt", "invalid_value", prompt={"a": 1}),
    bad("prompt", "invalid_value", prompt=[-1]),
    bad("prompt", "invalid_value", prompt=[[1], [10**12]]),
    bad("prompt", "invalid_unicode", prompt="a\ud800"),
    bad("prompt", "invalid_unicode", prompt="a\0"),
    bad("suffix", "unsupported_parameter", suffix="x"),
]
CHATS = [
    bad("messages", "invalid_value", messages=[]),
    bad("messages", "missing_required_parameter", messages=None),
    bad("messages", "invalid_type", messages="one"),
    bad("messages.0", "invalid_type", messages=[123]),
    bad("messages.0.role", "missing_required_parameter", messages=[{}]),
    bad("messages.0.role", "invalid_value", messages=[{"role": 123, "content": "x"}]),
    bad("messages.0.content", "invalid_value", messages=[{"role": "tool", "tool_call_id": "x"}]),
    bad("messages.0.tool_calls.0.function", "missing_required_parameter", messages=[CALLING]),
    bad("messages.0.content", "invalid_value", messages=[{"role": "user", "content": 123}]),
    bad("messages.0.content", "invalid_value", messages=[{"role": "user"}]),
    bad("messages.0.content", "invalid_value", messages=[{"role": "user", "content": [TEXT_PART | {"text": 1}]}]),
    bad("messages.0.content", "invalid_unicode", messages=[{"role": "user", "content": [TEXT_PART | {"text": "\0"}]}]),
    bad("messages.0.content", "invalid_unicode", messages=[{"role": "user", "content": "\udfff"}]),
    bad("messages", "unsupported_parameter", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
    bad("messages.0.audio", "unsupported_parameter", messages=[{"role": "user", "content": "x", "audio": {}}]),
    bad("tools.0.function", "missing_required_parameter", tools=[{"type": "function"}]),
    bad("tool_choice", "invalid_value", tools=[TOOL], tool_choice={"function": {"name": "g"}}),
    bad("tool_choice", "invalid_value", tools=[TOOL], tool_choice="required", response_format={"type": "json_object"}),
    bad("tool_choice", "invalid_value", tools=[TOOL], tool_choice="perhaps"),
    bad("tool_choice", "invalid_value", tool_choice="required"),
    bad("tool_choice", "invalid_value", tools=[TOOL], tool_choice=ALLOWED),
    bad("tool_choice", "invalid_value", tools=[TOOL], tool_choice=ALLOWED | {"tools": [{"name": ["f"]}]}),
    bad("tool_choice", "invalid_value", tools=[TOOL], tool_choice=ALLOWED | {"tools": [{"name": "g"}]}),
    bad("add_generation_prompt", "invalid_value", continue_final_message=True, add_generation_prompt=True),
    bad("chat_template_kwargs", "invalid_type", chat_template_kwargs=[]),
    bad("max_tokens", "invalid_value", max_tokens=3, max_completion_tokens=4),
]  # fmt: skip


def send(client, path, fields):
    content = json.dumps(fields).encode()  # escapes lone surrogates, as a careless client does
    return client.post(path, content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("path", "sent", "param", "code", "fields"),
    [pytest.param("/v1/completions", COMPLETION, *case.values, id=case.id) for case in BOTH + COMPLETIONS]
    + [pytest.param("/v1/chat/completions", CHAT, *case.values, id=f"chat-{case.id}") for case in BOTH + CHATS],
)
async def test_a_wrong_field_is_named(connect, make_model, path, sent, param, code, fields):
    model = make_model()
    async with connect(model) as client:
        answer = await send(client, path, sent | fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code), error
        assert error["message"]
        good = await send(client, "/v1/completions", COMPLETION)
        assert good.status_code == 200
    assert model.engine.status().free_slots == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'{"model": "tiny", ', "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"", "missing_required_parameter"),
        (b"[1]", "invalid_type"),
        (b'"tiny"', "invalid_type"),
        (b'{"model": "tiny", "prompt": "x", "messages": [], "temperature": NaN}', "invalid_value"),
        (b'{"model": "tiny", "logprobs": ' + b"[" * 300 + b"]" * 300 + b"}", "invalid_value"),
        (b'{"model": "tiny", "user": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}", "invalid_value"),
        (b'{"model": "tiny", "prompt": "x", "messages": [], "temperature": 1e400}', "invalid_value"),
    ],
)
async def test_bodies_that_are_not_what_they_should_be(connect, make_model, path, content, code):
    async with connect(make_model()) as client:
        answer = await client.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == code
        assert (await send(client, "/v1/completions", COMPLETION)).status_code == 200


async def test_a_prompt_over_the_context_gets_both_numbers(connect, make_model):
    async with connect(make_model(context=50)) as client:
        for fields in ({"prompt": [5] * 50}, {"prompt": [5] * 50, "max_tokens": -1}, {"prompt": [[5], [5] * 51]}):
            answer = await send(client, "/v1/completions", COMPLETION | fields)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
            assert "maximum context length is 50 tokens" in error["message"]
            assert error["n_ctx"] == 50
        assert "51 tokens are in the prompt" in error["message"]
        assert error["n_prompt_tokens"] == 51
        fits = await send(client, "/v1/completions", COMPLETION | {"prompt": [5] * 48, "max_tokens": 2})
        assert fits.status_code == 200
        echo = {"prompt": [5] * 51, "echo": True, "max_tokens": 0}
        assert (await send(client, "/v1/completions", COMPLETION | echo)).status_code == 400


async def test_unknown_models_and_routes(connect, make_model):
    async with connect(make_model()) as client:
        answer = await send(client, "/v1/completions", COMPLETION | {"model": "gpt-9"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "'tiny'" in answer.json()["error"]["message"]
        assert (await client.get("/v1/models/gpt-9")).json()["error"]["code"] == "model_not_found"
        nowhere = await client.get("/v1/nowhere")
        assert (nowhere.status_code, nowhere.json()["error"]["param"]) == (404, None)
        for path, way in (("/chat/completions", "/v1/chat/completions"), ("/completion", "/v1/completions")):
            assert f"use {way}" in (await send(client, path, COMPLETION)).json()["error"]["message"]
        wrong = await client.get("/v1/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "headers", [{"content-type": "text/plain"}, {}, {"content-type": "application/x-www-form-urlencoded"}]
)
async def test_other_content_types(connect, make_model, headers):
    async with connect(make_model()) as client:
        answer = await client.post("/v1/completions", content=json.dumps(COMPLETION).encode(), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
        zipped = {"content-type": "application/json", "content-encoding": "gzip"}
        assert (await client.post("/v1/completions", content=b"x", headers=zipped)).status_code == 415


async def test_bodies_over_the_limit(connect, make_model):
    async def pieces():
        for _ in range(9):
            yield b" " * 2**20

    async with connect(make_model()) as client:
        headers = {"content-type": "application/json"}
        for content in (b" " * 9 * 2**20, pieces()):
            answer = await client.post("/v1/completions", content=content, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert (await send(client, "/v1/completions", COMPLETION)).status_code == 200


ODD = [
    None,
    True,
    -1,
    0,
    1,
    1.5,
    10**30,
    -(10**30),
    1e308,
    "",
    "x",
    "\ud800",
    "\0",
    [],
    [None],
    [[]],
    {},
    {"type": "text"},
]
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n",
    "stop", "stream", "stream_options", "seed", "logit_bias", "presence_penalty", "frequency_penalty", "echo",
    "best_of", "repetition_penalty", "stop_token_ids", "ignore_eos", "speculative", "suffix", "logprobs",
    "tools", "tool_choice", "response_format", "structured_outputs", "guided_json", "grammar", "min_tokens",
    "chat_template_kwargs", "parallel_tool_calls", "continue_final_message", "user",
]  # fmt: skip


@pytest.mark.parametrize(("path", "base"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
async def test_no_value_of_any_field_takes_the_server_down(connect, make_model, path, base):
    model = make_model(text="x")
    async with connect(model) as client:
        for field in FIELDS:
            for value in ODD:
                answer = await send(client, path, base | {field: value})
                assert answer.status_code in (200, 400, 404), (field, value, answer.text)
                if answer.status_code != 200:
                    assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}
        assert not client.app.state.serving.dispatcher.queues
        assert (await client.get("/openapi.json")).status_code == 200
    assert model.engine.status().free_slots == 4

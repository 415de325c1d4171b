"""Libraries people put between themselves and a server: chat, stream, tools, structured output, errors, cancelling.

Extra ``clients``; slow to import. The model of each server says the same whatever it is asked.
"""

import asyncio
import gc
import json
import os
from contextlib import ExitStack
from types import SimpleNamespace

import openai
import pydantic
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # their own, of their own dependencies
]
ANSWER = "Grüße 🌍, one two three. STOP and more"
CITY = {"city": "Rome", "people": 3}
CALL = f"<tool_call>{json.dumps({'name': 'City', 'arguments': CITY})}</tool_call>"
QUESTION = [{"role": "user", "content": "one"}]
SCHEMA = {
    "title": "City",
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "City", "description": "a city", "parameters": SCHEMA}}
SLOW_ROUND_S = 0.05


class City(pydantic.BaseModel):
    """A city."""

    city: str
    people: int


@pytest.fixture
def servers(listen, make_model, until):
    """Addresses of servers that answer with text, a call, JSON, the bare JSON of a forced call, and without an end.

    ``asked()`` tells whether the last one has had a request, ``left()`` waits until it has nothing to do any more.
    """
    texts = {"text": ANSWER, "call": CALL, "json": json.dumps(CITY)}
    texts["forced"] = json.dumps({"name": "City", "arguments": CITY})
    endless = make_model(script=lambda request: ((70,) for _ in range(4000)), context=4000, round_s=SLOW_ROUND_S)
    with ExitStack() as running:
        urls = {
            name: running.enter_context(listen(make_model(text=text, context=4000)))[0] for name, text in texts.items()
        }
        long = running.enter_context(listen(endless))[0]

        def left():
            assert endless.engine.submitted
            until(lambda: endless.engine.cancelled and endless.engine.status().free_slots == 4)

        addresses = {name: f"{url}/v1" for name, url in urls.items()} | {"long": f"{long}/v1"}
        yield SimpleNamespace(**addresses, left=left, asked=lambda: bool(endless.engine.submitted))


def test_litellm(servers):
    litellm = pytest.importorskip("litellm")
    call = {"model": "openai/tiny", "api_base": servers.text, "api_key": "-", "messages": QUESTION, "max_retries": 0}
    assert litellm.completion(**call).choices[0].message.content == ANSWER
    streamed = litellm.completion(**call, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == ANSWER
    called = litellm.completion(**call | {"api_base": servers.call}, tools=[TOOL])
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments) == CITY
    formed = litellm.completion(**call | {"api_base": servers.json}, response_format=City)
    assert json.loads(formed.choices[0].message.content) == CITY
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**call | {"messages": [{"role": "user", "content": "one " * 6000}]})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**call | {"model": "openai/nobody"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**call, temperature=9)
    stream = litellm.completion(**call | {"api_base": servers.long}, stream=True)
    next(stream)
    stream.completion_stream.close()
    servers.left()


def test_langchain(servers):
    langchain = pytest.importorskip("langchain_openai")

    def chat(url, **options):
        return langchain.ChatOpenAI(model="tiny", base_url=url, api_key="-", max_retries=0, **options)

    assert chat(servers.text).invoke("one").content == ANSWER
    chunks = list(chat(servers.text, stream_usage=True).stream("one"))
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 10
    (call,) = chat(servers.call).bind_tools([SCHEMA], strict=True).invoke("one").tool_calls
    assert (call["name"], call["args"]) == ("City", CITY)
    formed = chat(servers.json).with_structured_output(City, method="json_schema").invoke("one")
    assert formed.model_dump() == CITY
    vectors = langchain.OpenAIEmbeddings(
        model="tiny", base_url=servers.text, api_key="-", check_embedding_ctx_length=False
    )
    assert vectors.embed_documents(["one", "two"]) == [pytest.approx([0.6, 0.8, 0, 0])] * 2
    with pytest.raises(openai.NotFoundError):
        langchain.ChatOpenAI(model="nobody", base_url=servers.text, api_key="-", max_retries=0).invoke("one")
    with pytest.raises(openai.BadRequestError):
        chat(servers.text, temperature=9).invoke("one")
    stream = chat(servers.long).stream("one")
    next(stream)
    stream.close()
    servers.left()


def test_instructor(servers):
    """Its answers are always structured, so a chat is a call of a tool or JSON."""
    instructor = pytest.importorskip("instructor")

    def client(url, mode=instructor.Mode.JSON_SCHEMA):
        return instructor.from_openai(openai.OpenAI(base_url=url, api_key="-", max_retries=0), mode=mode)

    def ask(client, **fields):
        wanted = {"model": "tiny", "response_model": City, "messages": QUESTION, "max_retries": 0}
        return client.chat.completions.create(**wanted | fields)

    assert ask(client(servers.json, instructor.Mode.JSON)).model_dump() == CITY
    assert ask(client(servers.json)).model_dump() == CITY
    assert ask(client(servers.forced, instructor.Mode.TOOLS)).model_dump() == CITY
    grown = client(servers.json).chat.completions.create_partial(model="tiny", response_model=City, messages=QUESTION)
    assert list(grown)[-1].model_dump() == CITY
    with pytest.raises(Exception, match="does not exist"):
        ask(client(servers.json), model="nobody")
    with pytest.raises(Exception, match="timed out"):
        ask(client(servers.long), timeout=3)
    servers.left()


def test_pydantic_ai(servers):
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.exceptions import ModelHTTPError
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    def agent(url, name="tiny", kind=OpenAIChatModel, **options):
        client = openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0)
        return Agent(kind(name, provider=OpenAIProvider(openai_client=client)), retries=0, **options)

    async def all_of_it():
        assert (await agent(servers.text).run("one")).output == ANSWER
        assert (await agent(servers.text, kind=OpenAIResponsesModel).run("one")).output == ANSWER
        async with agent(servers.text).run_stream("one") as stream:
            assert "".join([text async for text in stream.stream_text(delta=True)]) == ANSWER
        called = await agent(servers.forced, output_type=ToolOutput(City, name="City")).run("one")
        assert called.output.model_dump() == CITY
        assert (await agent(servers.json, output_type=NativeOutput(City)).run("one")).output.model_dump() == CITY
        for wrong in (agent(servers.text, "nobody"), agent(servers.text, model_settings={"temperature": 9})):
            with pytest.raises(ModelHTTPError) as refused:
                await wrong.run("one")
            assert refused.value.status_code in (404, 400)
        endless = asyncio.create_task(agent(servers.long).run("one"))
        while not servers.asked():
            await asyncio.sleep(0.01)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless

    asyncio.run(all_of_it())
    servers.left()


def test_llm(servers, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", os.fspath(tmp_path))
    llm = pytest.importorskip("llm")
    from llm.default_plugins.openai_models import Chat

    def model(url, name="tiny"):
        return Chat("tiny", model_name=name, api_base=url, supports_schema=True, supports_tools=True)

    assert model(servers.text).prompt("one", key="-", stream=True).text() == ANSWER
    assert model(servers.text).prompt("one", key="-", stream=False).text() == ANSWER
    city = llm.Tool(name="City", description="a city", input_schema=SCHEMA, implementation=lambda **given: "sunny")
    for stream in (True, False):
        (call,) = model(servers.call).prompt("one", key="-", tools=[city], stream=stream).tool_calls()
        assert (call.name, call.arguments) == ("City", CITY)
    assert json.loads(model(servers.json).prompt("one", key="-", schema=SCHEMA).text()) == CITY
    with pytest.raises(openai.NotFoundError):
        model(servers.text, "nobody").prompt("one", key="-").text()
    pieces = iter(model(servers.long).prompt("one", key="-"))
    next(pieces)
    pieces.close()
    del pieces
    gc.collect()  # it leaves the connection to whoever holds it last
    servers.left()


def test_anthropic(servers):
    anthropic = pytest.importorskip("anthropic")
    call = {"model": "tiny", "max_tokens": 1000, "messages": QUESTION}

    def client(url):
        return anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="-", max_retries=0)

    assert client(servers.text).messages.create(**call).content[0].text == ANSWER
    with client(servers.text).messages.stream(**call) as stream:
        assert "".join(stream.text_stream) == ANSWER
        assert stream.get_final_message().stop_reason == "end_turn"
    assert client(servers.text).messages.count_tokens(model="tiny", messages=QUESTION).input_tokens > 3
    tool = {"name": "City", "description": "c", "input_schema": SCHEMA, "strict": True}
    used = client(servers.call).messages.create(**call, tools=[tool])
    assert (used.stop_reason, used.content[-1].input) == ("tool_use", CITY)
    with client(servers.call).messages.stream(**call, tools=[tool]) as stream:
        assert stream.get_final_message().content[-1].input == CITY
    assert client(servers.json).messages.parse(**call, output_format=City).parsed_output.model_dump() == CITY
    with pytest.raises(anthropic.NotFoundError):
        client(servers.text).messages.create(**call | {"model": "nobody"})
    with pytest.raises(anthropic.BadRequestError):
        client(servers.text).messages.create(**call, extra_body={"temperature": 9})
    with client(servers.long).messages.stream(**call) as stream:
        next(iter(stream.text_stream))
    servers.left()

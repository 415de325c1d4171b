"""Libraries people put between themselves and a server, each on its usual path. Extra ``clients``; slow to import."""

import json
import os

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # their own, of their own dependencies
]
ANSWER = "Grüße 🌍, one two three. STOP and more"
CITY = {"city": "Rome", "people": 3}
CALL = f"<tool_call>{json.dumps({'name': 'City', 'arguments': CITY})}</tool_call>"
QUESTION = [{"role": "user", "content": "one"}]


@pytest.fixture
def base(listen, make_model):
    with listen(make_model(context=2000)) as (url, _):
        yield f"{url}/v1"


def structured(listen, make_model, text):
    """A server whose model says this, whatever it is asked."""
    return listen(make_model(text=text, context=4000))


def test_litellm(base):
    litellm = pytest.importorskip("litellm")
    call = {"model": "openai/tiny", "api_base": base, "api_key": "-", "messages": QUESTION}
    whole = litellm.completion(**call)
    streamed = litellm.completion(**call, stream=True)
    assert whole.choices[0].message.content == ANSWER
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == ANSWER
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**call | {"messages": [{"role": "user", "content": "one " * 3000}]})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**call | {"model": "openai/nobody"})


def test_langchain(base, listen, make_model):
    openai = pytest.importorskip("langchain_openai")
    chat = openai.ChatOpenAI(model="tiny", base_url=base, api_key="-", stream_usage=True, max_retries=0)
    assert chat.invoke("one").content == ANSWER
    chunks = list(chat.stream("one"))
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 10
    vectors = openai.OpenAIEmbeddings(model="tiny", base_url=base, api_key="-", check_embedding_ctx_length=False)
    assert vectors.embed_documents(["one", "two"]) == [pytest.approx([0.6, 0.8, 0, 0])] * 2
    schema = {"title": "City", "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    with structured(listen, make_model, CALL) as (url, _):
        caller = openai.ChatOpenAI(model="tiny", base_url=f"{url}/v1", api_key="-", max_retries=0)
        (call,) = caller.bind_tools([schema]).invoke("one").tool_calls
    assert (call["name"], call["args"]) == ("City", CITY)


def test_instructor(listen, make_model):
    instructor = pytest.importorskip("instructor")
    import openai
    import pydantic

    class City(pydantic.BaseModel):
        city: str
        people: int

    called = json.dumps({"name": "City", "arguments": CITY})
    for mode, text in ((instructor.Mode.JSON, json.dumps(CITY)), (instructor.Mode.TOOLS, called)):
        with structured(listen, make_model, text) as (url, _):
            client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0), mode=mode)
            answer = client.chat.completions.create(model="tiny", response_model=City, messages=QUESTION, max_retries=0)
        assert answer.model_dump() == CITY


def test_pydantic_ai(base):
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    def agent(url, **options):
        return Agent(OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=url, api_key="-")), **options)

    assert agent(base).run_sync("one").output == ANSWER


def test_llm(base, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", os.fspath(tmp_path))
    pytest.importorskip("llm")
    from llm.default_plugins.openai_models import Chat

    model = Chat("tiny", model_name="tiny", api_base=base)
    assert model.prompt("one", key="-", stream=True).text() == ANSWER
    assert model.prompt("one", key="-", stream=False).text() == ANSWER


def test_anthropic(base, listen, make_model):
    anthropic = pytest.importorskip("anthropic")
    url = base.removesuffix("/v1")
    client = anthropic.Anthropic(base_url=url, api_key="-", max_retries=0)
    call = {"model": "tiny", "max_tokens": 100, "messages": QUESTION}
    assert client.messages.create(**call).content[0].text == ANSWER
    with client.messages.stream(**call) as stream:
        assert "".join(stream.text_stream) == ANSWER
        assert stream.get_final_message().stop_reason == "end_turn"
    assert client.messages.count_tokens(model="tiny", messages=QUESTION).input_tokens > 3
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**call | {"model": "nobody"})
    tool = {"name": "City", "description": "c", "input_schema": {"type": "object", "properties": {}}}
    with structured(listen, make_model, CALL) as (other, _):
        caller = anthropic.Anthropic(base_url=other, api_key="-", max_retries=0)
        used = caller.messages.create(**call, tools=[tool])
    assert (used.stop_reason, used.content[-1].input) == ("tool_use", CITY)

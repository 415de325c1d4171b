"""The default model as it is served, where text must make sense: calls, schemas, log-probabilities, stops, choices.

It runs on its native layers, so what is drafted changes no bit; the slow tests compare it with transformers in fp32.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from server.own_models import OwnModelError, default_target

ROOT = Path(__file__).resolve().parent.parent
START_S = 250.0
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "the weather of a city", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}}}},
]
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Rome in the next three days?"}]
CALL = {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}
HISTORY: list[Any] = [
    {"role": "user", "content": "What is the weather in Paris in the next two days?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
    *QUESTION,
]
SCRIPTS: list[Any] = [
    {"role": "user", "content": "Go on."},
    {"role": "assistant", "content": "🌍 🌎 東京 🌍 🌎 東京 🌍 🌎 東京 🌍"},
]
REPEATING = "one two three four one two three four one two three four one two"
BREAKS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\r\nh\\u2028"
PLAIN = {"speculative": {"enabled": False}}


@contextmanager
def served(log: Path, *options: str) -> Iterator[str]:
    """The address of a server of the default model."""
    try:
        default_target()
    except OwnModelError as error:
        pytest.skip(str(error))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DOVETAIL_")}
    command = ["serve", "--port", str(port), "--trees", "fixed", "--context", "2048"]
    command += ["--model-name", "default", "--vision", "none", *options]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-c", "from server.cli import main; main()", *command],
            cwd=ROOT, stdout=file, stderr=file, env=environment,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while not is_ready(f"http://127.0.0.1:{port}"):
            assert time.monotonic() < deadline, log.read_text()
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        assert server.wait(30) == 0


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("serve") / "log") as address:
        yield address


@pytest.fixture(scope="module")
def exact_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same weights in fp32."""
    with served(tmp_path_factory.mktemp("serve") / "log", "--weights", "fp32") as address:
        yield address


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=200)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    more = {"model": "default", "messages": QUESTION, "temperature": 0, "max_tokens": 60}
    return client.chat.completions.create(**more | fields)


def called(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def streamed_calls(chunks: Any) -> tuple[list[tuple[str, Any]], str]:
    """Calls and text of a stream; an id and a name come once a call."""
    calls: dict[int, list[str]] = {}
    text = ""
    for chunk in chunks:
        delta = chunk.choices[0].delta
        text += delta.content or ""
        for part in delta.tool_calls or ():
            assert bool(part.id) == bool(part.function.name) == (part.index not in calls)
            name_and_arguments = calls.setdefault(part.index, [part.function.name, ""])
            name_and_arguments[1] += part.function.arguments or ""
    return [(name, json.loads(arguments)) for name, arguments in calls.values()], text


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_parse_validate_and_stream_the_same(client: openai.OpenAI, choice: Any, temperature: int) -> None:
    asked = {"tools": TOOLS, "tool_choice": choice, "temperature": temperature, "seed": 5}
    whole = chat(client, **asked).choices[0]
    (call,) = called(whole.message)
    assert whole.finish_reason == "tool_calls"
    assert call[0] == "weather" or (choice == "required" and call == ("wait", {}))
    if call[0] == "weather":
        jsonschema.validate(call[1], SCHEMA)
    assert streamed_calls(chat(client, **asked, stream=True)) == ([call], "")
    assert called(chat(client, **asked, extra_body=PLAIN).choices[0].message) == [call]


@pytest.mark.parametrize("strict", [False, True])
def test_calls_that_the_model_makes_by_itself_parse_and_stream_the_same(client: openai.OpenAI, strict: bool) -> None:
    tools = [{"type": "function", "function": tool["function"] | {"strict": strict}} for tool in TOOLS]
    asked = {"messages": HISTORY, "tools": tools, "max_tokens": 90}
    whole = chat(client, **asked).choices[0]
    calls = called(whole.message)
    assert calls[0][0] == "weather"
    assert whole.finish_reason == "tool_calls"
    for name, arguments in calls:
        if strict and name == "weather":
            jsonschema.validate(arguments, SCHEMA)
    assert streamed_calls(chat(client, **asked, stream=True)) == (calls, whole.message.content or "")


def test_an_answer_follows_its_schema_whatever_is_drafted(client: openai.OpenAI) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    for temperature in (0, 1):
        asked = {"response_format": format, "temperature": temperature, "seed": 3}
        drafted, plain = (chat(client, **asked, extra_body=body) for body in ({}, PLAIN))
        jsonschema.validate(json.loads(drafted.choices[0].message.content), SCHEMA)
        assert drafted.choices[0].message.content == plain.choices[0].message.content
        assert drafted.model_extra["timings"]["draft_n"] > 0 == plain.model_extra["timings"]["draft_n"]


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_log_probabilities_are_the_same_whatever_is_drafted_and_join_to_the_text(
    client: openai.OpenAI, temperature: float
) -> None:
    asked: dict[str, Any] = {"messages": SCRIPTS, "temperature": temperature, "seed": 4, "max_tokens": 36}
    asked |= {"logprobs": True, "top_logprobs": 3}
    more = {"continue_final_message": True}
    whole, plain = (chat(client, **asked, extra_body=more | body).choices[0] for body in ({}, PLAIN))
    chunks = list(chat(client, **asked, stream=True, extra_body=more))
    parts = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content or ()
    ]
    tokens = [(token.token, token.logprob, token.bytes) for token in whole.logprobs.content]
    assert tokens == [(token.token, token.logprob, token.bytes) for token in plain.logprobs.content]
    assert tokens == [(token.token, token.logprob, token.bytes) for token in parts]
    assert "".join(token for token, *_ in tokens) == whole.message.content
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == whole.message.content
    assert any(token == "" and bytes for token, _, bytes in tokens), "no character was made of several tokens"
    assert "\ufffd" not in "".join(texts)[:-1], "only the end of the answer may cut one"


def test_a_stop_string_over_the_border_of_a_draft_never_shows(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "default", "prompt": REPEATING, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    assert len(text) > 60
    for first in range(12, 24, 2):
        stop = text[first : first + 9]
        cut = client.completions.create(**asked, stop=stop)
        assert cut.choices[0].text == text[: text.index(stop)]
        streamed = "".join(
            chunk.choices[0].text for chunk in client.completions.create(**asked, stop=stop, stream=True)
        )
        assert streamed == cut.choices[0].text
        assert cut.choices[0].finish_reason == "stop"
    assert cut.model_extra["timings"]["draft_n_accepted"] > 0


def test_four_choices_of_a_seed_are_the_same_again(client: openai.OpenAI) -> None:
    asked = {"n": 4, "temperature": 1, "seed": 11, "max_tokens": 12}
    first, again = ([choice.message.content for choice in chat(client, **asked).choices] for _ in range(2))
    assert first == again
    assert len(set(first)) > 1
    plain = [choice.message.content for choice in chat(client, **asked, extra_body=PLAIN).choices]
    streamed = [""] * 4
    for chunk in chat(client, **asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert plain == streamed == first


STREAMS: dict[str, tuple[dict[str, Any], Callable[[Any], str]]] = {
    "/v1/completions": ({"prompt": "Say it."}, lambda event: event["choices"][0]["text"]),
    "/v1/chat/completions": ({"messages": QUESTION}, lambda event: event["choices"][0]["delta"].get("content") or ""),
}


@pytest.mark.parametrize("path", STREAMS)
def test_characters_that_end_lines_elsewhere_pass_whole(url: str, path: str) -> None:
    """Read by a client that takes all of them for a line's end, as ``str.splitlines`` and httpx do."""
    asked, text_of = STREAMS[path]
    body = asked | {"model": "default", "max_tokens": 80, "guided_choice": [BREAKS], "stream": True}
    raw = httpx.post(f"{url}{path}", json=body, timeout=200).content
    lines = [line.removeprefix("data: ") for line in raw.decode().splitlines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(text_of(json.loads(line)) for line in lines[:-1]) == BREAKS
    for wrong in ("\0", "\ud800"):
        content = json.dumps(body | {"guided_choice": [f"a{wrong}"]}).encode()
        answer = httpx.post(f"{url}{path}", content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_unicode")


@pytest.fixture(scope="module")
def reference() -> Any:
    import torch  # with transformers ten seconds, for the slow tests alone
    from transformers import AutoModelForCausalLM

    file = default_target()
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_log_probabilities_in_fp32_are_those_of_transformers(
    exact_url: str, reference: Any, temperature: float
) -> None:
    import torch

    client = client_of(exact_url)
    asked = {"temperature": temperature, "seed": 6, "logprobs": True, "top_logprobs": 5}
    ids = {"return_token_ids": True}
    drafted, plain = (chat(client, **asked, extra_body=ids | body) for body in ({}, PLAIN))
    assert drafted.model_extra["timings"]["draft_n_accepted"] > 0
    choice = drafted.choices[0]
    prompt, answer = choice.model_extra["prompt_token_ids"], choice.model_extra["token_ids"]
    with torch.inference_mode():
        rows = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    own = rows.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
    tokens = choice.logprobs.content
    assert [token.logprob for token in tokens] == pytest.approx(own[: len(tokens)], abs=1e-4)
    assert [token.logprob for token in tokens] == pytest.approx(
        [token.logprob for token in plain.choices[0].logprobs.content], abs=1e-4
    )
    for token, row in zip(tokens, rows, strict=False):
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
    echoed = client.completions.create(
        model="default", prompt=prompt + answer, max_tokens=0, echo=True, logprobs=0, temperature=0
    )
    scores = echoed.choices[0].logprobs.token_logprobs
    assert scores[0] is None
    assert scores[len(prompt) :] == pytest.approx(own, abs=1e-4)

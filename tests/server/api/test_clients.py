"""The official client and plain sockets against a server on a loopback port."""

import json
import socket
import subprocess
import sys

import httpx
import openai
import pytest

from server.app import serve

ANSWER = "Grüße 🌍, one two three. STOP and more"
COMPLETION = {"model": "tiny", "prompt": "one", "max_tokens": 190, "temperature": 0}
SLOW_ROUND_S = 0.05  # 190 of them outlast every wait below
MESSAGES = [{"role": "user", "content": "one"}]


def forever(request):
    while True:
        yield (70,)


@pytest.fixture
def openai_client(listen, make_model):
    with listen(make_model()) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_completions(openai_client):
    answer = openai_client.completions.create(model="tiny", prompt="one", max_tokens=100)
    assert answer.choices[0].text == ANSWER
    assert answer.model_extra["timings"]["acceptance_length"] > 1
    stream = openai_client.completions.create(model="tiny", prompt="one", max_tokens=100, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == ANSWER


def test_chats(openai_client):
    answer = openai_client.chat.completions.create(model="tiny", messages=MESSAGES, n=2, extra_body={"top_k": 3})
    assert [choice.message.content for choice in answer.choices] == [ANSWER, ANSWER]
    assert answer._request_id
    stream = openai_client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ANSWER
    assert chunks[-1].usage == answer.usage.model_copy(
        update={
            "completion_tokens": answer.usage.completion_tokens // 2,
            "total_tokens": answer.usage.prompt_tokens + answer.usage.completion_tokens // 2,
        }
    )


def test_models_and_error_classes(openai_client):
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError) as not_found:
        openai_client.completions.create(model="gpt-9", prompt="x")
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 200 tokens"):
        openai_client.completions.create(model="tiny", prompt=[5] * 201)


def test_a_failure_in_the_stream_is_raised(listen, make_model):
    model = make_model(script=lambda request: [(70,), None])
    with listen(model) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError) as failed:
            list(stream)
    assert failed.value.code == "internal_error"


def test_a_client_that_leaves_a_stream_frees_its_slot(listen, make_model, until):
    model = make_model(script=forever, round_s=SLOW_ROUND_S)
    with listen(model) as (url, server):
        with httpx.stream("POST", f"{url}/v1/completions", json=COMPLETION | {"stream": True}) as answer:
            lines = answer.iter_lines()  # kept: a dropped iterator closes the connection
            next(lines)
            assert model.engine.status().running == 1
        until(lambda: model.engine.cancelled)
        assert model.engine.status().free_slots == 4
        until(lambda: not server.app.state.serving.dispatcher.queues)


@pytest.mark.parametrize(("stream", "working"), [(False, True), (False, False), (True, False)])
def test_a_client_that_leaves_early_frees_its_slot(listen, make_model, until, stream, working):
    model = make_model(script=forever, round_s=SLOW_ROUND_S)
    if not working:
        model.engine.turn.clear()  # a long prefill: nothing comes
    with listen(model) as (url, server):
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.2) as client:
            answer = client.post(f"{url}/v1/completions", json=COMPLETION | {"stream": stream})
            answer.raise_for_status()
        until(lambda: not server.app.state.serving.dispatcher.queues)
        model.engine.turn.set()
        until(lambda: model.engine.cancelled)
        assert model.engine.status().free_slots == 4
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_storm_of_clients_that_leave_at_once_leaves_nothing(listen, make_model, until):
    model = make_model(script=forever, round_s=0.001)
    with listen(model) as (url, server):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps(COMPLETION | {"stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        for place in range(100):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body[: 20 + place])
        # The last of the storm may still be on their way, and fill the queue once more.
        until(lambda: httpx.post(f"{url}/v1/completions", json=COMPLETION | {"max_tokens": 1}).status_code == 200)
        until(lambda: model.engine.status().free_slots == 4 and not server.app.state.serving.dispatcher.queues)
    assert model.engine.cancelled


def test_silence_is_bridged_by_comments(listen, make_model):
    model = make_model()
    model.engine.turn.clear()
    with (
        listen(model, keepalive_s=0.02) as (url, _),
        httpx.stream("POST", f"{url}/v1/completions", json=COMPLETION | {"stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith(":")
        model.engine.turn.set()
        assert "data: [DONE]" in list(lines)


def test_a_signal_lets_running_requests_finish(listen, make_model, until):
    model = make_model(round_s=0.01)
    with (
        listen(model) as (url, server),
        httpx.stream("POST", f"{url}/v1/completions", json=COMPLETION | {"stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        model.engine.turn.clear()
        server.should_exit = True
        until(lambda: server.app.state.serving.phase == "shutting_down")
        assert httpx.post(f"{url}/v1/completions", json=COMPLETION).status_code == 503
        model.engine.turn.set()
        assert "data: [DONE]" in list(lines)


def test_a_load_error_ends_the_process(make_settings):
    def load(settings, report):
        raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        serve(make_settings(port=0), load)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_while_loading_ends_the_process_in_order(name):
    code = (
        "import os, signal, threading, time\n"
        "from server.app import serve\n"
        "from server.settings import Settings\n"
        f"signal.signal(signal.{name}, signal.SIG_DFL)\n"  # whatever the tests were started with, nohup say
        "def load(settings, report):\n"
        f"    threading.Timer(0.3, os.kill, (os.getpid(), signal.{name})).start()\n"
        "    time.sleep(60)\n"
        "serve(Settings(port=0), load)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=20).returncode == 0


def test_garbage_on_the_wire_does_not_hurt(listen, make_model):
    with listen(make_model()) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        for garbage in (b"\x00\xff\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n"):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(garbage)
                assert connection.recv(100).startswith(b"HTTP/1.1 4")
        assert httpx.post(f"{url}/v1/completions", json=COMPLETION).status_code == 200


def test_a_refusal_arrives_although_the_body_is_still_coming(listen, make_model):
    """A connection closed on unread data is reset, and the client never sees why."""
    with listen(make_model(), api_key="sesame") as (url, _):
        host, port = url.removeprefix("http://").split(":")
        body = b" " * 9 * 2**20
        for key, status in ((b"sesame", b"413"), (b"wrong", b"401")):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer "
                    + key + b"\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
                )  # fmt: skip
                connection.sendall(body)
                answer = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert b'"error"' in answer

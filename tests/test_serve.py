"""``dovetail serve`` as a user starts it, asked by the official OpenAI client."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

ROOT = Path(__file__).resolve().parent.parent
START_S = 120.0
MODEL = "tiny"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = (tmp_path_factory.mktemp("serve") / "log").open("wb")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DOVETAIL_")}
    environment |= {"DOVETAIL_TARGET": "tiny", "DOVETAIL_TREES": "fixed"}
    server = subprocess.Popen(
        [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", str(port)],
        cwd=ROOT, stdout=log, stderr=log, env=environment,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert server.poll() is None, Path(log.name).read_text()
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        assert server.wait(30) == 0
        log.close()


@pytest.fixture
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)


def test_completion_streaming_and_not_are_the_same_text(client: openai.OpenAI) -> None:
    prompt = "def mean(values):\n"
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=40, temperature=0)
    stream = client.completions.create(model=MODEL, prompt=prompt, max_tokens=40, temperature=0, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) > 2
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40
    timings = whole.model_extra["timings"]  # type: ignore[index]
    assert timings["draft_n"] >= timings["draft_n_accepted"] > 0
    assert timings["acceptance_length"] > 1


def test_drafting_changes_no_token(client: openai.OpenAI) -> None:
    def text(enabled: bool, **sampling: float | int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="import os\n\n\nclass", max_tokens=48, extra_body={"speculative": {"enabled": enabled}},
            **sampling,  # type: ignore[arg-type]
        )  # fmt: skip
        return answer.choices[0].text

    assert text(True, temperature=0) == text(False, temperature=0)
    assert text(True, temperature=0.9, seed=5) == text(False, temperature=0.9, seed=5)


def test_chat_streams_in_the_agreed_order(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "How many apples are 2 + 3 apples?"}]
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=16, temperature=0, stream=True,  # type: ignore[arg-type]
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=16, temperature=0)  # type: ignore[arg-type]
    assert whole.choices[0].message.content == "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_client_that_leaves_frees_its_slot(client: openai.OpenAI, base_url: str) -> None:
    stream = client.completions.create(model=MODEL, prompt="x = 1\n", max_tokens=900, stream=True, temperature=1.0)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if httpx.get(f"{base_url}/health").json().get("running", 0) == 0:
            break
        time.sleep(0.05)
    assert httpx.get(f"{base_url}/health").json().get("running") == 0


def test_errors_have_openai_types_and_the_server_lives(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=MODEL):
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt="x " * 5000, max_tokens=8)
    assert error.value.code == "context_length_exceeded"
    assert client.models.list().data[0].id == MODEL

"""Log lines as JSON: each names the request it belongs to, and none holds what was asked or answered."""

import json
import logging
import sys

import pytest

from server.logs import JsonLines

COMPLETION = {"prompt": "a very secret prompt", "max_tokens": 20, "temperature": 0}


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.DEBUG)
    written = []
    caplog.handler.setFormatter(JsonLines())
    keep = caplog.handler.emit
    caplog.handler.emit = lambda record: (written.append(caplog.handler.format(record)), keep(record))
    yield written
    caplog.handler.emit = keep


@pytest.mark.anyio
async def test_lines_carry_the_requests_id_and_no_text(lines, connect, make_model):
    async with connect(make_model()) as client:
        answer = await client.post("/v1/completions", json=COMPLETION, headers={"x-request-id": "mine-1"})
        refused = await client.post("/v1/completions", json=COMPLETION | {"n": 0}, headers={"x-request-id": "mine-2"})
    found = [json.loads(line) for line in lines]
    assert (answer.status_code, refused.status_code) == (200, 400)
    access = {line["request_id"]: line["http"] for line in found if "http" in line}
    assert {key: (http["method"], http["route"], http["status"]) for key, http in access.items()} == {
        "mine-1": ("POST", "/v1/completions", 200),
        "mine-2": ("POST", "/v1/completions", 400),
    }
    assert any("output tokens" in line["message"] and line.get("request_id") == "mine-1" for line in found)
    ours = [line for line in found if line["logger"].startswith("server")]
    assert not any("secret" in json.dumps(line) or answer.json()["choices"][0]["text"] in str(line) for line in ours)


def test_an_exception_stays_on_its_line():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("server", logging.ERROR, "", 1, "it %s", ("failed",), sys.exc_info())
    written = JsonLines().format(record)
    assert "\n" not in written
    line = json.loads(written)
    assert (line["level"], line["message"]) == ("error", "it failed")
    assert "ValueError: two\nlines" in line["exception"] and line["time"].endswith("+00:00")

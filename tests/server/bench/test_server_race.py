"""Servers beside each other over HTTP: what is counted, what a failure is, and who cannot take part."""

import json
import sys
import textwrap
from pathlib import Path

import pytest

from server.bench.server_race import LLAMA_CPP, TRANSFORMERS, Contender, ServerUnavailable, contender, servers_report

SERVER = textwrap.dedent("""
    import http.server, json, sys

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            words = body["messages"][0]["content"].split()
            assert body["stream"] and body["temperature"] == 0
            self.send_response(503 if "refused" in words else 200)
            self.end_headers()
            for word in words[: body["max_tokens"]]:
                event = {"error": {"message": "broken"}} if word == "broken" else {
                    "choices": [{"delta": {"role": "assistant", "content": word + " "}}]}
                self.wfile.write(f": comment\\ndata: {json.dumps(event)}\\n\\n".encode())
            self.wfile.write(b"data: [DONE]\\n\\n")

        def log_message(self, *_):
            pass

    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
""")


def test_texts_are_counted_alike_and_failures_are_told(tmp_path: Path) -> None:
    file = tmp_path / "server.py"
    file.write_text(SERVER)
    names = ("first", "second")
    contenders = [Contender(name, (sys.executable, str(file)), "m") for name in names]
    told: list[str] = []
    prompts = ["a b c d", "a b", "a broken one", "refused"]
    report = servers_report(contenders, prompts, [1, 3], 3, 1, lambda text: len(text.split()), told.append)
    assert set(report) == {*names, "unavailable"} and report["unavailable"] == {}
    for name in names:
        assert [report[name][n]["failures"] for n in ("1", "3")] == [0, 2]
        assert report[name]["1"]["tokens_per_s"] > 0 and report[name]["1"]["first_token_p95_ms"] > 0
    assert len(told) == 4 and json.dumps(report)


def test_a_server_that_does_not_come_up_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = Contender("dead", (sys.executable, "-c", "raise SystemExit(3)"), "")
    report = servers_report([dead], ["a"], [1], 2, 1, len, lambda _: None)
    assert list(report) == ["unavailable"] and "ended with 3" in report["unavailable"]["dead"]
    monkeypatch.setattr("server.bench.server_race.START_TIMEOUT_S", 0.3)
    silent = Contender("silent", (sys.executable, "-c", "import signal; signal.pause()"), "")
    report = servers_report([silent], ["a"], [1], 2, 1, len, lambda _: None)
    assert list(report) == ["unavailable"] and "within 0 s" in report["unavailable"]["silent"]
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ServerUnavailable, match="names the same weights"):
        contender(TRANSFORMERS, file, [], 2, 100)
    with pytest.raises(ServerUnavailable, match="known are"):
        contender("vllm", file, [], 2, 100)
    monkeypatch.setattr("server.bench.server_race.installed", lambda module: module != "sse_starlette")
    with pytest.raises(ServerUnavailable, match="sse_starlette is missing"):
        contender(LLAMA_CPP, file, [], 2, 100)

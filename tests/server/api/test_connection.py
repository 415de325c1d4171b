"""What a client may do to its connection: be slow, leave answers unread, come too often, speak no HTTP."""

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
from contextlib import ExitStack

import httpx
import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from server.app import DrainingServer, serve
from server.connection import Connection
from server.settings import SettingsError

COMPLETION = {"model": "tiny", "prompt": "one", "max_tokens": 20}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def connected(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer_of(connection):
    return b"".join(iter(lambda: connection.recv(65536), b""))


def was_cut(connection):
    """Whether the server ends the connection without a word, by a reset or in order."""
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-y"])
def test_heads_that_do_not_come_are_cut(listen, make_model, monkeypatch, sent):
    monkeypatch.setattr("server.connection.HEAD_DEADLINE_S", 0.2)
    with listen(make_model()) as (url, _), connected(url) as connection:
        connection.sendall(sent)
        assert was_cut(connection)


def test_a_second_head_that_does_not_come_is_cut_as_well(listen, make_model, monkeypatch):
    monkeypatch.setattr("server.connection.HEAD_DEADLINE_S", 0.2)
    with listen(make_model()) as (url, _), connected(url) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = b""
        while b'"version"' not in answer:
            answer += connection.recv(65536)
        connection.sendall(b"GET /ver")
        assert was_cut(connection)


class Unread(asyncio.Transport):
    """A client that takes nothing."""

    def __init__(self):
        super().__init__()
        self.cut = asyncio.Event()

    def abort(self):
        self.cut.set()

    def is_closing(self):
        return False


def test_a_body_that_does_not_come_is_told_and_cut(listen, make_model, monkeypatch):
    monkeypatch.setattr("server.api.gate.BODY_DEADLINE_S", 0.2)
    with listen(make_model()) as (url, _), connected(url) as connection:
        connection.sendall(HEAD + b"content-length: 100\r\n\r\n{")
        answer = answer_of(connection)
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"code":"timeout"' in answer


@pytest.mark.anyio
async def test_an_answer_that_is_not_read_is_cut(make_settings):
    server = DrainingServer(make_settings(send_timeout_s=0.05), lambda *_: None)
    connection = server.config.http_protocol_class(config=server.config, server_state=server.server_state, app_state={})
    transport = Unread()
    connection.connection_made(transport)
    connection.pause_writing()
    timer = connection.send_timer
    connection.resume_writing()
    assert timer.cancelled() and connection.send_timer is None
    connection.pause_writing()
    await asyncio.wait_for(transport.cut.wait(), 20)
    connection.connection_lost(OSError("cut"))
    assert connection.send_timer is None and connection.head_timer is None


def test_more_connections_than_allowed_are_told(listen, make_model, until):
    with listen(make_model(), max_connections=3) as (url, server), ExitStack() as stack:
        until(lambda: not server.server_state.connections)
        for _ in range(3):
            stack.enter_context(connected(url))
        until(lambda: len(server.server_state.connections) == 3)
        with connected(url) as late:
            answer = answer_of(late)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 5" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        stack.close()
        until(lambda: not server.server_state.connections)
        assert httpx.get(f"{url}/health").status_code == 200


def test_what_is_no_http_is_told_in_json(listen, make_model, caplog):
    with listen(make_model()) as (url, _):
        with connected(url) as connection:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01")
            connection.sendall(b"\r\n\r\n")
            head, _, body = answer_of(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_http"
        with connected(url) as connection:  # garbage behind a body whose answer has been given
            connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n")
            assert b"HTTP/1.1 400" in answer_of(connection)
        assert httpx.get(f"{url}/health").status_code == 200
    assert "Traceback" not in caplog.text


def test_heads_with_too_many_lines_are_431(listen, make_model):
    with listen(make_model()) as (url, _):
        answer = httpx.get(f"{url}/health", headers=[(f"x-{i}", "y") for i in range(120)])
        assert (answer.status_code, answer.json()["error"]["code"]) == (431, "too_many_headers")
        answer = httpx.get(f"{url}/health", headers={"x": "y" * 20_000})
        assert (answer.status_code, answer.json()["error"]["code"]) == (431, "headers_too_large")


def test_whole_addresses_are_taken_as_their_paths(listen, make_model):
    """As proxies are sent; the address tells the host, whatever the head says."""
    with listen(make_model()) as (url, _):
        for host, status in ((b"LOCALHOST:80", b"200"), (b"evil.example", b"403")):
            with connected(url) as connection:
                connection.sendall(b"GET HTTP://" + host + b"/v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
                assert answer_of(connection).startswith(b"HTTP/1.1 " + status)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificate: openssl")
def test_https_with_a_certificate_and_a_sentence_without(make_settings, listen, make_model, tmp_path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    trust = ssl.create_default_context(cafile=str(cert))
    with listen(lambda *_: make_model(), tls_cert=cert, tls_key=key) as (url, _):
        url = url.replace("http://", "https://")
        assert httpx.get(f"{url}/v1/models", verify=trust).status_code == 200
    cert.write_text("not a certificate")
    with pytest.raises(SettingsError, match=r"tls_cert .*cert.pem"):
        serve(make_settings(port=0, tls_cert=cert, tls_key=key), lambda *_: make_model())


@pytest.mark.anyio
async def test_transports_of_other_event_loops_are_taken():
    written = []

    class Transport:  # as uvloop's, which is no asyncio.Transport
        def get_extra_info(self, name, default=None):
            return default

        def write(self, data):
            written.append(data)

        def is_closing(self):
            return False

        def close(self):
            pass

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    config = Config(app, lifespan="off", log_config=None)
    config.load()
    connection = Connection(config, ServerState(), {}, send_timeout_s=1, max_connections=10)
    connection.connection_made(Transport())
    connection.data_received(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    async with asyncio.timeout(20):
        await asyncio.gather(*connection.tasks)
    connection.connection_lost(None)
    assert written[0].startswith(b"HTTP/1.1 204")

import http.client
import io
import socket

import pytest

from server.api.errors import ApiError
from server.vision import urls
from server.vision.urls import MAX_REMOTE_BYTES, check_url, fetch_image, is_public, public_address
from vision.images import ImageError

HOSTS = frozenset({"images.example"})


@pytest.mark.parametrize(
    ("url", "hosts", "words"),
    [
        ("https://images.example/a", frozenset(), "not fetched by this server"),
        ("http://images.example/a", HOSTS, "Only plain https"),
        ("https://images.example:8443/a", HOSTS, "without a port"),
        ("https://user@images.example/a", HOSTS, "user name"),
        ("https://images.example@other.example/a", HOSTS, "user name"),
        ("https://other.example/a", HOSTS, "'other.example' is not among"),
        ("https://images.example.other.example/a", HOSTS, "is not among"),
        ("https://images.example/a b", HOSTS, "blanks"),
        ("https://images.example/a\r\nX: y", HOSTS, "blanks"),
        ("https://images.example:x/a", HOSTS, "no URL"),
        ("https://[::1/a", HOSTS, "no URL"),
    ],
)
def test_urls_that_are_not_fetched(url, hosts, words):
    with pytest.raises(ApiError) as refused:
        check_url(url, hosts)
    assert words in refused.value.detail
    assert (refused.value.status_code, refused.value.code) == (400, "remote_url_not_allowed")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1",
    ],
)  # fmt: skip
def test_addresses_inside_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34"])
def test_addresses_on_the_internet_are_public(address):
    assert is_public(address)


def resolve_to(monkeypatch, *addresses):
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)


def test_one_private_address_among_several_is_enough_to_refuse(monkeypatch):
    resolve_to(monkeypatch, "93.184.216.34", "10.0.0.1")
    with pytest.raises(ApiError, match="private network"):
        public_address("images.example")
    resolve_to(monkeypatch, "93.184.216.34")
    assert public_address("images.example") == "93.184.216.34"


class Wire:
    """A socket that has the answer already."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.sent = b""

    def makefile(self, *_, **__):
        return io.BytesIO(self.answer)

    def sendall(self, data):
        self.sent += data

    def close(self):
        pass


@pytest.fixture
def answer_with(monkeypatch):
    resolve_to(monkeypatch, "93.184.216.34")

    def prepare(head: str, body: bytes = b"") -> Wire:
        wire = Wire(f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

        def connect(connection):
            assert (connection.host, connection.address) == ("images.example", "93.184.216.34")
            connection.sock = wire

        monkeypatch.setattr(urls.PinnedConnection, "connect", connect)
        return wire

    return prepare


def test_an_image_is_fetched_from_the_address_that_was_checked(answer_with):
    wire = answer_with("200 OK\r\nContent-Type: image/png", b"the image")
    assert fetch_image("https://images.example/a?b=c", HOSTS) == b"the image"
    assert wire.sent.startswith(b"GET /a?b=c HTTP/1.1\r\nHost: images.example\r\n")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("302 Found\r\nLocation: http://10.0.0.1/\r\nContent-Type: image/png", "answered 302"),
        ("200 OK\r\nContent-Type: text/html", "text/html instead of an image"),
        ("404 Not Found\r\nContent-Type: image/png", "answered 404"),
        ("nonsense", "did not give"),
    ],
)
def test_other_answers_are_no_image(answer_with, head, words):
    answer_with(head)
    with pytest.raises(ImageError, match=words):
        fetch_image("https://images.example/a", HOSTS)


def test_too_many_bytes_are_cut_off(answer_with):
    answer_with("200 OK\r\nContent-Type: image/png", bytes(MAX_REMOTE_BYTES + 1))
    with pytest.raises(ImageError, match="larger than") as error:
        fetch_image("https://images.example/a", HOSTS)
    assert error.value.code == "image_too_large"


def test_a_server_that_cannot_be_reached_is_told(monkeypatch):
    resolve_to(monkeypatch, "93.184.216.34")

    def refuse(connection):
        raise http.client.CannotSendRequest

    monkeypatch.setattr(urls.PinnedConnection, "connect", refuse)
    with pytest.raises(ImageError, match="did not give"):
        fetch_image("https://images.example/a", HOSTS)

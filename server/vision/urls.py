"""Images that lie elsewhere, fetched for a client: only over https, only from hosts the operator named.

A server that fetches what strangers name is a way into the network it stands in. So: nothing unless configured; the
name is resolved once and every address must be public; that very address is connected to; no redirects, no proxies, no
cookies; bounded in bytes and in time.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, urlsplit

from server.api.errors import ApiError, shown
from vision.images import ImageError

HTTPS_PORT = 443
CONNECT_TIMEOUT_S = 5.0
FETCH_TIMEOUT_S = 15.0
MAX_REMOTE_BYTES = 20 * 2**20
CHUNK = 64 * 2**10


class PinnedConnection(http.client.HTTPSConnection):
    """HTTPS to one address, while the certificate is checked against the host's name."""

    def __init__(self, host: str, address: str) -> None:
        self.tls = ssl.create_default_context()
        super().__init__(host, HTTPS_PORT, timeout=CONNECT_TIMEOUT_S, context=self.tls)
        self.address = address

    def connect(self) -> None:
        """Connect to the address that was checked, not to whatever the name resolves to by now."""
        raw = socket.create_connection((self.address, HTTPS_PORT), timeout=CONNECT_TIMEOUT_S)
        self.sock = self.tls.wrap_socket(raw, server_hostname=self.host)


def fetch_image(url: str, hosts: frozenset[str]) -> bytes:
    """The bytes behind ``url``. Errors: ApiError where the URL is not allowed; ImageError where nothing comes."""
    parts = check_url(url, hosts)
    assert parts.hostname is not None
    connection = PinnedConnection(parts.hostname, public_address(parts.hostname))
    deadline = time.monotonic() + FETCH_TIMEOUT_S
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        response = connection.getresponse()
        kind = response.headers.get_content_type()
        if response.status != 200 or not kind.startswith("image/"):
            raise ImageError("invalid_image", f"{parts.hostname} answered {response.status} {kind} instead of an image")
        return read_bounded(response, deadline)
    except (OSError, http.client.HTTPException) as error:
        raise ImageError("invalid_image", f"{parts.hostname} did not give the image") from error
    finally:
        connection.close()


def check_url(url: str, hosts: frozenset[str]) -> SplitResult:
    """Errors: ApiError saying what is allowed."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise refused(f"{shown(url)} is no URL.") from error
    if not hosts:
        raise refused("URLs are not fetched by this server; send the image itself, as a file or as base64.")
    if parts.scheme.lower() != "https" or port not in (None, HTTPS_PORT) or parts.username is not None:
        raise refused("Only plain https URLs are fetched, without a port or a user name.")
    if parts.hostname not in hosts:
        raise refused(f"The host {shown(parts.hostname)} is not among those this server fetches images from.")
    if any(ord(character) <= ord(" ") or ord(character) > ord("~") for character in url):
        raise refused("The URL holds blanks or characters that must be escaped.")
    return parts


def refused(message: str) -> ApiError:
    """400 for a URL."""
    return ApiError(400, message, param="image", code="remote_url_not_allowed")


def public_address(host: str) -> str:
    """An address of ``host``, all of which must be public. Errors: ImageError, ApiError."""
    try:
        answers = socket.getaddrinfo(host, HTTPS_PORT, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ImageError("invalid_image", f"the host {host} cannot be found") from error
    addresses = [str(answer[4][0]) for answer in answers]
    if not addresses or not all(is_public(address) for address in addresses):
        raise refused(f"The host {host} has an address inside a private network.")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is on the open internet, also one written inside an IPv6 address."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.teredo is not None or parsed in ipaddress.ip_network("64:ff9b::/32"):
            return False
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if inner is not None:
            return inner.is_global
    return parsed.is_global and not parsed.is_multicast


def read_bounded(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body. Errors: ImageError where it is too large or too slow."""
    data = bytearray()
    while chunk := response.read1(CHUNK):
        data += chunk
        if len(data) > MAX_REMOTE_BYTES:
            raise ImageError("image_too_large", f"the image is larger than {MAX_REMOTE_BYTES} bytes")
        if time.monotonic() > deadline:
            raise ImageError("invalid_image", f"the image did not come within {FETCH_TIMEOUT_S:.0f} s")
    return bytes(data)

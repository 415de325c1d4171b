"""What stands before every route: request id, access, size and pace of the body, and the answer to our own faults."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from urllib.parse import quote

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.access import Access
from server.api.errors import ApiError, internal_error, retry_after
from server.logs import CURRENT_REQUEST

logger = logging.getLogger(__name__)

MAX_HEADERS = 100
MAX_HEAD_BYTES = 16 * 2**10
MAX_BODY_BYTES = 8 * 2**20
VISION_PATHS = "/v1/vision/"
MAX_VISION_BODY_BYTES = 32 * 2**20
MAX_HELD_BYTES = 256 * 2**20  # bodies of all requests together
BODY_DEADLINE_S = 30.0
DRAIN_S = 10.0
ROOM_RETRY_S = 1.0
MAX_DRAINED_BYTES = 256 * 2**20
FIELD_CHARS = ".*[]$"  # a blank at its end is no header value
MAX_NAME_CHARS = 100
EMPTY_NAME = '""'
# Nothing that the server sends is a document of its own, unless its route says otherwise.
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
WHOLE_ADDRESS = re.compile(r"https?://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Gate:
    """ASGI middleware. ``access`` says who may come in."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access
        self.room = BodyRoom(MAX_HELD_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = as_routes_know_it(scope)
        headers = Headers(scope=scope)
        request_id = accepted_request_id(headers.get("x-request-id"))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        CURRENT_REQUEST.set(request_id)
        body = BodyReader(receive, max_body_bytes(scope["path"]), self.room)
        answer = AnswerSender(scope, body, send)
        try:
            state["key_digests"] = self.access.digests
            with self.access.admit(scope, headers) as state["limits"]:
                check_head(scope["path"], headers)
                await self.app(scope, body, answer)
        except ApiError as error:
            await error.response()(scope, body, answer)
        except ClientDisconnect:
            logger.info("request %s: the client left before its body was whole", request_id)
        except Exception:  # the one place that answers our own faults
            logger.exception("request %s failed", request_id)
            if answer.started:
                raise
            await internal_error(request_id).response()(scope, body, answer)
        finally:
            body.release()


def check_head(path: str, headers: Headers) -> None:
    """Errors: ApiError 431, 415 and 413 for what is wrong before a byte of the body is read."""
    if len(headers) > MAX_HEADERS:
        message = f"The request has {len(headers)} headers; at most {MAX_HEADERS} are allowed."
        raise ApiError(431, message, code="too_many_headers", headers={"Connection": "close"})
    num_bytes = sum(len(name) + len(value) for name, value in headers.raw)
    if num_bytes > MAX_HEAD_BYTES:
        message = f"The request's headers have {num_bytes} bytes; at most {MAX_HEAD_BYTES} are allowed."
        raise ApiError(431, message, code="headers_too_large", headers={"Connection": "close"})
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "Compressed bodies are not accepted; send it plain.", code="unsupported_media_type")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > max_body_bytes(path):
        raise too_large(max_body_bytes(path))


class BodyRoom:
    """The memory that the bodies of all requests may take together, in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Errors: ApiError 429 where there is no room."""
        if self.num_bytes + num_bytes > self.max_bytes:
            headers = {"Retry-After": retry_after(ROOM_RETRY_S), "Connection": "close"}
            message = f"The server holds {self.num_bytes} bytes of other requests; try again soon."
            raise ApiError(429, message, kind="overloaded", code="queue_full", headers=headers)
        self.num_bytes += num_bytes


class BodyReader:
    """A ``receive`` that bounds the body in bytes and in time, then passes everything through."""

    def __init__(self, receive: Receive, max_bytes: int, room: BodyRoom) -> None:
        self.receive = receive
        self.max_bytes = max_bytes
        self.room = room
        self.num_bytes = 0
        self.complete = False  # nothing more of the body will come
        self.deadline = asyncio.get_running_loop().time() + BODY_DEADLINE_S

    async def __call__(self) -> Message:
        """The next ASGI message. Errors: ApiError 413, 408, and 429 where all bodies together are too large."""
        if self.complete:
            return await self.receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive()
        except TimeoutError as error:
            text = f"The body did not arrive within {BODY_DEADLINE_S:.0f} s."
            raise ApiError(408, text, code="timeout", headers={"Connection": "close"}) from error
        if message["type"] == "http.disconnect":
            self.complete = True
        else:
            num_bytes = len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self.num_bytes + num_bytes > self.max_bytes:
                raise too_large(self.max_bytes)
            self.room.take(num_bytes)
            self.num_bytes += num_bytes
        return message

    def release(self) -> None:
        """The request has ended: its body is held no more."""
        self.room.num_bytes -= self.num_bytes
        self.num_bytes = 0

    async def drain(self) -> None:
        """Read and drop the rest, within bounds: a connection closed on unread data takes the answer with it."""
        deadline = min(self.deadline, asyncio.get_running_loop().time() + DRAIN_S)
        num_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while not self.complete and num_bytes < MAX_DRAINED_BYTES:
                    message = await self.receive()
                    num_bytes += len(message.get("body", b""))
                    self.complete = not message.get("more_body", False)


class AnswerSender:
    """A ``send`` that adds what every answer carries.

    An answer goes out at once, also where the body is still coming in (it was refused); it ends when the client has
    sent what it was sending.
    """

    def __init__(self, scope: Scope, body: BodyReader, send: Send) -> None:
        self.scope = scope
        self.body = body
        self.send = send
        self.started = False

    async def __call__(self, message: Message) -> None:
        """Pass an ASGI message on."""
        if message["type"] == "http.response.start":
            self.started = True
            set_headers(self.scope, MutableHeaders(scope=message))
        elif not message.get("more_body", False) and not self.body.complete:
            await self.send({**message, "more_body": True})
            await self.body.drain()
            message = {"type": "http.response.body", "body": b""}
        await self.send(message)


def as_routes_know_it(scope: Scope) -> Scope:
    """The request with single slashes and none at the end of its path; HEAD, answered without body, as GET; a whole
    address, as proxies are sent (RFC 9112, 3.2.2), as its path, with its host in the stead of the head's."""
    if address := WHOLE_ADDRESS.fullmatch(scope["path"]):
        kept = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope = {**scope, "path": address[2], "headers": [(b"host", address[1].encode()), *kept]}
    path = re.sub("/+", "/", scope["path"]).rstrip("/") or "/"
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "raw_path": path.encode(), "method": method}


def set_headers(scope: Scope, headers: MutableHeaders) -> None:
    """What every answer carries: the request's id, what it may be used for, what its caller has left, and the names of
    the fields that were ignored."""
    headers["x-request-id"] = scope["state"]["request_id"]
    for name, value in (SECURITY_HEADERS | scope["state"].get("limits", {})).items():
        headers.setdefault(name, value)
    if ignored := scope["state"].get("ignored_fields"):
        names = [quote(name, safe=FIELD_CHARS)[:MAX_NAME_CHARS] or EMPTY_NAME for name in ignored]
        headers["x-dovetail-ignored"] = ", ".join(names)


async def require_json(request: Request) -> None:
    """Route dependency: the body must be declared as JSON, which also keeps other sites' forms out."""
    if (kind := content_type(request)) != "application/json":
        message = f"The content type is {kind or 'missing'}; send application/json."
        raise ApiError(415, message, code="unsupported_media_type")


def content_type(request: Request) -> str:
    """What the body is said to be, without parameters; empty where nothing is said."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def max_body_bytes(path: str) -> int:
    """How large a body may be: images are larger than texts."""
    return MAX_VISION_BODY_BYTES if path.startswith(VISION_PATHS) else MAX_BODY_BYTES


def accepted_request_id(given: str | None) -> str:
    """The client's id where it is harmless, else a new one."""
    return given if given is not None and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def too_large(max_bytes: int) -> ApiError:
    """413 with the limit; the connection ends behind it."""
    message = f"The body is larger than {max_bytes} bytes, the server's limit."
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})

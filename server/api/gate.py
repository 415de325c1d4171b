"""What stands before every route: request id, key, size and pace of the body, and the answer to our own faults."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import uuid
from urllib.parse import quote

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, internal_error

logger = logging.getLogger(__name__)

PUBLIC_PATHS = frozenset({"/health"})
MAX_BODY_BYTES = 8 * 2**20
VISION_PATHS = "/v1/vision/"
MAX_VISION_BODY_BYTES = 32 * 2**20
BODY_DEADLINE_S = 30.0
DRAIN_S = 10.0
MAX_DRAINED_BYTES = 256 * 2**20
FIELD_CHARS = ".*[]$ "
MAX_NAME_CHARS = 100
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Gate:
    """ASGI middleware. Without a key configured every path is open; with one, all but ``PUBLIC_PATHS`` need it."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self.key_digest = None if api_key is None else digest(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope = as_routes_know_it(scope)
        request_id = accepted_request_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        body = BodyReader(receive, max_body_bytes(scope["path"]))
        answer = AnswerSender(scope, body, send)
        try:
            self._check(scope["path"], headers)
            await self.app(scope, body, answer)
        except ApiError as error:
            await error.response()(scope, body, answer)
        except Exception:  # the one place that answers our own faults
            logger.exception("request %s failed", request_id)
            if answer.started:
                raise
            await internal_error(request_id).response()(scope, body, answer)

    def _check(self, path: str, headers: Headers) -> None:
        if self.key_digest is not None and path not in PUBLIC_PATHS:
            given = headers.get("authorization", "").removeprefix("Bearer ") or headers.get("x-api-key", "")
            if not hmac.compare_digest(digest(given), self.key_digest):
                message = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
                challenge = {"WWW-Authenticate": "Bearer"}
                raise ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=challenge)
        if headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "Compressed bodies are not accepted; send it plain.", code="unsupported_media_type")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > max_body_bytes(path):
            raise too_large(max_body_bytes(path))


class BodyReader:
    """A ``receive`` that bounds the body in bytes and in time, then passes everything through."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self.receive = receive
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.complete = False  # nothing more of the body will come
        self.deadline = asyncio.get_running_loop().time() + BODY_DEADLINE_S

    async def __call__(self) -> Message:
        """The next ASGI message. Errors: ApiError 413 and 408."""
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
            self.num_bytes += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self.num_bytes > self.max_bytes:
                raise too_large(self.max_bytes)
        return message

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
    """The request with single slashes and none at the end of its path; HEAD, answered without body, as GET."""
    path = re.sub("/+", "/", scope["path"]).rstrip("/") or "/"
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "raw_path": path.encode(), "method": method}


def set_headers(scope: Scope, headers: MutableHeaders) -> None:
    """What every answer carries: the request's id, and the names of the fields that were ignored."""
    headers["x-request-id"] = scope["state"]["request_id"]
    if ignored := scope["state"].get("ignored_fields"):
        headers["x-dovetail-ignored"] = ", ".join(quote(name, safe=FIELD_CHARS)[:MAX_NAME_CHARS] for name in ignored)


async def require_json(request: Request) -> None:
    """Route dependency: the body must be declared as JSON, which also keeps other sites' forms out."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"The content type is {kind or 'missing'}; send application/json."
        raise ApiError(415, message, code="unsupported_media_type")


def max_body_bytes(path: str) -> int:
    """How large a body may be: images are larger than texts."""
    return MAX_VISION_BODY_BYTES if path.startswith(VISION_PATHS) else MAX_BODY_BYTES


def digest(key: str) -> bytes:
    """Keys are compared as digests, so that the time taken tells nothing."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def accepted_request_id(given: str | None) -> str:
    """The client's id where it is harmless, else a new one."""
    return given if given is not None and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def too_large(max_bytes: int) -> ApiError:
    """413 with the limit; the connection ends behind it."""
    message = f"The body is larger than {max_bytes} bytes, the server's limit."
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})

"""Errors on the wire, in OpenAI's shape, made from types in one table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server.engine.request import ContextTooLong, EngineError, EngineStopped, QueueFull
from server.text import InvalidText, TextError, TextTooLong
from server.vision.child import VisionError, VisionStopped
from server.vision.worker import VisionQueueFull

MAX_RETRY_AFTER_S = 120  # the official client gives up on longer ones
MAX_SHOWN = 80

VERSIONED = ("models", "completions", "chat/completions", "responses", "messages", "embeddings")
INSTEAD = {f"/{name}": f"/v1/{name}, a client's base URL ends in /v1" for name in VERSIONED} | {
    "/completion": "/v1/completions", "/embedding": "/v1/embeddings", "/props": "/v1/models",
    "/slots": "/health and /metrics", "/api/chat": "/v1/chat/completions", "/api/generate": "/v1/completions",
    "/api/tags": "/v1/models", "/api/version": "/version", "/generate": "/v1/completions",
}  # fmt: skip  # for routes of other servers


class ApiError(HTTPException):
    """An answer other than success: HTTP status, the four keys of OpenAI's error object, and numbers for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.details = dict(details or {})
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON object; whatever a client sent and UTF-8 cannot carry is escaped."""
        return {
            "error": {
                "message": printable(self.detail),
                "type": self.kind,
                "param": None if self.param is None else printable(self.param),
                "code": self.code,
            }
            | self.details
        }

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status_code, headers=dict(self.headers or {}))


class UnsupportedParameter(ApiError):
    """A field the API knows and this server cannot honour."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(400, message, param=param, code="unsupported_parameter")


class InvalidValue(ApiError):
    """A field of the right type with a value that is not allowed."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(400, message, param=param, code="invalid_value")


class NotServing(ApiError):
    """The server lives but cannot answer now; the code is model_loading, model_failed, shutting_down or engine_dead."""

    def __init__(self, code: str, message: str, retry_after_s: float) -> None:
        super().__init__(
            503, message, kind="service_unavailable", code=code, headers={"Retry-After": retry_after(retry_after_s)}
        )


def internal_error(request_id: str) -> ApiError:
    """A fault of ours: no detail leaves the server, the log has it under the same id."""
    message = f"The server failed on this request; its log tells more under request id {request_id}."
    return ApiError(500, message, kind="server_error", code="internal_error")


def retry_after(seconds: float) -> str:
    """Whole seconds a client should wait, 1 to 120."""
    return str(min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S))


def printable(text: str) -> str:
    """Lone surrogates as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any) -> str:
    """A client's value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def from_engine(error: EngineError) -> ApiError:
    """What the engine refuses, on the wire."""
    if isinstance(error, QueueFull):
        headers = {"Retry-After": retry_after(error.retry_after_s)}
        return ApiError(429, f"{error}.", kind="overloaded", code="queue_full", headers=headers)
    if isinstance(error, ContextTooLong):
        details = {"n_prompt_tokens": error.prompt_tokens, "n_ctx": error.context}
        return ApiError(400, str(error), code="context_length_exceeded", details=details)
    if isinstance(error, EngineStopped):
        return NotServing("engine_dead", str(error) or "The engine has stopped; restart the server.", MAX_RETRY_AFTER_S)
    return ApiError(500, "The engine failed on this request.", kind="server_error", code="internal_error")


def from_vision(error: VisionError) -> ApiError:
    """What the vision worker refuses or fails with, on the wire."""
    if isinstance(error, VisionQueueFull):
        headers = {"Retry-After": retry_after(error.retry_after_s)}
        return ApiError(429, f"{error}.", kind="overloaded", code="queue_full", headers=headers)
    if isinstance(error, VisionStopped):
        return NotServing("engine_dead", f"{error}.", MAX_RETRY_AFTER_S)
    return ApiError(500, f"{error}.", kind="server_error", code="internal_error")


def from_text(error: TextError) -> ApiError:
    """Text the codec does not take, on the wire."""
    codes = {InvalidText: "invalid_unicode", TextTooLong: "context_length_exceeded"}
    code = codes.get(type(error), "invalid_value")
    return ApiError(400, f"{error}.", code=code)


VALUE_FAULTS = ("greater_", "less_", "finite_", "literal_", "value_", "too_", "string_too_", "int_parsing_size")


def from_validation(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first fault of a request body, with the dotted path of the field."""
    fault = faults[0]
    # Where several types are allowed, the path also holds the type that was tried.
    kind, path = fault["type"], [str(part) for part in fault["loc"][1:] if "[" not in str(part) and part != "str"]
    if kind == "json_invalid":
        message = f"The body is not JSON: {fault['ctx']['error']} at character {fault['loc'][-1]}."
        return ApiError(400, message, code="invalid_json")
    param = ".".join(path) or None
    name = param or "the request body"
    if kind == "missing":
        return ApiError(400, f"{name} is missing.", param=param, code="missing_required_parameter")
    cause = fault.get("ctx", {}).get("error")
    if kind == "string_unicode":
        return ApiError(400, f"{name} holds a key that is not valid Unicode.", param=param, code="invalid_unicode")
    if isinstance(cause, InvalidText):
        return ApiError(400, f"{name}: {cause}.", param=param, code="invalid_unicode")
    code = "invalid_value" if kind.startswith(VALUE_FAULTS) else "invalid_type"
    if cause is not None:
        return ApiError(400, f"{name}: {cause}.", param=param, code=code)
    given = "" if isinstance(fault.get("input"), dict | list) else f", not {shown(fault.get('input'))}"
    return ApiError(400, f"{name}: {fault['msg'].removeprefix('Input ')}{given}.", param=param, code=code)


def from_http(error: HTTPException, request: Request) -> ApiError:
    """What the framework raises, in our shape."""
    if isinstance(error, ApiError):
        return error
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"There is no route {where}; {way_from(request)}.", code="unknown_route")
    if error.status_code == 405:
        message = f"{where} is not allowed; the Allow header names the methods that are."
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    if error.status_code == 400:
        return ApiError(400, "The body is not JSON in UTF-8 with at most a few hundred levels.", code="invalid_json")
    return ApiError(error.status_code, str(error.detail), headers=error.headers)


def way_from(request: Request) -> str:
    """What to do instead of asking for a route that is not there."""
    way = INSTEAD.get(request.url.path.rstrip("/"))
    return "GET /docs lists those there are" if way is None else f"use {way}"


def install_error_handlers(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape; faults of ours are answered by the gate around the app."""

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return from_http(error, request).response()

    async def on_validation(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    async def on_engine(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
        assert isinstance(error, EngineError)
        return from_engine(error).response()

    async def on_vision(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
        assert isinstance(error, VisionError)
        return from_vision(error).response()

    async def on_text(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
        assert isinstance(error, TextError)
        return from_text(error).response()

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(EngineError, on_engine)
    app.add_exception_handler(VisionError, on_vision)
    app.add_exception_handler(TextError, on_text)

"""Reading JSON bodies: bounded in what they hold, and away from the event loop where that takes long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from server.api.errors import ApiError
from server.api.gate import content_type
from server.heaps import and_give_back

SMALL_BODY = 32 * 2**10  # bytes that are read in less time than another thread takes to be asked
LARGE_BODY = 256 * 2**10  # bytes whose tokens take so long that no other request should wait for them
MAX_VALUES = 500_000
UNREADABLE = "The body is not JSON in UTF-8 with at most a few hundred levels."

Result = TypeVar("Result")


class JsonRoute(APIRoute):
    """A route whose JSON body is parsed and checked before the framework sees it, large ones one at a time in
    ``Serving.bodies``; their bytes are not kept while the answer runs. The errors are the framework's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's handler behind the reading."""
        answer = super().get_route_handler()
        if self.body_field is None:
            return answer
        schema = cast(type[BaseModel], self.body_field.field_info.annotation)

        async def read_and_answer(request: Request) -> Response:
            raw = b"".join([chunk async for chunk in request.stream()])
            request.state.is_large = len(raw) > LARGE_BODY
            if not raw or content_type(request) != "application/json":
                return await answer(ReadRequest(request, raw, None))
            if len(raw) <= SMALL_BODY:
                body = parse(raw, schema)
            else:
                body = await request.app.state.serving.aside(parse, raw, schema)
            del raw
            return await answer(ReadRequest(request, b"{}", body))

        return read_and_answer


async def in_thread(request: Request, work: Callable[..., Result], *arguments: Any) -> Result:
    """Run ``work`` away from the event loop. What large bodies ask for runs one after another, so that what small ones
    ask for never waits for it."""
    if request.state.is_large:
        return cast(Result, await request.app.state.serving.aside(and_give_back, work, *arguments))
    return await asyncio.to_thread(work, *arguments)


class ReadRequest(Request):
    """A request whose body has been read: ``raw``, or ``parsed`` where that is JSON."""

    def __init__(self, request: Request, raw: bytes, parsed: BaseModel | None) -> None:
        super().__init__(request.scope, request.receive)
        self.raw = raw
        self.parsed = parsed

    async def body(self) -> bytes:
        """The bytes, or anything in their stead."""
        return self.raw

    async def json(self) -> Any:
        """What the bytes hold."""
        return self.parsed


def parse(raw: bytes, schema: type[BaseModel]) -> BaseModel:
    """A body of ``schema``. Errors: RequestValidationError, ApiError 400 and 413, what the schema's checks raise."""
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_VALUES:
        message = f"The body holds more than {MAX_VALUES} values (commas and brackets are counted)."
        raise ApiError(413, message, code="request_too_large")
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        fault = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "", "ctx": {"error": error.msg}}
        raise RequestValidationError([fault]) from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, UNREADABLE, code="invalid_json") from error
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]) from error

"""One API call's answer, whole or as a stream, for any wire format of choices."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from server.api.errors import ApiError, from_engine, internal_error
from server.api.generation import Generation
from server.api.schemas import GenerationBody
from server.api.sse import DONE, KEEPALIVE, EventStream, event
from server.engine.request import EngineError

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; the access log does


class ChoiceFormat(Protocol):
    """How choices look on one route. Every method gives an entry of ``choices``; None means: send nothing."""

    @property
    def id_prefix(self) -> str:
        """What the answer's id begins with."""

    @property
    def object_name(self) -> str:
        """``object`` of a whole answer."""

    @property
    def chunk_object_name(self) -> str:
        """``object`` of a stream's chunk."""

    def whole(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """A complete choice."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream sends for a choice before its text."""

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Text as it comes."""

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        """The last entry of a choice."""


@dataclass(frozen=True)
class Reply:
    """Identity and format of an answer, and what the stream was asked to carry."""

    format: ChoiceFormat
    model: str
    created: int
    include_usage: bool = False
    continuous_usage: bool = False
    keepalive_s: float = 10.0
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def to(cls, body: GenerationBody, model: str, format: ChoiceFormat, keepalive_s: float) -> Reply:
        """The reply that this body asks for; a stream silent for ``keepalive_s`` sends a comment."""
        options = body.stream_options
        continuous = options.include_usage and options.continuous_usage_stats
        return cls(format, model, int(time.time()), options.include_usage, continuous, keepalive_s)

    async def send(self, generation: Generation, request: HttpRequest, *, stream: bool) -> Response:
        """Stream the generation, or collect it while watching for the client to leave."""
        if stream:
            return EventStream(self.events(generation, request.state.request_id), generation.close)
        collecting = asyncio.ensure_future(self.collect(generation))
        leaving = asyncio.ensure_future(client_left(request))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if collecting.done():
                return JSONResponse(collecting.result())
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            generation.close()
            for task in (collecting, leaving):
                task.cancel()
            await asyncio.gather(collecting, leaving, return_exceptions=True)

    async def collect(self, generation: Generation) -> dict[str, Any]:
        """The whole answer."""
        texts = dict.fromkeys(range(len(generation.choices)), "")
        reasons: dict[int, str] = {}
        async for delta in generation.deltas(self.keepalive_s):
            if delta is not None:
                texts[delta.index] += delta.text
                if delta.finish_reason is not None:
                    reasons[delta.index] = delta.finish_reason
        choices = [self.format.whole(index, text, reasons[index]) for index, text in texts.items()]
        head = self.head()
        return head | {"choices": choices, "usage": generation.usage(), "timings": generation.timings()}

    async def events(self, generation: Generation, request_id: str) -> AsyncGenerator[bytes, None]:
        """The stream's events. An error after the first one is an event too; then the stream ends without [DONE]."""
        try:
            async with contextlib.aclosing(self._chunks(generation)) as chunks:
                async for chunk in chunks:
                    yield KEEPALIVE if chunk is None else event(chunk)
            yield DONE
        except ApiError as error:
            yield event(error.body())
        except EngineError as error:
            yield event(from_engine(error).body())
        except Exception:  # headers are out: the stream itself must tell
            logger.exception("request %s failed", request_id)
            yield event(internal_error(request_id).body())

    async def _chunks(self, generation: Generation) -> AsyncGenerator[dict[str, Any] | None, None]:
        num_open = len(generation.choices)
        for index in range(num_open):
            if (opening := self.format.opening(index)) is not None:
                yield self._chunk(generation, opening)
        async with contextlib.aclosing(generation.deltas(self.keepalive_s)) as deltas:
            async for delta in deltas:
                if delta is None:
                    yield None
                    continue
                if delta.text:
                    yield self._chunk(generation, self.format.piece(delta.index, delta.text))
                if delta.finish_reason is not None:
                    num_open -= 1
                    chunk = self._chunk(generation, self.format.closing(delta.index, delta.finish_reason))
                    last = num_open == 0 and not self.include_usage
                    yield chunk | {"timings": generation.timings()} if last else chunk
        if self.include_usage:
            head = self.head(chunk=True)
            yield head | {"choices": [], "usage": generation.usage(), "timings": generation.timings()}

    def _chunk(self, generation: Generation, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self.head(chunk=True) | {"choices": [choice]}
        if self.continuous_usage:
            chunk["usage"] = generation.usage()
        elif self.include_usage:
            chunk["usage"] = None
        return chunk

    def head(self, *, chunk: bool = False) -> dict[str, Any]:
        """What every object of this answer begins with."""
        return {
            "id": self.format.id_prefix + self.id,
            "object": self.format.chunk_object_name if chunk else self.format.object_name,
            "created": self.created,
            "model": self.model,
        }


async def client_left(request: HttpRequest) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

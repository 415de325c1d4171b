"""Server-sent events: a response that always closes its source, and one way to write JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

DONE = format_sse_event(data_str="[DONE]")
KEEPALIVE = KEEPALIVE_COMMENT
# ASCII, in one line: readers that split at U+2028, U+2029 or U+0085 find none in an event. JSON has no NaN or infinity.
ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


class EventStream(EventSourceResponse):
    """Streams ready-made events. ``close`` is called when the response ends, however it ends and even if the stream
    never began, so a client that leaves frees what it held at once.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.events = events
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream, then close."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()
            await self.events.aclose()


def event(payload: Mapping[str, Any]) -> bytes:
    """One ``data:`` event."""
    return line_event(ENCODER.encode(payload))


def line_event(data: str) -> bytes:
    """One ``data:`` event of a text in one line, which is written as it is: this runs for every token."""
    return f"data: {data}\n\n".encode()


def named_event(payload: Mapping[str, Any]) -> bytes:
    """An event whose name is its payload's ``type``."""
    return format_sse_event(event=payload["type"], data_str=ENCODER.encode(payload))

"""Clients that close the connection before they have their answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; the access log does


async def unless_left(request: HttpRequest, work: Coroutine[Any, Any, Any]) -> Response:
    """The JSON that ``work`` gives; it is cancelled where the client leaves before it ends."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(client_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(working.result()) if working.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def client_left(request: HttpRequest) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

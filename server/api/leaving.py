"""Clients that close the connection before they have their answer."""

from __future__ import annotations

from fastapi import Request as HttpRequest

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; the access log does


async def client_left(request: HttpRequest) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""A request on its way from the edge to a replica."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

CARRIED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client")


@dataclass(frozen=True)
class Call:
    """head: what of the ASGI scope goes along; conversation: what keeps its calls on one replica; target: the name of
    the model that answers."""

    head: dict[str, Any]
    body: bytes
    conversation: str
    target: str


def head_of(scope: Scope) -> dict[str, Any]:
    """The scope without what lives in this process, and with the request's id, so that both ends log the same."""
    request_id = str(scope["state"]["request_id"]).encode()
    headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    head = {name: scope[name] for name in CARRIED if name in scope}
    return head | {"headers": [*headers, (b"x-request-id", request_id)]}

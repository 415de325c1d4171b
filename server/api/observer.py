"""The outermost layer: how many answers each route gave, with which status, and how long each took to its end.

An answer is one log line as well, but for those that are asked for by the clock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.gate import as_routes_know_it
from server.api.observations import Observations

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
QUIET = frozenset({"/health", "/metrics", "/", "/web/{name}"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Observer:
    """ASGI middleware around everything else. A stream's time ends with its last byte, or when its client leaves.

    An answer counts for the path as its route writes it, so there are as many names as routes whatever is asked for.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self.app = app
        known = [route for route in routes if isinstance(route, Route)]
        self.plain = {route.path for route in known if "{" not in route.path}
        self.patterns = {route.path: route.path_regex for route in known if "{" in route.path}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through and observe its answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0
        route = self.route_of(as_routes_know_it(scope)["path"])
        observations: Observations = scope["app"].state.serving.observations
        tracing = None if route in QUIET else observations.tracing

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if tracing is None:
                await self.app(scope, receive, observed)
            else:
                with tracing.answering(scope, route) as span:
                    await self.app(scope, receive, observed)
                    tracing.answered(span, status)
        finally:
            method = scope["method"] if scope["method"] in METHODS else UNKNOWN
            seconds = time.monotonic() - started
            observations.answer(method, route, status, seconds)
            if route not in QUIET:
                http = {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
                logger.info("%s %s: %d in %.3f s", method, route, status, seconds, extra={"http": http})

    def route_of(self, path: str) -> str:
        """The route's own path; ``UNKNOWN`` where there is none."""
        if path in self.plain:
            return path
        return next((name for name, pattern in self.patterns.items() if pattern.match(path)), UNKNOWN)

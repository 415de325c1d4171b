"""A client's connection: what uvicorn leaves unbounded (time for a head, time for an unread answer, their number)."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

logger = logging.getLogger(__name__)

HEAD_DEADLINE_S = 10.0
BUSY_RETRY_S = 5


class Connection(H11Protocol):
    """uvicorn's connection, cut off where a head does not come within ``HEAD_DEADLINE_S`` or an answer is not read
    within ``send_timeout_s``, and refused with 503 beyond ``max_connections``."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        send_timeout_s: float,
        max_connections: int,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.send_timeout_s = send_timeout_s
        self.max_connections = max_connections
        self.head_timer: asyncio.TimerHandle | None = None
        self.send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a head."""
        super().connection_made(cast(asyncio.Transport, transport))  # uvloop's is one in all but name
        if len(self.connections) > self.max_connections:
            self.refuse(503, "The server has as many connections as it may; try again soon.", "too_many_connections")
        else:
            self.head_timer = self.loop.call_later(HEAD_DEADLINE_S, self.cut, "its request did not arrive")

    def data_received(self, data: bytes) -> None:
        """A head that is complete ends the wait; what comes between two requests begins another."""
        super().data_received(data)
        is_busy = self.cycle is not None and not self.cycle.response_complete
        if is_busy or self.transport.is_closing():
            self.stop_head_timer()
        elif self.head_timer is None and self.timeout_keep_alive_task is None:
            self.head_timer = self.loop.call_later(HEAD_DEADLINE_S, self.cut, "its request did not arrive")

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self.stop_head_timer()
        self.stop_send_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More of the answer waits than the connection takes."""
        super().pause_writing()
        self.watch_sending()

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        self.stop_send_timer()

    def timeout_keep_alive_handler(self) -> None:
        """Close the idle connection, whether or not the client takes what is left of its last answer."""
        super().timeout_keep_alive_handler()
        self.watch_sending()

    def on_response_complete(self) -> None:
        """An answer has been given; where the connection ends with it, the client has to take it in time."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.watch_sending()

    def watch_sending(self) -> None:
        """Cut the connection where the client does not read in time."""
        if self.send_timer is None:
            self.send_timer = self.loop.call_later(self.send_timeout_s, self.cut, "its answer was not read")

    def stop_head_timer(self) -> None:
        """A head is not waited for any more."""
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def stop_send_timer(self) -> None:
        """The client reads, or has gone."""
        if self.send_timer is not None:
            self.send_timer.cancel()
            self.send_timer = None

    def cut(self, reason: str) -> None:
        """End the connection without waiting for the client."""
        logger.debug("the connection of %s is cut: %s", self.client, reason)
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP. Where an answer is on its way already, it just ends."""
        self.refuse(400, f"{msg} Its head may have at most 16 KiB.", "invalid_http")

    def refuse(self, status: int, message: str, code: str) -> None:
        """Answer by the connection itself, in OpenAI's shape, and close it."""
        kind = "service_unavailable" if status == 503 else "invalid_request_error"
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
        headers = [
            ("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close"),
            *([("retry-after", str(BUSY_RETRY_S))] if status == 503 else []),
        ]  # fmt: skip
        reason = b"Service Unavailable" if status == 503 else b"Bad Request"
        events = (h11.Response(status_code=status, headers=headers, reason=reason), h11.Data(body), h11.EndOfMessage())
        try:
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # its answer has begun
            logger.debug("the connection of %s is closed: it sent what is no HTTP behind its request", self.client)
        self.transport.close()

"""Log lines as JSON objects, and the HTTP request that a line belongs to. No line holds a prompt or an answer."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

CURRENT_REQUEST: ContextVar[str | None] = ContextVar("current_request", default=None)
"""The ``X-Request-Id`` of the request that this task answers."""


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, request_id and ``http`` where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := CURRENT_REQUEST.get()) is not None:
            line["request_id"] = request_id
        if (http := getattr(record, "http", None)) is not None:
            line["http"] = http
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def write_json() -> None:
    """Every handler there is writes JSON lines from now on."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines())

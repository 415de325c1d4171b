"""Fields that a request holds and its schema does not declare: nothing that changes an answer is dropped in silence.

A known field that cannot change the answer passes; one that would is refused by name. A name nobody knows is ignored
and reported (response header ``X-Dovetail-Ignored``, one log line for each name), or refused by a strict server.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from fastapi import Request as HttpRequest

from server.api.body import Body
from server.api.errors import ApiError, UnsupportedParameter, printable, shown
from server.api.serving import Serving

logger = logging.getLogger(__name__)

MAX_REPORTED = 1000  # names a process remembers having logged
MAX_NAMES = 32  # names in one response header


def check_fields(body: Body, request: HttpRequest, serving: Serving) -> None:
    """Judge every undeclared field of a body and of the objects in it; the ignored ones go to the response's header.

    Errors: UnsupportedParameter, and ApiError ``unknown_parameter`` where the server is strict.
    """
    ignored: dict[str, None] = {}
    for path, inner in objects_in(body, ()):
        for name, value in (inner.model_extra or {}).items():
            param = ".".join([*path, name])
            if is_ignored(inner, name, value, param):
                if serving.settings.strict:
                    message = f"Unknown field {shown(param)}; leave it out, or start the server without --strict."
                    raise ApiError(400, message, param=param, code="unknown_parameter")
                ignored[".".join(["*" if part.isdecimal() else part for part in path] + [name])] = None
    if ignored:
        names = [printable(name) for name in ignored]
        request.state.ignored_fields = names[:MAX_NAMES]
        report(names, serving.reported_fields)


def report(names: list[str], known: set[str]) -> None:
    """One log line for each name that this process has not logged yet."""
    for name in names:
        if name not in known and len(known) < MAX_REPORTED:
            known.add(name)
            logger.warning("the request field %s is not known and is ignored", shown(name))


def is_ignored(body: Body, name: str, value: Any, param: str) -> bool:
    """Whether nobody knows the name. Errors: UnsupportedParameter for a known field that would change the answer."""
    if name in body.without_effect:
        return False
    if name not in body.neutral:
        return True
    if value in body.neutral[name]:
        return False
    allowed = " or ".join(["null", *(shown(v) for v in body.neutral[name])])
    message = f"{param} is {shown(value)}, which this server does not support; leave it out or send {allowed}."
    raise UnsupportedParameter(param, message)


def objects_in(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Body]]:
    """Every declared object of a body with its path, the body itself first."""
    if isinstance(value, Body):
        yield path, value
        for name in type(value).model_fields:
            yield from objects_in(getattr(value, name), (*path, name))
    elif isinstance(value, list) and any(isinstance(inner, Body) for inner in value[:1]):
        for index, inner in enumerate(value):
            yield from objects_in(inner, (*path, str(index)))

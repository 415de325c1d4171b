"""Conversations in other wire formats become chats: one form inside, whatever the route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from server.api.errors import InvalidValue, UnsupportedParameter, shown
from server.api.language.messages import ChatBody

Part = Mapping[str, Any]


def as_chat(fields: Mapping[str, Any]) -> ChatBody:
    """The chat that these fields describe. Errors: RequestValidationError with the chat's names of the fields."""
    try:
        return ChatBody.model_validate(dict(fields))
    except ValidationError as error:
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]) from error


def objects(value: Any, param: str) -> list[Part]:
    """A list of objects. Errors: InvalidValue."""
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise InvalidValue(param, f"{param} must be a list of objects.")
    return value


def unsupported(param: str, kind: Any) -> UnsupportedParameter:
    """A kind of item that this server has no place for."""
    return UnsupportedParameter(param, f"{param} is of type {shown(kind)}, which this server does not support.")

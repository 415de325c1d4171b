"""What OpenAPI tells of this server: every status that occurs, and none that does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field

MEANINGS = {
    400: "The request is wrong; param names the field.",
    401: "The server wants a key, and it is missing or wrong.",
    403: "The host name is not served here, or a page of another site asks.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is of another type, or compressed.",
    429: "Too many requests are waiting, or are this caller's; Retry-After says when to come back.",
    431: "The request has too many headers.",
    500: "The server failed on this request; its log tells more.",
    503: "The server cannot answer now: a model loads or could not be loaded, the engine is stuck, or the server ends.",
}


class ErrorObject(BaseModel):
    """What went wrong, for people and for programs."""

    message: str = Field(description="One sentence.")
    type: str = Field(description="The kind of fault, in OpenAI's words.")
    param: str | None = Field(description="The dotted path of the field at fault; null where it is no field's.")
    code: str | None = Field(description="For programs, such as context_length_exceeded.")


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorObject = Field(description="The fault.")


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route that may answer so."""
    return {status: {"model": ErrorBody, "description": MEANINGS[status]} for status in statuses}


def success(what: str, *, streams: bool = False, **keys: tuple[str, str]) -> dict[int | str, dict[str, Any]]:
    """The 200 of ``responses``: an object that holds these keys, each with its JSON type and what it is; with
    ``streams`` also server-sent events.
    """
    properties = {name: {"type": kind, "description": meaning} for name, (kind, meaning) in keys.items()}
    schema = {"type": "object", "required": list(keys), "properties": properties}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if streams:
        content["text/event-stream"] = {}  # events differ by route and kind, and one is [DONE]
    return {200: {"description": what, "content": content}}


ANYWHERE = (403, 413, 415, 429, 431, 500)  # what stands before every route answers these
ASKING = failures(400, 401, 404, 408, 503, *ANYWHERE)
LOOKING = failures(400, 401, 404, *ANYWHERE)


class App(FastAPI):
    """FastAPI, except that it does not document the status 422, which this server never answers with."""

    def openapi(self) -> dict[str, Any]:
        """The description, made once."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for operation in operations_of(schema):
                operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        return super().openapi()


def operations_of(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every operation of a description."""
    return [operation for operations in schema["paths"].values() for operation in operations.values()]

"""What OpenAPI tells of this server: every status that occurs, and none that does not."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

MEANINGS = {
    400: "The request is wrong; ``param`` names the field.",
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
    """message: one sentence; param: the dotted path of a field; code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorObject


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route that may answer so."""
    return {status: {"model": ErrorBody, "description": MEANINGS[status]} for status in statuses}


ASKING = failures(400, 401, 403, 404, 408, 413, 415, 429, 431, 500, 503)
LOOKING = failures(400, 401, 403, 404, 429, 431)


class App(FastAPI):
    """FastAPI, except that it does not document the status 422, which this server never answers with."""

    def openapi(self) -> dict[str, Any]:
        """The description, made once."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        return super().openapi()

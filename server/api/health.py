"""GET /health and GET /version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.api.errors import NotServing
from server.api.serving import CurrentServing

DISTRIBUTION = "dovetail-server"

router = APIRouter()


@router.get("/health")
async def health(serving: CurrentServing) -> JSONResponse:
    """200 while requests are answered; 503 with the reason while loading, going down, or after a failure."""
    try:
        model = serving.model()
    except NotServing as error:
        return JSONResponse({"status": error.code} | error.body(), error.status_code, headers=dict(error.headers or {}))
    status = model.engine.status()
    return JSONResponse(
        {
            "status": "ok",
            "model": model.name,
            "drafter": model.drafter_name,
            "running": status.running,
            "waiting": status.waiting,
            "slots": status.slots,
            "free_slots": status.free_slots,
        }
    )


@router.get("/version")
async def read_version() -> dict[str, Any]:
    """The distribution's version."""
    return {"version": installed_version()}


def installed_version() -> str:
    """The version that is installed; ``unknown`` where the code runs without being installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"

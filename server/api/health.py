"""GET /health and GET /version."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.api.errors import NotServing
from server.api.openapi import ANYWHERE, failures, success
from server.api.serving import CurrentServing
from server.installation import own_version

router = APIRouter()


HEALTHY = success("Requests are answered.", status=("string", "ok"))
VERSION = success("The version.", version=("string", "Of the distribution."))


@router.get("/health", responses=HEALTHY | failures(503, *ANYWHERE))
async def health(serving: CurrentServing) -> JSONResponse:
    """200 while requests for text are answered, or for vision where there is no language model; 503 with the reason
    while loading, going down, or after a failure. How vision stands is told beside it."""
    try:
        text = None if serving.load is None else serving.model()
        if text is None:
            serving.vision_worker()
    except NotServing as error:
        told = {"status": error.code} | error.body() | ({"loading": serving.loading()} if serving.is_loading else {})
        return JSONResponse(told, error.status_code, headers=dict(error.headers or {}))
    answer: dict[str, Any] = {"status": "ok"}
    if text is not None:
        status = text.engine.status()
        answer |= {
            "model": text.name,
            "drafter": text.drafter_name,
            "running": status.running,
            "waiting": status.waiting,
            "slots": status.slots,
            "free_slots": status.free_slots,
            "drafting": {"state": status.drafting.state, "reason": status.drafting.reason},
            "placement": text.placement(),
        }
    if serving.vision is not None:
        state, reason = serving.vision_state()
        told = {"models": list(serving.vision.names), "state": state, "reason": reason}
        answer["vision"] = told | dataclasses.asdict(serving.vision.status())
    return JSONResponse(answer)


@router.get("/version", responses=VERSION | failures(401, *ANYWHERE))
async def read_version() -> dict[str, Any]:
    """The distribution's version."""
    return {"version": own_version()}

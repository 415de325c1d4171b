"""GET /v1/models and /v1/models/{id}: answered in every state, since clients ask for them first."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.api.serving import CurrentServing, Serving

router = APIRouter()


@router.get("/v1/models")
async def list_models(serving: CurrentServing) -> dict[str, Any]:
    """The one model that is, or will be, served."""
    return {"object": "list", "data": [describe(serving)]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, serving: CurrentServing) -> dict[str, Any]:
    """One model. Errors: 404 listing what is served."""
    if model_id != serving.name:
        raise serving.unknown_model(model_id)
    return describe(serving)


def describe(serving: Serving) -> dict[str, Any]:
    """OpenAI's model object; the context length and the drafter join it once the model is loaded."""
    model = serving.loaded
    entry = {
        "id": serving.name,
        "object": "model",
        "created": serving.created if model is None else model.created,
        "owned_by": "dovetail",
    }
    if model is None:
        return entry
    return entry | {"max_model_len": model.context_length, "drafter": model.drafter_name}

"""GET /v1/models and /v1/models/{id}: answered in every state, since clients ask for them first."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.api.serving import CurrentServing, Serving

router = APIRouter()


@router.get("/v1/models")
async def list_models(serving: CurrentServing) -> dict[str, Any]:
    """The models that are, or will be, served: the language model first, then vision models."""
    return {"object": "list", "data": [describe(serving, name) for name in serving.names]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, serving: CurrentServing) -> dict[str, Any]:
    """One model. Errors: 404 listing what is served."""
    if model_id not in serving.names:
        raise serving.unknown_model(model_id)
    return describe(serving, model_id)


def describe(serving: Serving, name: str) -> dict[str, Any]:
    """OpenAI's model object.

    Once the model is loaded, the context length and the drafter join it; kind, licence, classes, input size and runtime
    for a vision model.
    """
    entry = {"id": name, "object": "model", "created": serving.created, "owned_by": "dovetail"}
    for info in serving.vision.models if serving.vision is not None else ():
        if info.name == name:
            return entry | {key: value for key, value in info.json().items() if key != "name"}
    model = serving.loaded
    if model is None or name != model.name:
        return entry
    return entry | {
        "created": model.created,
        "max_model_len": model.context_length,
        "drafter": model.drafter_name,
    }

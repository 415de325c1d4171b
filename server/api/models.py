"""GET /v1/models and /v1/models/{id}: answered in every state, since clients ask for them first."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from server.api.errors import InvalidValue, shown
from server.api.openapi import LOOKING
from server.api.serving import CurrentServing, Serving

LANGUAGE = "language"

router = APIRouter(responses=LOOKING)

Kind = Annotated[
    str | None, Query(description=f"Only models of this kind: {LANGUAGE}, or a vision model's, such as detector.")
]


@router.get("/v1/models")
async def list_models(serving: CurrentServing, kind: Kind = None) -> dict[str, Any]:
    """The models that are, or will be, served: the language model first, then vision models."""
    entries = [describe(serving, name) for name in serving.names]
    kinds = [entry["kind"] for entry in entries if "kind" in entry]
    if kind is not None and kind not in kinds and not serving.is_loading:
        raise InvalidValue("kind", f"kind is {shown(kind)}; this server has models of the kinds {', '.join(kinds)}.")
    return {"object": "list", "data": [entry for entry in entries if kind in (None, entry.get("kind"))]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(model_id: str, serving: CurrentServing) -> dict[str, Any]:
    """One model. Errors: 404 listing what is served."""
    if model_id not in serving.names:
        raise serving.unknown_model(model_id)
    return describe(serving, model_id)


def describe(serving: Serving, name: str) -> dict[str, Any]:
    """OpenAI's model object, with ``kind`` as far as it is known.

    Once the model is loaded, its size (``meta``), the context length, the drafter, what lies where and T(n) in
    milliseconds by rows (``verify_ms``) join it; licence, classes, input size and runtime for a vision model.
    """
    entry: dict[str, Any] = {"id": name, "object": "model", "created": serving.created, "owned_by": "dovetail"}
    for info in serving.vision.models if serving.vision is not None else ():
        if info.name == name:
            return entry | {key: value for key, value in info.json().items() if key != "name"}
    if serving.load is None or name != serving.name:
        return entry
    entry["kind"] = LANGUAGE
    model = serving.loaded
    if model is None:
        return entry
    facts = model.info
    meta = {
        "n_vocab": facts.vocab_size, "n_embd": facts.hidden_size, "n_params": facts.num_parameters,
        "n_layer": facts.num_layers, "n_ctx_train": facts.context_length, "weights": facts.weights,
        "architecture": facts.architecture,
    }  # fmt: skip
    return entry | {
        "created": model.created,
        "meta": meta,
        "max_model_len": model.context_length,
        "drafter": model.drafter_name,
        "placement": model.placement(),
        "verify_ms": {
            str(rows): round(1000 * seconds, 3) for rows, seconds in model.engine.figures().verify_curve.items()
        },
    }

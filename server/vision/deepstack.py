"""POST /v1/vision/detection as DeepStack has it, for cameras' software that knows no other: Frigate, Home Assistant.

A form with the file ``image``; ``min_confidence`` and ``api_key`` are optional fields of it. The answer is DeepStack's,
also where there is none: ``success`` false with ``error``, beside the usual status.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from server.api.access import DEEPSTACK_PATH, key_in, require_key
from server.api.errors import ApiError, InvalidValue, from_vision, shown
from server.api.leaving import CLIENT_CLOSED_REQUEST
from server.api.openapi import ASKING, ErrorBody
from server.api.serving import CurrentServing, Serving
from server.vision.child import JobAnswer, VisionError
from server.vision.routes import Order, answer_or_leave, image_fault, model_of_kind
from server.vision.upload import Files, FileSource, read_form
from server.vision.worker import VisionWorker
from vision.serving.answers import CLASS_NAME, SCORE, number, record, several, truth, whole
from vision.serving.registry import all_kinds

DETECTOR = "detector"
MIN_CONFIDENCE = 0.4  # DeepStack's own, where a client names none


class Refusal(BaseModel):
    """DeepStack's answer where there is none."""

    success: bool = Field(description="False.")
    error: str = Field(description="Why there is no answer, in one sentence.")
    duration: float = Field(description="Seconds taken.", ge=0)


# What is refused before the route is reached has the shape of every other route.
router = APIRouter(responses={status: told | {"model": Refusal | ErrorBody} for status, told in ASKING.items()})
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {
                    "image": {"type": "string", "format": "binary", "description": "The picture's file."},
                    "min_confidence": {
                        "type": "number",
                        "minimum": 0,
                        "maximum": 1,
                        "default": MIN_CONFIDENCE,
                        "description": "Lowest score.",
                    },
                    "api_key": {"type": "string", "description": "The server's key, where it has one."},
                },
            }
        }
    },
}


ANSWER = record(
    success=truth("True."),
    predictions=several(
        "By falling score.",
        record(
            label=CLASS_NAME,
            confidence=SCORE,
            **{side: whole("Pixels.", 0) for side in ("x_min", "y_min", "x_max", "y_max")},
        ),
    ),
    duration=number("Seconds taken.", 0),
)
FOUND: dict[int | str, dict[str, Any]] = {
    200: {"description": "What was found.", "content": {"application/json": {"schema": ANSWER}}}
}


@router.post(DEEPSTACK_PATH, openapi_extra={"requestBody": BODY}, responses=FOUND)
async def create_deepstack_detection(request: HttpRequest, serving: CurrentServing) -> Response:
    """Detect objects by the first detector served, and answer as DeepStack does."""
    started = time.perf_counter()
    try:
        fields, files = await read_allowed_form(request)
        worker = serving.vision_worker()
        with worker.admit(sum(len(each.data) for each in files["image"] if isinstance(each, FileSource))):
            order = read_order(fields, files, serving, worker)
            outcomes = await answer_or_leave(request, worker, [order], serving)
    except (ApiError, VisionError) as error:
        return refused(error if isinstance(error, ApiError) else from_vision(error), started)
    if outcomes is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    (outcome,) = outcomes
    if not isinstance(outcome, JobAnswer):
        return refused(image_fault(outcome, "image"), started)
    predictions = [prediction(record) for record in outcome.header["answer"]["detections"]]
    return JSONResponse({"success": True, "predictions": predictions, "duration": seconds_since(started)})


async def read_allowed_form(request: HttpRequest) -> tuple[dict[str, Any], Files]:
    """Text fields and files, once the key is right. Errors: ApiError 401, 415 and 400."""
    is_form = request.headers.get("content-type", "").lower().startswith("multipart/form-data")
    fields, files = await read_form(request, frozenset()) if is_form else ({}, {})
    known = request.state.key_digests
    if known and not key_in(request.headers):  # a key in the head was looked at before
        require_key(fields.get("api_key", ""), known)
    if not is_form:
        raise ApiError(415, "Send multipart/form-data with the file image.", code="unsupported_media_type")
    return fields, files


def read_order(fields: dict[str, Any], files: Files, serving: Serving, worker: VisionWorker) -> Order:
    """What a form asks. Errors: ApiError."""
    given = [each for each in files["image"] if isinstance(each, FileSource)]
    if len(given) != 1:
        raise InvalidValue("image", f"{len(given)} files were sent as image; send one.")
    try:
        threshold = float(fields.get("min_confidence", MIN_CONFIDENCE))
    except ValueError:
        threshold = -1.0
    if not 0 <= threshold <= 1:
        raise InvalidValue("min_confidence", f"{shown(fields['min_confidence'])} is no number from 0 to 1.")
    info = model_of_kind(DETECTOR, None, serving, worker)
    options = dataclasses.asdict(all_kinds()[DETECTOR].options(score_threshold=threshold))  # type: ignore[call-arg]
    return Order(given[0], info.name, options, None)


def prediction(record: dict[str, Any]) -> dict[str, Any]:
    """One detection, in whole pixels."""
    x1, y1, x2, y2 = (round(value) for value in record["box"])
    return {
        "label": record["class_name"],
        "confidence": record["score"],
        "x_min": x1, "y_min": y1, "x_max": x2, "y_max": y2,
    }  # fmt: skip


def refused(error: ApiError, started: float) -> JSONResponse:
    """An error as DeepStack's clients read it."""
    body = {"success": False, "error": error.body()["error"]["message"], "duration": seconds_since(started)}
    return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))


def seconds_since(started: float) -> float:
    """To the millisecond."""
    return round(time.perf_counter() - started, 3)

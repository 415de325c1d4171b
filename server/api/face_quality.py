"""POST /v1/vision/face-quality: how useful faces are for recognition. Nothing of an image is kept or logged."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BeforeValidator, model_validator

from server.api.errors import InvalidValue
from server.api.fields import check_fields
from server.api.gate import MAX_VISION_BODY_BYTES
from server.api.leaving import CLIENT_CLOSED_REQUEST
from server.api.openapi import ASKING
from server.api.serving import CurrentServing, Serving
from server.api.vision import (
    PICTURE_TYPES,
    Order,
    Outcome,
    answer_or_leave,
    image_fault,
    model_of_kind,
    wanted_picture,
)
from server.api.vision_body import ImageBody, Source, read_vision_request, refuse_constant
from server.vision_worker import JobAnswer, VisionWorker
from vision.assess import FACE_QUALITY, MAX_FACES
from vision.predict import ModelInfo

MAX_COORDINATE = 1e6  # far beyond every image that is decoded, and no infinity


def parsed_text(value: Any) -> Any:
    """A form's field holds JSON as text; what is no JSON is left to the check of its type."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return value


class FaceQualityBody(ImageBody):
    """POST /v1/vision/face-quality.

    ``landmarks``: for each face of the image five points x, y in pixels of the upright image: left eye, right eye, nose
    tip, left and right corner of the mouth, left and right as seen in it; with ``images`` one such list an image.
    ``aligned``: every image is one face of 112 x 112 pixels at the template's place.
    """

    landmarks: Annotated[list[Any] | None, BeforeValidator(parsed_text)] = None
    aligned: bool | None = None

    @model_validator(mode="after")
    def _one_way(self) -> FaceQualityBody:
        if self.aligned and self.landmarks is not None:
            raise InvalidValue("landmarks", "landmarks and aligned were both sent; an aligned crop needs no landmarks.")
        return self

    def landmarks_by_image(self, num_images: int, single: bool) -> list[Any]:
        """The faces of every image, None where none were sent. Errors: InvalidValue."""
        if self.landmarks is None:
            return [None] * num_images
        if single:
            return [checked_faces(self.landmarks, "landmarks")]
        if len(self.landmarks) != num_images:
            message = f"landmarks hold {len(self.landmarks)} lists for {num_images} images; send one an image."
            raise InvalidValue("landmarks", message)
        return [checked_faces(faces, f"landmarks.{index}") for index, faces in enumerate(self.landmarks)]


def checked_faces(faces: Any, param: str) -> list[Any]:
    """Faces of five points each. Errors: InvalidValue naming the face."""
    if not isinstance(faces, list) or len(faces) > MAX_FACES:
        raise InvalidValue(param, f"{param} must be a list of at most {MAX_FACES} faces.")
    for index, face in enumerate(faces):
        if not (isinstance(face, list) and len(face) == 5 and all(is_point(point) for point in face)):
            raise InvalidValue(
                f"{param}.{index}", f"{param}.{index} is no face: it needs five points x, y, all numbers."
            )
    return faces


def is_point(value: Any) -> bool:
    """Two finite numbers."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < MAX_COORDINATE for v in value)
    )


BODY_DOCUMENTATION = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": FaceQualityBody.model_json_schema()}
            for kind in ("application/json", "multipart/form-data")
        },
    }
}

router = APIRouter(responses=ASKING)


@dataclass(frozen=True)
class Plan:
    """What a request comes to."""

    info: ModelInfo
    orders: Sequence[Order]
    single: bool
    picture_type: str | None


@router.post("/v1/vision/face-quality", openapi_extra=BODY_DOCUMENTATION)
async def create_face_quality(request: HttpRequest, serving: CurrentServing) -> Response:
    """Score faces. One image: its answer, or an error; several: ``results`` in their order, errors among them."""
    worker = serving.vision_worker()
    length = request.headers.get("content-length", "")
    with worker.admit(int(length) if length.isdecimal() else MAX_VISION_BODY_BYTES):
        plan = await read_plan(request, serving, worker)
        outcomes = await answer_or_leave(request, worker, plan.orders, serving)
    if outcomes is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    head = {
        "id": f"fq-{uuid.uuid4().hex}",
        "object": "vision.face_quality",
        "created": int(time.time()),
        "model": plan.info.name,
    }
    if not plan.single:
        return JSONResponse(head | {"results": [result_or_error(outcome, n) for n, outcome in enumerate(outcomes)]})
    (outcome,) = outcomes
    if not isinstance(outcome, JobAnswer):
        raise image_fault(outcome, "image")
    if plan.picture_type is not None:
        return Response(outcome.picture, media_type=plan.picture_type)
    return JSONResponse(head | result(outcome))


async def read_plan(request: HttpRequest, serving: Serving, worker: VisionWorker) -> Plan:
    """Read and check a request. Errors: ApiError."""
    sent = await read_vision_request(request, FaceQualityBody)
    body = sent.body
    check_fields(body, request, serving)
    picture_type = wanted_picture(request, sent.single)
    info = model_of_kind(FACE_QUALITY, body.model, serving, worker)
    draw = PICTURE_TYPES[picture_type] if picture_type else "JPEG" if body.draw else None
    landmarks = body.landmarks_by_image(len(sent.sources), sent.single)
    return Plan(
        info,
        [order(source, info, faces, body, draw) for source, faces in zip(sent.sources, landmarks, strict=True)],
        sent.single,
        picture_type,
    )


def order(source: Source, info: ModelInfo, faces: Any, body: FaceQualityBody, draw: str | None) -> Order:
    """One image with its landmarks."""
    return Order(source, info.name, {"landmarks": faces, "aligned": bool(body.aligned)}, draw)


def result_or_error(outcome: Outcome, index: int) -> Any:
    """One entry of ``results``."""
    return result(outcome) if isinstance(outcome, JobAnswer) else image_fault(outcome, f"images.{index}").body()


def result(answer: JobAnswer) -> dict[str, Any]:
    """An image's faces with its size; the drawn picture where it was asked for."""
    header = answer.header
    picture = f"data:image/jpeg;base64,{base64.b64encode(answer.picture).decode()}"
    answered: dict[str, Any] = header["answer"]
    return (
        {"image": {"width": header["width"], "height": header["height"]}}
        | answered
        | ({"picture": picture} if answer.picture else {})
        | {"timings": header["timings"]}
    )

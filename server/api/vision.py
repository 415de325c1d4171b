"""POST /v1/vision/detections: what is on one or several images."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from server.api.detection_formats import OBJECT_FORMATS, WRITERS
from server.api.errors import ApiError, from_vision
from server.api.fields import check_fields
from server.api.gate import MAX_VISION_BODY_BYTES
from server.api.leaving import CLIENT_CLOSED_REQUEST, client_left
from server.api.openapi import ASKING
from server.api.remote_images import fetch_image
from server.api.serving import CurrentServing, Serving
from server.api.vision_body import DetectionBody, FileSource, Source, UrlSource, read_vision_request
from server.vision_worker import ImageCrashed, Job, JobAnswer, VisionWorker
from vision.detect import DETECTOR
from vision.images import ImageError
from vision.predict import ModelInfo

PICTURE_TYPES = {"image/jpeg": "JPEG", "image/png": "PNG"}
SCHEMA = DetectionBody.model_json_schema()
BODY_DOCUMENTATION = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": SCHEMA} for kind in ("application/json", "multipart/form-data")},
    }
}

Outcome = JobAnswer | ImageError | ImageCrashed


@dataclass(frozen=True)
class Order:
    """One image, and what is asked of it."""

    source: Source
    model: str
    options: Mapping[str, Any]
    draw: str | None


router = APIRouter(responses=ASKING)


@dataclass(frozen=True)
class Plan:
    """What a request comes to. ``picture_type`` is set where the answer is to be a picture and nothing else."""

    body: DetectionBody
    info: ModelInfo
    sources: Sequence[Source]
    single: bool
    picture_type: str | None

    @property
    def draw(self) -> str | None:
        """The format of the drawn picture, None where nobody asked for one."""
        return PICTURE_TYPES[self.picture_type] if self.picture_type else "JPEG" if self.body.draw else None

    @property
    def orders(self) -> list[Order]:
        """Every image with the same options."""
        options = self.body.options(self.info)
        return [Order(source, self.info.name, options, self.draw) for source in self.sources]


@router.post("/v1/vision/detections", openapi_extra=BODY_DOCUMENTATION)
async def create_detections(request: HttpRequest, serving: CurrentServing) -> Response:
    """Detect objects. One image: its answer, or an error; several: ``results`` in their order, errors among them."""
    worker = serving.vision_worker()
    length = request.headers.get("content-length", "")
    with worker.admit(int(length) if length.isdecimal() else MAX_VISION_BODY_BYTES):
        plan = await read_plan(request, serving, worker)
        answers = await answer_or_leave(request, worker, plan.orders, serving)
    if answers is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if plan.single:
        return single_response(plan, answers[0])
    return JSONResponse(
        head(plan) | {"results": [result_or_error(plan, answer, index) for index, answer in enumerate(answers)]}
    )


async def read_plan(request: HttpRequest, serving: Serving, worker: VisionWorker) -> Plan:
    """Read and check a request. Errors: ApiError."""
    vision_request = await read_vision_request(request, DetectionBody)
    body = vision_request.body
    check_fields(body, request, serving)
    picture_type = wanted_picture(request, vision_request.single)
    info = model_of_kind(DETECTOR, body.model, serving, worker)
    return Plan(body, info, vision_request.sources, vision_request.single, picture_type)


def wanted_picture(request: HttpRequest, single: bool) -> str | None:
    """The picture type that ``Accept`` asks for instead of JSON. Errors: ApiError 400 for several images."""
    accepted = request.headers.get("accept", "").partition(",")[0].partition(";")[0].strip().lower()
    picture_type = accepted if accepted in PICTURE_TYPES else None
    if picture_type and not single:
        raise ApiError(400, "A picture as the answer needs exactly one image.", param="images", code="invalid_value")
    return picture_type


def model_of_kind(kind: str, name: str | None, serving: Serving, worker: VisionWorker) -> ModelInfo:
    """The model, or the first of ``kind`` where no name was sent. Errors: ApiError 404 and 400."""
    models = [info for info in worker.models if info.kind == kind]
    if name is None and models:
        return models[0]
    for info in models:
        if info.name == name:
            return info
    if name is not None and name not in serving.names:
        raise serving.unknown_model(name)
    known = ", ".join(repr(info.name) for info in models) or "none"
    what = "No model was named" if name is None else f"{name!r} is not of the kind {kind}"
    raise ApiError(400, f"{what}; this server's {kind} models are: {known}.", param="model", code="invalid_value")


async def answer_or_leave(
    request: HttpRequest, worker: VisionWorker, orders: Sequence[Order], serving: Serving
) -> list[Outcome] | None:
    """Answers in the images' order; None once the client has left, whose waiting jobs are then dropped."""
    collecting = asyncio.ensure_future(collect(worker, orders, serving))
    leaving = asyncio.ensure_future(client_left(request))
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else None
    finally:
        for task in (collecting, leaving):
            task.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)


async def collect(worker: VisionWorker, orders: Sequence[Order], serving: Serving) -> list[Outcome]:
    """Fetch what must be fetched, queue the images and wait. Errors: ApiError, VisionStopped."""
    hosts = frozenset(serving.settings.vision_url_hosts)
    images = [await image_of(order.source, hosts) for order in orders]
    jobs = [
        Job(order.model, data, order.options, order.draw)
        for order, data in zip(orders, images, strict=True)
        if isinstance(data, bytes)
    ]
    futures = worker.submit(jobs)
    try:
        found = iter([await outcome_of(future) for future in futures])
    finally:
        for future in futures:
            future.cancel()  # only those whose turn has not come: the client left
    return [data if isinstance(data, ImageError) else next(found) for data in images]


async def image_of(source: Source, hosts: frozenset[str]) -> bytes | ImageError:
    """The file's bytes, or what is wrong with it. Errors: ApiError where URLs are not allowed."""
    if isinstance(source, UrlSource):
        try:
            return await asyncio.to_thread(fetch_image, source.url, hosts)
        except ImageError as error:
            return error
    return source.data if isinstance(source, FileSource) else source


async def outcome_of(future: Future[JobAnswer]) -> Outcome:
    """A job's answer, or why this image has none. Errors: VisionStopped."""
    try:
        answer = await asyncio.wrap_future(future)
    except ImageCrashed as error:
        return error
    fault = answer.header.get("error")
    return answer if fault is None else ImageError(fault["code"], fault["message"])


def head(plan: Plan) -> dict[str, Any]:
    """What an answer of ours begins with."""
    return {
        "id": f"det-{uuid.uuid4().hex}",
        "object": "vision.detection",
        "created": int(time.time()),
        "model": plan.info.name,
    }


def single_response(plan: Plan, outcome: Outcome) -> Response:
    """The answer for one image; another format's shape stands alone. Errors: ApiError."""
    if not isinstance(outcome, JobAnswer):
        raise image_fault(outcome, "image")
    if plan.picture_type is not None:
        return Response(outcome.picture, media_type=plan.picture_type)
    result = write(plan, outcome)
    return JSONResponse(head(plan) | result if plan.body.answer_format == "dovetail" else result)


def result_or_error(plan: Plan, outcome: Outcome, index: int) -> Any:
    """One entry of ``results``."""
    return write(plan, outcome) if isinstance(outcome, JobAnswer) else image_fault(outcome, f"images.{index}").body()


def write(plan: Plan, answer: JobAnswer) -> Any:
    """An answer in the shape asked for; picture and timings stand beside the keys of a shape that is an object."""
    header, wanted = answer.header, plan.body.answer_format
    result = WRITERS[wanted](header["answer"]["detections"], header["width"], header["height"])
    if wanted not in OBJECT_FORMATS:
        return result
    picture = f"data:image/jpeg;base64,{base64.b64encode(answer.picture).decode()}"
    return result | ({"picture": picture} if answer.picture else {}) | {"timings": header["timings"]}


def image_fault(error: ImageError | ImageCrashed, param: str) -> ApiError:
    """Why an image has no answer, on the wire."""
    if isinstance(error, ImageCrashed):
        return from_vision(error)
    return ApiError(400, f"{param}: {error}.", param=param, code=error.code)

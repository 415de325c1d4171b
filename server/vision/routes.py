"""POST /v1/vision/...: one route a kind of model, all made here. Nothing of an image is kept or logged."""

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

from server.api.errors import ApiError, from_vision
from server.api.fields import check_fields
from server.api.gate import MAX_VISION_BODY_BYTES
from server.api.leaving import CLIENT_CLOSED_REQUEST, client_left
from server.api.openapi import ASKING
from server.api.serving import CurrentServing, Serving
from server.vision.answers import PICTURE_TYPES, success_of
from server.vision.bodies import OWN_SHAPE, ImageBody, body_of
from server.vision.child import Job, JobAnswer
from server.vision.upload import FileSource, Source, UrlSource, read_vision_request
from server.vision.urls import MAX_REMOTE_BYTES, fetch_image
from server.vision.worker import ImageCrashed, VisionWorker
from vision.images import ImageError
from vision.serving.protocol import Kind, ModelInfo
from vision.serving.registry import all_kinds

BODY_TYPES = ("application/json", "multipart/form-data")

Outcome = JobAnswer | ImageError | ImageCrashed


@dataclass(frozen=True)
class Order:
    """One image, and what is asked of it."""

    source: Source
    model: str
    options: Mapping[str, Any]
    draw: str | None


@dataclass(frozen=True)
class Plan:
    """What a request comes to. ``picture_type`` is set where the answer is to be a picture and nothing else."""

    body: ImageBody
    info: ModelInfo
    orders: Sequence[Order]
    single: bool
    picture_type: str | None


def make_router(kinds: Mapping[str, Kind]) -> APIRouter:
    """The routes of all kinds."""
    router = APIRouter(responses=ASKING)
    for kind in kinds.values():
        add_route(router, kind)
    return router


def add_route(router: APIRouter, kind: Kind) -> None:
    """The route of ``kind``."""
    schema = body_of(kind)
    content = {body_type: {"schema": schema.model_json_schema()} for body_type in BODY_TYPES}

    async def create(request: HttpRequest, serving: CurrentServing) -> Response:
        worker = serving.vision_worker()
        length = request.headers.get("content-length", "")
        with worker.admit(int(length) if length.isdecimal() else MAX_VISION_BODY_BYTES):
            plan = await read_plan(request, serving, worker, schema)
            outcomes = await answer_or_leave(request, worker, plan.orders, serving)
        if outcomes is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return single_response(plan, outcomes[0]) if plan.single else joint_response(plan, outcomes)

    router.add_api_route(
        f"/v1/vision/{kind.route}",
        create,
        methods=["POST"],
        name=f"create_{kind.route.replace('-', '_')}",
        description=f"{kind.summary} One image: its answer, or an error; several: `results` in their order, errors "
        "among them.",
        responses=success_of(kind),
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )


async def read_plan(request: HttpRequest, serving: Serving, worker: VisionWorker, schema: type[ImageBody]) -> Plan:
    """Read and check a request. Errors: ApiError."""
    sent = await read_vision_request(request, schema, worker.aside)
    body, single = sent.body, sent.single
    check_fields(body, request, serving)
    picture_type = wanted_picture(request, single)
    info = model_of_kind(schema.kind.name, body.model, serving, worker)
    draw = PICTURE_TYPES[picture_type] if picture_type else "JPEG" if body.draw else None
    options = body.options(info, len(sent.sources), single)
    orders = [Order(source, info.name, wanted, draw) for source, wanted in zip(sent.sources, options, strict=True)]
    return Plan(body, info, orders, single, picture_type)


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
    """Fetch what must be fetched, queue the images and wait. Errors: ApiError, VisionQueueFull, VisionStopped."""
    hosts = frozenset(serving.settings.vision_url_hosts)
    fetched = MAX_REMOTE_BYTES * sum(isinstance(order.source, UrlSource) for order in orders) if hosts else 0
    with worker.reserve(fetched):
        images = [await image_of(order.source, hosts, worker) for order in orders]
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


async def image_of(source: Source, hosts: frozenset[str], worker: VisionWorker) -> bytes | ImageError:
    """The file's bytes, or what is wrong with it. Errors: ApiError where URLs are not allowed."""
    if isinstance(source, UrlSource):
        try:
            return await worker.aside(fetch_image, source.url, hosts)
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
    kind = plan.body.kind
    return {
        "id": f"{kind.id_prefix}-{uuid.uuid4().hex}",
        "object": kind.noun,
        "created": int(time.time()),
        "model": plan.info.name,
    }


def joint_response(plan: Plan, outcomes: Sequence[Outcome]) -> Response:
    """The answers for several images."""
    results = [
        write(plan, outcome) if isinstance(outcome, JobAnswer) else image_fault(outcome, f"images.{index}").body()
        for index, outcome in enumerate(outcomes)
    ]
    return JSONResponse(head(plan) | {"results": results})


def single_response(plan: Plan, outcome: Outcome) -> Response:
    """The answer for one image; another format's shape stands alone. Errors: ApiError."""
    if not isinstance(outcome, JobAnswer):
        raise image_fault(outcome, "image")
    if plan.picture_type is not None:
        return Response(outcome.picture, media_type=plan.picture_type)
    result = write(plan, outcome)
    return JSONResponse(head(plan) | result if plan.body.shape == OWN_SHAPE else result)


def write(plan: Plan, answer: JobAnswer) -> Any:
    """An answer in the shape asked for; picture and timings stand beside the keys of a shape that is an object."""
    header, shape = answer.header, plan.body.shape
    width, height = header["width"], header["height"]
    if shape == OWN_SHAPE:
        result = {"image": {"width": width, "height": height}} | header["answer"]
    else:
        result = plan.body.kind.shapes[shape].write(header["answer"], width, height)
    if not plan.body.has_room:
        return result
    picture = f"data:image/jpeg;base64,{base64.b64encode(answer.picture).decode()}"
    return result | ({"picture": picture} if answer.picture else {}) | {"timings": header["timings"]}


def image_fault(error: ImageError | ImageCrashed, param: str) -> ApiError:
    """Why an image has no answer, on the wire."""
    if isinstance(error, ImageCrashed):
        return from_vision(error)
    return ApiError(400, f"{param}: {error}.", param=param, code=error.code)


router = make_router(all_kinds())

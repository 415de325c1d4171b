"""Bodies of vision requests: JSON with base64, or multipart. Both end as the same fields and the same image files."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from server.api.errors import ApiError, InvalidValue, shown
from server.api.gate import MAX_VISION_BODY_BYTES, content_type
from server.api.reading import SMALL_BODY, UNREADABLE
from server.vision.bodies import MAX_IMAGES, ImageBody, refuse_constant
from vision.images import ImageError

MAX_FORM_FIELDS = 288
DATA_URI = re.compile(r"data:[\w/+.-]*(;[\w=.-]+)*;base64,")
URL = re.compile(r"https?://", re.IGNORECASE)


@dataclass(frozen=True)
class FileSource:
    """An image that came as a file."""

    data: bytes


@dataclass(frozen=True)
class UrlSource:
    """An image that lies elsewhere."""

    url: str


Source = FileSource | UrlSource | ImageError
Files = dict[str, list[str | FileSource]]
# Runs a function with its arguments in another thread.
Aside = Callable[..., Awaitable[Any]]


@dataclass(frozen=True)
class VisionRequest:
    """Fields and images, in the order they were sent; ``single`` where one came as ``image``."""

    body: ImageBody
    sources: list[Source]
    single: bool


async def read_vision_request(request: HttpRequest, schema: type[ImageBody], aside: Aside) -> VisionRequest:
    """A body by its content type. An image that is no base64 stands as an ImageError in its place.

    What takes longer the larger the body is runs ``aside``, if that is longer than asking another thread takes. Errors:
    ApiError 400 and 415, RequestValidationError.
    """
    kind = content_type(request)
    if kind == "application/json":
        raw = await request.body()
        body, sources = parse_json(raw, schema) if len(raw) <= SMALL_BODY else await aside(parse_json, raw, schema)
        single = body.image is not None
    elif kind == "multipart/form-data":
        fields, files = await read_form(request, schema.lists)
        body = validated(schema, fields, strict=False)
        given = files["image"] + files["images"]
        sources = [await source_of(each, aside) for each in given]
        single = len(files["image"]) == 1 and not files["images"]
    else:
        message = f"The content type is {kind or 'missing'}; send application/json or multipart/form-data."
        raise ApiError(415, message, code="unsupported_media_type")
    if not sources:
        message = "image is missing; send image, or images."
        raise ApiError(400, message, param="image", code="missing_required_parameter")
    if len(sources) > MAX_IMAGES:
        raise InvalidValue("images", f"{len(sources)} images were sent; at most {MAX_IMAGES} are allowed.")
    return VisionRequest(body, sources, single)


async def source_of(given: str | FileSource, aside: Aside) -> Source:
    """The image in a form's field; long texts are decoded ``aside``."""
    if isinstance(given, FileSource):
        return given
    return text_source(given) if len(given) <= SMALL_BODY else cast(Source, await aside(text_source, given))


def parse_json(raw: bytes, schema: type[ImageBody]) -> tuple[ImageBody, list[Source]]:
    """Fields and images of a JSON body. Errors: ApiError 400, also for NaN and Infinity; RequestValidationError."""
    try:
        values = json.loads(raw, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, UNREADABLE, code="invalid_json") from error
    body = validated(schema, values, strict=True)
    return body, [text_source(text) for text in ([body.image] if body.image is not None else body.images or [])]


async def read_form(request: HttpRequest, lists: frozenset[str]) -> tuple[dict[str, Any], Files]:
    """Text fields, and files by field. Files stay in memory: images are never written to disk."""
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=2 * MAX_IMAGES,  # one more than allowed must still get our own message
        max_fields=MAX_FORM_FIELDS,
    )
    parser.spool_max_size = MAX_VISION_BODY_BYTES + 1
    try:
        form = await parser.parse()
    except (MultiPartException, MultipartParseError, KeyError) as error:
        message = getattr(error, "message", "") or "its boundary or its parts are damaged"
        raise ApiError(400, f"The multipart body cannot be read: {message}", code="invalid_multipart") from error
    try:
        return await sorted_form(form, lists)
    finally:
        await form.close()


async def sorted_form(form: FormData, lists: frozenset[str]) -> tuple[dict[str, Any], Files]:
    """A form's text fields, those of ``lists`` parted at commas, and its images by field.

    Errors: InvalidValue for a field sent twice or misplaced.
    """
    fields: dict[str, Any] = {}
    files: Files = {"image": [], "images": []}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in files:
                raise InvalidValue(name, f"A file was sent as {shown(name)}; send images as image or images.")
            files[name].append(FileSource(await value.read()))
        elif name in files:
            files[name].append(value)
        elif name in lists:
            fields.setdefault(name, []).extend(part.strip() for part in value.split(","))
        elif name in fields:
            raise InvalidValue(name, f"{shown(name)} was sent twice.")
        else:
            fields[name] = value
    return fields, files


def validated(schema: type[ImageBody], values: Any, *, strict: bool) -> ImageBody:
    """Check fields; not ``strict`` where all are texts, as in a form: "0.5" is a number there."""
    try:
        return schema.model_validate(values, strict=strict)
    except ValidationError as error:
        # The same way out as bodies that the framework reads.
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]) from error


def text_source(text: str) -> Source:
    """An image given as text: a URL, a data URI, or plain base64."""
    if URL.match(text):
        return UrlSource(text)
    prefix = DATA_URI.match(text[:256])
    if prefix is None and text.startswith("data:"):
        return ImageError("invalid_image", "the data URI is not base64; send data:image/jpeg;base64,...")
    try:
        return FileSource(base64.b64decode(text[prefix.end() if prefix else 0 :], validate=True))
    except (binascii.Error, ValueError):
        return ImageError("invalid_image", "the image is not base64 without spaces, a data URI or a URL")

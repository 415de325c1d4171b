"""What a vision route answers with, for its description: one image's answer, several images' answers, or a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vision.serving.answers import Schema, number, record, several, text, whole
from vision.serving.protocol import Kind

IMAGE = record(width=whole("Pixels of the upright original.", 1), height=whole("Pixels of the upright original.", 1))
BESIDE = record(
    picture=text("Data URI of a JPEG with what was found drawn into it; with draw."),
    timings=record(
        queue_ms=number("Waiting.", 0),
        decode_ms=number("Reading the image.", 0),
        inference_ms=number("The network.", 0),
    ),
    optional=("picture",),
)
FAULT = {"$ref": "#/components/schemas/ErrorBody"}  # which every route's refusals bring in
PICTURE_TYPES = {"image/jpeg": "JPEG", "image/png": "PNG"}


def success_of(kind: Kind) -> dict[int | str, dict[str, Any]]:
    """The 200 of ``responses`` of the route of ``kind``."""
    own = joined(record(image=IMAGE), kind.schema, BESIDE)
    others = [joined(shape.schema, BESIDE) if shape.is_object else shape.schema for shape in kind.shapes.values()]
    head = record(
        id=text(f"Begins with {kind.id_prefix}-."),
        object=text(f"{kind.noun}."),
        created=whole("Seconds since 1970.", 0),
        model=text("The model that answered."),
    )
    results = several("In the images' order; errors among them.", {"anyOf": [own, *others, FAULT]})
    content: dict[str, Any] = {name: {"schema": {"type": "string", "format": "binary"}} for name in PICTURE_TYPES}
    content["application/json"] = {
        "schema": {"anyOf": [joined(head, own), joined(head, record(results=results)), *others]}
    }
    return {200: {"description": kind.summary, "content": content}}


def joined(*records: Mapping[str, Any]) -> Schema:
    """One record of the fields of all."""
    properties = {name: field for each in records for name, field in each["properties"].items()}
    required = {name for each in records for name in each["required"]}
    return record(**properties, optional=properties.keys() - required)

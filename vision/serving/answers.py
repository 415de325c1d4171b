"""JSON schemas of what models answer, for the description of the routes that hand it out.

A schema says of every field what it is; a record holds its fields and no others.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

Schema = dict[str, Any]


def record(*, optional: Collection[str] = (), **fields: Schema) -> Schema:
    """An object of these fields, all of them there but those of ``optional``."""
    required = [name for name in fields if name not in optional]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


def number(meaning: str, least: float | None = None, most: float | None = None) -> Schema:
    """A number from ``least`` to ``most``."""
    limits = {"minimum": least, "maximum": most}
    return {"type": "number", "description": meaning} | {name: at for name, at in limits.items() if at is not None}


def whole(meaning: str, least: int | None = None, most: int | None = None) -> Schema:
    """A whole number from ``least`` to ``most``."""
    return number(meaning, least, most) | {"type": "integer"}


def text(meaning: str) -> Schema:
    """A text."""
    return {"type": "string", "description": meaning}


def truth(meaning: str) -> Schema:
    """True or false."""
    return {"type": "boolean", "description": meaning}


def several(meaning: str, entry: Schema, count: int | None = None) -> Schema:
    """A list, of exactly ``count`` entries where that is given."""
    limits = {} if count is None else {"minItems": count, "maxItems": count}
    return {"type": "array", "items": entry, "description": meaning} | limits


def maybe(schema: Schema) -> Schema:
    """The same, or null."""
    meaning = {"description": schema["description"]} if "description" in schema else {}
    return {"anyOf": [schema, {"type": "null"}]} | meaning


BOX = several("x1, y1, x2, y2 in pixels of the upright original.", {"type": "number"}, 4)
SCORE = number("How sure the model is.", 0, 1)
CLASS_ID = whole("From 0, in the order of the model's class_names.", 0)
CLASS_NAME = text("As the model names it.")
POINTS = several(
    "Left eye, right eye, nose tip, left and right corner of the mouth: x, y in pixels of the upright original.",
    several("x, y.", {"type": "number"}, 2),
    5,
)

"""JSON schemas of growing difficulty, drawn from a seed, each with a request for an answer that follows it.

Levels: 1 flat objects of simple fields; 2 formats, patterns, ranges of numbers, free texts; 3 lists; 4 objects within
objects, optional fields; 5 alternatives and references; 6 all of these, three deep, with references to themselves.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]

NUM_LEVELS = 6
LISTS, NESTED, ALTERNATIVES, DEEPEST = 3, 4, 5, 6  # the levels that bring something new
TOPICS = (
    "a book", "a bus stop", "a cat", "a city", "a film", "a garden", "a hotel", "a ship", "a student", "a theatre",
    "an invoice", "an order", "a recipe", "a server", "a song", "a train", "a village", "a workshop",
)  # fmt: skip
GROUPS = ("address", "contact", "details", "item", "owner", "place", "record", "size", "status", "step")
WORDS = ("amber", "blue", "cold", "draft", "east", "final", "green", "high", "low", "open", "sold", "west")


@dataclass(frozen=True)
class SchemaCase:
    """A schema, how difficult it is, and what a model is asked for."""

    name: str
    level: int
    schema: Schema
    request: str


def schema_cases(count: int, seed: int = 0) -> list[SchemaCase]:
    """``count`` schemas, the levels in turn, so that any beginning of the list holds all of them."""
    cases: list[SchemaCase] = []
    for number in range(count):
        level = number % NUM_LEVELS + 1
        writer = SchemaWriter(random.Random(f"{seed}-{number}"), level)
        schema, topic = writer.whole(), writer.rng.choice(TOPICS)
        request = f"Describe {topic} in JSON that follows this schema. Answer with the JSON only.\n{json.dumps(schema)}"
        cases.append(SchemaCase(f"level{level}-{number}", level, schema, request))
    return cases


class SchemaWriter:
    """Draws one schema. ``definitions`` are what it refers to."""

    def __init__(self, rng: random.Random, level: int) -> None:
        self.rng = rng
        self.level = level
        self.definitions: dict[str, Schema] = {}

    def whole(self) -> Schema:
        """The schema, its definitions with it."""
        schema = self.object_of(depth=0)
        return schema | ({"$defs": self.definitions} if self.definitions else {})

    def object_of(self, depth: int) -> Schema:
        """An object with one to four fields, most of them required, and from level 4 on some that are not."""
        fields = dict(self.field(depth) for _ in range(self.rng.randint(1, 4 if depth == 0 else 2)))
        required = [name for name in fields if self.level < NESTED or self.rng.random() < 0.8]
        return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}

    def field(self, depth: int) -> tuple[str, Schema]:
        """A name and its schema; the higher the level, the rarer a simple one."""
        builders: list[Callable[[int], Schema]] = []
        if self.level >= LISTS:
            builders.append(self.list_of)
        if self.level >= NESTED and depth < (2 if self.level == DEEPEST else 1):
            builders.append(self.object_of_next)
        if self.level >= ALTERNATIVES:
            builders += [self.alternatives, self.reference]
        if not builders or self.rng.random() < 0.4:
            return self.leaf()
        return self.rng.choice(GROUPS), self.rng.choice(builders)(depth)

    def object_of_next(self, depth: int) -> Schema:
        """An object one level further down."""
        return self.object_of(depth + 1)

    def list_of(self, depth: int) -> Schema:
        """A list of few entries, all of one schema or, now and then, the first of another."""
        most = self.rng.randint(1, 3)
        entry = self.object_of(depth + 1) if self.level >= NESTED and depth == 0 else self.leaf()[1]
        schema = {"type": "array", "items": entry, "minItems": self.rng.randint(0, most), "maxItems": most}
        return schema | ({"prefixItems": [self.leaf()[1]]} if self.rng.random() < 0.2 else {})

    def alternatives(self, depth: int) -> Schema:
        """One of two or three schemas."""
        kinds = [self.leaf()[1] for _ in range(self.rng.randint(1, 2))]
        return {"anyOf": [*kinds, self.object_of(max(depth, 1) + 1)]}

    def reference(self, depth: int) -> Schema:
        """A reference to a definition, at the deepest level to one whose list of parts may hold it again."""
        name = self.rng.choice(GROUPS)
        if self.definitions.get(name) == {}:  # being drawn: an object that must hold itself has no end
            return self.leaf()[1]
        if name not in self.definitions:
            self.definitions[name] = {}
            definition = self.object_of(max(depth, 1) + 1)
            if self.level == DEEPEST and self.rng.random() < 0.3:
                own = {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 1}
                definition["properties"]["parts"] = own
            self.definitions[name] = definition
        return {"$ref": f"#/$defs/{name}"}

    def leaf(self) -> tuple[str, Schema]:
        """A simple field, of those that the level knows."""
        simple = (
            ("count", self.whole_number()),
            ("is_open", {"type": "boolean"}),
            ("name", {"type": "string", "minLength": 1, "maxLength": self.rng.randint(4, 24)}),
            ("kind", {"enum": self.rng.sample(WORDS, 3)}),
            ("unit", {"const": self.rng.choice(WORDS)}),
        )
        return self.rng.choice(simple if self.level == 1 else simple + self.formed())

    def whole_number(self) -> Schema:
        """A range of whole numbers."""
        least = self.rng.randint(-50, 200)
        return {"type": "integer", "minimum": least, "maximum": least + self.rng.randint(0, 5000)}

    def formed(self) -> tuple[tuple[str, Schema], ...]:
        """Fields whose text has a form, and numbers with a point."""
        letters, digits = self.rng.randint(2, 4), self.rng.randint(2, 5)
        return (
            ("email", {"type": "string", "format": "email", "maxLength": 40}),
            ("date", {"type": "string", "format": "date"}),
            ("starts_at", {"type": "string", "format": "date-time"}),
            ("id", {"type": "string", "format": "uuid"}),
            ("host", {"type": "string", "format": "ipv4"}),
            ("code", {"type": "string", "pattern": f"^[A-Z]{{{letters}}}-[0-9]{{{digits}}}$"}),
            ("phone", {"type": "string", "pattern": r"^\+[1-9][0-9]{6,11}$"}),
            ("price", {"type": "number", "minimum": 0, "exclusiveMaximum": self.rng.choice((1, 100, 2500))}),
            ("steps", {"type": "integer", "multipleOf": self.rng.choice((5, 10)), "minimum": 0, "maximum": 1000}),
            ("title", {"type": "string"}),
            ("note", {"type": ["string", "null"], "maxLength": 30}),
        )

"""A JSON schema in the terms that llguidance holds exactly.

It reads every number of a schema as a double and writes a bound's digits as a pattern: whole numbers beyond 2**53 are
taken for their neighbours, an exclusive bound lets itself through where both bounds stand between the same whole
numbers, and bounds of 64 bits are beyond its own (the least one ends the process). Here bounds are drawn in by what
they would be wrong by, so that every answer follows the schema as it was sent, and what cannot be held to is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, TypeGuard

Schema = dict[str, Any]

MAX_PROPERTIES = 1000  # of a schema; what optional ones cost grows with their square
MAX_LENGTH = 1_000_000  # characters of a text that are counted
MAX_REPEATS = 1000  # of an expression; what compiling costs grows with their square
MAX_PATTERNS = 8  # expressions that one text has to match at once; what compiling costs doubles with each
MAX_MULTIPLE = 1_000_000  # of steps that have to hold at once: their product in units of the last decimal place
LEAST = 1e-15  # a bound nearer to nought is taken for this, or for nought
BEYOND = 1e120  # no answer writes a number as large: a bound there says nothing
LARGEST = math.nextafter(1e18, 0)  # of the bounds that are held to
LARGEST_WHOLE = float(2**63 - 2048)  # and of whole numbers
SIGNIFICANT = 15  # decimal digits that no double confuses
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # of names, not of keywords
BARE = ("default", "examples", "x-guidance")  # keywords that hold no schema
IN_GRAMMAR = re.compile(r"%json\s*(?=\{)")


def held(text: str) -> Schema | bool:
    """The schema in a text. Errors: ValueError for what is no JSON, too large, or cannot be held to."""
    try:
        schema = json.loads(text)
        count = num_properties(schema)
        if count > MAX_PROPERTIES:
            raise ValueError(f"it has {count} properties; at most {MAX_PROPERTIES} are allowed")
        if (count := patterns_at_once(schema)) > MAX_PATTERNS:
            raise ValueError(f"one text has to match {count} patterns at once; at most {MAX_PATTERNS} are allowed")
        result: Schema | bool = with_exact_numbers(schema)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError("it is no JSON, or nested too deeply") from error
    return result


def held_in_grammar(grammar: str, options: Mapping[str, Any]) -> str:
    """A grammar with its schemas so; options: how they are written where they do not say. Errors: as ``held``."""
    parts, end = [], 0
    for found in IN_GRAMMAR.finditer(grammar):
        if found.end() < end:
            continue
        try:
            _, length = json.JSONDecoder().raw_decode(grammar[found.end() :])
        except ValueError:  # within a text, or for the compiler to refuse
            continue
        schema = held(grammar[found.end() : found.end() + length])
        assert isinstance(schema, dict)
        parts += [grammar[end : found.end()], json.dumps({"x-guidance": options} | schema)]
        end = found.end() + length
    return "".join([*parts, grammar[end:]])


def num_properties(schema: Any) -> int:
    """How many properties are described, all levels together."""
    left, count = [schema], 0
    while left:
        value = left.pop()
        if isinstance(value, dict):
            count += len(found) if isinstance(found := value.get("properties"), dict) else 0
            left += value.values()
        elif isinstance(value, list):
            left += value
    return count


def patterns_at_once(root: Any) -> int:
    """The most expressions that one text has to match: its own, those of ``allOf`` and of what is referred to."""
    left, known = [root], dict[int, Counter[str]]()
    while left:
        value = left.pop()
        if isinstance(value, dict):
            count_patterns(value, root, known)
            left += value.values()
        elif isinstance(value, list):
            left += value
    return max((count for counts in known.values() for count in counts.values()), default=0)


def count_patterns(schema: Any, root: Any, known: dict[int, Counter[str]]) -> Counter[str]:
    """How many expressions a text has to match by one schema, by the name of the property it stands in, "" for the
    value itself: what ``allOf`` joins is joined name by name. ``known``: schemas counted before, by identity.
    """
    if not isinstance(schema, dict):
        return Counter()
    if id(schema) not in known:
        known[id(schema)] = Counter()  # where it refers to itself
        own = Counter({"": int(isinstance(schema.get("pattern"), str))})
        for place, value in inner_schemas(schema):
            inside = count_patterns(value, root, known)
            own |= Counter({name or place: count for name, count in inside.items()})
        for part in (*parts_of(schema, "allOf"), referred(schema.get("$ref"), root)):
            own = own + count_patterns(part, root, known)
        for key in ("anyOf", "oneOf"):
            branches = Counter[str]()
            for part in parts_of(schema, key):
                branches |= count_patterns(part, root, known)
            own = own + branches
        known[id(schema)] = own
    return known[id(schema)]


def inner_schemas(schema: Schema) -> Iterator[tuple[str, Any]]:
    """What describes a part of the value: the property's name, or the keyword, and the schema."""
    for key, value in schema.items():
        if key in ("allOf", "anyOf", "oneOf", "$defs", "definitions", "const", "enum", *BARE):
            continue
        if isinstance(value, dict):
            yield from value.items() if key in NAMED else [(key, value)]
        elif isinstance(value, list):
            yield from ((f"{key} {index}", entry) for index, entry in enumerate(value))


def parts_of(schema: Schema, key: str) -> list[Any]:
    """The schemas that ``key`` joins; empty where it does not."""
    parts = schema.get(key)
    return parts if isinstance(parts, list) else []


def referred(reference: Any, root: Any) -> Any:
    """What a reference within the schema means; None for any other."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    place = root
    for name in filter(None, reference[1:].split("/")):
        place = place.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
    return place


def with_exact_numbers(schema: Any) -> Any:
    """The schema with its bounds drawn in, those of every schema in it too. Errors: ValueError."""
    if isinstance(schema, list):
        return [with_exact_numbers(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    result: Schema = {}
    for key, value in schema.items():
        if key in ("const", "enum"):
            check_exact(value)
        if key in NAMED and isinstance(value, dict):
            result[key] = {name: with_exact_numbers(entry) for name, entry in value.items()}
        else:
            result[key] = value if key in ("const", "enum", *BARE) else with_exact_numbers(value)
    check_sizes(result)
    draw_in(result, "minimum", "exclusiveMinimum", 1)
    draw_in(result, "maximum", "exclusiveMaximum", -1)
    if is_number(least := result.get("minimum")) and least >= LARGEST:
        result.setdefault("maximum", LARGEST_WHOLE)
    return result


def check_exact(value: Any) -> None:
    """Errors: ValueError for a number in a value that would be answered as its neighbour."""
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            check_exact(entry)
    elif is_number(value) and abs(value) > 2**53 and written(value) != int(value):
        raise ValueError(f"it holds the number {shortened(value)}, which doubles do not tell from others; send a text")


def check_sizes(schema: Schema) -> None:
    """Drop a bound that no text reaches. Errors: ValueError for one that is asked for, for steps of nought or with too
    large a multiple in common, and for an expression that takes too long.
    """
    if is_number(most := schema.get("maxLength")) and most > MAX_LENGTH:
        del schema["maxLength"]
    if is_number(least := schema.get("minLength")) and least > MAX_LENGTH:
        raise ValueError(f"minLength is {shortened(least)}; at most {MAX_LENGTH} can be held to")
    holders = [schema, *(part for part in parts_of(schema, "allOf") if isinstance(part, dict))]
    steps = {step for holder in holders if is_number(step := holder.get("multipleOf"))}
    if any(step <= 0 for step in steps):
        raise ValueError(f"multipleOf is {shortened(min(steps))}; it must be above 0")
    places = max((-int(Decimal(repr(step)).as_tuple().exponent) for step in steps), default=0)
    if len(steps) > 1 and math.prod(int(Decimal(repr(step)).scaleb(places)) for step in steps) > MAX_MULTIPLE:
        raise ValueError(f"allOf asks for multiples of {', '.join(map(shortened, sorted(steps)))} at once; send one")
    if isinstance(pattern := schema.get("pattern"), str):
        check_expression(pattern)


def check_expression(expression: str) -> None:
    """Errors: ValueError for more repetitions than are compiled in a second or two."""
    count = sum(map(expression.count, "*+?{"))
    if count > MAX_REPEATS:
        raise ValueError(f"an expression has {count} repetitions (* + ? {{); at most {MAX_REPEATS} are allowed")


def draw_in(schema: Schema, name: str, exclusive: str, inward: int) -> None:
    """Replace a bound and its exclusive form; inward: 1 for the lower bound, -1 for the upper one. Both are mirrored
    into lower bounds first. Errors: ValueError for a bound that no answer within reach could keep.
    """
    if isinstance(schema.get(exclusive), bool):  # draft 4, and OpenAPI 3.0
        is_exclusive = schema.pop(exclusive)
        if is_exclusive and name in schema:
            schema[exclusive] = schema.pop(name)
    largest = LARGEST_WHOLE if schema.get("type") == "integer" else LARGEST
    bounds: list[float] = []
    for key in (name, exclusive):
        if not is_number(value := schema.get(key)):
            continue
        bound = inward * value
        if bound > largest:
            raise ValueError(f"{key} is {shortened(value)}; numbers are held to bounds of at most {largest:.3g}")
        if key == exclusive and not (bound >= 0 and bound == int(bound)) and -largest <= bound and abs(bound) > LEAST:
            schema[key] = inward * at_least(bound)  # the library's own exclusive bound holds
            continue
        del schema[key]
        if bound >= -BEYOND:
            bounds.append(next_above(int(bound)) if key == exclusive and bound >= 0 else within(bound, -largest))
    if bounds:
        schema[name] = inward * max(bounds)


def within(bound: float, least: float) -> float:
    """A lower bound as a double that is not below it, and that has few enough digits."""
    if 0 < abs(bound) < LEAST:
        return LEAST if bound > 0 else 0.0
    return max(least, at_least(bound))


def at_least(number: float) -> float:
    """The least double that is not below a number."""
    double = float(number)
    return double if double >= number else math.nextafter(double, math.inf)


def next_above(whole: int) -> float:
    """The next number above with as many decimal digits as a double holds, at most the next whole one."""
    step = Decimal(1).scaleb(len(str(whole)) - SIGNIFICANT) if whole else Decimal(1).scaleb(-SIGNIFICANT)
    return at_least(whole + 1) if step >= 1 else float(whole + step)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a schema is a number: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def written(number: float) -> int:
    """The whole number that is written for one: the shortest digits of its double, then noughts."""
    try:
        return int(Decimal(repr(float(number))))
    except OverflowError:
        return 0


def shortened(number: float) -> str:
    """A number for a message."""
    text = str(number) if abs(number) < 10**30 else "of more than 30 digits"
    return text[:40]

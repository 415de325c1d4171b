"""What every request body has in common: strict types, null as absence, bounded depth, plain values, and fields that
change nothing."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from server.api.errors import ApiError, InvalidValue
from server.text import InvalidText, check_text

MAX_DEPTH = 128
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def whole_number(value: Any) -> Any:
    """6.0 is 6: JSON has one type of number. Whatever else came is judged by the type."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, AfterValidator(check_text)]
NeutralValues = dict[str, tuple[Any, ...]]
WholeNumber = Annotated[int, BeforeValidator(whole_number, json_schema_input_type=int)]


class Body(BaseModel):
    """An object in a request. A field that is null counts as left out; undeclared fields are kept for ``check_fields``.

    without_effect: undeclared fields accepted with any value, since they cannot change the answer; neutral: undeclared
    fields accepted with these values, and refused by name with any other, which would change it.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    without_effect: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[NeutralValues] = {}

    @model_validator(mode="before")
    @classmethod
    def _null_is_absence(cls, value: Any) -> Any:
        return {name: v for name, v in value.items() if v is not None} if isinstance(value, dict) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Ranges of numbers under JSON schema's names; behind a validator pydantic writes its own, or none."""
        reference = handler(core_schema)
        properties = handler.resolve_ref_schema(reference).get("properties", {})
        for name, field in cls.model_fields.items():
            bounds = {
                BOUNDS[key]: getattr(entry, key) for entry in field.metadata for key in BOUNDS if hasattr(entry, key)
            }
            place = properties[name]
            for part in place.get("anyOf", [place]):
                if "description" in part:
                    place.setdefault("description", part["description"])
                if part.get("type") in ("integer", "number"):
                    part |= {BOUNDS[key]: part.pop(key) for key in BOUNDS if key in part} | bounds
        return reference


class RequestBody(Body):
    """The whole of a request's body."""

    @model_validator(mode="wrap")
    @classmethod
    def _plain_json(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Nothing in it is nested too deeply; where the fields leave room, no number is NaN and every text Unicode."""
        for name, inner in value.items() if isinstance(value, dict) else ():
            if is_deeper(inner, MAX_DEPTH):
                raise InvalidValue(name, f"{name} is nested more than {MAX_DEPTH} levels deep.")
        body = handler(value)
        check_values(value)
        return body


def is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects stand in each other more than ``limit`` times; without recursion."""
    level = [value]
    for _ in range(limit + 1):
        level = [inner for outer in level for inner in children(outer)]
        if not level:
            return False
    return True


def children(value: Any) -> list[Any]:
    """The lists and objects directly inside a value."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in inside if isinstance(inner, dict | list)]


def check_values(body: Any) -> None:
    """Errors: InvalidValue for NaN and infinity, which JSON does not have, ApiError ``invalid_unicode`` for lone
    surrogates and NUL, each with its place; also in fields that nobody declared.
    """
    left: list[tuple[tuple[str, ...], Any]] = [((), body)]
    while left:
        path, value = left.pop()
        if isinstance(value, dict):
            left += [((*path, key), inner) for key, inner in value.items()]
            value = "".join(value)
        elif isinstance(value, list):
            left += [((*path, str(index)), inner) for index, inner in enumerate(value) if not isinstance(inner, int)]
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidValue(".".join(path), f"{'.'.join(path)} is {value}, which is no number of JSON.")
        if isinstance(value, str):
            try:
                check_text(value)
            except InvalidText as error:
                param = ".".join(path) or None
                message = f"{param or 'the request body'}: {error}."
                raise ApiError(400, message, param=param, code="invalid_unicode") from error

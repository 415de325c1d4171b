"""The body of a kind's route, made from its options: the schema of JSON and the fields of a form are one thing."""

from __future__ import annotations

import dataclasses
import json
import types
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, Field, create_model, model_validator

from server.api.body import RequestBody, Text, WholeNumber
from server.api.errors import InvalidValue
from vision.serving.protocol import Kind, ModelInfo, OptionError

MAX_IMAGES = 8
OWN_SHAPE = "dovetail"
LIMITS = ("ge", "le", "min_length", "max_length")


class ImageBody(RequestBody):
    """What every vision route takes: ``image`` or ``images`` (base64, a data URI, or a URL), and the model's name."""

    kind: ClassVar[Kind]
    lists: ClassVar[frozenset[str]] = frozenset()

    model: Text | None = Field(None, description="Left out: the first model of this kind.")
    image: Text | None = Field(None, description="base64, a data URI or a URL; in a form, a file.")
    images: list[Text] | None = Field(
        None, min_length=1, max_length=MAX_IMAGES, description="Several images, answered in their order."
    )
    draw: bool | None = Field(None, description="The answer holds the picture with what was found drawn into it.")

    @model_validator(mode="after")
    def _fits_together(self) -> ImageBody:
        if self.image is not None and self.images is not None:
            raise InvalidValue("image", "image and images were both sent; send one of them.")
        if self.draw and not self.has_room:
            others = [name for name, shape in self.kind.shapes.items() if shape.is_object]
            places = ", ".join(sorted([OWN_SHAPE, *others]))
            raise InvalidValue("draw", f"format {self.shape} has no place for a picture; use one of {places}.")
        try:
            self.kind.options(**self.given())
        except OptionError as error:
            raise refusal(error) from error
        return self

    @property
    def shape(self) -> str:
        """The shape of the answer."""
        return getattr(self, "format", None) or OWN_SHAPE

    @property
    def has_room(self) -> bool:
        """Whether the answer is an object, beside whose keys a picture may stand."""
        return self.shape == OWN_SHAPE or self.kind.shapes[self.shape].is_object

    def given(self) -> dict[str, Any]:
        """The kind's options that were sent."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self.kind.options)}
        return {name: value for name, value in values.items() if value is not None}

    def options(self, info: ModelInfo, num_images: int, single: bool) -> list[dict[str, Any]]:
        """The options of every image as JSON objects. Errors: InvalidValue."""
        given = self.given()
        split = {} if single else {
            entry.name: given.pop(entry.name)
            for entry in dataclasses.fields(self.kind.options)
            if entry.metadata.get("per_image") and entry.name in given
        }  # fmt: skip
        for name, values in split.items():
            if len(values) != num_images:
                message = f"{name} hold {len(values)} lists for {num_images} images; send one an image."
                raise InvalidValue(name, message)
        try:
            return [
                dataclasses.asdict(
                    self.kind.options(**given, **{name: values[index] for name, values in split.items()}).checked(
                        info, f".{index}" if split else ""
                    )
                )
                for index in range(num_images)
            ]
        except OptionError as error:
            raise refusal(error) from error


def refusal(error: OptionError) -> InvalidValue:
    """An option's value that a kind does not take, on the wire."""
    return InvalidValue(error.param, f"{error}.")


def body_of(kind: Kind) -> type[ImageBody]:
    """The body of the route of ``kind``; null means the default everywhere."""
    hints = get_type_hints(kind.options)
    fields: dict[str, Any] = {}
    for entry in dataclasses.fields(kind.options):
        limits = {name: entry.metadata[name] for name in LIMITS if name in entry.metadata}
        fields[entry.name] = (
            Annotated[wire_type(hints[entry.name]) | None, Field(None, description=entry.metadata["help"], **limits)],
            None,
        )
    if kind.shapes:
        meaning = Field(None, description="Whose shape the answer has.")
        fields["format"] = (Annotated[Literal[(OWN_SHAPE, *kind.shapes)] | None, meaning], None)
    name = "".join(part.capitalize() for part in kind.name.split("-")) + "Body"
    body: type[ImageBody] = create_model(name, __base__=ImageBody, __doc__=f"POST /v1/vision/{kind.route}.", **fields)
    body.kind = kind
    body.lists = frozenset(
        entry.name for entry in dataclasses.fields(kind.options) if is_list_of_texts(hints[entry.name])
    )
    return body


def wire_type(hint: Any) -> Any:
    """The type of an option as a strict body declares it."""
    arguments = [argument for argument in get_args(hint) if argument is not types.NoneType]
    if get_origin(hint) in (Union, types.UnionType):
        if len(arguments) == 1:
            return wire_type(arguments[0])
        return Union[tuple(wire_type(argument) for argument in arguments)]  # noqa: UP007 - made at run time
    if get_origin(hint) is tuple:
        return list[wire_type(arguments[0])]  # type: ignore[misc]
    if get_origin(hint) is list:
        return Annotated[hint, BeforeValidator(parsed_text)]
    return {int: WholeNumber, str: Text}.get(hint, hint)


def is_list_of_texts(hint: Any) -> bool:
    """Whether a form holds it as text parted by commas."""
    return any(get_origin(argument) is tuple for argument in (hint, *get_args(hint)))


def parsed_text(value: Any) -> Any:
    """A form's field holds JSON as text; what is no JSON is left to the check of its type."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return value


def refuse_constant(name: str) -> Any:
    """JSON has no NaN and no Infinity."""
    raise ValueError(f"{name} is not JSON")

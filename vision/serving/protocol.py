"""What a kind of model is: options in, rows asked of networks, an answer out. No torch here.

A kind never runs its network. ``answer`` is a generator that yields ``Ask`` and is sent the network's outputs, so that
``vision.serving.batch`` alone decides which rows of which requests run together, and one kind asks another by
``yield from``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vision.images import Picture
from vision.serving.folder import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Outputs = Sequence[NDArray[Any]]
Answer = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Another system's shape of an answer: ``write(answer, width, height)`` of the image, and the schema of that."""

    write: Callable[[Answer, int, int], Any]
    schema: Mapping[str, Any]

    @property
    def is_object(self) -> bool:
        """Whether a picture and timings may stand beside its keys."""
        return bool(self.schema["type"] == "object")


class Network(Protocol):
    """A network on some engine."""

    @property
    def runtime(self) -> str:
        """onnxruntime or torch."""

    def run(self, rows: Pixels) -> Outputs:
        """RGB rows uint8 [B, 3, H, W] to outputs [B, ...], in the order of the traced form."""


@dataclass(frozen=True, eq=False)
class Ask:
    """Rows uint8 [N, 3, H, W] for ``network``, at least one."""

    network: Network
    rows: Pixels


Answering = Generator[Ask, Outputs, Answer]


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field of ``Options``: its help, and limits (``ge le min_length max_length``) for who reads strangers' input.

    ``flag`` is its name on the command line where that is another; ``per_image``: with several images it holds a list
    of one value an image; ``parse`` reads it from the command line's text.
    """
    return field(default=default, metadata={"help": help, **limits})


class ExportError(RuntimeError):
    """An export cannot be made, or its answers are not torch's."""


class OptionError(ModelError):
    """An option's value is not one this model takes. ``param`` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Options:
    """What may be asked of a kind: a frozen dataclass of ``option`` fields.

    The server makes the body's schema and the form's fields from it, the command line its flags.
    """

    @classmethod
    def from_json(cls, values: Mapping[str, Any], kind: str) -> Self:
        """From a JSON object; missing keys take the defaults. Errors: ModelError for options that are not its own."""
        if unknown := sorted(set(values) - {entry.name for entry in dataclasses.fields(cls)}):
            raise ModelError(f"the options {', '.join(unknown)} are not known to a {kind} model")
        return cls(**values)

    def checked(self, info: ModelInfo, place: str = "") -> Self:  # noqa: ARG002
        """The same as far as ``info`` takes it; ``place`` ends the name of an option in errors. Errors: OptionError."""
        return self


@dataclass(frozen=True)
class Card:
    """What of a config.json is needed to use a model. ``digest`` is the SHA-256 of its weights."""

    class_names: tuple[str, ...]
    licence: str
    image_size: int
    description: str
    digest: str


@dataclass(frozen=True)
class ModelInfo:
    """What a model says of itself. ``kind``: what it answers ("detector"); ``runtime``: onnxruntime or torch.

    ``full_size``: whatever is asked, it looks at parts of the image.
    """

    name: str
    kind: str
    class_names: tuple[str, ...]
    licence: str
    image_size: int
    runtime: str
    description: str = ""
    full_size: bool = False

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Parity:
    """How a file's answers differ from torch's: ``figures`` for the report, and what is wrong ("" for nothing)."""

    figures: Mapping[str, float | int | str | None]
    fault: str = ""


# Pairs of torch's outputs and the file's.
Compare = Callable[[Sequence[tuple[Outputs, Outputs]]], Parity]


def close_logits(tolerance: float) -> Compare:
    """The largest deviation of a file's logit from torch's, relative to the largest logit of its batch."""

    def compare(pairs: Sequence[tuple[Outputs, Outputs]]) -> Parity:
        worst = max(float(np.abs(b[0] - a[0]).max() / max(np.abs(a[0]).max(), 1e-6)) for a, b in pairs)
        fault = "" if worst <= tolerance else f"answered {worst:.2e} apart from torch (allowed {tolerance:.0e})"
        return Parity({"max_difference": worst}, fault)

    return compare


@dataclass(frozen=True)
class Traced:
    """A network as it is exported: ``module`` maps images [B, 3, H, W] in [0, 1] to ``outputs`` by name.

    ``images(B)`` makes what it is checked with, in [0, 1]; ``expected`` is torch's answer, ``module`` itself unless it
    holds operators that torch has not. ``compare`` judges the file, ``compare_int8`` one with 8 bits. ``config`` goes
    into the file, with ``metadata`` beside it; ``sees_nothing`` is what to warn of where a training failed.
    """

    module: nn.Module
    outputs: tuple[str, ...]
    image_size: int
    config: Mapping[str, Any]
    compare: Compare
    images: Callable[[int], Tensor]
    compare_int8: Compare | None = None
    expected: Callable[[Tensor], Outputs] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    sees_nothing: str = ""


class Kind(ABC):
    """One kind of model. The attributes name it; a file in ``vision.serving.kinds`` holds its one instance.

    ``format`` and ``version`` are those of saved folders; ``route`` ends the path of its HTTP route, ``noun`` is its
    ``object`` there and ``id_prefix`` begins its ids. ``schema``: of its answer, an object. ``shapes``: other systems'
    shapes of it, by the name a client asks for. ``asks`` names kinds of models it turns to.
    ``boxes``: the answer's list of boxes with scores, which can be followed through a video.
    """

    name: ClassVar[str]
    format: ClassVar[str]
    version: ClassVar[int] = 1
    route: ClassVar[str]
    noun: ClassVar[str]
    id_prefix: ClassVar[str]
    summary: ClassVar[str]
    options: ClassVar[type[Options]] = Options
    schema: ClassVar[Mapping[str, Any]]
    shapes: ClassVar[Mapping[str, Shape]] = {}
    asks: ClassVar[tuple[str, ...]] = ()
    boxes: ClassVar[str] = ""

    @abstractmethod
    def read_card(self, config: Mapping[str, Any], digest: str) -> Card:
        """From the object in config.json. Errors: KeyError, TypeError, ValueError where it is not of this kind."""

    @abstractmethod
    def module(self, folder: Path) -> nn.Module:
        """The saved network in torch, images [B, 3, H, W] in [0, 1] to a tensor or a tuple of them."""

    @abstractmethod
    def trace(self, folder: Path, image_size: int | None = None) -> Traced:
        """The saved network as it is exported. Errors: CheckpointError, ExportError."""

    @abstractmethod
    def answer(self, model: Model, picture: Picture, options: Any) -> Answering:
        """Ask for rows, return the answer, JSON; lets go of ``picture`` as soon as it can.

        Errors: ImageError for a picture of which the options ask too much.
        """

    def full_size(self, options: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Whether it looks at parts of the image, so that a large one must not be decoded smaller."""
        return False

    @abstractmethod
    def draw(self, image: Image.Image, answer: Answer) -> Image.Image:
        """The upright image with its answer drawn on it."""

    @abstractmethod
    def rows(self, answer: Answer) -> list[Answer]:
        """An answer as the lines of a table for people, and of a CSV."""

    def says_something(self, answer: Answer) -> bool:  # noqa: ARG002
        """Whether a caller got what it came for; nothing found is an answer."""
        return True

    def nothing(self, answer: Answer) -> str:  # noqa: ARG002
        """What to tell people where there are no rows."""
        return "nothing found"

    def adopt(self, file: Path, session: Any, num_threads: int) -> tuple[Mapping[str, Any], Network] | None:  # noqa: ARG002
        """Config and network of an ONNX file that is not ours but of a network this kind knows; None for any other."""
        return None


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: its kind, what it says of itself, its network, and the models its kind asks, by kind."""

    kind: Kind
    info: ModelInfo
    card: Any
    network: Network
    companions: Mapping[str, Model] = field(default_factory=dict)

    def answer(self, picture: Picture, options: Mapping[str, Any]) -> Answering:
        """See ``Kind``; ``options`` as a JSON object. Errors: ModelError for options that are not its own."""
        return self.kind.answer(self, picture, self.kind.options.from_json(options, self.kind.name))

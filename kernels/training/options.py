"""What a recipe's ``[training]`` table may say, and how recipes are read. No torch here."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

OPTIMIZERS = ("adamw", "muon", "sgd")
PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "step", "warmup_stable_decay")

Table = TypeVar("Table")


class RecipeError(ValueError):
    """A recipe is missing, is not TOML, or holds a key or value that is not allowed."""


@dataclass(frozen=True)
class TrainingOptions:
    """How one run trains. ``output`` receives checkpoints, ``training.json`` and ``training.png``.

    ``steps`` counts optimiser steps of ``batch_size * accumulation`` samples for each process. ``muon`` trains the
    matrices of the hidden layers with torch's Muon at ``muon_learning_rate`` and everything else with AdamW.
    ``momentum`` and ``nesterov`` belong to ``sgd``, ``betas`` to the other two. Weight decay spares vectors (biases,
    normalisation) unless ``decay_vectors``. ``clip_norm`` bounds the gradient's norm, 0 leaves it alone. ``step``
    multiplies the learning rate by ``schedule_options.factor`` every ``schedule_options.every`` steps, or at the steps
    listed as ``schedule_options.at``. ``drop_last``
    leaves out an epoch's last, smaller batch. ``threads`` None leaves torch's own choice. ``freeze`` names parts of the
    network, by the beginnings of their parameters' names such as "backbone.stages.0", that stay as they are, their
    batch normalisation's statistics with them; ``rates`` multiplies the learning rate of parts, the longest name
    that fits deciding: { backbone = 0.1 }.
    """

    output: str
    steps: int
    batch_size: int = 8
    accumulation: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_vectors: bool = False
    clip_norm: float = 1.0
    schedule: str = "cosine"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    precision: str = "fp32"
    seed: int = 0
    log_every: int = 10
    evaluate_every: int | None = None
    save_every: int = 100
    keep_checkpoints: int = 2
    loader_workers: int = 0
    drop_last: bool = False
    threads: int | None = None
    freeze: tuple[str, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise RecipeError(f"training.{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise RecipeError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise RecipeError(f"training.evaluate_every is {self.evaluate_every}; it must be at least 1, or left out")
        if not all(isinstance(rate, int | float) and rate > 0 for rate in self.rates.values()):
            raise RecipeError("training.rates must hold numbers above 0; freeze what is not to move")
        if self.schedule == "step" and set(self.schedule_options) not in ({"every", "factor"}, {"at", "factor"}):
            raise RecipeError(
                'training.schedule = "step" needs schedule_options = { every = STEPS, factor = NUMBER }, or at'
            )


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a TOML recipe, all but `data.source`, which is for people (see `check_data`)."""
    recipe = read_toml(path)
    if isinstance(data := recipe.get("data"), dict):
        data.pop("source", None)
    return recipe


def check_data(path: Path) -> None:
    """Errors: RecipeError where the data are not there; it repeats what the recipe's `data.source` says of them."""
    data = read_toml(path).get("data")
    if not isinstance(data, dict):
        return
    for key in ("root", "tokens", "conversations"):
        place = data.get(key)
        if isinstance(place, str) and not Path(place).expanduser().exists():
            source = f"; they come from: {data['source']}" if "source" in data else ""
            raise RecipeError(f"the data of {path} are not there: data.{key} is {place}, seen from this folder{source}")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file whole. Errors: RecipeError."""
    if not path.is_file():
        raise RecipeError(f"the recipe {path} does not exist")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error


def check_tables(recipe: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Refuse a recipe with tables that nobody would read."""
    names = tuple(allowed)
    if unknown := sorted(set(recipe) - set(names)):
        raise RecipeError(f"the recipe has unknown tables {', '.join(unknown)}; allowed are {', '.join(names)}")


def take_table(recipe: dict[str, Any], name: str, table: type[Table]) -> Table:
    """Build the dataclass ``table`` from ``recipe[name]``; unknown and missing keys are named."""
    values = recipe.get(name, {})
    if not isinstance(values, dict):
        raise RecipeError(f"[{name}] must be a table, not {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(table)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise RecipeError(f"[{name}] has unknown keys {', '.join(unknown)}; allowed are {', '.join(fields)}")
    missing = [
        key
        for key, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and key not in values
    ]
    if missing:
        raise RecipeError(f"[{name}] lacks {', '.join(missing)}")
    hints = typing.get_type_hints(table)
    for key, value in values.items():
        if not fits(value, hints[key]):
            expected = hints[key].__name__ if isinstance(hints[key], type) else hints[key]
            raise RecipeError(f"{name}.{key} is {value!r}, a {type(value).__name__}; expected {expected}")
    return table(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value may stand where the dataclass says ``hint``; lists and tables are not looked into."""
    if hint is Any:
        return True
    origin = typing.get_origin(hint)
    if origin in (typing.Union, UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:  # which of its values, the dataclass checks
        return isinstance(value, tuple({type(option) for option in typing.get_args(hint)}))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (tuple, list):
        return isinstance(value, list)
    if origin in (dict, Mapping):
        return isinstance(value, dict)
    return isinstance(value, origin or hint)

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from kernels.training import RecipeError, TrainingOptions, load_recipe, take_table


@dataclass(frozen=True)
class Model:
    name: str
    width: float = 1.0
    sizes: tuple[int, ...] = ()
    limit: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def test_table_becomes_its_dataclass() -> None:
    recipe = {"model": {"name": "a", "width": 2, "sizes": [1, 2], "extra": {"b": 1}}}
    assert take_table(recipe, "model", Model) == Model("a", 2, (1, 2), None, {"b": 1})


def test_unknown_keys_are_named() -> None:
    with pytest.raises(RecipeError, match=r"\[model\] has unknown keys colour, heigth; allowed are name, width, sizes"):
        take_table({"model": {"name": "a", "heigth": 1, "colour": 2}}, "model", Model)


def test_missing_keys_are_named() -> None:
    with pytest.raises(RecipeError, match=r"\[model\] lacks name"):
        take_table({}, "model", Model)
    with pytest.raises(RecipeError, match=r"\[training\] lacks output, steps"):
        take_table({"training": {"batch_size": 4}}, "training", TrainingOptions)


@pytest.mark.parametrize(("values", "message"), [
    ({"name": 3}, r"model\.name is 3, a int; expected str"),
    ({"name": "a", "width": "wide"}, r"model\.width is 'wide', a str; expected float"),
    ({"name": "a", "limit": True}, r"model\.limit is True, a bool; expected int \| None"),
    ({"name": "a", "sizes": 3}, r"model\.sizes is 3"),
    ({"name": "a", "extra": []}, r"model\.extra is \[\]"),
])  # fmt: skip
def test_values_of_another_type_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        take_table({"model": values}, "model", Model)


def test_a_table_must_be_a_table() -> None:
    with pytest.raises(RecipeError, match=r"\[model\] must be a table, not str"):
        take_table({"model": "a"}, "model", Model)


@pytest.mark.parametrize(("changes", "message"), [
    ({"optimizer": "lion"}, "optimizer is 'lion'; allowed are adamw, muon, sgd"),
    ({"schedule": "exponential"}, "schedule is 'exponential'; allowed are constant"),
    ({"precision": "int8"}, "precision is 'int8'; allowed are fp32, bf16, fp16"),
    ({"steps": 0}, "steps is 0; it must be at least 1"),
    ({"evaluate_every": 0}, "evaluate_every is 0"),
    ({"schedule": "step"}, "needs schedule_options"),
    ({"schedule": "step", "schedule_options": {"every": 2, "at": [3], "factor": 0.1}}, "needs schedule_options"),
])  # fmt: skip
def test_values_that_are_not_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainingOptions(**({"output": "x", "steps": 1} | changes))


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[training\n")
    with pytest.raises(RecipeError, match="is not TOML"):
        load_recipe(tmp_path / "bad.toml")
    (tmp_path / "good.toml").write_text('[training]\noutput = "x"\nsteps = 3\nbetas = [0.9, 0.99]\n')
    assert take_table(load_recipe(tmp_path / "good.toml"), "training", TrainingOptions).betas == (0.9, 0.99)


@dataclass(frozen=True)
class WithLiteral:
    resize: Literal["stretch", "letterbox"] = "stretch"


def test_a_literal_takes_values_of_its_type() -> None:
    assert take_table({"data": {"resize": "letterbox"}}, "data", WithLiteral) == WithLiteral("letterbox")
    with pytest.raises(RecipeError, match=r"data\.resize is 3, a int"):
        take_table({"data": {"resize": 3}}, "data", WithLiteral)

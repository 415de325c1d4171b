"""One classifier recipe for every combination that a ``[study]`` table lists."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.training import RecipeError, take_table


@dataclass(frozen=True)
class StudyOptions:
    """Networks to compare, and the seeds each is trained with."""

    backbones: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)


def expand(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """``BACKBONE/seed_N`` -> recipe for ``train_classifier``; seeds vary slowest, so a cut-off study compares all nets.

    Everything but network, seed and output folder is the same. Errors: RecipeError where [study] is missing, or a
    [model] stands beside it.
    """
    if "study" not in recipe or "model" in recipe:
        raise RecipeError("a study needs the table [study] and no [model]: the networks are study.backbones")
    study = take_table(recipe, "study", StudyOptions)
    recipes: dict[str, dict[str, Any]] = {}
    for seed in study.seeds:
        for backbone in study.backbones:
            name = f"{backbone}/seed_{seed}"
            one = copy.deepcopy({table: values for table, values in recipe.items() if table != "study"})
            one["model"] = {"backbone": backbone}
            output = str(Path(one["training"]["output"]) / name)
            one["training"] |= {"seed": seed, "output": output}
            recipes[name] = one
    return recipes

"""A study: one recipe trained in several variants with several seeds, cell by cell, resumable at any point.

Beside the tables of one training the recipe has ``[study]``: ``seeds``, ``variants``, which for each name hold the
tables laid over the rest, and ``comparisons``, the questions it is made for (``kernels.training.paired``). Cells are
trained in order, seeds varying slowest, so that a study cut short has compared all variants. Each cell leaves
``report.json`` in its folder; ``study.json`` says where the whole stands.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kernels.training.options import RecipeError, take_table
from kernels.training.paired import Comparison
from kernels.training.run import TrainingDivergedError, TrainingReport, last_checkpoint

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
STUDY_FILE = "study.json"
FINISHED, INTERRUPTED, FAILED, NOT_RUN = "finished", "interrupted", "failed", "NOT RUN"


@dataclass(frozen=True)
class StudyOptions:
    """What varies: ``variants`` are named tables laid over the recipe, each is trained with every seed.

    ``comparisons`` are tables of ``Comparison``, read before anything is trained. ``beside`` names what a study's own
    evaluation measures without training it; comparisons may name it too.
    """

    variants: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    comparisons: tuple[dict[str, Any], ...] = ()
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.variants or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise RecipeError(f"[study] needs variants and different seeds; it has {len(self.variants)}, {self.seeds}")
        for name, tables in self.variants.items():
            if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
                raise RecipeError(f"study.variants.{name} names a folder; use letters, digits, '_', '-' and '.'")
            if not isinstance(tables, dict) or not all(isinstance(table, dict | list) for table in tables.values()):
                raise RecipeError(f"study.variants.{name} must hold tables, as in {name}.training.learning_rate = 0.1")
        for each in self.parsed_comparisons:
            known = [*self.variants, *self.beside]
            if unknown := {each.variant, each.against} - set(known):
                raise RecipeError(
                    f"study.comparisons names {', '.join(sorted(unknown))}; the variants are {', '.join(known)}"
                )

    @property
    def parsed_comparisons(self) -> list[Comparison]:
        """``comparisons``, checked. Errors: RecipeError."""
        return [take_table({"study.comparisons": each}, "study.comparisons", Comparison) for each in self.comparisons]


@dataclass(frozen=True)
class Cell:
    """One training of a study: the recipe of one variant with one seed, and the folder it trains into."""

    variant: str
    seed: int
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        """``VARIANT/seed_N``, also the cell's place below the study's folder."""
        return f"{self.variant}/seed_{self.seed}"

    @property
    def output(self) -> Path:
        """Checkpoints, history and report."""
        return Path(self.recipe["training"]["output"])


@dataclass(frozen=True)
class Outcome:
    """Where a cell stands. ``final`` and ``best`` are its report's figures, ``reason`` says why it failed."""

    variant: str
    seed: int
    status: str
    final: dict[str, float] = dataclasses.field(default_factory=dict)
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    checkpoint: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (0 for a single run) of a figure over ``runs`` seeds."""

    mean: float
    std: float
    runs: int


class Train(Protocol):
    """Trains one recipe; ``resume`` continues from the newest checkpoint in its output."""

    def __call__(self, recipe: dict[str, Any], *, resume: bool) -> TrainingReport:
        """The report of the run; ``finished`` is False where it was interrupted."""


def expand(recipe: Mapping[str, Any], output: Path | None = None) -> list[Cell]:
    """Every cell of a study in the order of training. ``output`` replaces the recipe's own folder.

    Errors: RecipeError where [study] is missing or wrong, or the recipe names no output.
    """
    if "study" not in recipe:
        raise RecipeError("a study needs the table [study] with variants and seeds; see the recipes *_study.toml")
    study = take_table(dict(recipe), "study", StudyOptions)
    base = {table: values for table, values in recipe.items() if table != "study"}
    if output is None and "output" not in base.get("training", {}):
        raise RecipeError("[training] lacks output, the folder of the study")
    folder = Path(base["training"]["output"]) if output is None else output
    cells = []
    for seed in study.seeds:
        for variant, tables in study.variants.items():
            own = overlay(base, tables)
            cell = Cell(variant, seed, own)
            own["training"] = {**own.get("training", {}), "seed": seed, "output": str(folder / cell.name)}
            cells.append(cell)
    return cells


def overlay(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of ``base`` with the tables of ``changes`` laid over it, key by key; lists are replaced whole."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = overlay(merged[key], value) if both else copy.deepcopy(value)
    return merged


def choose(cells: Sequence[Cell], variants: Collection[str]) -> list[Cell]:
    """The cells of these variants, all where none is named. Errors: RecipeError for an unknown one."""
    known = {cell.variant for cell in cells}
    unknown = sorted(set(variants) - known)
    if unknown:
        raise RecipeError(f"the study has no variants {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return [cell for cell in cells if not variants or cell.variant in variants]


def run_study(cells: Sequence[Cell], train: Train, folder: Path, variants: Collection[str] = ()) -> list[Outcome]:
    """Train the cells of ``variants`` (all by default) that have no report yet, and return where every cell stands.

    A cell with a checkpoint is resumed. A training that diverges is noted as failed and the study goes on (remove its
    folder to try it again); an interrupted one ends it. ``folder/study.json`` is renewed after each cell. Errors: those
    of ``train``; RecipeError for a cell that another recipe trained.
    """
    chosen = choose(cells, variants)
    outcomes = write_outcomes(cells, folder)
    for place, cell in enumerate(chosen, start=1):
        if read_outcome(cell).status in (FINISHED, FAILED):
            continue
        logger.info("cell %d of %d: %s", place, len(chosen), cell.name)
        interrupted = not train_cell(cell, train)
        outcomes = write_outcomes(cells, folder)
        if interrupted:
            logger.warning("the study stops in %s; the same command resumes it", cell.name)
            break
    return outcomes


def train_cell(cell: Cell, train: Train) -> bool:
    """Train or resume one cell and keep its report; False where it was interrupted."""
    try:
        report = train(cell.recipe, resume=last_checkpoint(cell.output) is not None)
    except TrainingDivergedError as error:
        logger.warning("%s failed: %s", cell.name, error)
        write_json({"recipe": cell.recipe, "reason": str(error)}, cell.output / REPORT_FILE)
        return True
    if report.finished:
        write_json({"recipe": cell.recipe, **dataclasses.asdict(report)}, cell.output / REPORT_FILE)
    return report.finished


def read_outcome(cell: Cell) -> Outcome:
    """Where ``cell`` stands by what lies in its folder. Errors: RecipeError where another recipe wrote its report."""
    file = cell.output / REPORT_FILE
    if not file.is_file():
        started = last_checkpoint(cell.output) is not None
        return Outcome(cell.variant, cell.seed, INTERRUPTED if started else NOT_RUN)
    report = json.loads(file.read_text(encoding="utf-8"))
    if report["recipe"] != json.loads(json.dumps(cell.recipe)):
        raise RecipeError(f"{file} was written by another recipe; train into another output, or remove {cell.output}")
    if "reason" in report:
        return Outcome(cell.variant, cell.seed, FAILED, reason=report["reason"])
    return Outcome(
        cell.variant, cell.seed, FINISHED, report["final"], report["best"], report["seconds"], report["checkpoint"]
    )


def summarise_seeds(statuses: Mapping[Any, str]) -> str:
    """How many seeds of a variant are finished, and how each of the others stands: "1; 1 NOT RUN, 2 NOT RUN"."""
    finished = sum(status == FINISHED for status in statuses.values())
    others = ", ".join(f"{seed} {status}" for seed, status in statuses.items() if status != FINISHED)
    return f"{finished}; {others}" if others else str(finished)


def write_outcomes(cells: Sequence[Cell], folder: Path) -> list[Outcome]:
    """Read where every cell stands, and put that into ``folder/study.json``."""
    outcomes = [read_outcome(cell) for cell in cells]
    write_json({"cells": [dataclasses.asdict(outcome) for outcome in outcomes]}, folder / STUDY_FILE)
    return outcomes


def write_json(content: Any, file: Path) -> None:
    """All or nothing: a killed process leaves the old file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(file.name + ".part")
    half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(half, file)


def spread_over_seeds(outcomes: Sequence[Outcome], figure: str) -> dict[str, Spread]:
    """Variant -> mean and deviation of ``final[figure]`` over its finished cells; variants without any are left out."""
    values: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.status == FINISHED and figure in outcome.final:
            values.setdefault(outcome.variant, []).append(outcome.final[figure])
    return {
        variant: Spread(statistics.fmean(runs), statistics.stdev(runs) if len(runs) > 1 else 0.0, len(runs))
        for variant, runs in values.items()
    }

"""Many small trainings in one run, for studies: all variants and seeds as stacked tensors whose losses are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset, SequentialSampler

from kernels.training import AfterStep, RecipeError, TrainingOptions, run
from kernels.training.study import REPORT_FILE, Cell, write_json

RUN_FOLDER = "together"

# (variant, seed) by their places in the cells -> what that training ended with.
Figures = Mapping[tuple[int, int], dict[str, float]]


class StackedTask(nn.Module):
    """A task for all cells: called on an ``order``, what every seed sees in a step, it answers the summed ``loss``."""

    steps_done: Tensor

    def __init__(self) -> None:
        super().__init__()
        # In the state, so that a resumed run knows how far it is.
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))

    def after_step(self) -> None:
        """Count the step."""
        self.steps_done += 1


def check_shared(cells: Sequence[Cell], shared: Sequence[str]) -> None:
    """Errors: RecipeError where a variant changes one of the tables that are ``shared`` by all in one run."""
    for table in shared:
        tables = {
            cell.variant: {
                key: value for key, value in cell.recipe.get(table, {}).items() if key not in ("seed", "output")
            }
            for cell in cells
        }
        first = tables[cells[0].variant]
        if other := next((name for name, values in tables.items() if values != first), None):
            raise RecipeError(f"{other} changes [{table}], which all cells of one run share; make it another study")


def train_all(
    task: StackedTask, orders: Dataset[Tensor], cells: Sequence[Cell], options: TrainingOptions, console: Console | None
) -> float | None:
    """Train all cells; the seconds it took, or None where it was interrupted. ``orders`` has an item a step.

    Errors: RecipeError where the gradient would be clipped, which all cells share; TrainingDivergedError.
    """
    if options.clip_norm:
        raise RecipeError("training.clip_norm would tie the cells together, which share one gradient: set it to 0")
    report = run(
        task,
        orders,
        options,
        collate=lambda steps: {"order": steps[0]},
        batch_sampler=BatchSampler(SequentialSampler(orders), 1, drop_last=False),  # type: ignore[arg-type]
        callbacks=[AfterStep(task.after_step)],
        recipe={"cells": [cell.recipe for cell in cells]},
        resume=Path(options.output).is_dir(),
        console=console,
    )
    return report.seconds if report.finished else None


def write_reports(cells: Sequence[Cell], figures: Figures, seconds: float, checkpoint: str) -> None:
    """Each cell's report; ``seconds`` of the run are shared out evenly."""
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    seeds = sorted({cell.seed for cell in cells})
    for cell in cells:
        report = {
            "recipe": cell.recipe,
            "final": figures[variants.index(cell.variant), seeds.index(cell.seed)],
            "best": {},
            "seconds": seconds / len(cells),
            "checkpoint": checkpoint,
        }
        write_json(report, cell.output / REPORT_FILE)

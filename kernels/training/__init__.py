"""The only training code both wings share: a recipe's options in, a trained task and its report out."""

from kernels.training.callbacks import AfterStep
from kernels.training.options import RecipeError, TrainingOptions, check_tables, load_recipe, take_table
from kernels.training.run import Task, TrainingDivergedError, TrainingReport, run

__all__ = [
    "AfterStep",
    "RecipeError",
    "Task",
    "TrainingDivergedError",
    "TrainingOptions",
    "TrainingReport",
    "check_tables",
    "load_recipe",
    "run",
    "take_table",
]

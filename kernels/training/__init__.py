"""The only training code both wings share: a recipe's options in, a trained task and its report out."""

from kernels.training.callbacks import AfterEvaluation, AfterStep, BeforeEvaluation, KeepBest
from kernels.training.options import RecipeError, TrainingOptions, check_tables, load_recipe, take_table
from kernels.training.run import Metric, Task, TrainingDivergedError, TrainingReport, run

__all__ = [
    "AfterEvaluation",
    "AfterStep",
    "BeforeEvaluation",
    "KeepBest",
    "Metric",
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

"""What a training may start from."""

from __future__ import annotations

from pathlib import Path

from kernels.training import RecipeError
from vision.backbones.backbone import Backbone
from vision.backbones.preprocessing import NORMALIZATIONS


def check_normalization(trained: Backbone, normalization: str, folder: Path) -> None:
    """Errors: RecipeError where images would reach the weights of ``folder`` in another range than they learned."""
    own = trained.preprocessing.normalization
    if own == NORMALIZATIONS[normalization]:
        return
    name = next((name for name, constants in NORMALIZATIONS.items() if constants == own), None)
    advice = f'set data.normalization = "{name}"' if name else "its constants have no name here"
    raise RecipeError(
        f"{folder} was trained with the means {own.mean} and deviations {own.std}, data.normalization is "
        f"{normalization!r}; {advice}"
    )

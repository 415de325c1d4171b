"""Quality scorers on disk: ``model.safetensors`` beside ``config.json``, which holds what their numbers mean."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vision.face_quality.scale import QualityScale
from vision.face_quality.tinyfqnet import TinyFQNet
from vision.serving.folder import (
    CONFIG_FILE,
    MALFORMED,
    WEIGHTS_FILE,
    CheckpointError,
    check_state,
    read_described,
    read_weights,
    save_folder,
)

FORMAT = "dovetail-face-quality"

# Before anything was measured: 0.5 of the sigmoid's range in the middle, 0.1 a step of 23 points.
DEFAULT_SCALE = QualityScale(midpoint=0.5, width=0.1)


@dataclass(frozen=True)
class ScorerConfig:
    """What stands beside a scorer's weights. ``labels`` says by which recogniser and which rule they were made."""

    width: int = 1
    scale: QualityScale = DEFAULT_SCALE
    licence: str = "unknown"
    description: str = ""
    labels: dict[str, Any] = field(default_factory=dict)


def save_scorer(model: TinyFQNet, config: ScorerConfig, folder: Path) -> None:
    """Write weights and description into ``folder``, which is made if need be."""
    save_folder(folder, {"format": FORMAT, "version": 1, **dataclasses.asdict(config)}, model.state_dict())


def load_scorer(folder: Path) -> tuple[TinyFQNet, ScorerConfig]:
    """The scorer saved in ``folder``, in evaluation mode, on the CPU. Errors: CheckpointError."""
    values = read_described(folder, FORMAT, "quality scorer; `dovetail train face-quality` writes one")
    try:
        config = ScorerConfig(**(values | {"scale": QualityScale(**values["scale"])}))
        model = TinyFQNet(config.width)
    except MALFORMED as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} describes no scorer ({type(error).__name__}: {error})"
        ) from error
    state = read_weights(folder / WEIGHTS_FILE)
    check_state(model.state_dict(), state, source=str(folder), network=f"tinyfqnet of width {config.width}")
    model.load_state_dict(state)
    return model.eval(), config

"""Detectors on disk: ``model.safetensors`` beside ``config.json``, which holds what the weights need to be used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vision.backbones.preprocessing import Normalization
from vision.detection.detector import ARCHITECTURES, DetectorConfig, Head, LoadedDetector, Network, build_detector
from vision.detection.rpn import AnchorGrid, ProposalBudget
from vision.detection.thundernet import ThunderNetConfig
from vision.detection.yolo_v2 import YOLOv2Config
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

FORMAT = "dovetail-detector"


def save_detector(model: Network, config: DetectorConfig, folder: Path) -> None:
    """Write weights and description into ``folder``, which is made if need be."""
    save_folder(folder, {"format": FORMAT, "version": 1, **dataclasses.asdict(config)}, model.state_dict())


def load_detector(folder: Path) -> LoadedDetector:
    """The detector saved in ``folder``, in evaluation mode, on the CPU. Errors: CheckpointError."""
    config = read_detector_config(folder)
    model = build_detector(config)
    state = read_weights(folder / WEIGHTS_FILE)
    check_state(model.state_dict(), state, source=str(folder), network=f"{config.architecture} on {config.backbone}")
    model.load_state_dict(state)
    return LoadedDetector(model.eval(), config)


def read_detector_config(folder: Path) -> DetectorConfig:
    """The description of the detector in ``folder``; no weights are read. Errors: CheckpointError."""
    file = folder / CONFIG_FILE
    values = read_described(folder, FORMAT, "detector; `dovetail train detector` writes one")
    try:
        architecture = values.pop("architecture")
        constants = values.pop("normalization")
        return DetectorConfig(
            architecture=architecture,
            head=_head(architecture, values.pop("head")),
            normalization=Normalization(**_tuples(constants)),
            **_tuples(values),
        )
    except MALFORMED as error:
        raise CheckpointError(f"{file} does not describe a detector ({type(error).__name__}: {error})") from error


def _head(architecture: str, values: dict[str, Any]) -> Head:
    if ARCHITECTURES[architecture] is YOLOv2Config:
        anchors = tuple((float(width), float(height)) for width, height in values.pop("anchors"))
        return YOLOv2Config(anchors=anchors, **values)
    anchor_grid = AnchorGrid(**_tuples(values.pop("anchors")))
    return ThunderNetConfig(anchors=anchor_grid, test_budget=ProposalBudget(**values.pop("test_budget")), **values)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the dataclasses have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

"""What a training may start from: a saved backbone, detector or segmenter, whatever is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from kernels.training import RecipeError
from vision.backbones import create_backbone
from vision.backbones.backbone import Backbone
from vision.backbones.checkpoint import load_backbone
from vision.backbones.preprocessing import NORMALIZATIONS, Normalization
from vision.detection.checkpoint import FORMAT as DETECTOR
from vision.detection.checkpoint import load_detector
from vision.segmentation.pspnet import load_segmenter
from vision.serving.folder import BACKBONE, CONFIG_FILE, SEGMENTER, format_of, read_config

logger = logging.getLogger(__name__)

FEATURES = "backbone."
# Layers whose rows are classes: of another set of classes they mean nothing.
CLASS_LAYERS = ("class_logits.", "output.", "classify.")


@dataclass(frozen=True)
class Trained:
    """A saved network: the ``backbone`` it stands on, its classes, how its images were normalised, its tensors.

    Tensors have their names in a detector or a segmenter; a backbone's begin with ``FEATURES``, without classifier.
    """

    folder: Path
    backbone: str
    class_names: tuple[str, ...]
    normalization: Normalization
    state: Mapping[str, Tensor]

    def features(self) -> dict[str, Tensor]:
        """Tensors of the backbone, by its own names."""
        return {name.removeprefix(FEATURES): v for name, v in self.state.items() if name.startswith(FEATURES)}


def open_trained(folder: Path) -> Trained:
    """What is saved in ``folder``. Errors: CheckpointError; RecipeError where it is nothing to start from."""
    found = format_of(read_config(folder / CONFIG_FILE))
    if found == BACKBONE:
        backbone = load_backbone(folder)
        state = {FEATURES + key: value for key, value in backbone.state_dict().items() if not key.startswith("head.")}
        return Trained(folder, backbone.name, backbone.class_names, backbone.normalization, state)
    if found == DETECTOR:
        loaded = load_detector(folder)
        config = loaded.config
        return Trained(folder, config.backbone, config.class_names, config.normalization, loaded.model.state_dict())
    if found == SEGMENTER:
        segmenter = load_segmenter(folder)
        shape = segmenter.config
        constants = NORMALIZATIONS[shape.normalization]
        return Trained(folder, shape.backbone, shape.class_names, constants, segmenter.state_dict())
    raise RecipeError(f"{folder} holds no backbone, detector or segmenter to start from (format {found!r})")


def start_from(model: nn.Module, folder: str, backbone: str, class_names: tuple[str, ...], normalization: str) -> None:
    """Take over, into a detector or a segmenter, what the network in ``folder`` has of the same name and shape.

    Of other classes all but their layer; of another architecture the backbone. What starts afresh is told. Errors:
    RecipeError where the backbone or the normalisation is another; CheckpointError.
    """
    trained = open_trained(Path(folder).expanduser())
    if trained.backbone != backbone:
        raise RecipeError(f"{trained.folder} holds {trained.backbone}; model.backbone is {backbone!r}")
    check_normalization(trained.normalization, normalization, trained.folder)
    own = model.state_dict()
    same_classes = trained.class_names == class_names
    taken = {
        name: value
        for name, value in trained.state.items()
        if name in own and own[name].shape == value.shape and (same_classes or not name.startswith(CLASS_LAYERS))
    }
    fresh = sorted({name.partition(".")[0] for name in own.keys() - taken.keys()})
    model.load_state_dict(taken, strict=False)
    logger.info("started from %s; afresh: %s", trained.folder, ", ".join(fresh) or "nothing")


def trained_backbone(folder: Path, num_classes: int, normalization: str) -> Backbone:
    """The backbone in ``folder``: a saved one whole, a detector's or segmenter's with a fresh head of ``num_classes``.

    Errors: RecipeError, CheckpointError.
    """
    if format_of(read_config(folder / CONFIG_FILE)) == BACKBONE:
        whole = load_backbone(folder)
        check_normalization(whole.normalization, normalization, folder)
        return whole
    trained = open_trained(folder)
    check_normalization(trained.normalization, normalization, folder)
    backbone = create_backbone(trained.backbone, num_classes)
    backbone.load_state_dict(trained.features(), strict=False)
    return backbone


def check_normalization(own: Normalization, normalization: str, folder: Path) -> None:
    """Errors: RecipeError where images would reach the weights of ``folder`` in another range than they learned."""
    if own == NORMALIZATIONS[normalization]:
        return
    name = next((name for name, constants in NORMALIZATIONS.items() if constants == own), None)
    advice = f'set data.normalization = "{name}"' if name else "its constants have no name here"
    raise RecipeError(
        f"{folder} was trained with the means {own.mean} and deviations {own.std}, data.normalization is "
        f"{normalization!r}; {advice}"
    )

"""What a detector's recipe may say, and the network and miners it asks for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kernels.training import RecipeError, TrainingOptions, check_tables, take_table
from vision.backbones.backbone import BackboneError
from vision.data.detection import DetectionDataOptions
from vision.data.detection_augmentation import DetectionAugmentation
from vision.data.labelled_boxes import DetectionSource
from vision.detection.anchors import cluster_shapes, shapes_in_cells
from vision.detection.detector import DetectorConfig, Head, Network, build_detector
from vision.detection.psroi_align import Reduction
from vision.detection.rpn import TRAINING_BUDGET, AnchorGrid, ProposalBudget
from vision.detection.thundernet import ThunderNetConfig
from vision.detection.thundernet_loss import AnchorMiner, RegionMiner, Reweighing
from vision.detection.yolo_loss import BACKGROUND, MapMiner, YOLOv2Loss
from vision.detection.yolo_v2 import PUBLISHED_HEAD, VOC_ANCHORS, YOLOv2Config
from vision.distillation.detector import DetectorTeacherOptions
from vision.distillation.terms import Term, parse_terms
from vision.mining import (
    OHEM,
    AllRegions,
    LossRankMiner,
    RandomPredictions,
    RandomSample,
    StratifiedOHEM,
    focal_loss,
    loss_rank_mining,
)
from vision.mining.loss_rank_mining import Element
from vision.tasks.starting import start_from

logger = logging.getLogger(__name__)

REGION_SAMPLERS = ("none", "random", "ohem", "s-ohem")
MAP_SAMPLERS = ("none", "random", "lrm", "focal")
SMALL_HEAD = YOLOv2Config(width=64, passthrough=8)
HEADS = {"light": YOLOv2Config(), "published": PUBLISHED_HEAD, "small": SMALL_HEAD}


@dataclass(frozen=True)
class ModelOptions:
    """Which detector: ``architecture`` "thundernet" or "yolo_v2" on ``backbone``.

    ``start_from`` is a folder with a trained backbone of that name, for instance from ImageNet, or with a detector or
    segmenter on it, of these classes or of others; without it training starts from nothing. ``anchor_scales`` and
    ``anchor_ratios`` are ThunderNet's anchors, in pixels of the input and height over width. The paper's are meant for
    320 pixels and photographs; take smaller ones where the smallest objects are much smaller than 32 pixels (ours).
    ``anchors`` are YOLOv2's, width and height in cells of 32 pixels; without them five are clustered from the training
    boxes. ``head`` is YOLOv2's: "light" (ours), "published" or "small" (for studies of many trainings).
    ``context_enhancement`` and ``spatial_attention`` are ThunderNet's, and can be left out to see what they are worth.
    ``licence`` and ``description`` are written into the saved detector.
    """

    backbone: str
    architecture: str = "thundernet"
    start_from: str | None = None
    anchor_scales: tuple[float, ...] = AnchorGrid.scales
    anchor_ratios: tuple[float, ...] = AnchorGrid.ratios
    reduction: Reduction = "max"
    anchors: tuple[tuple[float, float], ...] | None = None
    head: str = "light"
    context_enhancement: bool = True
    spatial_attention: bool = True
    test_proposals: int = 200
    licence: str = "unknown"
    description: str = ""

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise RecipeError(f"model.head is {self.head!r}; allowed are {', '.join(HEADS)}")
        if self.reduction not in ("max", "mean"):
            raise RecipeError(f"model.reduction is {self.reduction!r}; allowed are max, mean")
        if min((*self.anchor_scales, *self.anchor_ratios), default=0.0) <= 0:
            raise RecipeError("model.anchor_scales and model.anchor_ratios must hold numbers above 0")
        if self.anchors is not None and not (
            self.anchors and all(len(anchor) == 2 and min(anchor) > 0 for anchor in self.anchors)
        ):
            raise RecipeError("model.anchors must be pairs of width and height in cells, above 0")

    def detector_head(self, anchors: tuple[tuple[float, float], ...] | None) -> Head:
        """Sizes, anchors and thresholds of the detection part; ``anchors`` are for YOLOv2 where the recipe has none."""
        if self.architecture == "thundernet":
            return ThunderNetConfig(
                reduction=self.reduction,
                anchors=AnchorGrid(scales=self.anchor_scales, ratios=self.anchor_ratios),
                test_budget=ProposalBudget(10 * self.test_proposals, self.test_proposals),
                context_enhancement=self.context_enhancement,
                spatial_attention=self.spatial_attention,
            )
        return dataclasses.replace(
            HEADS[self.head], anchors=tuple((float(w), float(h)) for w, h in self.anchors or anchors or VOC_ANCHORS)
        )


@dataclass(frozen=True)
class MiningOptions:
    """Which examples train.

    ``regions`` is for ThunderNet's second stage: "none" (all regions), "random" (at most a quarter foreground),
    "ohem" (the paper's) or "s-ohem", choosing ``regions_per_image``. ``map`` is for the dense map, ThunderNet's anchors
    or YOLOv2's predictions: "none" (ThunderNet then draws ``anchors_per_image`` at random, YOLOv2 keeps all), "lrm"
    (``anchors_per_image`` anchors, or a ``share`` of the predictions, of largest loss), "focal" (all, weighted by
    their difficulty) or, for YOLOv2, "random" (a ``share`` drawn by chance beside all that have a true box).
    ``element`` is what loss rank mining ranks in YOLOv2: "prediction" or "cell". ``nms_threshold`` thins out what
    overlaps before ranking. ``background_weight`` is that of YOLOv2's predictions without a true box.
    """

    regions: str = "ohem"
    regions_per_image: int = 256
    map: str = "none"
    anchors_per_image: int = 256
    share: float = 0.15
    element: Element = "prediction"
    nms_threshold: float = 0.7
    background_weight: float = BACKGROUND

    def __post_init__(self) -> None:
        for name, allowed in (("regions", REGION_SAMPLERS), ("map", MAP_SAMPLERS)):
            if getattr(self, name) not in allowed:
                raise RecipeError(f"mining.{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        if min(self.regions_per_image, self.anchors_per_image) < 1:
            raise RecipeError("mining.regions_per_image and mining.anchors_per_image must be at least 1")
        if not self.background_weight > 0:
            raise RecipeError(f"mining.background_weight is {self.background_weight}; it must be above 0")

    @property
    def region_miner(self) -> RegionMiner:
        """The choice of ThunderNet's regions."""
        if self.regions == "none":
            return AllRegions()
        if self.regions == "random":
            return RandomSample(self.regions_per_image)
        miner = OHEM if self.regions == "ohem" else StratifiedOHEM
        return miner(self.regions_per_image, nms_threshold=self.nms_threshold)

    @property
    def anchor_miner(self) -> AnchorMiner | None:
        """The choice of ThunderNet's anchors; None draws them."""
        if self.map != "lrm":
            return None
        return lambda loss, boxes: loss_rank_mining(loss, boxes, self.anchors_per_image, self.nms_threshold)

    @property
    def prediction_miner(self) -> MapMiner | None:
        """The choice of YOLOv2's predictions; None keeps all."""
        if self.map == "random":
            return RandomPredictions(self.share)
        return LossRankMiner(self.share, self.nms_threshold, self.element) if self.map == "lrm" else None

    def yolo_loss(self) -> YOLOv2Loss:
        """YOLOv2's loss over the predictions that train."""
        return YOLOv2Loss(
            self.prediction_miner, self.map == "focal", self.background_weight, keeps_answers=self.map == "random"
        )

    @property
    def reweighing(self) -> Reweighing | None:
        """How ThunderNet's anchors are weighted by their difficulty; None for not at all."""
        return focal_loss if self.map == "focal" else None


@dataclass(frozen=True)
class TaskOptions:
    """What is optimised, beside mining.

    ``proposals_before`` and ``proposals_after`` suppression feed ThunderNet's second stage in training; 600 and 300 do
    on a CPU. ``proposals_nms`` is the overlap from which it suppresses; a region miner, which suppresses again by loss,
    has something to do only where ``mining.nms_threshold`` is smaller. ``ema_decay`` keeps an exponential average of
    the weights (``vision.tasks.averaging``), which is what is evaluated; the better of it and the raw weights is saved.
    ``warm_up_images`` is darknet's: so long YOLOv2's predictions are also drawn to their anchors, unmined.
    """

    proposals_before: int = TRAINING_BUDGET.before_nms
    proposals_after: int = TRAINING_BUDGET.after_nms
    proposals_nms: float = TRAINING_BUDGET.nms_threshold
    ema_decay: float | None = None
    warm_up_images: int = 12_800

    def __post_init__(self) -> None:
        if min(self.proposals_before, self.proposals_after) < 1 or self.warm_up_images < 0:
            raise RecipeError("[task] proposals must be at least 1 and warm_up_images at least 0")
        if not 0 < self.proposals_nms <= 1:
            raise RecipeError(f"task.proposals_nms is {self.proposals_nms}; it must be above 0 and at most 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise RecipeError(f"task.ema_decay is {self.ema_decay}; it must be between 0 and 1, or left out")

    @property
    def budget(self) -> ProposalBudget:
        """The proposals of training."""
        return ProposalBudget(self.proposals_before, self.proposals_after, self.proposals_nms)


@dataclass(frozen=True)
class DetectorRecipe:
    """All tables of a recipe, checked; a ``teacher`` and its ``terms`` come together or not at all."""

    model: ModelOptions
    data: DetectionDataOptions
    augmentation: DetectionAugmentation
    mining: MiningOptions
    task: TaskOptions
    training: TrainingOptions
    teacher: DetectorTeacherOptions | None = None
    terms: Mapping[str, Term] = field(default_factory=dict)

    @classmethod
    def parse(cls, recipe: dict[str, Any]) -> DetectorRecipe:
        """Read every table. Errors: RecipeError naming the table and the key."""
        tables = {
            "model": ModelOptions,
            "data": DetectionDataOptions,
            "augmentation": DetectionAugmentation,
            "mining": MiningOptions,
            "task": TaskOptions,
            "training": TrainingOptions,
        }
        check_tables(recipe, (*tables, "teacher", "terms"))
        terms = parse_terms(recipe.get("terms", []))
        if ("teacher" in recipe) != bool(terms):
            raise RecipeError("[teacher] and [[terms]] belong together; give both, or neither")
        teacher = take_table(recipe, "teacher", DetectorTeacherOptions) if terms else None
        try:
            read: dict[str, Any] = {name: take_table(recipe, name, table) for name, table in tables.items()}
            parsed = cls(**read, teacher=teacher, terms=terms)
        except ValueError as error:
            raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from error
        if parsed.model.architecture == "thundernet" and parsed.mining.map == "random":
            raise RecipeError('ThunderNet draws its anchors at random without mining; set mining.map to "none"')
        if parsed.suppresses_in_vain:
            logger.warning(
                "mining.nms_threshold %g suppresses no region: the proposals are suppressed at task.proposals_nms %g "
                "already; a larger one, such as 0.9, gives the miner something to choose from",
                parsed.mining.nms_threshold, parsed.task.proposals_nms,
            )  # fmt: skip
        return parsed

    @property
    def suppresses_in_vain(self) -> bool:
        """Whether a region miner's suppression by loss comes after one by score that leaves it nothing to do."""
        by_loss = self.model.architecture == "thundernet" and self.mining.regions in ("ohem", "s-ohem")
        return by_loss and self.mining.nms_threshold >= self.task.proposals_nms


def build_model(recipe: DetectorRecipe, source: DetectionSource) -> tuple[Network, DetectorConfig]:
    """The network of a recipe for the classes of ``source``, and its description.

    YOLOv2's anchors come from the boxes of ``source`` where the recipe has none. Errors: RecipeError, BackboneError,
    CheckpointError.
    """
    options, data = recipe.model, recipe.data
    try:
        clustered = None
        if options.architecture == "yolo_v2" and options.anchors is None:
            clustered = cluster_shapes(shapes_in_cells(source, data.image_size, data.resize))
        config = DetectorConfig(
            architecture=options.architecture,
            backbone=options.backbone,
            class_names=source.class_names,
            image_size=data.image_size,
            resize=data.resize,
            normalization=data.constants,
            licence=options.licence,
            description=options.description,
            head=options.detector_head(clustered),
        )
        model = build_detector(config)
    except BackboneError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if options.start_from is not None:
        start_from(model, options.start_from, options.backbone, source.class_names, data.normalization)
    return model, config

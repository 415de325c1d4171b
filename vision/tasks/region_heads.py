"""A detector's second stage alone, trained on kept regions: all miners and seeds of a study in one run.

The setting of stratified mining (Li et al., arXiv 1705.02233): trunk and proposals are a trained detector's and stay as
they are, so that every head sees the same regions and a miner's choice is all that differs. What the second stage sees
of each region is computed once and kept; heads lie in stacked tensors (``vision.tasks.together``). A seed sets a head's
initial weights and the order of the images, the same for every miner.

The recipe's tables: ``[study]``, ``[frozen]``, ``[head]``, ``[mining]``, ``[data]``, ``[training]``, whose
``batch_size`` counts images; variants change ``[mining]`` alone. Images are not augmented.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from kernels.training import RecipeError, TrainingOptions, check_tables, take_table
from kernels.training.study import REPORT_FILE, Cell, Outcome, write_outcomes
from vision.data.classification import Skipped
from vision.data.detection import DetectionData, DetectionDataOptions, DetectionSample
from vision.data.labelled_boxes import DetectionSource
from vision.data.sources import UnreadableImageError
from vision.detection.boxes import clip_boxes, decode_boxes, encode_boxes, nms
from vision.detection.checkpoint import load_detector
from vision.detection.detections import Detections
from vision.detection.detector import LoadedDetector
from vision.detection.evaluate import OVERLAPS, Truth, average_precisions, mean_present
from vision.detection.rpn import ProposalBudget
from vision.detection.thundernet import REGION_STDS, ThunderNet
from vision.detection.thundernet_loss import RegionMiner, label_regions, smooth_l1
from vision.tasks.detection_recipe import MiningOptions
from vision.tasks.together import RUN_FOLDER, Figures, StackedTask, check_shared, train_all, write_reports


@dataclass(frozen=True)
class FrozenOptions:
    """A recipe's ``[frozen]``: the folder of a trained ThunderNet, and the proposals that heads are trained on.

    They are suppressed at ``proposals_nms``, loosely, so that a miner has something to choose from; at test time the
    detector's own budget holds.
    """

    detector: str
    proposals_before: int = 1_000
    proposals_after: int = 300
    proposals_nms: float = 0.9

    @property
    def budget(self) -> ProposalBudget:
        """The proposals of training."""
        return ProposalBudget(self.proposals_before, self.proposals_after, self.proposals_nms)


@dataclass(frozen=True)
class HeadOptions:
    """A recipe's ``[head]``: units of the one hidden layer, and what a head's answers go through at test time.

    The suppression is the plain one of Fast R-CNN, the miners' host: Soft-NMS of a hundred heads takes minutes.
    """

    width: int = 256
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100

    def __post_init__(self) -> None:
        if self.width < 1 or self.max_detections < 1:
            raise RecipeError(f"[head] width is {self.width}, max_detections {self.max_detections}; at least 1 each")


@dataclass(frozen=True)
class KeptRegions:
    """The regions of one image of ``size`` (height, width): what the head sees [R, inputs], ``boxes`` [R, 4].

    ``labels`` [R], 0 for background, and the true box [R, 4] that answers for each region; ``truth`` is all that is on
    the image.
    """

    inputs: Tensor
    boxes: Tensor
    labels: Tensor
    answers: Tensor
    size: tuple[int, int]
    truth: Truth


class Heads(nn.Module):
    """Second stages in stacked tensors, V variants with S seeds; those of one seed begin alike."""

    def __init__(self, variants: int, seeds: Sequence[int], num_inputs: int, width: int, num_classes: int) -> None:
        super().__init__()
        shapes = {"hidden": (num_inputs, width), "classes": (width, num_classes + 1), "deltas": (width, 4)}
        drawn: dict[str, list[Tensor]] = {name: [] for name in shapes}
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for name, shape in shapes.items():
                # As ``ThunderNet`` begins.
                drawn[name].append(torch.randn(shape, generator=generator) * (0.001 if name == "deltas" else 0.01))
        self.weights = nn.ParameterDict(
            {name: torch.stack(values).repeat(variants, 1, 1, 1) for name, values in drawn.items()}
        )  # [V, S, in, out]
        self.biases = nn.ParameterDict(
            {name: torch.zeros(variants, len(seeds), 1, shape[1]) for name, shape in shapes.items()}
        )

    def forward(self, inputs: Tensor, variant: int | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Inputs [(V,) S, R, inputs] of the seeds of ``variant`` -> class logits, background first, and box deltas."""

        def layer(name: str, values: Tensor) -> Tensor:
            answer: Tensor = values @ self.weights[name][variant] + self.biases[name][variant]
            return answer

        hidden = layer("hidden", inputs).relu()
        return layer("classes", hidden), layer("deltas", hidden)


class RegionHeadsTask(StackedTask):
    """The sum of all heads' losses over the regions that each one's miner chooses of its images.

    As ``ThunderNetLoss``: all regions go through the head once without gradient, to be ranked, and the chosen ones a
    second time; both terms are averaged over the chosen regions of a batch, the box term twice as heavy.
    """

    def __init__(self, heads: Heads, miners: Sequence[RegionMiner], images: Sequence[KeptRegions], steps: int) -> None:
        super().__init__()
        self.heads, self.miners, self.steps = heads, list(miners), steps
        self.counts = [len(image.labels) for image in images]
        self.boxes = [image.boxes for image in images]
        pad = nn.utils.rnn.pad_sequence
        self.inputs = pad([image.inputs for image in images], batch_first=True)  # [N, R, inputs]
        self.labels = pad([image.labels for image in images], batch_first=True)  # [N, R]
        self.goals = pad([goals_of(image) for image in images], batch_first=True)  # [N, R, 4]

    def forward(self, order: Tensor) -> dict[str, Tensor]:
        """``order`` [S, B]: the images that each seed sees in this step."""
        seen = tuple(values[order].flatten(1, 2) for values in (self.inputs, self.labels, self.goals))
        losses = [self.loss(place, miner, order, *seen) for place, miner in enumerate(self.miners)]
        return {"loss": torch.stack(losses).sum()}

    def loss(
        self, variant: int, miner: RegionMiner, order: Tensor, inputs: Tensor, labels: Tensor, goals: Tensor
    ) -> Tensor:
        """Of one variant's heads, added up over the seeds; regions are [S, B R, ...] of the images in ``order``."""
        with torch.no_grad():
            classification, localization = region_losses(self.heads(inputs, variant), labels, goals)
        chosen = self.choose(miner, order, classification, localization)
        counts = torch.tensor([len(rows) for rows in chosen])
        rows = nn.utils.rnn.pad_sequence(chosen, batch_first=True)  # [S, most]
        used = torch.arange(rows.shape[1]) < counts[:, None]
        taken = [values.gather(1, rows[..., None].expand(-1, -1, values.shape[2])) for values in (inputs, goals)]
        classification, localization = region_losses(self.heads(taken[0], variant), labels.gather(1, rows), taken[1])
        means = ((classification + 2 * localization) * used).sum(dim=1) / counts.clamp(min=1)
        return means.sum()

    def choose(self, miner: RegionMiner, order: Tensor, classification: Tensor, localization: Tensor) -> list[Tensor]:
        """For each seed the chosen rows of its images' regions."""
        progress = min(1.0, int(self.steps_done) / self.steps)
        most, chosen = self.inputs.shape[1], []
        for images, *losses in zip(order.tolist(), classification, localization, strict=True):
            rows = []
            for place, image in enumerate(images):
                own = slice(place * most, place * most + self.counts[image])
                c, g = (values[own] for values in losses)
                labels = self.labels[image, : self.counts[image]]
                rows.append(place * most + miner(c, g, self.boxes[image], labels, progress))
            chosen.append(torch.cat(rows))
        return chosen


def goals_of(image: KeptRegions) -> Tensor:
    """The deltas [R, 4] that turn the regions into their answers; 0 for background."""
    goals = torch.zeros_like(image.boxes)
    own = image.labels > 0
    goals[own] = encode_boxes(image.answers[own], image.boxes[own], REGION_STDS)
    return goals


def region_losses(answers: tuple[Tensor, Tensor], labels: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits and deltas: cross-entropy and smooth L1 of every region [S, R], the latter 0 for background."""
    logits, deltas = answers
    classification = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    localization = smooth_l1(deltas - goals, sigma=1.0) * (labels > 0)
    return classification.view(labels.shape), localization


class ImageOrders(Dataset[Tensor]):
    """For each step the images of every seed, [S, batch]: shuffled epochs without what is left over."""

    def __init__(self, num_images: int, seeds: Sequence[int], options: TrainingOptions) -> None:
        whole = num_images // options.batch_size * options.batch_size
        if whole == 0:
            raise RecipeError(f"training.batch_size is {options.batch_size}, but there are {num_images} images")
        epochs = range(-(-options.steps * options.batch_size // whole))
        self.orders = torch.stack(
            [
                torch.cat(
                    [
                        torch.randperm(num_images, generator=torch.Generator().manual_seed(1000 * seed + epoch))[:whole]
                        for epoch in epochs
                    ]
                )[: options.steps * options.batch_size].view(options.steps, -1)
                for seed in seeds
            ],
            dim=1,
        )

    def __len__(self) -> int:
        return len(self.orders)

    def __getitem__(self, step: int) -> Tensor:
        return self.orders[step]


def train_heads(cells: Sequence[Cell], folder: Path, console: Console | None = None) -> list[Outcome]:
    """Train the heads of all cells, unless all have a report, and return where every cell stands.

    Each cell's report has ``map50``, ``map60`` and ``map70`` over the evaluation split. An interrupted run is resumed
    by the same call. Errors: RecipeError, DataError, CheckpointError, TrainingDivergedError.
    """
    check_tables(cells[0].recipe, ("frozen", "head", "mining", "data", "training"))
    check_shared(cells, ("frozen", "head", "data", "training"))
    if all((cell.output / REPORT_FILE).is_file() for cell in cells):
        return write_outcomes(cells, folder)
    recipe = cells[0].recipe
    options = take_table(recipe, "training", TrainingOptions)
    options = dataclasses.replace(options, output=str(folder / RUN_FOLDER), seed=0)
    frozen, data = take_table(recipe, "frozen", FrozenOptions), take_table(recipe, "data", DetectionDataOptions)
    miners = {cell.variant: take_table(cell.recipe, "mining", MiningOptions).region_miner for cell in cells}
    loaded, source = load_detector(Path(frozen.detector).expanduser()), data.open_train()
    kept = keep_regions(loaded, source, data, frozen.budget)
    seeds, head = sorted({cell.seed for cell in cells}), take_table(recipe, "head", HeadOptions)
    heads = Heads(len(miners), seeds, kept[0].inputs.shape[1], head.width, len(source.class_names))
    task = RegionHeadsTask(heads, list(miners.values()), kept, options.steps)
    seconds = train_all(task, ImageOrders(len(kept), seeds, options), cells, options, console)
    if seconds is not None:
        tested = keep_regions(loaded, data.open_eval(source.class_names), data, None)
        write_reports(cells, measure(heads, tested, head), seconds, options.output)
    return write_outcomes(cells, folder)


def second_stage(loaded: LoadedDetector) -> ThunderNet:
    """The network of a detector that has one. Errors: RecipeError."""
    if not isinstance(loaded.model, ThunderNet):
        raise RecipeError(f"the frozen detector is {loaded.config.architecture}; only thundernet has a second stage")
    return loaded.model


@torch.no_grad()
def keep_regions(
    loaded: LoadedDetector, source: DetectionSource, data: DetectionDataOptions, budget: ProposalBudget | None
) -> list[KeptRegions]:
    """The regions of every image of ``source`` and what the second stage sees of them.

    With a ``budget`` they are those of training, true boxes among them; without one those of test time. Errors:
    RecipeError, UnreadableImageError.
    """
    model = second_stage(loaded)
    images = DetectionData(source, data.image_size, data.resize, train_difficult=data.train_difficult)
    kept = []
    for sample in (images[place] for place in range(len(images))):
        if isinstance(sample, Skipped):
            raise UnreadableImageError(sample.reason)
        maps = model.dense(loaded.config.normalization(sample.image[None].float() / 255))
        regions = model.propose(maps, budget or model.config.test_budget)[0]
        used = ~sample.ignored
        if budget is not None:
            regions = torch.cat([regions, sample.boxes[used]])
        labels, answers = label_regions([regions], [sample.boxes[used]], [sample.labels[used]])
        inputs = model.pool(maps, [regions]).flatten(1)
        kept.append(KeptRegions(inputs, regions, labels[0], answers[0], maps.image_size, truth_of(sample)))
    return kept


def truth_of(sample: DetectionSample) -> Truth:
    """What is on an image, in the network's pixels."""
    return Truth(sample.boxes.numpy(), sample.labels.numpy(), sample.ignored.numpy())


@torch.no_grad()
def measure(heads: Heads, images: Sequence[KeptRegions], options: HeadOptions) -> Figures:
    """Mean average precision of every head at each of ``OVERLAPS``."""
    heads.cpu()
    variants, seeds = heads.weights["hidden"].shape[:2]
    cells = list(itertools.product(range(variants), range(seeds)))
    found: dict[tuple[int, int], list[Detections]] = {cell: [] for cell in cells}
    for image in images:
        logits, deltas = heads(image.inputs)
        boxes = clip_boxes(decode_boxes(deltas, image.boxes, REGION_STDS), *image.size)
        probabilities = logits.softmax(dim=-1)[..., 1:]
        for cell in cells:
            found[cell].append(select(boxes[cell], probabilities[cell], options))
    truths = [image.truth for image in images]
    num_classes = heads.weights["classes"].shape[-1] - 1
    return {
        cell: {
            f"map{round(100 * overlap)}": mean_present(average_precisions(own, truths, num_classes, overlap))
            for overlap in OVERLAPS
        }
        for cell, own in found.items()
    }


def select(boxes: Tensor, probabilities: Tensor, options: HeadOptions) -> Detections:
    """What is left of one image's boxes [P, 4] and class probabilities [P, classes] after the suppression."""
    rows, class_ids = (probabilities > options.score_threshold).nonzero(as_tuple=True)
    scores = probabilities[rows, class_ids]
    kept = nms(boxes[rows], scores, options.nms_threshold, class_ids, options.max_detections)
    return Detections(boxes[rows[kept]], scores[kept], class_ids[kept])

"""Face-quality scorers trained on folds of people, measured on the fold each has not seen, with another recogniser.

A scorer's figure is ``area``: the mean over the folds of the area under its error-versus-discard curve to 0.3, over
0.3 times the mean FNMR without discarding; 1 is a useless score, lower is better. Intervals come from redrawing people,
each in its fold; what another training of the same scorer would change they do not hold.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.training.options import RecipeError, take_table
from kernels.training.paired import Comparison, PairedResult
from kernels.training.paired_report import PairedStudy, check_finished, write_paired
from kernels.training.study import Cell, StudyOptions, read_outcome
from vision.data.classification import to_tensor
from vision.data.faces import DegradedFaces, fold_split
from vision.data.image_sources import open_source
from vision.data.sources import InMemorySource
from vision.face_quality.checkpoint import load_scorer
from vision.face_quality.labelling import LabelOptions, label_faces
from vision.face_quality.pictures import Line, plot_curves
from vision.face_quality.protocol import FRACTIONS, LIMIT, Comparisons, compare_all
from vision.face_quality.recognition import Recogniser
from vision.face_quality.report import CHANCE, LABEL, NORM, SEVERITY, hand_made_methods, readable, trained_method
from vision.tasks.face_quality import FaceDataOptions, FaceQualityRecipe

ROUNDS = 1000
# As many copies as there are kinds of defects, so that every photograph is measured with each.
COPIES = 7
AREA = "area"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fold:
    """The people of one fold: their ``comparisons``, and every method's ``scores`` of the images [N]."""

    seed: int
    comparisons: Comparisons
    scores: Mapping[str, Floats]


@dataclass(frozen=True)
class FoldAreas:
    """For each method its areas before normalising, ``areas`` [folds, 1 + rounds], and for all of them ``fnmr0``.

    Column 0 is what was measured; in the others people are redrawn.
    """

    areas: Mapping[str, Floats]
    fnmr0: Floats

    def normalized(self, method: str) -> Floats:
        """The figure [1 + rounds]."""
        return np.asarray(self.areas[method].sum(axis=0) / (LIMIT * self.fnmr0.sum(axis=0)))

    def of_folds(self, method: str) -> Floats:
        """What was measured in each fold [folds]."""
        return np.asarray(self.areas[method][:, 0] / (LIMIT * self.fnmr0[:, 0]))


def evaluate_folds(
    recipe: Mapping[str, Any], cells: Sequence[Cell], judge: Recogniser, fmr: float, command: str, file: Path
) -> dict[str, Any]:
    """Compare what the recipe's ``[[study.comparisons]]`` name; JSON in ``file``, plots beside it; the JSON object.

    Errors: PairingError where a training is not finished; RecipeError where the recipe has no folds or no comparisons;
    CheckpointError, RecogniserError, DataError.
    """
    study = take_table(dict(recipe), "study", StudyOptions)
    options = FaceQualityRecipe.parse(cells[0].recipe)
    if options.data.folds is None or not study.comparisons:
        raise RecipeError(
            "the recipe must have data.folds and [[study.comparisons]]: who is measured, what is compared"
        )
    outcomes = [read_outcome(cell) for cell in cells]
    check_finished(outcomes)
    folds = [measure_fold(seed, cells, options.data, judge, fmr) for seed in study.seeds]
    areas = redraw(folds, ROUNDS)
    results = tuple(compare_areas(each, areas, study.seeds) for each in study.parsed_comparisons)
    conditions = {
        "judge": judge.name,
        "labels": Path(options.recogniser.path).stem,
        "fmr": fmr,
        "copies": COPIES,
        "people": int(sum(len(set(fold.comparisons.identities.tolist())) for fold in folds)),
        "mated": int(sum(len(fold.comparisons.mated) for fold in folds)),
        "fnmr0": float(areas.fnmr0[:, 0].mean()),
        "areas": {method: described(areas.normalized(method)) for method in areas.areas},
    }
    paired = PairedStudy(results, study.seeds, sum(outcome.seconds for outcome in outcomes), conditions)
    report = write_paired(paired, command, file)
    plot_curves(mean_curves(folds, areas), study.parsed_comparisons[0].variant, fmr, curves_file(file))
    return report


def curves_file(file: Path) -> Path:
    """Where the curves of a report are drawn."""
    return file.with_name(f"{file.stem}_curves.png")


def described(draws: Floats) -> dict[str, float]:
    """A figure with its 95 % interval."""
    low, high = np.quantile(draws[1:], (0.025, 0.975))
    return {"area": float(draws[0]), "low": float(low), "high": float(high)}


def measure_fold(seed: int, cells: Sequence[Cell], data: FaceDataOptions, judge: Recogniser, fmr: float) -> Fold:
    """Every method's scores of the people that the trainings with ``seed`` have not seen."""
    assert data.folds is not None  # the caller's check
    root = Path(data.root)
    measured = fold_split([seed % data.folds], data.folds)
    faces = DegradedFaces(InMemorySource(open_source(data.kind, root, measured)), COPIES, seed=1)
    kept = None if data.features is None else Path(data.features)
    labelled = label_faces(faces, judge, LabelOptions(min_images=2, min_raw=-1.0), kept)
    rows = np.flatnonzero(labelled.features.norm(dim=1).numpy() > 0)
    crops = torch.stack([to_tensor(faces.read(int(row))) for row in rows])
    natural = readable(open_source(data.kind, root, data.splits(seed)[0]))
    methods = hand_made_methods(torch.stack([to_tensor(image) for image in natural]))
    for cell in cells:
        if cell.seed == seed:
            methods[cell.variant] = trained_method(load_scorer(cell.output / "model")[0])
    scores = {name: method(crops) for name, method in methods.items()} | {
        NORM: labelled.features.norm(dim=1).numpy().astype(np.float64)[rows],
        CHANCE: np.random.default_rng(seed).random(len(rows)),
        SEVERITY: -faces.severities[rows],
        LABEL: labelled.labels.raw.numpy().astype(np.float64)[rows],
    }
    return Fold(seed, compare_all(labelled.features[rows], faces.labels[rows], faces.originals[rows], fmr), scores)


def redraw(folds: Sequence[Fold], rounds: int, seed: int = 0) -> FoldAreas:
    """The areas of every method as measured and with people redrawn, the same draws for all methods."""
    generator = np.random.default_rng(seed)
    areas: dict[str, list[Floats]] = {method: [] for method in folds[0].scores}
    fnmr0 = []
    for fold in folds:
        compared = fold.comparisons
        _, members = np.unique(compared.identities[compared.mated[:, 0]], return_inverse=True)
        people = int(members.max()) + 1
        counts = np.concatenate([np.ones((1, people)), generator.multinomial(people, [1 / people] * people, rounds)])
        weights = counts[:, members].astype(np.float64)
        errors = (compared.mated_similarity < compared.threshold).astype(np.float64)
        for method, scores in fold.scores.items():
            curves = weighted_curves(errors, scores[compared.mated].min(axis=1), weights)
            heights = (curves[:, :-1] + curves[:, 1:]) / 2
            areas[method].append(heights @ np.diff(FRACTIONS))
        fnmr0.append(weights @ errors / weights.sum(axis=1))
    return FoldAreas({method: np.stack(rows) for method, rows in areas.items()}, np.stack(fnmr0))


def weighted_curves(errors: Floats, quality: Floats, weights: Floats) -> Floats:
    """FNMR at ``FRACTIONS`` [rounds, fractions] where pair p stands ``weights`` [rounds, pairs] times in the set.

    That of ``error_versus_discard`` on the repeated pairs: of equal qualities the mean over all orders.
    """
    order = np.argsort(quality, kind="stable")
    _, starts = np.unique(quality[order], return_index=True)
    sorted_weights = weights[:, order]
    counts = np.add.reduceat(sorted_weights, starts, axis=1).cumsum(axis=1)
    failed = np.add.reduceat(sorted_weights * errors[order], starts, axis=1).cumsum(axis=1)
    curves = np.empty((len(weights), len(FRACTIONS)))
    for row, (count, fail) in enumerate(zip(counts, failed, strict=True)):
        dropped = np.floor(np.array(FRACTIONS) * count[-1] + 1e-9)
        lost = np.interp(dropped, np.append(0.0, count), np.append(0.0, fail))
        curves[row] = (fail[-1] - lost) / (count[-1] - dropped)
    return curves


def compare_areas(comparison: Comparison, areas: FoldAreas, seeds: Sequence[int]) -> PairedResult:
    """The gain of one method over another, with chances from the redrawn people; ``differences`` are the folds'.

    Errors: RecipeError for a figure other than the area, or a method that was not measured.
    """
    unknown = {comparison.variant, comparison.against} - set(areas.areas)
    if unknown or comparison.figure != AREA or not comparison.smaller_is_better:
        raise RecipeError(
            f"{comparison.variant} against {comparison.against} in {comparison.figure} cannot be compared; compare "
            f"{', '.join(areas.areas)} in {AREA}, where smaller is better"
        )
    gains = areas.normalized(comparison.against) - areas.normalized(comparison.variant)
    own = (areas.of_folds(comparison.against) - areas.of_folds(comparison.variant)).tolist()
    draws, effect = gains[1:], comparison.smallest_effect
    low, high = np.quantile(draws, (0.025, 0.975))
    return PairedResult(
        comparison, dict(zip(seeds, own, strict=True)), float(gains[0]), statistics.stdev(own), float(low), float(high),
        p_gain=float((draws <= 0).mean()), p_smaller=float((draws >= effect).mean()),
        p_no_loss=float((draws <= -effect).mean()),
    )  # fmt: skip


def mean_curves(folds: Sequence[Fold], areas: FoldAreas) -> dict[str, Line]:
    """Every method's curve, the mean over the folds."""
    lines = {}
    for method in areas.areas:
        fnmr = np.mean([fold.comparisons.curve(fold.scores[method]).fnmr for fold in folds], axis=0)
        style = "--" if method in (LABEL, SEVERITY, CHANCE) else "-"
        lines[method] = Line(FRACTIONS, fnmr.tolist(), float(areas.normalized(method)[0]), style)
    return lines

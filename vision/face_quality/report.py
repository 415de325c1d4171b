"""A saved scorer measured on faces of known people, beside scores that need no training: figures, table, plots."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vision.data.classification import to_tensor
from vision.data.faces import DegradedFaces, FaceSource
from vision.data.image_sources import open_source
from vision.data.sources import InMemorySource, UnreadableImageError
from vision.face_quality.baselines import Naturalness, brightness, laplacian_sharpness
from vision.face_quality.checkpoint import load_scorer
from vision.face_quality.evaluate import Convention, spearman
from vision.face_quality.labelling import LabelledFaces, LabelOptions, label_faces
from vision.face_quality.pictures import Line, plot_curves, plot_order
from vision.face_quality.protocol import (
    ORDERED_DEFECTS,
    Comparisons,
    compare_all,
    curve_json,
    defect_series,
    group_table,
    ordered_share,
    score_drift,
    template_figures,
)
from vision.face_quality.recognition import Recogniser, RecogniserOptions, load_recogniser
from vision.face_quality.tinyfqnet import TinyFQNet, normalize_faces

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Method = Callable[[Tensor], Floats]

REPORT_FILE, CURVES_FILE, DEFECTS_FILE = "report.json", "error_versus_discard.png", "defects.png"
OURS, LABEL, SEVERITY, CHANCE, NORM = "tinyfqnet", "label", "true severity", "random", "embedding norm"
DISCARDS = (0.1, 0.2, 0.3)
BATCH = 64


@dataclass(frozen=True)
class EvaluationOptions:
    """Data (see ``vision.data.sources``), degraded ``copies`` of each photograph, and the ``fmr`` of the threshold.

    Faces of ``pristine_split`` say what the naturalness baseline calls natural; None: those of ``split`` themselves.
    """

    kind: str
    root: Path
    split: str
    copies: int = 7
    fmr: float = 1e-2
    convention: Convention = "fixed threshold"
    pristine_split: str | None = None
    seed: int = 1


@dataclass(frozen=True)
class MethodFigures:
    """One way of scoring: pAUC(0.3) / FNMR(0) with its 95 % interval over people, and rank correlations.

    ``spearman`` is with the recogniser's label, ``spearman_severity`` with minus the defect's true severity; None where
    every score is the same.
    """

    pauc: float
    interval: tuple[float, float]
    spearman: float | None
    spearman_severity: float | None
    curve: dict[str, Any]


@dataclass(frozen=True)
class FaceQualityReport:
    """How well a scorer predicts errors of a recogniser.

    ``pauc`` (1 is useless, lower is better), ``fnmr0`` and ``spearman`` are the scorer's; ``methods`` holds it beside
    the others. ``groups`` holds for each grouping and share of discarded images what happens to each group.
    ``templates`` is the FNMR of quality-weighted templates. ``ordered`` is the share of pairs of severities that a
    method puts in the right order, by defect ("all": over every defect together). ``drift`` is
    the mean change of the scorer's score under changes that hardly matter to people.
    """

    pauc: float
    fnmr0: float
    spearman: float | None
    methods: dict[str, MethodFigures]
    groups: dict[str, dict[str, dict[str, dict[str, float]]]]
    templates: dict[str, float]
    ordered: dict[str, dict[str, float]]
    drift: dict[str, float]
    images: int
    people: int
    mated: int
    non_mated: int
    fmr: float
    threshold: float
    recogniser: str
    same_recogniser: bool
    skipped: tuple[str, ...] = field(default=())


def evaluate_face_quality(
    checkpoint: Path, recogniser: RecogniserOptions, options: EvaluationOptions, output: Path | None = None
) -> FaceQualityReport:
    """Measure the scorer saved in ``checkpoint`` with the errors of ``recogniser``.

    ``same_recogniser`` says whether it also made the scorer's labels; figures with another one are the harder test.
    With ``output`` the folder receives the report and plots. Errors: CheckpointError, RecogniserError, DataError,
    EvaluationError.
    """
    model, config = load_scorer(checkpoint)
    network = load_recogniser(recogniser)
    source = open_source(options.kind, options.root, options.split)
    faces = DegradedFaces(InMemorySource(source), options.copies, options.seed)
    subtract_mean = bool(config.labels.get("subtract_mean", False))
    labelled = label_faces(faces, network, LabelOptions(min_images=2, min_raw=-1.0, subtract_mean=subtract_mean))
    rows = np.flatnonzero(labelled.features.norm(dim=1).numpy() > 0)
    crops = torch.stack([to_tensor(faces.read(int(row))) for row in rows])
    methods = scoring_methods(model, network, pristine_faces(options, faces))
    scores = {name: method(crops) for name, method in methods.items()}
    scores |= {
        CHANCE: np.random.default_rng(options.seed).random(len(rows)),
        SEVERITY: -faces.severities[rows],
        LABEL: labelled.labels.raw.numpy().astype(np.float64)[rows],
    }
    comparisons = compare_all(labelled.features[rows], faces.labels[rows], faces.originals[rows], options.fmr)
    report = build_report(options, Evidence(labelled, rows, scores, comparisons, methods), network, config.labels)
    if output is not None:
        write_report(report, output)
    return report


@dataclass(frozen=True)
class Evidence:
    """Everything that figures are made of; ``rows`` are the readable images, in whose order ``scores`` [N] stand."""

    labelled: LabelledFaces
    rows: NDArray[np.int64]
    scores: Mapping[str, Floats]
    comparisons: Comparisons
    methods: Mapping[str, Method]


def build_report(
    options: EvaluationOptions, evidence: Evidence, network: Recogniser, label_rule: Mapping[str, Any]
) -> FaceQualityReport:
    """All figures."""
    labelled, rows, scores, comparisons = evidence.labelled, evidence.rows, evidence.scores, evidence.comparisons
    faces, seed = labelled.faces, options.seed
    figures = {
        name: method_figures(comparisons, quality, scores[LABEL], scores[SEVERITY], options.convention, seed)
        for name, quality in scores.items()
    }
    return FaceQualityReport(
        pauc=figures[OURS].pauc,
        fnmr0=comparisons.fnmr0,
        spearman=figures[OURS].spearman,
        methods=figures,
        groups=group_figures(faces, rows, comparisons, scores[OURS]),
        templates=template_figures(
            labelled.features[rows], faces.labels[rows], faces.originals[rows], scores, options.fmr
        ),
        ordered=ordered_figures(faces, evidence.methods, seed),
        drift=score_drift(evidence.methods[OURS], undegraded(faces)),
        images=len(rows),
        people=len(set(faces.labels[rows].tolist())),
        mated=len(comparisons.mated),
        non_mated=len(comparisons.non_mated),
        fmr=options.fmr,
        threshold=comparisons.threshold,
        recogniser=network.name,
        same_recogniser=label_rule.get("recogniser_sha256") == network.digest,
        skipped=labelled.skipped,
    )


def scoring_methods(model: TinyFQNet, network: Recogniser, pristine: Tensor) -> dict[str, Method]:
    """Every score that is a function of the face alone."""

    def norm(crops: Tensor) -> Floats:
        norms = [network.embed(batch).norm(dim=1) for batch in torch.split(crops, BATCH)]
        return np.asarray(torch.cat(norms).double().numpy())

    return {OURS: trained_method(model), **hand_made_methods(pristine), NORM: norm}


def trained_method(model: TinyFQNet) -> Method:
    """What ``model`` says."""

    @torch.no_grad()
    def score(crops: Tensor) -> Floats:
        batches = [model(normalize_faces(batch.float() / 255)) for batch in torch.split(crops, BATCH)]
        return np.asarray(torch.cat(batches).double().numpy())

    return score


def hand_made_methods(pristine: Tensor) -> dict[str, Method]:
    """Scores that nothing is trained for; naturalness is fitted to the faces ``pristine`` [N, 3, 112, 112]."""
    return {
        "laplacian sharpness": laplacian_sharpness,
        "brightness": brightness,
        "naturalness": Naturalness(pristine),
    }


def pristine_faces(options: EvaluationOptions, faces: DegradedFaces) -> Tensor:
    """Undegraded crops that the naturalness baseline is fitted to."""
    if options.pristine_split is None:
        return undegraded(faces)
    source = open_source(options.kind, options.root, options.pristine_split)
    return torch.stack([to_tensor(image) for image in readable(source)])


def undegraded(faces: DegradedFaces) -> Tensor:
    """Every photograph as it is, uint8 [N, 3, 112, 112]."""
    return torch.stack([to_tensor(image) for image in readable(faces.source)])


def readable(source: Any) -> list[Image.Image]:
    """Every image of ``source`` that can be read."""
    images = []
    for index in range(len(source.labels)):
        try:
            images.append(source.read(index))
        except UnreadableImageError as error:
            logger.warning("skipped: %s", error)
    return images


def method_figures(
    comparisons: Comparisons, quality: Floats, labels: Floats, severity: Floats, convention: Convention, seed: int
) -> MethodFigures:
    """The row of one method."""
    constant = bool((quality == quality[0]).all())
    varied = bool((severity != severity[0]).any())
    return MethodFigures(
        pauc=comparisons.area(quality),
        interval=comparisons.interval(quality, seed),
        spearman=None if constant else spearman(quality, labels),
        spearman_severity=None if constant or not varied else spearman(quality, severity),
        curve=curve_json(comparisons.curve(quality, convention)),
    )


def group_figures(
    faces: DegradedFaces, rows: NDArray[np.int64], comparisons: Comparisons, quality: Floats
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """By grouping and discarded share; empty where the data know no groups."""
    source = faces.source.source if isinstance(faces.source, InMemorySource) else faces.source
    if not isinstance(source, FaceSource):
        return {}
    photos = [source.photos[original] for original in faces.originals[rows]]
    kinds = sorted({kind for photo in photos for kind in photo.groups})
    return {
        kind: {
            f"{discard:g}": group_table(
                comparisons, quality, [photo.groups.get(kind, "unknown") for photo in photos], discard
            )
            for discard in DISCARDS
        }
        for kind in kinds
    }


def ordered_figures(faces: DegradedFaces, methods: Mapping[str, Method], seed: int) -> dict[str, dict[str, float]]:
    """Whether scores fall as a defect grows, on every undegraded photograph."""
    images = readable(faces.source)
    figures: dict[str, dict[str, float]] = {name: {} for name in methods}
    for kind, steps in defect_series(images, seed).items():
        crops = [torch.stack([to_tensor(image) for image in step]) for step in steps]
        for name, method in methods.items():
            figures[name][kind] = ordered_share(np.stack([method(step) for step in crops]))
    for shares in figures.values():
        shares["all"] = float(np.mean([shares[kind] for kind in ORDERED_DEFECTS]))
    return figures


def write_report(report: FaceQualityReport, output: Path) -> None:
    """``report.json``, and with matplotlib the error curves and the order under defects."""
    output.mkdir(parents=True, exist_ok=True)
    (output / REPORT_FILE).write_text(json.dumps(report_json(report), indent=1) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        logger.warning("matplotlib is not installed (extra train): plots will not be drawn")
        return
    lines = {
        name: Line(
            row.curve["fractions"], row.curve["fnmr"], row.pauc, "--" if name in (LABEL, SEVERITY, CHANCE) else "-"
        )
        for name, row in report.methods.items()
    }
    plot_curves(lines, OURS, report.fmr, output / CURVES_FILE)
    plot_order(report.ordered, output / DEFECTS_FILE)


def report_json(report: FaceQualityReport) -> dict[str, Any]:
    """JSON has no NaN."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(report)), parse_constant=lambda _: None)
    return values

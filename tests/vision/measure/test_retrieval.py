"""Rank-1 and mean average precision against a slow count, and on a saved network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vision.backbones import create_backbone
from vision.backbones.checkpoint import save_backbone
from vision.backbones.preprocessing import Preprocessing
from vision.data.sources import DataError
from vision.measure.retrieval import evaluate_retrieval, retrieval_figures


def slow_figures(points: Tensor, identities: Tensor) -> tuple[float, float]:
    firsts, averages = [], []
    for query in range(len(points)):
        others = [i for i in range(len(points)) if i != query]
        cosine = torch.cosine_similarity(points[query][None], points[others])
        ranked = [others[int(i)] for i in cosine.argsort(descending=True)]
        hits = [bool(identities[i] == identities[query]) for i in ranked]
        if not any(hits):
            continue
        firsts.append(hits[0])
        averages.append(sum(sum(hits[: n + 1]) / (n + 1) for n, hit in enumerate(hits) if hit) / sum(hits))
    return sum(firsts) / len(firsts), sum(averages) / len(averages)


@pytest.mark.parametrize("seed", range(4))
def test_figures_equal_the_slow_count(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(17, 5, generator=generator, dtype=torch.float64)
    identities = torch.randint(5, (17,), generator=generator)
    report = retrieval_figures(points, identities)
    assert (report.rank1, report.mean_average_precision) == pytest.approx(slow_figures(points, identities))


def test_identities_that_stand_apart_are_found_and_loners_are_no_queries() -> None:
    points = torch.tensor([[1.0, 0], [2, 0.1], [0, 1], [0.1, 3], [-1, -1]])
    report = retrieval_figures(points, torch.tensor([0, 0, 1, 1, 2]))
    assert (report.rank1, report.mean_average_precision, report.queries, report.identities) == (1.0, 1.0, 4, 3)


def test_only_loners_are_refused() -> None:
    with pytest.raises(DataError, match="needs pairs"):
        retrieval_figures(torch.randn(3, 2), torch.arange(3))


def test_a_saved_network_is_measured_on_classes_it_does_not_know(image_folder: Path, tmp_path: Path) -> None:
    network = create_backbone("fd_mobilenet_x0_25", 7)
    network.preprocessing = Preprocessing(32, 36)
    save_backbone(network, tmp_path / "net")
    (image_folder / "val" / "red" / "0.png").write_bytes(b"broken")
    report = evaluate_retrieval(tmp_path / "net", "folder", image_folder, "val")
    assert (report.queries, report.identities, len(report.skipped)) == (11, 3, 1)
    assert 0 <= report.rank1 <= 1

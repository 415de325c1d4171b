"""The tables of docs/vision.md are what the code and the reports say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.diagonalwise import bench_report
from kernels.training import paired_report, study_report
from vision.backbones import create_backbone, list_backbones
from vision.backbones.complexity import count
from vision.tasks import detection_study, study

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
PAGE = (DOCS / "vision.md").read_text(encoding="utf-8")
DETECTION = (DOCS / "vision" / "detection.md").read_text(encoding="utf-8")
EVIDENCE = (DOCS / "evidence.md").read_text(encoding="utf-8")
DISTILLATION = (DOCS / "vision" / "distillation.md").read_text(encoding="utf-8")


def between_markers(name: str, page: str = PAGE) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", page, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_every_network_stands_with_its_size() -> None:
    for name in list_backbones():
        whole, small = count(create_backbone(name)), count(create_backbone(name, 10), 64)
        row = f"| `{name}` | {whole.parameters:,} | {whole.macs / 1e6:.1f} | {small.macs / 1e6:.2f} |"
        assert row in PAGE, row


def test_the_study_is_its_report() -> None:
    report = json.loads((DOCS / "vision" / "cifar10_study.json").read_text(encoding="utf-8"))
    assert between_markers("cifar10_study") == study.markdown(report["rows"])


def test_the_backbones_latencies_are_their_report() -> None:
    report = json.loads((DOCS / "vision" / "evidence" / "latency.json").read_text(encoding="utf-8"))
    assert between_markers("latency", EVIDENCE) == study.markdown(report["rows"])


def test_the_bundled_detectors_study_is_its_report() -> None:
    report = json.loads((DOCS / "vision" / "bccd_study.json").read_text(encoding="utf-8"))
    assert between_markers("bccd_study", DETECTION) == detection_study.markdown(report["rows"])


def test_the_study_of_own_images_is_its_report() -> None:
    report = json.loads((DOCS / "vision" / "own_images_study.json").read_text(encoding="utf-8"))
    assert between_markers("own_images_study", DETECTION) == detection_study.markdown(report["rows"])


def test_the_endpoints_before_and_now_are_their_report() -> None:
    rows = json.loads((DOCS / "bench" / "vision_versions.json").read_text(encoding="utf-8"))["rows"]
    table = between_markers("vision_versions", DETECTION).splitlines()[2:]
    assert table == [
        f"| {name} | {row['before']:.1f} | {row['now']:.1f} | {row['now_over_before']:.2f} |"
        for name, row in rows.items()
    ]


def test_the_mining_study_is_its_report() -> None:
    report = json.loads((DOCS / "vision" / "detector_mining_study.json").read_text(encoding="utf-8"))
    assert between_markers("detector_mining_study", DETECTION) == detection_study.markdown(report["rows"])


@pytest.mark.parametrize("name", ["distillation_cifar10", "distillation_scenes", "distillation_faces"])
def test_the_distillation_studies_are_their_reports(name: str) -> None:
    report = json.loads((DOCS / "vision" / f"{name}.json").read_text(encoding="utf-8"))
    assert between_markers(name, DISTILLATION) == study_report.markdown(report)


@pytest.mark.parametrize(
    "name",
    [
        "textures_bdd",
        "textures_cckd",
        "textures_long",
        "textures_plugin",
        "regions_bccd",
        "bccd_lrm",
        "shapes_thundernet",
        "orl_cckd",
        "scenes_bdd",
        "textures_backbones",
    ],
)
def test_the_paired_studies_are_their_reports(name: str) -> None:
    report = json.loads((DOCS / "vision" / "evidence" / f"{name}.json").read_text(encoding="utf-8"))
    assert between_markers(name, EVIDENCE) == paired_report.markdown(report)
    assert len(report["seeds"]) >= 10
    assert report["command"].split()[:3] == ["dovetail", "eval", "paired-study"]


@pytest.mark.parametrize("name", ["faces_folds", "faces_folds_ranks", "faces_folds_wide"])
def test_the_studies_of_face_scorers_are_their_reports(name: str) -> None:
    report = json.loads((DOCS / "vision" / "evidence" / f"{name}.json").read_text(encoding="utf-8"))
    assert between_markers(name, EVIDENCE) == paired_report.markdown(report)
    assert report["conditions"]["people"] == 86 and len(report["seeds"]) == 5


def test_the_tuning_is_its_report() -> None:
    report = json.loads((DOCS / "vision" / "evidence" / "textures_tuning.json").read_text(encoding="utf-8"))
    assert between_markers("textures_tuning", EVIDENCE) == study_report.markdown(report)


def test_the_mining_example_runs() -> None:
    found = re.search(r"```python\n(.*?)```", DETECTION, flags=re.DOTALL)
    assert found is not None
    corners = torch.arange(200.0)[:, None] * 30
    values: dict[str, Any] = {
        "class_logits": torch.randn(200, 4, requires_grad=True), "box_regression": torch.randn(200, 16),
        "targets": torch.randn(200, 4), "labels": torch.arange(200) % 4,
        "boxes": torch.cat([corners, corners, corners + 20, corners + 20], dim=1), "step": 3, "num_steps": 10,
    }  # fmt: skip
    exec(found[1], values)
    assert len(values["chosen"]) == 64
    values["loss"].backward()
    assert (values["class_logits"].grad.abs().sum(dim=1) > 0).sum() == 64


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", DETECTION))))
def test_links_of_the_detection_page_lead_somewhere(link: str) -> None:
    assert (DOCS / "vision" / link).exists()


def test_the_depthwise_benchmark_is_its_report() -> None:
    report = json.loads((DOCS / "vision" / "diagonalwise.json").read_text(encoding="utf-8"))
    assert between_markers("diagonalwise") == f"{bench_report.markdown(report['summary'])}\n\n{report['verdict']}"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE))))
def test_links_lead_somewhere(link: str) -> None:
    assert (DOCS / link).exists()

"""The tables of docs/vision.md are what the code and the reports say."""

import json
import re
from pathlib import Path

import pytest

from kernels.diagonalwise import bench_report
from kernels.training import study_report
from vision.backbones import create_backbone, list_backbones
from vision.backbones.complexity import count
from vision.tasks import detection_study, study

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
PAGE = (DOCS / "vision.md").read_text(encoding="utf-8")
DETECTION = (DOCS / "vision" / "detection.md").read_text(encoding="utf-8")
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


def test_the_bundled_detectors_study_is_its_report() -> None:
    report = json.loads((DOCS / "vision" / "bccd_study.json").read_text(encoding="utf-8"))
    assert between_markers("bccd_study", DETECTION) == detection_study.markdown(report["rows"])


def test_the_mining_study_is_its_report() -> None:
    report = json.loads((DOCS / "vision" / "detector_mining_study.json").read_text(encoding="utf-8"))
    assert between_markers("detector_mining_study", DETECTION) == detection_study.markdown(report["rows"])


@pytest.mark.parametrize("name", ["distillation_cifar10", "distillation_scenes", "distillation_faces"])
def test_the_distillation_studies_are_their_reports(name: str) -> None:
    report = json.loads((DOCS / "vision" / f"{name}.json").read_text(encoding="utf-8"))
    assert between_markers(name, DISTILLATION) == study_report.markdown(report)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", DETECTION))))
def test_links_of_the_detection_page_lead_somewhere(link: str) -> None:
    assert (DOCS / "vision" / link).exists()


def test_the_depthwise_benchmark_is_its_report() -> None:
    report = json.loads((DOCS / "vision" / "diagonalwise.json").read_text(encoding="utf-8"))
    assert between_markers("diagonalwise") == f"{bench_report.markdown(report['summary'])}\n\n{report['verdict']}"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE))))
def test_links_lead_somewhere(link: str) -> None:
    assert (DOCS / link).exists()

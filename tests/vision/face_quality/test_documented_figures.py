"""The tables of docs/vision/face_quality.md are what the reports beside it say."""

import json
import re
from pathlib import Path

import pytest

from vision.face_quality.report import FaceQualityReport, MethodFigures
from vision.face_quality.tables import defect_table, group_table, method_table, template_table

DOCS = Path(__file__).resolve().parents[3] / "docs" / "vision"
PAGE = (DOCS / "face_quality.md").read_text(encoding="utf-8")


def saved_report(name: str) -> FaceQualityReport:
    values = json.loads((DOCS / f"face_quality_{name}.json").read_text(encoding="utf-8"))
    return FaceQualityReport(
        **values | {"methods": {method: MethodFigures(**row) for method, row in values["methods"].items()}}
    )


@pytest.mark.parametrize("name", ["london", "london_other", "orl"])
def test_a_table_is_its_report(name: str) -> None:
    assert method_table(saved_report(name)) in PAGE


def test_the_other_tables_are_those_of_their_reports() -> None:
    assert defect_table(saved_report("london_other")) in PAGE and group_table(saved_report("london_other")) in PAGE
    assert template_table(saved_report("orl")) in PAGE


def test_withheld_faces_are_ordered_better_than_by_sharpness() -> None:
    for name in ("london", "london_other", "orl"):
        report = saved_report(name)
        assert report.ordered["tinyfqnet"]["all"] > report.ordered["laplacian sharpness"]["all"]
        assert report.methods["tinyfqnet"].pauc < report.methods["random"].pauc
    assert saved_report("london").same_recogniser and not saved_report("london_other").same_recogniser


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE))))
def test_links_lead_somewhere(link: str) -> None:
    assert (DOCS / link).exists()

"""One image's boxes in the shapes that clients of other systems already parse.

Ours is the record all others are made from: corners in pixels of the upright original, score, class id from 0, class
name, by falling score.
"""

from __future__ import annotations

from typing import Any

from vision.serving.answers import BOX, CLASS_ID, CLASS_NAME, SCORE, number, record, several, text, whole
from vision.serving.protocol import Answer, Shape


def roboflow(answer: Answer, width: int, height: int) -> dict[str, Any]:
    """Roboflow's inference server: the box's CENTRE, width and height in pixels."""
    predictions = []
    for entry in answer["detections"]:
        x1, y1, x2, y2 = entry["box"]
        predictions.append(
            {
                "x": (x1 + x2) / 2,
                "y": (y1 + y2) / 2,
                "width": x2 - x1,
                "height": y2 - y1,
                "confidence": entry["score"],
                "class": entry["class_name"],
                "class_id": entry["class_id"],
            }
        )
    return {"image": {"width": width, "height": height}, "predictions": predictions}


def ultralytics(answer: Answer, width: int, height: int) -> list[dict[str, Any]]:  # noqa: ARG001
    """``Results.summary()`` of Ultralytics."""
    return [
        {
            "name": entry["class_name"],
            "class": entry["class_id"],
            "confidence": entry["score"],
            "box": dict(zip(("x1", "y1", "x2", "y2"), entry["box"], strict=True)),
        }
        for entry in answer["detections"]
    ]


def huggingface(answer: Answer, width: int, height: int) -> list[dict[str, Any]]:  # noqa: ARG001
    """The object-detection task of Hugging Face: corners in whole pixels."""
    names = ("xmin", "ymin", "xmax", "ymax")
    return [
        {
            "label": entry["class_name"],
            "score": entry["score"],
            "box": dict(zip(names, (round(value) for value in entry["box"]), strict=True)),
        }
        for entry in answer["detections"]
    ]


def coco(answer: Answer, width: int, height: int) -> list[dict[str, Any]]:  # noqa: ARG001
    """COCO results: left, top, width, height; category ids count from 1, the image's id is the client's to add."""
    return [
        {
            "category_id": entry["class_id"] + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": entry["score"],
        }
        for entry in answer["detections"]
        for x1, y1, x2, y2 in [entry["box"]]
    ]


def supervision(answer: Answer, width: int, height: int) -> dict[str, Any]:  # noqa: ARG001
    """The arguments of ``supervision.Detections``, as lists."""
    return {
        "xyxy": [entry["box"] for entry in answer["detections"]],
        "confidence": [entry["score"] for entry in answer["detections"]],
        "class_id": [entry["class_id"] for entry in answer["detections"]],
        "data": {"class_name": [entry["class_name"] for entry in answer["detections"]]},
    }


def label_studio(answer: Answer, width: int, height: int) -> dict[str, Any]:
    """A Label Studio prediction: rectangles in per cent of the image."""
    regions = []
    for entry in answer["detections"]:
        x1, y1, x2, y2 = entry["box"]
        regions.append(
            {
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "score": entry["score"],
                "value": {
                    "x": 100 * x1 / width,
                    "y": 100 * y1 / height,
                    "width": 100 * (x2 - x1) / width,
                    "height": 100 * (y2 - y1) / height,
                    "rotation": 0,
                    "rectanglelabels": [entry["class_name"]],
                },
            }
        )
    return {"result": regions, "score": max((entry["score"] for entry in answer["detections"]), default=0.0)}


PIXELS, PER_CENT = "In pixels of the upright original.", "In per cent of the image's side."


def sides(meaning: str, *names: str) -> dict[str, Any]:
    """A number for each name."""
    return {name: number(meaning) for name in names}


ROBOFLOW = record(
    image=record(width=whole("Pixels.", 1), height=whole("Pixels.", 1)),
    predictions=several(
        "By falling score.",
        record(
            **sides(PIXELS, "x", "y", "width", "height"), confidence=SCORE, class_id=CLASS_ID, **{"class": CLASS_NAME}
        ),
    ),
)
ULTRALYTICS = several(
    "By falling score.",
    record(
        name=CLASS_NAME, confidence=SCORE, box=record(**sides(PIXELS, "x1", "y1", "x2", "y2")), **{"class": CLASS_ID}
    ),
)
HUGGINGFACE = several(
    "By falling score.",
    record(
        label=CLASS_NAME,
        score=SCORE,
        box=record(**{name: whole(PIXELS, 0) for name in ("xmin", "ymin", "xmax", "ymax")}),
    ),
)
COCO = several(
    "By falling score.",
    record(
        category_id=whole("From 1.", 1), score=SCORE,
        bbox=several("Left, top, width and height in pixels of the upright original.", {"type": "number"}, 4),
    ),
)  # fmt: skip
SUPERVISION = record(
    xyxy=several("A box each.", BOX),
    confidence=several("A score each.", SCORE),
    class_id=several("A class each.", CLASS_ID),
    data=record(class_name=several("A name each.", CLASS_NAME)),
)
LABEL_STUDIO = record(
    result=several(
        "Regions by falling score.",
        record(
            type=text("rectanglelabels."), from_name=text("label."), to_name=text("image."),
            original_width=whole("Pixels.", 1), original_height=whole("Pixels.", 1), score=SCORE,
            value=record(
                **sides(PER_CENT, "x", "y", "width", "height"), rotation=whole("0.", 0, 0),
                rectanglelabels=several("One.", CLASS_NAME, 1),
            ),
        ),
    ),
    score=SCORE,
)  # fmt: skip
BOX_SHAPES = {
    "roboflow": Shape(roboflow, ROBOFLOW),
    "ultralytics": Shape(ultralytics, ULTRALYTICS),
    "huggingface": Shape(huggingface, HUGGINGFACE),
    "coco": Shape(coco, COCO),
    "supervision": Shape(supervision, SUPERVISION),
    "label-studio": Shape(label_studio, LABEL_STUDIO),
}

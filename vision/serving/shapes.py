"""One image's boxes in the shapes that clients of other systems already parse.

Ours is the record all others are made from: corners in pixels of the upright original, score, class id from 0, class
name, by falling score.
"""

from __future__ import annotations

from typing import Any

from vision.serving.protocol import Answer, Shape


def roboflow(answer: Answer, width: int, height: int) -> dict[str, Any]:
    """Roboflow's inference server: the box's CENTRE, width and height in pixels."""
    predictions = []
    for record in answer["detections"]:
        x1, y1, x2, y2 = record["box"]
        predictions.append(
            {
                "x": (x1 + x2) / 2,
                "y": (y1 + y2) / 2,
                "width": x2 - x1,
                "height": y2 - y1,
                "confidence": record["score"],
                "class": record["class_name"],
                "class_id": record["class_id"],
            }
        )
    return {"image": {"width": width, "height": height}, "predictions": predictions}


def ultralytics(answer: Answer, width: int, height: int) -> list[dict[str, Any]]:  # noqa: ARG001
    """``Results.summary()`` of Ultralytics."""
    return [
        {
            "name": record["class_name"],
            "class": record["class_id"],
            "confidence": record["score"],
            "box": dict(zip(("x1", "y1", "x2", "y2"), record["box"], strict=True)),
        }
        for record in answer["detections"]
    ]


def huggingface(answer: Answer, width: int, height: int) -> list[dict[str, Any]]:  # noqa: ARG001
    """The object-detection task of Hugging Face: corners in whole pixels."""
    names = ("xmin", "ymin", "xmax", "ymax")
    return [
        {
            "label": record["class_name"],
            "score": record["score"],
            "box": dict(zip(names, (round(value) for value in record["box"]), strict=True)),
        }
        for record in answer["detections"]
    ]


def coco(answer: Answer, width: int, height: int) -> list[dict[str, Any]]:  # noqa: ARG001
    """COCO results: left, top, width, height; category ids count from 1, the image's id is the client's to add."""
    return [
        {
            "category_id": record["class_id"] + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": record["score"],
        }
        for record in answer["detections"]
        for x1, y1, x2, y2 in [record["box"]]
    ]


def supervision(answer: Answer, width: int, height: int) -> dict[str, Any]:  # noqa: ARG001
    """The arguments of ``supervision.Detections``, as lists."""
    return {
        "xyxy": [record["box"] for record in answer["detections"]],
        "confidence": [record["score"] for record in answer["detections"]],
        "class_id": [record["class_id"] for record in answer["detections"]],
        "data": {"class_name": [record["class_name"] for record in answer["detections"]]},
    }


def label_studio(answer: Answer, width: int, height: int) -> dict[str, Any]:
    """A Label Studio prediction: rectangles in per cent of the image."""
    regions = []
    for record in answer["detections"]:
        x1, y1, x2, y2 = record["box"]
        regions.append(
            {
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "score": record["score"],
                "value": {
                    "x": 100 * x1 / width,
                    "y": 100 * y1 / height,
                    "width": 100 * (x2 - x1) / width,
                    "height": 100 * (y2 - y1) / height,
                    "rotation": 0,
                    "rectanglelabels": [record["class_name"]],
                },
            }
        )
    return {"result": regions, "score": max((record["score"] for record in answer["detections"]), default=0.0)}


BOX_SHAPES: dict[str, Shape] = {
    "roboflow": roboflow,
    "ultralytics": ultralytics,
    "huggingface": huggingface,
    "coco": coco,
    "supervision": supervision,
    "label-studio": label_studio,
}
# Those that are objects, beside whose keys a picture and timings may stand.
OBJECT_SHAPES = frozenset({"roboflow", "supervision", "label-studio"})

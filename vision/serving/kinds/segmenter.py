"""Segmenters: a class for every pixel, as a PNG mask, and the area of every class."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from vision.images import Picture, class_colour
from vision.serving.answers import CLASS_ID, CLASS_NAME, number, record, several, text, whole
from vision.serving.folder import SEGMENTER
from vision.serving.protocol import Answer, Answering, Ask, Card, Floats, Kind, Model, Options, Traced, option

if TYPE_CHECKING:
    from torch import nn

PNG_URI = "data:image/png;base64,"
OPACITY = 0.5


@dataclass(frozen=True)
class SegmentationOptions(Options):
    """How much of the answer is wanted."""

    mask: bool = option(True, "Whether the mask is wanted; without it areas alone are told.")


class SegmenterKind(Kind):
    """Answers ``{"classes": [{class_id, class_name, pixels, share}, ...], "mask"}``, the largest area first.

    The mask is a palette PNG of the original's size whose pixels are class ids.
    """

    name: ClassVar = "segmenter"
    format: ClassVar = SEGMENTER
    route: ClassVar = "segmentations"
    noun: ClassVar = "vision.segmentation"
    id_prefix: ClassVar = "seg"
    summary: ClassVar = "Give every pixel a class: a PNG mask, and the area of every class."
    options: ClassVar = SegmentationOptions
    schema: ClassVar = record(
        classes=several(
            "The largest area first.",
            record(
                class_id=CLASS_ID, class_name=CLASS_NAME, pixels=whole("Its area.", 1),
                share=number("Its share of the image.", 0, 1),
            ),
        ),
        mask=text("Data URI of a palette PNG of the original's size; its pixels are class ids."),
        optional=("mask",),
    )  # fmt: skip

    def read_card(self, config: Mapping[str, Any], digest: str) -> Card:
        """See ``Kind``."""
        return Card(
            tuple(config["class_names"]), config.get("licence", "unknown"), config.get("image_size", 320),
            config.get("description", ""), digest,
        )  # fmt: skip

    def module(self, folder: Path) -> nn.Module:
        """See ``Kind``."""
        from vision.segmentation.pspnet import load_segmenter
        from vision.segmentation.traced import UnitSegmenter

        return UnitSegmenter(load_segmenter(folder))

    def trace(self, folder: Path, image_size: int | None = None) -> Traced:
        """See ``Kind``."""
        from vision.segmentation.traced import trace_segmenter

        return trace_segmenter(folder, image_size)

    def answer(self, model: Model, picture: Picture, options: SegmentationOptions) -> Answering:
        """See ``Kind``."""
        size = (picture.width, picture.height)
        square = (model.card.image_size, model.card.image_size)
        pixels = np.asarray(picture.image.resize(square, Image.Resampling.BILINEAR)).transpose(2, 0, 1)[None]
        del picture
        logits = (yield Ask(model.network, pixels))[0][0]
        mask = coloured(likeliest(logits, square).resize(size, Image.Resampling.NEAREST))
        counts = mask.histogram()[: len(model.card.class_names)]
        found = sorted((count, class_id) for class_id, count in enumerate(counts) if count)
        classes = [
            {
                "class_id": class_id,
                "class_name": model.card.class_names[class_id],
                "pixels": count,
                "share": round(count / (size[0] * size[1]), 5),
            }
            for count, class_id in reversed(found)
        ]
        return {"classes": classes} | ({"mask": as_uri(mask)} if options.mask else {})

    def draw(self, image: Image.Image, answer: Answer) -> Image.Image:
        """The classes' colours over the image; the first class, as a rule the ground, is left as it is."""
        if "mask" not in answer:
            return image
        with Image.open(io.BytesIO(base64.b64decode(answer["mask"].removeprefix(PNG_URI)))) as opened:
            mask = opened.copy()
        veil = mask.point([0] + [round(255 * OPACITY)] * 255, "L")
        return Image.composite(mask.convert("RGB"), image, veil) if image.size == mask.size else image

    def rows(self, answer: Answer) -> list[Answer]:
        """Class and area."""
        return [{"class": entry["class_name"], "share": entry["share"]} for entry in answer["classes"]]


def likeliest(logits: Floats, size: tuple[int, int]) -> Image.Image:
    """Logits [C, h, w] of a coarse map, scaled to ``size`` as training scales them, to class ids."""
    best = np.full((size[1], size[0]), -np.inf, dtype=np.float32)
    classes = np.zeros((size[1], size[0]), dtype=np.uint8)
    for class_id, plane in enumerate(logits):
        scaled = np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
        better = scaled > best
        best[better], classes[better] = scaled[better], class_id
    return Image.fromarray(classes)


def coloured(mask: Image.Image) -> Image.Image:
    """A mask of ids as a palette image; the ids stay."""
    palette = mask.convert("P")
    palette.frombytes(mask.tobytes())
    palette.putpalette([value for class_id in range(256) for value in class_colour(class_id)])
    return palette


def as_uri(mask: Image.Image) -> str:
    """A PNG as a data URI."""
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return PNG_URI + base64.b64encode(buffer.getvalue()).decode()


KIND = SegmenterKind()

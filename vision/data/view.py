"""How an image becomes a network's square input, and where its boxes go.

Everything geometric is one rectangle: stretching shows the whole image, a letterbox shows a square around it, zooming
out shows more than there is, cropping shows less. The visible part is resized once and laid on a plain canvas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Boxes = NDArray[np.float32]
Colour = tuple[int, int, int]
Resize = Literal["stretch", "letterbox"]

RESIZES: tuple[Resize, ...] = ("stretch", "letterbox")
# darknet's canvas; the network sees it as a nearly neutral colour.
GREY: Colour = (128, 128, 128)
MAX_ASPECT = 4


@dataclass(frozen=True)
class View:
    """A rectangle in an image's pixels, which may reach beyond the image; it fills a network's input."""

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        if not (self.right > self.left and self.bottom > self.top):
            raise ValueError(f"a view from ({self.left}, {self.top}) to ({self.right}, {self.bottom}) shows nothing")

    @property
    def corner(self) -> Boxes:
        """(left, top, left, top), to be taken off boxes."""
        return np.array([self.left, self.top, self.left, self.top], dtype=np.float32)

    def scale(self, size: int) -> Boxes:
        """Pixels of an input of ``size`` for each pixel of the image, for x1, y1, x2 and y2."""
        x, y = size / (self.right - self.left), size / (self.bottom - self.top)
        return np.array([x, y, x, y], dtype=np.float32)

    def boxes_in(self, boxes: Boxes, size: int) -> Boxes:
        """``boxes`` [G, 4] of the image in the pixels of an input of ``size``; nothing is clipped."""
        return (boxes - self.corner) * self.scale(size)

    def boxes_out(self, boxes: Boxes, size: int) -> Boxes:
        """The inverse of ``boxes_in``."""
        return boxes / self.scale(size) + self.corner


def whole_image(width: int, height: int, resize: Resize) -> View:
    """The view of test time. "stretch" gives up the aspect (ThunderNet), "letterbox" keeps it by borders (YOLOv2)."""
    return fitted(View(0, 0, width, height), resize)


def fitted(part: View, resize: Resize) -> View:
    """``whole_image`` for a part of an image."""
    if resize == "stretch":
        return part
    width, height = part.right - part.left, part.bottom - part.top
    side = max(width, height)
    left, top = part.left + (width - side) / 2, part.top + (height - side) / 2
    return View(left, top, left + side, top + side)


def tiles(width: int, height: int, side: int, overlap: float) -> list[View]:
    """Squares of ``side`` pixels that cover an image, row by row, neighbours sharing at least ``overlap`` of a side.

    They never leave the image: along an axis that is shorter a tile is as long as it.
    """
    return [
        View(left, top, min(left + side, width), min(top + side, height))
        for top in _starts(height, side, overlap)
        for left in _starts(width, side, overlap)
    ]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """Where tiles begin along one axis, evenly spread from the first pixel to the last."""
    count = 1 + max(0, math.ceil((length - side) / (side * (1 - overlap))))
    return [round(place * max(0, length - side) / max(1, count - 1)) for place in range(count)]


def render(image: Image.Image, view: View, size: int, fill: Colour = GREY) -> Image.Image:
    """RGB ``image`` as ``view`` shows it, ``size`` pixels square; beyond the image lies ``fill``."""
    scale_x, scale_y, _, _ = (float(value) for value in view.scale(size))
    left, right = _visible(view.left, scale_x, image.width, size)
    top, bottom = _visible(view.top, scale_y, image.height, size)
    if left >= right or top >= bottom:
        return Image.new("RGB", (size, size), fill)
    # The source of exactly these target pixels; at the image's border that may be a fraction of a pixel too much.
    source = (
        max(0.0, view.left + left / scale_x),
        max(0.0, view.top + top / scale_y),
        min(float(image.width), view.left + right / scale_x),
        min(float(image.height), view.top + bottom / scale_y),
    )
    visible = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=source)
    if visible.size == (size, size):
        return visible
    canvas = Image.new("RGB", (size, size), fill)
    canvas.paste(visible, (left, top))
    return canvas


def _visible(start: float, scale: float, length: int, size: int) -> tuple[int, int]:
    """First and last + 1 target pixel that the image covers along one axis, to the nearest pixel."""
    first, last = -start * scale, (length - start) * scale
    return max(0, round(first)), min(size, round(last))


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale so that the shorter side has ``size`` pixels."""
    width, height = image.size
    scale = size / min(width, height)
    new = max(size, round(width * scale)), max(size, round(height * scale))
    return image if new == image.size else image.resize(new, Image.Resampling.BILINEAR)


def centre_crop(image: Image.Image, short_side: int, size: int) -> Image.Image:
    """A classifier's test-time view: the short side to ``short_side`` pixels, then the middle square of ``size``.

    Of a strip only the middle is scaled: one of 16,000 x 10 pixels would have a hundred million.
    """
    reach = MAX_ASPECT * min(image.size)
    if max(image.size) > reach:
        width, height = min(image.width, reach), min(image.height, reach)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    image = resize_short_side(image, short_side)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

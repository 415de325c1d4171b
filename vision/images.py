"""Image files from strangers: decoded within limits, upright, in RGB; and boxes drawn on them. No torch here."""

from __future__ import annotations

import colorsys
import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

# Few codecs, few holes: nothing that starts another program, and none of the rare ones.
FORMATS = ("JPEG", "PNG", "WEBP")
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = frozenset({5, 6, 7, 8})
# What Pillow's decoders raise on damaged files.
DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, zlib.error,
)  # fmt: skip
GOLDEN_TURN = 0.618034


class ImageError(ValueError):
    """An image that cannot be answered for. ``code``: invalid_image, unsupported_image or image_too_large."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ImageLimits:
    """What is decoded at most; the header is read first, so a larger image costs nothing."""

    max_pixels: int = 25_000_000
    max_side: int = 16_384


@dataclass(frozen=True)
class Picture:
    """A decoded image: RGB, upright. ``width`` and ``height`` are the original's; ``image`` may be a smaller copy."""

    image: Image.Image
    width: int
    height: int


def decode_image(data: bytes, limits: ImageLimits = ImageLimits(), enough: int | None = None) -> Picture:
    """A JPEG, PNG or WebP file in memory as a ``Picture``; of an animation the first image.

    EXIF rotation is applied. Grey, palette, CMYK and 16-bit images become RGB with 8 bits; what is transparent is laid
    on white. ``enough``: a large JPEG may be decoded at a fraction of its size, with both sides at least twice that
    many pixels. Errors: ImageError.
    """
    if not data:
        raise ImageError("invalid_image", "the image is empty")
    image = _open(data)
    _check_size(*image.size, limits)
    orientation, (width, height) = orientation_of(image), upright_size(image)
    if enough is not None:
        image.draft("RGB", (2 * enough, 2 * enough))
    try:
        image.load()
        rgb = to_rgb(image)
    except DAMAGE as error:
        raise ImageError("invalid_image", "the image is damaged or cut short") from error
    return Picture(turn_upright(rgb, orientation), width, height)


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("image_too_large", "the image has far more pixels than are decoded here") from error
    except UnidentifiedImageError as error:
        message = f"the data are no image of a known format; send {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise ImageError("unsupported_image", message) from error
    except DAMAGE as error:
        raise ImageError("invalid_image", "the image's header is damaged or cut short") from error


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if min(width, height) < 1:
        raise ImageError("invalid_image", f"the image is {width}x{height} pixels; it needs at least one")
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise ImageError(
            "image_too_large",
            f"the image is {width}x{height} pixels; allowed are {limits.max_pixels / 1e6:.4g} million, and "
            f"{limits.max_side} a side: send a smaller copy",
        )


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or the EXIF is damaged: that must not cost the image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(ORIENTATION_TAG, 1))
    except DAMAGE:
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the rotation that the EXIF asks for; the header is enough."""
    width, height = image.size
    return (height, width) if orientation_of(image) in SWAPS_SIDES else (width, height)


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """``image`` turned or mirrored as ``orientation_of`` the file says."""
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB: 16-bit grey is scaled, what is transparent is laid on white."""
    if image.mode.startswith("I"):
        # Pillow would cut 16-bit grey off at 255 instead of scaling it.
        values = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        ground = Image.new("RGB", opaque.size, "white")
        ground.paste(opaque, mask=opaque.getchannel("A"))
        return ground
    return image.convert("RGB")


@dataclass(frozen=True)
class LabelledBox:
    """A box to be drawn, x1, y1, x2, y2 in pixels; boxes of one ``class_id`` share a colour."""

    box: tuple[float, float, float, float]
    label: str
    class_id: int


def draw_boxes(image: Image.Image, boxes: Sequence[LabelledBox]) -> Image.Image:
    """A copy of the RGB ``image`` with ``boxes`` and their labels, the first box on top."""
    drawn = image.copy()
    canvas = ImageDraw.Draw(drawn)
    line = max(1, round(max(image.size) / 400))
    font = ImageFont.load_default(max(10, round(max(image.size) / 50)))
    for entry in reversed(boxes):
        colour = class_colour(entry.class_id)
        left, top, right, bottom = entry.box
        canvas.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=line)
        place = (left + line, max(0.0, top))
        canvas.rectangle(canvas.textbbox(place, entry.label, font=font), fill=colour)
        canvas.text(place, entry.label, fill="white", font=font)
    return drawn


def class_colour(class_id: int) -> tuple[int, int, int]:
    """A strong colour for each class; neighbouring ids get very different ones."""
    red, green, blue = colorsys.hsv_to_rgb((class_id * GOLDEN_TURN) % 1, 0.9, 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)

import numpy as np
import pytest
from PIL import Image

from vision.data.view import View, render, whole_image


def slow_render(image: Image.Image, view: View, size: int, fill: tuple[int, int, int]) -> np.ndarray:
    """Pad on all sides, cut out, resize."""
    padding = 200
    canvas = Image.new("RGB", (image.width + 2 * padding, image.height + 2 * padding), fill)
    canvas.paste(image, (padding, padding))
    box = (view.left + padding, view.top + padding, view.right + padding, view.bottom + padding)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BILINEAR, box=box), dtype=np.float32)


@pytest.mark.parametrize("view", [
    View(0, 0, 80, 60), View(10, 5, 50, 45), View(-40, -30, 120, 90), View(-20, 10, 60, 50), View(30.5, -10, 90, 44.5),
])  # fmt: skip
def test_rendering_equals_padding_cutting_and_resizing(view: View) -> None:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((80, 60), Image.Resampling.BILINEAR)
    fast = np.asarray(render(image, view, 40, (200, 10, 90)), dtype=np.float32)
    difference = np.abs(fast - slow_render(image, view, 40, (200, 10, 90))).max(axis=-1)
    # The border between image and canvas is sharp in one and blurred in the other.
    assert np.median(difference) <= 1
    assert (difference > 6).mean() < 0.12


def test_boxes_follow_the_picture_and_come_back() -> None:
    view = View(-20, 10, 60, 50)
    boxes = np.array([[0, 20, 30, 40], [10, 10, 11, 11]], dtype=np.float32)
    inside = view.boxes_in(boxes, 160)
    np.testing.assert_allclose(inside[0], [40, 40, 100, 120])
    np.testing.assert_allclose(view.boxes_out(inside, 160), boxes, atol=1e-4)


def test_a_planted_rectangle_lies_where_its_box_says() -> None:
    pixels = np.zeros((60, 90, 3), dtype=np.uint8)
    pixels[20:40, 30:60] = 255
    for resize in ("stretch", "letterbox"):
        view = whole_image(90, 60, resize)
        picture = np.asarray(render(Image.fromarray(pixels), view, 180, (0, 0, 0)))[..., 0]
        rows, columns = np.nonzero(picture > 127)
        (box,) = view.boxes_in(np.array([[30, 20, 60, 40]], dtype=np.float32), 180)
        np.testing.assert_allclose([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], box, atol=1)


def test_letterbox_keeps_the_aspect() -> None:
    assert whole_image(90, 60, "letterbox") == View(0, -15, 90, 75)
    assert whole_image(60, 90, "letterbox") == View(-15, 0, 75, 90)
    assert whole_image(60, 90, "stretch") == View(0, 0, 60, 90)


def test_a_view_beside_the_image_is_plain_and_an_empty_one_is_refused() -> None:
    image = Image.new("RGB", (10, 10), (255, 0, 0))
    assert render(image, View(20, 20, 30, 30), 4, (1, 2, 3)).getcolors() == [(16, (1, 2, 3))]
    with pytest.raises(ValueError, match="shows nothing"):
        View(5, 0, 5, 10)

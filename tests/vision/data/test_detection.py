"""Augmentation of images with boxes, and the batches made of them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kernels.training.options import TrainingOptions
from kernels.training.run import training_arguments
from vision.data.classification import Skipped
from vision.data.detection import DetectionData, DetectionDataOptions, DetectionSample, ImageCache, collate_detection
from vision.data.detection_augmentation import (
    DetectionAugmentation,
    centres_inside,
    distort_colours,
    draw_view,
    reflect,
)
from vision.data.labelled_boxes import DetectionSource, LabelledImage
from vision.data.sources import DataError, UnreadableImageError
from vision.data.view import Boxes, View

PLAIN = DetectionAugmentation(photometric=False, expand=1.0, crop_overlaps=(), flip=False)


def labelled(path: Path, boxes: list[list[float]], ignored: list[bool] | None = None) -> LabelledImage:
    corners = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    flags = np.array(ignored or [False] * len(boxes), dtype=np.bool_)
    return LabelledImage(path, corners, np.zeros(len(boxes), dtype=np.int64), flags, corners[:, 2] * corners[:, 3])


@pytest.fixture
def squares(tmp_path: Path) -> DetectionSource:
    """Two pictures with a white rectangle each, and a file that is no picture."""
    images = []
    for name, box in (("a", (10, 20, 40, 50)), ("b", (30, 5, 90, 30))):
        pixels = np.zeros((60, 100, 3), dtype=np.uint8)
        pixels[box[1] : box[3], box[0] : box[2]] = 255
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        images.append(labelled(tmp_path / f"{name}.png", [list(map(float, box)), [0, 0, 9, 9]], [False, True]))
    (tmp_path / "c.png").write_bytes(b"broken")
    images.append(labelled(tmp_path / "c.png", []))
    return DetectionSource(("thing",), tuple(images), 0)


def box_of_white(picture: torch.Tensor) -> list[int]:
    rows, columns = (picture.min(dim=0).values > 127).nonzero(as_tuple=True)
    return [int(x) for x in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def test_boxes_stay_on_their_objects_through_every_change(squares: DetectionSource) -> None:
    options = DetectionAugmentation(photometric=False, vertical_flip=True, transpose=True)
    data = DetectionData(squares, 96, augmentation=options)
    seen = 0
    for epoch in range(60):
        data.set_epoch(epoch)
        for index in (0, 1):
            sample = data[index]
            assert isinstance(sample, DetectionSample)
            assert sample.image.shape == (3, 96, 96)
            assert not sample.ignored.any()
            if len(sample.boxes) and (sample.image.min(dim=0).values > 127).any():
                assert len(sample.boxes) == 1, "the ignored box does not train"
                np.testing.assert_allclose(sample.boxes[0].numpy(), box_of_white(sample.image), atol=1.6)
                seen += 1
    assert seen > 60


def test_chance_depends_on_seed_epoch_and_index_alone(squares: DetectionSource) -> None:
    def first(seed: int, epoch: int) -> torch.Tensor:
        data = DetectionData(squares, 64, augmentation=DetectionAugmentation(), seed=seed)
        data.set_epoch(epoch)
        np.random.seed(len(data) + epoch)
        sample = data[0]
        assert isinstance(sample, DetectionSample)
        return sample.image

    assert torch.equal(first(0, 1), first(0, 1))
    assert not torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(1, 1))


def test_evaluation_keeps_everything_in_place(squares: DetectionSource) -> None:
    sample = DetectionData(squares, 120)[0]
    assert isinstance(sample, DetectionSample)
    np.testing.assert_allclose(sample.boxes.numpy(), [[12, 40, 48, 100], [0, 0, 10.8, 18]], rtol=1e-5)
    assert sample.ignored.tolist() == [False, True]
    assert box_of_white(sample.image) == [12, 40, 48, 100]


def test_a_letterbox_stretches_neither_in_testing_nor_in_training(tmp_path: Path) -> None:
    Image.new("RGB", (640, 320), "white").save(tmp_path / "wide.png")
    source = DetectionSource(("thing",), (labelled(tmp_path / "wide.png", [[100, 100, 200, 200]]),), 0)
    for augmentation in (None, PLAIN, dataclasses.replace(PLAIN, expand=4.0)):
        data = DetectionData(source, 320, "letterbox", augmentation)
        for epoch in range(4):
            data.set_epoch(epoch)
            sample = data[0]
            assert isinstance(sample, DetectionSample)
            ((left, top, right, bottom),) = sample.boxes.tolist()
            assert right - left == pytest.approx(bottom - top, rel=1e-4)
            if augmentation in (None, PLAIN):
                assert (left, top, right, bottom) == pytest.approx((50, 130, 100, 180))


def test_difficult_boxes_train_where_asked(squares: DetectionSource) -> None:
    sample = DetectionData(squares, 100, augmentation=PLAIN, train_difficult=True)[0]
    assert isinstance(sample, DetectionSample)
    assert len(sample.boxes) == 2


def overlap(view: View, box: Boxes) -> float:
    width = min(box[2], view.right) - max(box[0], view.left)
    height = min(box[3], view.bottom) - max(box[1], view.top)
    inside = max(width, 0) * max(height, 0)
    areas = (view.right - view.left) * (view.bottom - view.top) + (box[2] - box[0]) * (box[3] - box[1])
    return float(inside / (areas - inside))


def test_crops_keep_the_overlap_they_were_drawn_for() -> None:
    boxes = np.array([[20, 20, 80, 70], [40, 30, 90, 90]], dtype=np.float32)
    options = DetectionAugmentation(expand=1.0, crop_overlaps=(0.3,))
    generator = np.random.default_rng(0)
    crops = [draw_view(100, 100, boxes, options, generator) for _ in range(200)]
    whole = [crop for crop in crops if crop == View(0, 0, 100, 100)]
    assert 40 < len(whole) < 120, "no crop, overlap 0.3 and any crop have equal chances"
    for crop in crops:
        assert 0 <= crop.left < crop.right <= 100 + 1e-9
        assert min(crop.right - crop.left, crop.bottom - crop.top) >= 30
        assert centres_inside(crop, boxes).any()
    strict = [min(overlap(crop, box) for box in boxes) >= 0.3 for crop in crops]
    assert sum(strict) > len(whole)


def test_zooming_out_keeps_the_whole_image_in_view() -> None:
    generator = np.random.default_rng(0)
    options = DetectionAugmentation(expand=4.0, crop_overlaps=())
    views = [draw_view(100, 50, np.zeros((0, 4), dtype=np.float32), options, generator) for _ in range(200)]
    ratios = [(view.right - view.left) / 100 for view in views]
    assert max(ratios) > 3 and 70 < sum(ratio == 1 for ratio in ratios) < 130
    assert all(view.left <= 0 and view.top <= 0 and view.right >= 100 and view.bottom >= 50 for view in views)


def test_images_without_boxes_are_cropped_freely() -> None:
    generator = np.random.default_rng(0)
    views = {
        draw_view(50, 50, np.zeros((0, 4), dtype=np.float32), DetectionAugmentation(), generator) for _ in range(9)
    }
    assert len(views) > 3


def test_reflections_by_hand() -> None:
    image = Image.new("RGB", (10, 10))
    image.putpixel((1, 2), (255, 255, 255))
    boxes = np.array([[1, 2, 2, 3]], dtype=np.float32)
    options = DetectionAugmentation(vertical_flip=True, transpose=True)
    seen = set()
    for seed in range(40):
        turned, (box,) = reflect(image, boxes, options, np.random.default_rng(seed))
        assert turned.getpixel((int(box[0]), int(box[1]))) == (255, 255, 255)
        seen.add(tuple(box.tolist()))
    assert len(seen) == 8


def test_colours_change_within_their_bounds() -> None:
    image = Image.new("RGB", (4, 4), (120, 100, 90))
    shades = {
        distort_colours(image, DetectionAugmentation(), np.random.default_rng(seed)).getpixel((0, 0))
        for seed in range(60)
    }
    assert (120, 100, 90) in shades and len(shades) > 30
    assert max(max(shade) for shade in shades) <= (120 + 32) * 1.5 * 1.5
    ordered = {
        distort_colours(image, DetectionAugmentation(channel_swap=False), np.random.default_rng(seed)).getpixel((0, 0))
        for seed in range(60)
    }
    assert all(red >= blue for red, _, blue in ordered)


def test_batches_pad_boxes_and_count_what_cannot_be_read(
    squares: DetectionSource, caplog: pytest.LogCaptureFixture
) -> None:
    data = DetectionData(squares, 50)
    broken = data[2]
    assert isinstance(broken, Skipped)
    pixels, no_ids, no_flags = torch.zeros(3, 50, 50, dtype=torch.uint8), torch.zeros(0).long(), torch.zeros(0).bool()
    empty = DetectionSample(pixels, torch.zeros(0, 4), no_ids, no_flags)
    batch = collate_detection([data[0], broken, empty])
    assert batch["images"].shape == (2, 3, 50, 50)
    assert batch["labels"].tolist() == [[0, 0], [-1, -1]]
    assert batch["ignored"].tolist() == [[False, True], [False, False]]
    assert batch["skipped"].tolist() == [1]
    assert "c.png is not a readable image" in caplog.text
    assert collate_detection([empty])["boxes"].shape == (1, 0, 4)
    with pytest.raises(UnreadableImageError, match="no image of a batch of 1"):
        collate_detection([broken])


def test_the_cache_stays_within_its_bound(squares: DetectionSource) -> None:
    cache = ImageCache(60 * 100 * 3)
    first, second = (cache.read(image) for image in squares.images[:2])
    assert cache.read(squares.images[0]) is first
    assert cache.read(squares.images[1]) is not second
    assert len(cache.images) == 1


@pytest.mark.parametrize(("values", "message"), [
    ({"kind": "zip"}, r"data\.kind is 'zip'"), ({"normalization": "none"}, r"data\.normalization is 'none'"),
    ({"resize": "crop"}, r"data\.resize is 'crop'"), ({"train_sizes": (16,)}, "at least 32"),
    ({"limit": 0}, "limit is 0"),
])  # fmt: skip
def test_impossible_options_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DetectionDataOptions(**{"kind": "voc", "root": ".", **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(("values", "message"), [
    ({"expand": 0.5}, "expand is 0.5"), ({"min_crop": 0.0}, "min_crop is 0.0"),
    ({"crop_overlaps": (1.0,)}, "crop_overlaps"),
])  # fmt: skip
def test_impossible_augmentations_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionAugmentation(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("annotated", "turned"), [((60, 90), True), ((90, 60), False), (None, True)])
def test_boxes_stay_on_their_objects_whichever_way_a_photograph_was_annotated(
    tmp_path: Path, annotated: tuple[int, int] | None, turned: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    stored = Image.new("RGB", (90, 60))
    stored.paste("white", (10, 20, 40, 50))
    stored.save(tmp_path / "a.png", exif=exif)
    upright = stored.transpose(Image.Transpose.ROTATE_270)
    boxes = np.array([upright.getbbox() if turned else stored.getbbox()], dtype=np.float32)
    truth = LabelledImage(
        tmp_path / "a.png", boxes, np.zeros(1, np.int64), np.zeros(1, np.bool_), np.ones(1, np.float32), annotated
    )
    sample = DetectionData(DetectionSource(("cat",), (truth,), 0), 180)[0]
    assert isinstance(sample, DetectionSample)
    left, top, right, bottom = sample.boxes[0].round().int().tolist()
    assert (sample.image[:, top + 2 : bottom - 2, left + 2 : right - 2] > 200).all()
    white = (sample.image[0] > 128).nonzero()
    assert abs(int(white[:, 1].min()) - left) <= 1 and abs(int(white[:, 0].max()) + 1 - bottom) <= 1


def test_loader_workers_keep_their_images_and_see_the_epoch(squares: DetectionSource) -> None:
    flips = dataclasses.replace(PLAIN, flip=True)
    two = DetectionSource(squares.class_names, squares.images[:2], 0)
    data, own = (DetectionData(two, 64, augmentation=flips, cache_mib=1) for _ in range(2))
    options = training_arguments(TrainingOptions(output="unused", steps=1, batch_size=1, loader_workers=1), False, data)
    assert options.dataloader_persistent_workers
    loader = DataLoader(data, None, num_workers=1, persistent_workers=options.dataloader_persistent_workers)
    shown = []
    for epoch in range(4):
        for part in (data, own):
            part.set_epoch(epoch)
        expected = [own[index].image for index in range(2)]
        shown.append([sample.image for sample in loader])
        assert all(torch.equal(a, b) for a, b in zip(shown[-1], expected, strict=True))
        for image in two.images:
            image.path.unlink(missing_ok=True)  # from now on only a cache has them
    assert not all(torch.equal(image, shown[0][0]) for image, _ in shown), "every epoch draws anew"

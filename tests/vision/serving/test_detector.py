"""Detectors as the server calls them: numpy beside the torch reference, answers in pixels of the original."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detector import encoded, halves, write_tiny_detector

from vision.data.view import View
from vision.detection.boxes import nms, soft_nms
from vision.detection.checkpoint import load_detector, save_detector
from vision.detection.detector import DetectorConfig, build_detector, detect_images
from vision.detection.rpn import ProposalBudget
from vision.detection.thundernet import ThunderNetConfig
from vision.images import ImageError, ImageLimits, Picture, decode_image
from vision.serving.batch import answer_pictures
from vision.serving.folder import ModelError, name_of
from vision.serving.kinds.detector import (
    KIND,
    Candidates,
    DetectionOptions,
    DetectorCard,
    greedy_nms,
    joined_parts,
    suppress,
)
from vision.serving.load import load_model
from vision.serving.protocol import Model, ModelInfo

needs_onnx = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnx") is None, reason="not installed (extra vision): onnxruntime"
)


@pytest.mark.parametrize("count", [0, 1, 7, 150])
@pytest.mark.parametrize("seed", [0, 1])
def test_suppression_in_numpy_is_the_reference(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + torch.rand(count, 2, generator=generator) * 20], dim=1)
    boxes = torch.cat([boxes, boxes[: count // 3]])  # twins, which overlap wholly
    scores = torch.rand(len(boxes), generator=generator)
    class_ids = torch.randint(0, 3, (len(boxes),), generator=generator)
    arrays = boxes.numpy(), scores.numpy(), class_ids.numpy()
    expected, expected_scores = soft_nms(boxes, scores, 0.5, class_ids, max_kept=40)
    kept, kept_scores = greedy_nms(*arrays, 0.5, 40, soft=True)
    assert kept.tolist() == expected.tolist()
    np.testing.assert_allclose(kept_scores, expected_scores.numpy(), rtol=1e-5)
    kept, _ = greedy_nms(*arrays, 0.45, 40, soft=False)
    assert kept.tolist() == nms(boxes, scores, 0.45, class_ids, 40).tolist()


def tiny_thundernet(folder: Path) -> DetectorConfig:
    torch.manual_seed(0)
    head = ThunderNetConfig(test_budget=ProposalBudget(100, 20), score_threshold=0.01)
    config = DetectorConfig("thundernet", "snet49", ("a", "b"), image_size=64, licence="MIT", head=head)
    save_detector(build_detector(config), config, folder)
    return config


def test_a_checkpoint_runs_in_torch_and_answers_like_it(tmp_path: Path) -> None:
    tiny_thundernet(tmp_path / "mine")
    model = load_model(tmp_path / "mine")
    assert (model.info.name, model.info.kind, model.info.runtime, model.info.licence) == (
        "mine",
        "detector",
        "torch",
        "MIT",
    )
    image = halves("red", "blue", (100, 70))
    picture = decode_image(encoded(image))
    (answer,) = answer_pictures(model, [picture], {"score_threshold": 0.02})
    (expected,) = detect_images(load_detector(tmp_path / "mine"), [image])
    wanted = expected.scores >= 0.02
    assert len(answer["detections"]) == int(wanted.sum()) > 0
    boxes = torch.tensor([entry["box"] for entry in answer["detections"]])
    torch.testing.assert_close(boxes, expected.boxes[wanted], atol=2e-3, rtol=0)
    assert [entry["class_id"] for entry in answer["detections"]] == expected.class_ids[wanted].tolist()


class Fixed:
    """One box that leaves the image, one that does not."""

    runtime = "fixed"

    def run(self, rows):
        boxes = np.array([[0, 0, 16, 32], [-5, 8, 40, 24]], dtype=np.float32)
        scores = np.array([[0.0, 0.9], [0.6, 0.0]], dtype=np.float32)
        return [np.stack([part] * len(rows)) for part in (boxes, scores)]


def card(**changes) -> DetectorCard:
    values = {
        "class_names": ("a", "b"), "licence": "MIT", "image_size": 32, "description": "", "digest": "",
        "resize": "stretch", "soft": True, "nms_threshold": 0.5, "score_threshold": 0.05,
    }  # fmt: skip
    return DetectorCard(**(values | changes))


def test_boxes_are_scaled_and_clipped_to_the_original_however_it_was_resized() -> None:
    def boxes(resize):
        info = ModelInfo("fixed", "detector", ("a", "b"), "MIT", 32, "fixed")
        model = Model(KIND, info, card(resize=resize), Fixed())
        (answer,) = answer_pictures(model, [decode_image(encoded(halves(size=(64, 32))))], {})
        return [entry["box"] for entry in answer["detections"]]

    assert boxes("stretch") == [[0, 0, 32, 32], [0, 8, 64, 24]]
    assert boxes("letterbox") == [[0, 0, 32, 32], [0, 0, 64, 32]]


def test_more_than_a_hundred_detections_are_given_where_they_are_asked_for() -> None:
    corners = np.stack([np.arange(300) * 10.0, np.zeros(300)], axis=1).astype(np.float32)
    boxes = np.concatenate([corners, corners + 5], axis=1)
    found = Candidates(boxes, np.linspace(0.9, 0.6, 300, dtype=np.float32), np.zeros(300, dtype=np.int64))
    for wanted, given in ((100, 100), (250, 250), (1000, 300)):
        kept, _, _ = suppress(found, card(), DetectionOptions(max_detections=wanted))
        assert len(kept) == given


def test_a_box_falls_to_one_of_another_class_only_where_that_is_asked_for() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10]], dtype=np.float32)
    found = Candidates(boxes, np.array([0.9, 0.8, 0.7], dtype=np.float32), np.array([0, 1, 1]))
    for agnostic, given in ((False, [0, 1, 1]), (True, [0, 1])):
        _, _, class_ids = suppress(found, card(soft=False), DetectionOptions(class_agnostic=agnostic))
        assert class_ids.tolist() == given


class Blobs:
    """A network that finds what is white on black, as one box of the first class, where it is not too small for it."""

    runtime = "blobs"

    def run(self, rows):
        boxes, scores = np.zeros((len(rows), 1, 4), np.float32), np.zeros((len(rows), 1, 2), np.float32)
        for index, row in enumerate(rows):
            y, x = np.nonzero(row[0] > 128)
            if len(x) > 20:
                boxes[index, 0], scores[index, 0, 0] = [x.min(), y.min(), x.max() + 1, y.max() + 1], 0.9
        return [boxes, scores]


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_tiles_find_what_is_small_and_count_nothing_twice(resize: str) -> None:
    pixels = np.zeros((400, 640, 3), np.uint8)
    small = [[10, 10, 22, 22], [150, 200, 162, 212], [600, 380, 612, 392]]  # 12 pixels: under one of 32 by 32 input
    for x1, y1, x2, y2 in small:
        pixels[y1:y2, x1:x2] = 255
    model = Model(KIND, ModelInfo("blobs", "detector", ("a", "b"), "MIT", 32, "blobs"), card(resize=resize), Blobs())
    picture = decode_image(encoded(Image.fromarray(pixels)))

    def boxes(**options):
        (answer,) = answer_pictures(model, [picture], options)
        return sorted([round(value) for value in entry["box"]] for entry in answer["detections"])

    assert boxes() == []
    found = np.array(boxes(tile=80))
    assert found.shape == (3, 4)
    assert np.abs(found - np.array(sorted(small))).max() <= 4, "a pixel of a tile's view is 2.5 of the image"
    assert boxes(tile=640) == boxes(), "a tile as large as the image is the image"


def test_what_a_tile_cuts_falls_to_what_is_whole() -> None:
    whole, tile = View(0, 0, 100, 100), View(0, 0, 64, 64)
    boxes = np.array([[30, 10, 64, 40]], np.float32)  # to the tile's right border
    size = 32
    one = lambda box, score: Candidates(box, np.array([score], np.float32), np.array([0]))  # noqa: E731
    seen = [
        one(whole.boxes_in(np.array([[30, 10, 90, 40]], np.float32), size), 0.6),
        one(tile.boxes_in(boxes, size), 0.9),
    ]
    joined = joined_parts(seen, [whole, tile], (100, 100), card())
    assert joined.scores.tolist() == pytest.approx([0.6]), "the better part of a thing is still a part"
    nothing = Candidates(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    alone = joined_parts([nothing, seen[1]], [whole, tile], (100, 100), card())
    assert alone.scores.tolist() == pytest.approx([0.9]), "nobody saw the whole of it"


def test_too_many_tiles_are_refused_by_the_picture() -> None:
    model = Model(KIND, ModelInfo("blobs", "detector", ("a", "b"), "MIT", 32, "blobs"), card(), Blobs())
    picture = Picture(Image.new("RGB", (4000, 3000)), 4000, 3000)
    with pytest.raises(ImageError, match="take larger tiles"):
        answer_pictures(model, [picture], {"tile": 64})


@needs_onnx
def test_an_export_from_other_weights_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_thundernet(tmp_path / "mine")
    config = (tmp_path / "mine" / "config.json").read_text()
    write_tiny_detector(tmp_path / "mine")
    (tmp_path / "mine" / "config.json").write_text(config)
    assert load_model(tmp_path / "mine").info.runtime == "torch"
    assert "export" in caplog.text
    (tmp_path / "mine" / "model.safetensors").unlink()
    assert load_model(tmp_path / "mine").info.runtime == "onnxruntime"
    assert load_model(tmp_path / "mine" / "model.onnx").info.class_names == ("red", "blue")


@pytest.mark.parametrize(("path", "name"), [
    ("cats", "cats"), ("runs/cats/model", "cats"), ("runs/cats/model/model.onnx", "cats"), ("cats.onnx", "cats"),
    ("/model", "model"), ("/model/model.onnx", "model"), ("runs/study/wide/seed_3/model", "wide"),
])  # fmt: skip
def test_a_model_is_called_after_its_run(path: str, name: str) -> None:
    assert name_of(Path(path)) == name


@needs_onnx
def test_onnx_runtime_computes_with_the_threads_it_is_given(tmp_path: Path) -> None:
    folder = write_tiny_detector(tmp_path / "mine")
    for num_threads in (1, 2):
        model = load_model(folder, num_threads)
        assert model.network.session.get_session_options().intra_op_num_threads == num_threads  # type: ignore[attr-defined]


@needs_onnx
def test_what_is_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no vision model"):
        load_model(tmp_path)
    (tmp_path / "a.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="no ONNX model"):
        load_model(tmp_path / "a.onnx")
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(ModelError, match=r"its format is 'other'; known are .*dovetail-detector"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "dovetail-detector", "version": 2}')
    with pytest.raises(ModelError, match="has version 2 of dovetail-detector; this release reads 1"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_size": 10**9}, "image_size is 1000000000; it must be a whole number from 1 to 4096"),
        ({"image_size": 64.5}, "image_size is 64.5"),
        ({"normalization": None}, "does not describe a detector"),
        ({"head": []}, "does not describe a detector"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused_by_its_file(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    tiny_thundernet(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=said):
        load_model(tmp_path)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ModelError, match="score_treshold"):
        DetectionOptions.from_json({"score_treshold": 0.5}, "detector")


def test_a_large_jpeg_may_be_decoded_smaller_but_keeps_its_size() -> None:
    data = encoded(halves(size=(1600, 1200)), "JPEG")
    picture = decode_image(data, enough=100)
    assert (picture.width, picture.height) == (1600, 1200)
    assert (picture.image.width, picture.image.height) == (400, 300)
    assert decode_image(data).image.size == (1600, 1200)


def test_the_header_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    data = encoded(halves(size=(100, 50)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="100x50") as error:
        decode_image(data, ImageLimits(max_pixels=4999))
    assert error.value.code == "image_too_large"
    with pytest.raises(ImageError, match="100x50"):
        decode_image(data, ImageLimits(max_side=99))

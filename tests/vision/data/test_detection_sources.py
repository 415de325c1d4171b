"""VOC, COCO and YOLO folders, whole and broken."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision.data.detection import DetectionDataOptions
from vision.data.detection_sources import open_detection
from vision.data.sources import DataError, read_image


def voc_object(name: str, box: tuple[int, int, int, int], difficult: int = 0) -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


def write_voc(
    root: Path, objects: dict[str, list[str]], folders: tuple[str, str] = ("Annotations", "JPEGImages")
) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for stem, found in objects.items():
        Image.new("RGB", (60, 40)).save(root / folders[1] / f"{stem}.jpg")
        size = "<size><width>60</width><height>40</height></size>"
        (root / folders[0] / f"{stem}.xml").write_text(f"<annotation>{size}{''.join(found)}</annotation>")


def write_list(root: Path, split: str, stems: list[str]) -> None:
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(f"{stem} 1" for stem in stems) + "\n")


def test_voc_counts_from_one_and_includes_the_last_pixel(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": [voc_object("cat", (1, 1, 60, 40)), voc_object("dog", (11, 6, 20, 8), difficult=1)]})
    write_list(tmp_path, "train", ["a"])
    source = open_detection("voc", tmp_path, "train")
    (image,) = source.images
    assert source.class_names == ("cat", "dog")
    assert image.boxes.tolist() == [[0, 0, 60, 40], [10, 5, 20, 8]]
    assert image.labels.tolist() == [0, 1]
    assert image.ignored.tolist() == [False, True]
    assert image.areas.tolist() == [2400, 30]


def test_degenerate_boxes_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flat, swapped, outside = (5, 5, 5, 5), (20, 10, 10, 20), (61, 10, 80, 20)
    write_voc(tmp_path, {"a": [voc_object("cat", box) for box in (flat, swapped, outside)], "b": []})
    write_list(tmp_path, "train", ["a", "b"])
    source = open_detection("voc", tmp_path, "train", ("cat",))
    assert source.degenerate == 3
    assert [image.boxes.shape for image in source.images] == [(0, 4), (0, 4)]
    assert "dropped 3 boxes" in caplog.text


def test_voc_splits_of_several_folders_are_joined(tmp_path: Path) -> None:
    for year, stems in (("VOC2007", ["a", "b"]), ("VOC2012", ["c"])):
        write_voc(tmp_path / year, {stem: [voc_object("cat", (1, 1, 9, 9))] for stem in stems})
        write_list(tmp_path / year, "trainval", stems)
    source = open_detection("voc", tmp_path, "VOC2007/trainval+VOC2012/trainval")
    assert [image.path.stem for image in source.images] == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"test\.txt does not exist; splits of .*VOC2007 are trainval"):
        open_detection("voc", tmp_path, "VOC2007/test")


def test_own_images_without_lists_are_split_once_and_for_all(tmp_path: Path) -> None:
    write_voc(tmp_path, {f"{n:02}": [voc_object("cat", (1, 1, 9, 9))] for n in range(20)}, ("annotations", "images"))
    train, val = (
        {image.path.stem for image in open_detection("voc", tmp_path, split).images} for split in ("train", "val")
    )
    assert len(val) == 4 and len(train) == 16 and not train & val
    assert val == {image.path.stem for image in open_detection("voc", tmp_path, "val").images}
    assert len(open_detection("voc", tmp_path, "all").images) == 20
    with pytest.raises(DataError, match="its splits are train, val and all, not 'test'"):
        open_detection("voc", tmp_path, "test")


def test_unknown_classes_are_refused_by_name(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": [voc_object("cat", (1, 1, 9, 9)), voc_object("cow", (1, 1, 9, 9))]})
    write_list(tmp_path, "val", ["a"])
    with pytest.raises(DataError, match=r"a\.jpg names the class 'cow'; known are cat, dog"):
        open_detection("voc", tmp_path, "val", ("cat", "dog"))


@pytest.mark.parametrize("content", [
    "<annotation><object>", "<annotation><object><name>cat</name></object></annotation>",
    "<annotation><object><name>cat</name><bndbox><xmin>a</xmin></bndbox></object></annotation>",
])  # fmt: skip
def test_broken_voc_annotations_are_named(tmp_path: Path, content: str) -> None:
    write_voc(tmp_path, {"a": []})
    write_list(tmp_path, "train", ["a"])
    (tmp_path / "Annotations" / "a.xml").write_text(content)
    with pytest.raises(DataError, match=r"a\.xml is not a VOC annotation"):
        open_detection("voc", tmp_path, "train")


NOTE = {"image_id": 7, "category_id": 3, "bbox": [0, 0, 9, 9]}


def coco_content() -> dict[str, object]:
    return {
        "images": [{"id": 7, "file_name": "x.jpg", "width": 60, "height": 40},
                   {"id": 9, "file_name": "y.jpg", "width": 8, "height": 8}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"image_id": 7, "category_id": 18, "bbox": [10.5, 4, 20, 10], "iscrowd": 0, "area": 120.5},
            {"image_id": 7, "category_id": 3, "bbox": [0, 0, 60, 40], "iscrowd": 1},
            {"image_id": 7, "category_id": 3, "bbox": [5, 5, 0.5, 9], "iscrowd": 0},
        ],
    }  # fmt: skip


def test_coco_boxes_crowds_and_gaps_between_ids(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "instances_val.json").write_text(json.dumps(coco_content()))
    source = open_detection("coco", tmp_path, "val")
    first, second = source.images
    assert source.class_names == ("car", "dog")
    assert first.boxes.tolist() == [[10.5, 4, 30.5, 14], [0, 0, 60, 40]]
    assert (first.labels.tolist(), first.ignored.tolist()) == ([1, 0], [False, True])
    assert first.areas.tolist() == [120.5, 2400]
    assert (source.degenerate, len(second.labels), second.path.name) == (1, 0, "y.jpg")


def test_broken_coco_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"neither .*instances_val\.json"):
        open_detection("coco", tmp_path, "val")
    for content in ("{", "{}", json.dumps({**coco_content(), "categories": []})):
        (tmp_path / "instances_val.json").write_text(content)
        with pytest.raises(DataError, match="is not a COCO annotation file"):
            open_detection("coco", tmp_path, "val")


def write_yolo(root: Path, lines: str) -> None:
    for folder in ("images/train", "labels/train"):
        (root / folder).mkdir(parents=True)
    (root / "data.yaml").write_text("names: {0: cat, 1: dog}\n")
    for name in ("a", "b"):
        Image.new("RGB", (60, 40)).save(root / "images/train" / f"{name}.png")
    (root / "labels/train/a.txt").write_text(lines)


def test_yolo_boxes_are_shares_of_the_image(tmp_path: Path) -> None:
    write_yolo(tmp_path, "1 0.5 0.5 0.5 0.25\n\n0 0 0 0.5 1\n")
    (tmp_path / "images/train/c.jpg").write_bytes(b"broken")
    source = open_detection("yolo", tmp_path, "train")
    first, second = source.images
    np.testing.assert_allclose(first.boxes, [[15, 15, 45, 25], [0, 0, 15, 20]])
    assert first.labels.tolist() == [1, 0]
    assert len(second.boxes) == 0


def test_yolo_shares_are_of_the_upright_image(tmp_path: Path) -> None:
    for name in ("images/train", "labels/train"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data.yaml").write_text("names: [cat]")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "images/train/a.jpg", exif=exif)
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.25 1.0 0.5")
    (image,) = open_detection("yolo", tmp_path, "train").images
    assert image.size == (20, 40)
    assert image.boxes.tolist() == [[0, 0, 20, 20]]


@pytest.mark.parametrize(("lines", "message"), [
    ("0 0.5 0.5 0.5\n", r"a\.txt, line 1: expected a class id and four numbers"),
    ("0 0.5 0.5 0.5 0.5\n0 0.1 0.1 0.2 0.1 0.2 0.2 0.9\n", r"a\.txt, line 2: expected"),
    ("2 0.5 0.5 0.5 0.5\n", r"line 1: class 2 is beyond the 2 names.*ids are 0, 1"),
    ("1.7 0.5 0.5 0.5 0.5\n", r"line 1: the class id 1.7 is not a whole number"),
    ("nan 0.5 0.5 0.5 0.5\n", r"line 1: the class id nan is not a whole number"),
    ("0 30 20 10 10\n", r"line 1: coordinates must be shares .* from 0 to 1"),
    ("0 0.5 nan 0.5 0.5\n", r"line 1: coordinates must be shares"),
])  # fmt: skip
def test_broken_yolo_labels_are_named(tmp_path: Path, lines: str, message: str) -> None:
    write_yolo(tmp_path, lines)
    with pytest.raises(DataError, match=message):
        open_detection("yolo", tmp_path, "train")


@pytest.mark.parametrize(("names", "line", "expected"), [
    ("names: {1: person, 2: car}", "1", "person"), ("names: {0: a, 3: b}", "3", "b"),
    ("names: {" + ", ".join(f"'{n}': c{n}" for n in range(12)) + "}", "10", "c10"),
    ("names: [yes, no]\nnc: 2", "1", "no"), ("names: [a, b]", "1.0", "b"),
])  # fmt: skip
def test_yolo_classes_go_by_their_ids(tmp_path: Path, names: str, line: str, expected: str) -> None:
    write_yolo(tmp_path, f"{line} 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(names)
    source = open_detection("yolo", tmp_path, "train")
    assert [source.class_names[label] for label in source.images[0].labels] == [expected]


@pytest.mark.parametrize(("names", "message"), [
    ("names: cat", "'cat' is one text"), ("names: {0: a, '0': b}", "gives one class id two names"),
    ("names: {first: a}", "class id 'first'"), ("names: {-1: a}", "class id '-1'"), ("names: {1.5: a}", "'1.5'"),
    ("names: [a, a]", "'a' more than once"), ("names: [a, b]\nnc: 3", "nc: 3 and names 2"), ("[", "is not YAML"),
    ("names: [a, b]\nkpt_shape: [2, 2]", "describes poses"), ("train: x", "no list of class names"),
    ("names: [[a], b]", "every name must be one text"), ("names: {0: {a: b}}", "every name must be one text"),
    ("names: {[0]: a}", "class id"),
])  # fmt: skip
def test_yolo_names_that_contradict_themselves_are_refused(tmp_path: Path, names: str, message: str) -> None:
    write_yolo(tmp_path, "1 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(names)
    with pytest.raises(DataError, match=message):
        open_detection("yolo", tmp_path, "train")


def test_yolo_polygons_become_the_boxes_around_them(tmp_path: Path) -> None:
    write_yolo(tmp_path, "1 0.1 0.2 0.5 0.1 0.3 0.5\n")
    np.testing.assert_allclose(open_detection("yolo", tmp_path, "train").images[0].boxes, [[6, 4, 30, 20]], rtol=1e-6)


def test_yolo_images_that_would_share_labels_are_refused(tmp_path: Path) -> None:
    write_yolo(tmp_path, "1 0.5 0.5 0.5 0.5\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "images/train/a.JPG", "JPEG")
    with pytest.raises(DataError, match="would share the labels of a"):
        open_detection("yolo", tmp_path, "train")


def test_yolo_label_files_in_capitals_and_names_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "train/a.jpg")
    (tmp_path / "train/._a.jpg").write_bytes(b"what macOS puts into archives")
    (tmp_path / "train/a.TXT").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "train/classes.txt").write_text("cat\ndog\n\n")
    (image,) = open_detection("yolo", tmp_path, "train").images
    assert (image.path.name, len(image.boxes)) == ("a.jpg", 1)
    (tmp_path / "train/a.txt").write_text("1 0.5 0.5 0.5 0.5")
    with pytest.raises(DataError, match=r"a\.TXT and a\.txt are labels of the same image"):
        open_detection("yolo", tmp_path, "train")
    for content, message in ((b"cat\n\ndog\n", "line 2 is empty"), (b"\xff\xfec", "is not UTF-8")):
        (tmp_path / "train/classes.txt").write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_detection("yolo", tmp_path, "train")


def test_yolo_layouts_of_roboflow_and_labelimg(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for place in ("valid/images", "valid/labels", "flat"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "data.yaml").write_text("names: [cat]")
    for image, text in (("valid/images/a b.JPG", "valid/labels/a b.txt"), ("flat/c.png", "flat/c.txt")):
        Image.new("RGB", (60, 40)).save(tmp_path / image)
        (tmp_path / text).write_text("\ufeff0 0.5 0.5 0.5 0.5", encoding="utf-8")
    (tmp_path / "valid/labels/gone.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "flat/classes.txt").write_text("dog\n")
    (found,) = open_detection("yolo", tmp_path, "val").images
    assert (found.path.name, len(found.boxes)) == ("a b.JPG", 1)
    assert "1 label files" in caplog.text and "gone.txt" in caplog.text
    source = open_detection("yolo", tmp_path / "flat", "all")
    assert (source.class_names, len(source.images[0].boxes)) == (("dog",), 1)


def voc_file(root: Path, stem: str, named: str, size: str = "") -> None:
    found = voc_object("cat", (1, 1, 30, 20))
    (root / "annotations" / f"{stem}.xml").write_text(
        f"<annotation><filename>{named}</filename>{size}{found}</annotation>"
    )


@pytest.fixture
def own(tmp_path: Path) -> Path:
    for folder in ("annotations", "images"):
        (tmp_path / folder).mkdir()
    return tmp_path


@pytest.mark.parametrize("suffix", ["jpg", "PNG", "jpeg", "bmp"])
def test_a_stale_filename_does_not_move_boxes(own: Path, suffix: str) -> None:
    Image.new("RGB", (60, 40)).save(own / "images" / f"a.{suffix}")
    Image.new("RGB", (60, 40)).save(own / "images" / "b.jpg")
    voc_file(own, "a", "b.jpg")
    (image,) = open_detection("voc", own, "all").images
    assert (image.path.name, image.size) == (f"a.{suffix}", (60, 40))


def test_an_image_goes_with_one_annotation_alone(own: Path) -> None:
    Image.new("RGB", (60, 40)).save(own / "images" / "b.jpg")
    voc_file(own, "a", r"C:\pictures\b.jpg")
    assert open_detection("voc", own, "all").images[0].path.name == "b.jpg", "no other annotation claims it"
    voc_file(own, "b", "b.jpg")
    names = [image.path.name for image in open_detection("voc", own, "all").images]
    assert names == ["a.jpg", "b.jpg"], "a.jpg is missing, and b.jpg is not taken for it"
    voc_file(own, "c", "x.jpg")
    for suffix in ("jpg", "png"):
        Image.new("RGB", (60, 40)).save(own / "images" / f"c.{suffix}")
    with pytest.raises(DataError, match=r"could belong to c\.jpg or c\.png"):
        open_detection("voc", own, "all")


def test_boxes_drawn_on_another_size_are_left_out(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    for stem, (width, height) in (("a", (40, 60)), ("b", (60, 40)), ("c", (600, 400))):
        Image.new("RGB", (60, 40)).save(own / "images" / f"{stem}.jpg")
        voc_file(own, stem, "", f"<size><width>{width}</width><height>{height}</height></size>")
    source = open_detection("voc", own, "all")
    assert [image.path.stem for image in source.images] == ["b"]
    assert "has 60x40 pixels, its annotation was drawn on 40x60" in caplog.text
    assert "2 pictures" in caplog.text
    coco = {"images": [{"id": 1, "file_name": "a.jpg", "width": 120, "height": 80}],
            "categories": [{"id": 1, "name": "cat"}], "annotations": []}  # fmt: skip
    (own / "instances_train.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match="1 were left out for another size"):
        open_detection("coco", own, "train")


def test_boxes_beyond_the_picture_are_named(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (60, 40)).save(own / "images" / "a.jpg")
    boxes = voc_object("cat", (11, 11, 90, 60)) + voc_object("cat", (100, 10, 200, 20))
    (own / "annotations" / "a.xml").write_text(f"<annotation>{boxes}</annotation>")
    source = open_detection("voc", own, "all")
    assert (source.images[0].boxes.tolist(), source.degenerate) == ([[10, 10, 60, 40]], 1)
    assert caplog.text.count("beyond the picture of 60x40 pixels") == 2


def test_voc_layouts_of_labelimg_and_roboflow(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "valid"):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (60, 40)).save(folder / "my cat.PNG")
        (folder / "my cat.xml").write_text(f"<annotation>{voc_object('cat', (1, 1, 30, 20))}</annotation>")
    for split, expected in (("all", tmp_path), ("val", tmp_path / "valid")):
        (image,) = open_detection("voc", tmp_path, split).images
        assert image.path == expected / "my cat.PNG"


def test_stems_with_spaces_stand_in_lists(tmp_path: Path) -> None:
    write_voc(tmp_path, {"my cat 1": [voc_object("cat", (1, 1, 9, 9))], "b": []})
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("my cat 1\nb  -1\nb.jpg\n")
    images = open_detection("voc", tmp_path, "train").images
    assert [image.path.stem for image in images] == ["my cat 1", "b", "b"]


@pytest.mark.parametrize(("change", "message"), [
    ({"images": [{"id": 7, "file_name": "x.jpg"}, {"id": 7, "file_name": "y.jpg"}]}, "'x.jpg' and to 'y.jpg'"),
    ({"images": [{"id": 7, "file_name": "x.jpg"}, {"id": 9, "file_name": "x.jpg"}]}, "stands under several ids"),
    ({"categories": [{"id": 3, "name": "car"}, {"id": 3, "name": "dog"}]}, "category id 3 belongs to 'car' and to 'do"),
    ({"categories": [{"id": 3, "name": "car"}, {"id": 18, "name": "car"}]}, "'car' more than once"),
    ({"annotations": [{"image_id": 7, "category_id": 4, "bbox": [0, 0, 9, 9]}]}, "category_id 4; categories are 18, 3"),
    ({"annotations": [{"image_id": 7, "category_id": 3}]}, "annotation 1 has neither a bbox nor polygons"),
    ({"annotations": [NOTE | {"iscrowd": "no"}]}, "annotation 1 has the iscrowd 'no', which is no number"),
    ({"annotations": [NOTE | {"area": "large"}]}, "annotation 1 has the area 'large', which is no number"),
    ({"images": [{"id": 7, "file_name": None}]}, "image with the id 7 has the file_name None"),
    ({"categories": [{"id": 3, "name": "car"}, {"id": "18", "name": "dog"}]}, "ids 3, '18' are of several types"),
])  # fmt: skip
def test_coco_files_that_contradict_themselves_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "instances_val.json").write_text(json.dumps({**coco_content(), **change}))
    with pytest.raises(DataError, match=message):
        open_detection("coco", tmp_path, "val")


def test_coco_numbers_written_as_texts_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    notes = [NOTE | {"iscrowd": "0", "area": "81"}, NOTE | {"iscrowd": "1"}]
    (tmp_path / "instances_val.json").write_text(json.dumps({**coco_content(), "annotations": notes}))
    image = open_detection("coco", tmp_path, "val").images[0]
    assert (image.ignored.tolist(), image.areas.tolist()) == ([False, True], [81, 81])
    (tmp_path / "instances_val.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"instances_val\.json is not a COCO annotation file"):
        open_detection("coco", tmp_path, "val")


def test_roboflow_coco_polygons_and_strays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "valid").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "valid/x.jpg")
    annotations = [{"image_id": 7, "category_id": 3, "segmentation": [[10, 5, 20, 5, 15, 25]]},
                   {"image_id": 8, "category_id": 3, "bbox": [0, 0, 9, 9]}]  # fmt: skip
    (tmp_path / "valid/_annotations.coco.json").write_text(json.dumps({**coco_content(), "annotations": annotations}))
    first, _ = open_detection("coco", tmp_path, "val").images
    assert (first.path, first.boxes.tolist()) == (tmp_path / "valid/x.jpg", [[10, 5, 20, 25]])
    assert "1 annotations are of images that it does not list" in caplog.text


def test_a_missing_image_names_what_lies_there_instead(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.PNG")
    with pytest.raises(DataError, match=r"a\.jpg does not exist; a\.PNG lies there"):
        read_image(tmp_path / "a.jpg")


def test_a_split_without_boxes_is_refused(own: Path) -> None:
    Image.new("RGB", (60, 40)).save(own / "images" / "a.jpg")
    (own / "annotations" / "a.xml").write_text(f"<annotation>{voc_object('cat', (9, 9, 9, 9))}</annotation>")
    options = DetectionDataOptions("voc", str(own), "all", "all")
    for opened in (options.open_train, lambda: options.open_eval(("cat",))):
        with pytest.raises(DataError, match=r"no box is left on 1 images .* 1 were dropped as degenerate"):
            opened()


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'tfrecord' is not known; allowed are voc, coco, yolo"):
        open_detection("tfrecord", tmp_path, "train")
    with pytest.raises(DataError, match="is not a folder"):
        open_detection("voc", tmp_path / "none", "train")
    with pytest.raises(DataError, match="none of the folders Annotations, annotations"):
        open_detection("voc", tmp_path, "train")


def test_blood_cells(larger_data: Path, tmp_path: Path) -> None:
    archive = larger_data / "detection" / "bccd_voc.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, [member for member in tar if "JPEGImages/" not in member.name], filter="data")
        (tmp_path / "bccd/BCCD/JPEGImages").mkdir(exist_ok=True)
    splits = [open_detection("voc", tmp_path / "bccd/BCCD", split) for split in ("trainval", "test")]
    assert [len(split.images) for split in splits] == [292, 72]
    assert sum(split.degenerate for split in splits) == 2
    assert sum(len(image.boxes) for split in splits for image in split.images) == 4886
    assert splits[0].class_names == ("Platelets", "RBC", "WBC")


def test_a_subset_of_the_classes_has_ids_of_its_own_and_leaves_the_rest_out(tmp_path: Path) -> None:
    boxes = {name: voc_object(name, (5, 5, 20, 20)) for name in ("ape", "bee", "cow")}
    write_voc(tmp_path, {"one": [boxes["cow"], boxes["bee"]], "two": [boxes["ape"]], "three": [boxes["cow"]]})
    options = DetectionDataOptions("voc", str(tmp_path), train_split="all", only_classes=("cow", "ape"))
    source = options.open_train()
    assert source.class_names == ("cow", "ape")
    found = {image.path.stem: image.labels.tolist() for image in source.images}
    assert found == {"one": [0], "two": [1], "three": [0]}
    for wrong in ("dog", "Cow"):
        with pytest.raises(DataError, match=f"'{wrong}' are not among the data's; known are"):
            DetectionDataOptions("voc", str(tmp_path), train_split="all", only_classes=(wrong,)).open_train()

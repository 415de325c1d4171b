"""Segmenters from a saved folder: a mask of the original's size, and areas that are the mask's."""

import base64
import io
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detector import encoded, halves
from torch.nn import functional

from vision.data.classification import to_tensor
from vision.images import decode_image
from vision.segmentation.pspnet import Segmenter, SegmenterConfig, load_segmenter, save_segmenter
from vision.serving.batch import answer_pictures
from vision.serving.export import NEEDED, export_model
from vision.serving.kinds.segmenter import likeliest
from vision.serving.load import load_model

MISSING = [name for name in NEEDED if find_spec(name) is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("segmenter") / "streets" / "model"
    config = SegmenterConfig("fd_mobilenet_x0_25", ("ground", "sky", "tree"), 16, image_size=64)
    model = Segmenter(config)
    with torch.no_grad():
        model.train()(torch.randint(256, (4, 3, 64, 64)))
        model.classify.weight.mul_(20)
    save_segmenter(model, path)
    return path


def test_a_trained_folder_answers_with_a_mask_and_areas(folder: Path) -> None:
    model = load_model(folder)
    assert (model.info.name, model.info.kind, model.info.image_size) == ("streets", "segmenter", 64)
    picture = decode_image(encoded(halves("red", "blue", (100, 60))))
    answer, bare = (answer_pictures(model, [picture], {"mask": mask})[0] for mask in (True, False))
    for told in (answer, bare):
        jsonschema.validate(told, model.kind.schema)
    mask = Image.open(io.BytesIO(base64.b64decode(answer["mask"].partition(",")[2])))
    ids = np.asarray(mask)
    assert (mask.mode, ids.shape) == ("P", (60, 100))
    for entry in answer["classes"]:
        assert entry["pixels"] == (ids == entry["class_id"]).sum() > 0
        assert entry["class_name"] == ("ground", "sky", "tree")[entry["class_id"]]
    assert sum(entry["pixels"] for entry in answer["classes"]) == ids.size
    assert bare == {"classes": answer["classes"]}
    with torch.no_grad():
        small = picture.image.resize((64, 64), Image.Resampling.BILINEAR)
        logits = load_segmenter(folder)(to_tensor(small)[None])
        expected = functional.interpolate(logits, (64, 64), mode="bilinear").argmax(dim=1)[0].numpy()
    assert (np.asarray(likeliest(logits[0].numpy(), (64, 64))) == expected).mean() > 0.99
    shown = Image.fromarray(expected.astype(np.uint8)).resize((100, 60), Image.Resampling.NEAREST)
    assert (np.asarray(shown) == ids).mean() > 0.99
    drawn = model.kind.draw(picture.image, answer)
    assert drawn.size == (100, 60) and drawn.tobytes() != picture.image.tobytes()


@pytest.mark.skipif(bool(MISSING), reason=f"not installed (extra vision): {', '.join(MISSING)}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_export_answers_like_torch_and_is_served(folder: Path, tmp_path: Path) -> None:
    report = export_model(folder, tmp_path / "streets.onnx")
    assert report["max_difference"] < 1e-3 and report["image_size"] == 64
    served = load_model(tmp_path / "streets.onnx")
    assert (served.info.runtime, served.info.class_names) == ("onnxruntime", ("ground", "sky", "tree"))

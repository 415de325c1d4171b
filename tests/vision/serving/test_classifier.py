"""Classifiers from a saved folder, and as an export that answers like torch."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tiny_detector import encoded, halves

from vision.backbones import create_backbone
from vision.backbones.checkpoint import load_backbone, save_backbone
from vision.backbones.preprocessing import BGR_255, Preprocessing
from vision.data.classification import to_tensor
from vision.data.view import centre_crop
from vision.images import decode_image
from vision.serving import export
from vision.serving.batch import answer_pictures
from vision.serving.export import NEEDED, ExportError, export_model
from vision.serving.load import load_model

MISSING = [name for name in NEEDED if find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed (extra vision): {', '.join(MISSING)}")
# Both come from inside onnxscript and torch's exporter.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def saved(tmp_path: Path, name: str = "menet_108_8x1_g3", class_names: tuple[str, ...] = ("a", "b", "c", "d")) -> Path:
    torch.manual_seed(0)
    model = create_backbone(name, 4)
    model.preprocessing = Preprocessing(48, 52, BGR_255)
    model.class_names = class_names
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 48, 48) * 255)
        torch.nn.init.normal_(model.head.weight, std=0.5)
    save_backbone(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("size", [(64, 48), (48, 200), (3000, 20)])
def test_a_trained_folder_answers_as_its_network_does(tmp_path: Path, size: tuple[int, int]) -> None:
    folder = saved(tmp_path / "cats", "fd_mobilenet_x0_25")
    model = load_model(folder)
    assert (model.info.name, model.info.kind, model.info.runtime) == ("cats", "classifier", "torch")
    picture = decode_image(encoded(halves(size=size)))
    (answer,) = answer_pictures(model, [picture], {"top_k": 3})
    network = load_backbone(folder)
    with torch.no_grad():
        image = to_tensor(centre_crop(picture.image, 52, 48))[None].float() / 255
        expected = network(network.normalization(image)).softmax(1)[0]
    best = expected.argsort(descending=True)[:3]
    found = answer["classifications"]
    jsonschema.validate(answer, model.kind.schema)
    assert [entry["class_id"] for entry in found] == best.tolist()
    assert [entry["class_name"] for entry in found] == ["abcd"[index] for index in best]
    np.testing.assert_allclose([entry["score"] for entry in found], expected[best], atol=1e-5)
    assert model.kind.draw(picture.image, answer).tobytes() != picture.image.tobytes()
    assert model.kind.rows(answer)[0] == {"class": found[0]["class_name"], "score": found[0]["score"]}


def test_folders_of_before_there_was_a_format_and_classes_without_names_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, "fd_mobilenet_x0_25", ())
    config = json.loads((folder / "config.json").read_text())
    del config["format"], config["version"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).info.class_names == ("0", "1", "2", "3")


@pytest.mark.slow
@needs_onnx
@quiet
@pytest.mark.parametrize("name", ["menet_108_8x1_g3", "snet49"])
def test_exported_file_answers_like_torch(tmp_path: Path, name: str) -> None:
    import onnx
    import onnxruntime

    folder = saved(tmp_path, name)
    report = export_model(folder, tmp_path / "out" / "model.onnx")
    assert (report["image_size"], report["max_difference"] < 1e-4) == (48, True)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["model.onnx"], "one file, weights inside"
    session = onnxruntime.InferenceSession(report["file"], providers=["CPUExecutionProvider"])
    images = torch.rand(5, 3, 48, 48)
    model = load_backbone(folder)
    with torch.no_grad():
        expected = model(model.normalization(images)).numpy()
    (answer,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(answer, expected, atol=1e-4 * np.abs(expected).max())
    metadata = {entry.key: entry.value for entry in onnx.load(report["file"]).metadata_props}
    assert json.loads(metadata["class_names"]) == ["a", "b", "c", "d"]
    assert metadata["backbone"] == name
    assert b'.py", line' not in Path(report["file"]).read_bytes(), "traces of the tracing are nobody's business"


@needs_onnx
@quiet
def test_a_wrong_export_is_refused_and_a_right_one_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "fd_mobilenet_x0_25")
    write = export.write

    def write_badly(traced: Any, *rest: Any) -> None:
        with torch.no_grad():
            traced.module.model.head.weight.mul_(1.01)
        write(traced, *rest)
        with torch.no_grad():
            traced.module.model.head.weight.div_(1.01)

    monkeypatch.setattr(export, "write", write_badly)
    with pytest.raises(ExportError, match="apart from torch"):
        export_model(folder)
    assert not (folder / "model.onnx").exists()
    monkeypatch.setattr(export, "write", write)
    export_model(folder)
    assert load_model(folder).info.runtime == "onnxruntime"


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ExportError, match=r"needs onnxruntime: pip install 'dovetail-server\[vision\]'"):
        export_model(saved(tmp_path), tmp_path / "model.onnx")

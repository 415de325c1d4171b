import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from vision import export
from vision.backbones import create_backbone
from vision.backbones.checkpoint import load_backbone, save_backbone
from vision.backbones.preprocessing import BGR_255, Preprocessing
from vision.export import NEEDED, ExportError, export_classifier

MISSING = [name for name in NEEDED if find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed (extra vision): {', '.join(MISSING)}")
# Both come from inside onnxscript and torch's exporter.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def saved(tmp_path: Path, name: str = "menet_108_8x1_g3") -> Path:
    torch.manual_seed(0)
    model = create_backbone(name, 4)
    model.preprocessing = Preprocessing(48, 52, BGR_255)
    model.class_names = ("a", "b", "c", "d")
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 48, 48) * 255)
    save_backbone(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@needs_onnx
@quiet
@pytest.mark.parametrize("name", ["menet_108_8x1_g3", "snet49"])
def test_exported_file_answers_like_torch(tmp_path: Path, name: str) -> None:
    import onnx
    import onnxruntime

    folder = saved(tmp_path, name)
    report = export_classifier(folder, tmp_path / "out" / "model.onnx")
    assert (report.image_size, report.max_difference < 1e-4) == (48, True)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["model.onnx"], "one file, weights inside"
    session = onnxruntime.InferenceSession(report.file, providers=["CPUExecutionProvider"])
    images = torch.rand(5, 3, 48, 48)
    model = load_backbone(folder)
    with torch.no_grad():
        expected = model(model.normalization(images)).numpy()
    (answer,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(answer, expected, atol=1e-4 * np.abs(expected).max())
    metadata = {entry.key: entry.value for entry in onnx.load(report.file).metadata_props}
    assert json.loads(metadata["class_names"]) == ["a", "b", "c", "d"]
    assert metadata["backbone"] == name
    assert b'.py", line' not in Path(report.file).read_bytes(), "traces of the tracing are nobody's business"


@pytest.mark.slow
@needs_onnx
@quiet
def test_a_wrong_export_is_refused_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "compare", lambda *_: float("nan"))
    with pytest.raises(ExportError, match="apart from torch"):
        export_classifier(saved(tmp_path), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ExportError, match=r"needs onnxruntime: pip install 'dovetail-server\[vision\]'"):
        export_classifier(saved(tmp_path), tmp_path / "model.onnx")
